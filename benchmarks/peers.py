"""Measure one training epoch of SimpleCNN on CIFAR-10: the launcher against its peers.

    pip install -e ".[benchmarks]"
    python benchmarks/peers.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py; `--root ""` takes the embedded synthetic set, and
`--steps N` an epoch of N steps. Same model, optimizer, images, batch of 64 and precision for all,
evaluation excluded. Each peer is written as its own documents recommend:

    tutorial     the loop of PyTorch's tutorial: ToTensor, Normalize, `.item()` in each step
    accelerate   the computer-vision example of Accelerate: `prepare` of everything, `split_batches`
    torchvision  the reference script for classification: transforms.v2, a tracker that is read at
                 each print, here every 50 steps, channels_last
    lightning    a LightningModule and a Trainer with the loader that its guide shows
    launcher     `train_epoch` of launcher/training/loop.py, as `fit` runs it

All load in the training process: worker processes are slower on two cores (`--workers` says
otherwise). They take turns, and the order rotates from round to round. Each keeps its model over
the rounds and is warmed up before the first. Writes peers.json beside this file.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor, v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.competitors import Launched, Pictures, Tutorial, autocast, fresh_network
from benchmarks.epoch import first_steps, machine, opened
from benchmarks.turns import Figures, whole_epochs
from launcher import Recipe
from launcher.data.images import Data, ImageSet
from launcher.distributed.accelerator import create_accelerator
from launcher.distributed.world import World

FOLDER = Path(__file__).resolve().parent
PRINT_EVERY = 50  # steps, as far as a peer prints
WARM_UP_STEPS = 50

Loader = DataLoader[Any]


class Accelerated:
    """Accelerate's example for computer vision: everything is prepared, nothing is read back."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, workers: int) -> None:
        self.recipe, self.accelerator, self.workers = recipe, accelerator, workers
        network = fresh_network(recipe)
        optimizer = recipe.optimizer(network.named_parameters())
        self.network, self.optimizer = accelerator.prepare(network, optimizer)

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once."""
        transform = Compose([ToTensor(), Normalize(self.recipe.data.mean, self.recipe.data.std)])
        loader = self.accelerator.prepare(
            loader_of(Pictures(images, transform), self.recipe, self.workers)
        )
        self.network.train()
        total = torch.zeros((), device=self.accelerator.device)
        for inputs, targets in loader:
            outputs = self.network(inputs)
            loss = cross_entropy(outputs, targets)
            total += loss.detach().float()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        total.item()


class Referenced:
    """torchvision's reference script: new transforms, channels_last, meters."""

    def __init__(self, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.recipe, self.device, self.workers = recipe, device, workers
        self.network = fresh_network(recipe).to(device).to(memory_format=torch.channels_last)
        self.optimizer = recipe.optimizer(self.network.named_parameters())
        self.criterion = nn.CrossEntropyLoss()
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.ToDtype(torch.float, scale=True),
                v2.Normalize(mean=list(recipe.data.mean), std=list(recipe.data.std)),
                v2.ToPureTensor(),
            ]
        )

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once."""
        loader = loader_of(Pictures(images, self.transform), self.recipe, self.workers)
        self.network.train()
        recent: list[float] = []
        for number, (inputs, targets) in enumerate(loader):
            inputs = inputs.to(self.device, memory_format=torch.channels_last)
            targets = targets.to(self.device)
            with autocast(self.recipe, self.device):
                outputs = self.network(inputs)
                loss = self.criterion(outputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            right = (outputs.argmax(dim=1) == targets).float().mean()
            recent = [*recent[-19:], loss.item(), right.item()]
            if number % PRINT_EVERY == 0:
                statistics.median(recent)


class Lightning:
    """A LightningModule under a Trainer that neither logs to a file nor saves."""

    def __init__(self, recipe: Recipe, workers: int) -> None:
        self.recipe, self.workers = recipe, workers
        self.module = lightning_module(recipe)

    def epoch(self, images: ImageSet) -> None:
        """Train on the images once; a Trainer is made for one `fit`."""
        import lightning

        transform = Compose([ToTensor(), Normalize(self.recipe.data.mean, self.recipe.data.std)])
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if self.recipe.precision == "bf16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(self.module, loader_of(Pictures(images, transform), self.recipe, self.workers))


def lightning_module(recipe: Recipe) -> Any:
    """SimpleCNN as the guide to Lightning writes a module."""
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]  # it is Any
        def __init__(self) -> None:
            super().__init__()
            self.network = fresh_network(recipe)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            loss = cross_entropy(self.network(inputs), targets)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return recipe.optimizer(self.network.named_parameters())

    return Module()


def loader_of(pictures: Dataset[Any], recipe: Recipe, workers: int) -> Loader:
    """The loader that all of the peers use."""
    size = recipe.data.batch_size
    lasting = workers > 0
    return DataLoader(
        pictures, batch_size=size, shuffle=True, num_workers=workers, persistent_workers=lasting
    )


def racers(
    recipe: Recipe, data: Data, accelerator: Accelerator, workers: int
) -> dict[str, Callable[[ImageSet], None]]:
    """Everyone's epoch."""
    device = accelerator.device
    return {
        "tutorial": Tutorial(recipe, device).epoch,
        "accelerate": Accelerated(recipe, accelerator, workers).epoch,
        "torchvision": Referenced(recipe, device, workers).epoch,
        "lightning": Lightning(recipe, workers).epoch,
        "launcher": Launched(recipe, data, accelerator).epoch,
    }


def measure_all(recipe: Recipe, data: Data, words: argparse.Namespace) -> Figures:
    """Both precisions. Accelerate knows one at a time."""
    figures: Figures = {}
    for precision in ("fp32", "bf16"):
        accelerator = create_accelerator(precision, World.of_this_process())
        figures.setdefault("machine", machine(accelerator))
        chosen = replace(recipe, precision=precision, epochs=words.rounds + 2)
        runs = racers(chosen, data, accelerator, words.workers)
        for run in runs.values():
            run(first_steps(data.train, recipe, WARM_UP_STEPS))
        epochs = {name: partial(run, data.train) for name, run in runs.items()}
        figures[precision] = whole_epochs(epochs, len(data.train), words.rounds)
        print(precision, json.dumps(figures[precision], indent=1), flush=True)
        type(accelerator.state)._reset_state(reset_partial_state=True)
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", required=True, help="folder of CIFAR-10; empty for Synthetic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of an epoch; all images by default")
    parser.add_argument("--workers", type=int, default=0, help="of the peers' loaders")
    parser.add_argument("--output", type=Path, default=FOLDER / "peers.json")
    words = parser.parse_args()
    recipe, data = opened("simplecnn", words.root)
    if words.steps:
        data = replace(data, train=first_steps(data.train, recipe, words.steps))
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # it asks for workers
    steps = f" --steps {words.steps}" if words.steps else ""
    figures: Figures = {
        "command": f"python benchmarks/peers.py --root FOLDER --rounds {words.rounds}{steps}",
        "workers": words.workers,
        "date": date.today().isoformat(),
        "data": data.name,
        "images": len(data.train),
        "batch_size": recipe.data.batch_size,
        "lightning": lightning.__version__,
        **measure_all(recipe, data, words),
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(words.output)


if __name__ == "__main__":
    main()
