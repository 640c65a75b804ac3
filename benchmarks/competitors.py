"""The three ways to train an epoch that epoch.py compares: see there."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from launcher.config.plan import make_plan
from launcher.config.recipe import Recipe
from launcher.data.images import Data, ImageSet
from launcher.training.loop import make_batches, train_epoch
from launcher.training.metrics import StepReport
from launcher.training.model import build_network
from launcher.training.state import TrainContext, make_context


class Pictures(CIFAR10):  # type: ignore[misc]  # torchvision has no types
    """torchvision's own `__getitem__` over images that are loaded already."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        """Take the images where torchvision would read them from its files."""
        self.data, self.targets = images.tensor.numpy(), images.labels.tolist()
        self.transform, self.target_transform = transform, None


class Tutorial:
    """The loop of PyTorch's tutorial. Without worker processes: they are slower on two cores."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.network = fresh_network(recipe).to(device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = recipe.optimizer(self.network.named_parameters())
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(recipe.data.mean, recipe.data.std)]
        )

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once, in a new order."""
        for _ in self.parts(images, steps=1):
            pass

    def parts(self, images: ImageSet, steps: int) -> Iterator[None]:
        """The same with a pause after each so many steps."""
        pictures = Pictures(images, self.transform)
        loader: DataLoader[Any] = DataLoader(
            pictures, batch_size=self.recipe.data.batch_size, shuffle=True
        )
        running_loss = 0.0
        for number, (inputs, labels) in enumerate(loader, start=1):
            inputs, labels = inputs.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            with autocast(self.recipe, self.device):
                loss = self.criterion(self.network(inputs), labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item()
            if number % steps == 0:
                yield


class Bare:
    """The fast plain script. It uses nothing of the launcher but the recipe's settings."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.network = fresh_network(recipe).to(memory_format=torch.channels_last).to(device)
        self.optimizer = recipe.optimizer(self.network.named_parameters())

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once, in a new order."""
        for _ in self.parts(images, steps=1):
            pass

    def parts(self, images: ImageSet, steps: int) -> Iterator[None]:
        """The same with a pause after each so many steps."""
        total = torch.zeros((), device=self.device)
        losses = self.losses(images, torch.randperm(len(images)))
        for number, loss in enumerate(losses, start=1):
            total.add_(loss.detach())
            if number % steps == 0:
                yield
        total.item()

    def losses(self, images: ImageSet, order: Tensor) -> Iterator[Tensor]:
        """Train on the images in this order and yield the loss of every step."""
        network, optimizer, size = self.network, self.optimizer, self.recipe.data.batch_size
        count, *shape = images.images.shape
        pixels, labels, order = images.tensor.view(count, -1), images.labels, order.to(self.device)
        scale, shift = self.normalization(pixels.shape[1])
        for start in range(0, count, size):
            chosen = order[start : start + size]
            batch = pixels.index_select(0, chosen).float().mul_(scale).add_(shift)
            batch = batch.view(-1, *shape).permute(0, 3, 1, 2)
            with autocast(self.recipe, self.device):
                logits = network(batch)
            loss = cross_entropy(logits.float(), labels.index_select(0, chosen))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield loss

    def normalization(self, length: int) -> tuple[Tensor, Tensor]:
        """The factor and the summand of each number of an image, whose last axis is the colour."""
        mean = torch.tensor(self.recipe.data.mean, dtype=torch.float64) * 255
        std = torch.tensor(self.recipe.data.std, dtype=torch.float64) * 255
        rows = (1 / std, -mean / std)
        scale, shift = (row.float().repeat(length // len(row)).to(self.device) for row in rows)
        return scale, shift


class Launched:
    """The launcher, put together as its command line does it."""

    def __init__(self, recipe: Recipe, data: Data, accelerator: Accelerator) -> None:
        plan = make_plan(
            recipe,
            world_size=accelerator.num_processes,
            train_images=len(data.train),
            evaluated_images=len(data.test),
        )
        network = build_network(recipe, data.train)
        self.ctx = make_context(network, recipe, plan, accelerator, data)
        self.ctx.state.network.train()
        self.epochs = 0

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once, in a new order."""
        for _ in self.reports(images):
            pass

    def parts(self, images: ImageSet, steps: int) -> Iterator[StepReport]:
        """The same with a report and a pause after each so many steps."""
        reports = self.reports(images, log_every=steps)
        return (report for report in reports if report.step % steps == 0)

    def reports(self, images: ImageSet, log_every: int | None = None) -> Iterator[StepReport]:
        """Train on the images once and yield what the launcher measures."""
        ctx = self.next_epoch(images, log_every)
        events = train_epoch(ctx, make_batches(ctx), self.epochs)
        return (event for event in events if isinstance(event, StepReport))

    def next_epoch(self, images: ImageSet, log_every: int | None = None) -> TrainContext:
        """The same training over these images, in its next epoch."""
        self.epochs += 1
        plan = make_plan(
            self.ctx.recipe,
            world_size=self.ctx.plan.world_size,
            train_images=len(images),
            evaluated_images=0,
            log_every=log_every,
        )
        return replace(self.ctx, plan=plan, data=replace(self.ctx.data, train=images))


def fresh_network(recipe: Recipe) -> nn.Module:
    """The network with the weights that belong to the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return recipe.model()


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """A new context per step: it keeps the weights in bfloat16 until it is left."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
