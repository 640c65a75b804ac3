"""The network: built, checked against the data, averaged, handed to Accelerate."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launcher.config.overrides import code_name
from launcher.config.recipe import Recipe
from launcher.config.slots import Schedule
from launcher.data.batches import Normalize
from launcher.data.sources import ImageSet
from launcher.errors import UserError
from launcher.training.optimizers import compile_steps

INITIAL_IMAGES = 5000  # training images that a data-dependent initialization sees
_PURE = {"pure_bf16": torch.bfloat16, "pure_fp16": torch.float16}


@dataclass(frozen=True)
class TrainState:
    """A network in the forms in which it is used, and what changes it.

    `network` is the plain module. `wrapped` is what trains: on several ranks, DDP around it.
    `average` is its running average, if the recipe keeps one. `options` are the settings of the
    optimizer's groups as the recipe made them, the rate before the schedule among them;
    `schedules` are the groups' own, where they have one.
    """

    network: nn.Module
    wrapped: nn.Module
    average: AveragedModel | None
    optimizer: Optimizer
    schedules: tuple[Schedule | None, ...]
    options: tuple[dict[str, Any], ...]

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and saved: the average where there is one."""
        return self.average.module if self.average is not None else self.network

    @property
    def learning_rate(self) -> float:
        """The present rate of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def rate_at(self, progress: float, schedule: Schedule) -> float:
        """The rate of the first group at some point of the training."""
        return self.options[0]["lr"] * (self.schedules[0] or schedule)(progress)

    def set_rates(self, progress: float, schedule: Schedule) -> None:
        """Set each group's rate to its own times the multiplier of its or the recipe's schedule."""
        groups = self.optimizer.param_groups
        for group, options, own in zip(groups, self.options, self.schedules, strict=True):
            group["lr"] = options["lr"] * (own or schedule)(progress)
        # DDP waits for the gradient of all it knows, and a loss must have one at least.
        may_rest = self.wrapped is self.network and any(group["lr"] != 0 for group in groups)
        for group, own in zip(groups, self.schedules, strict=True):
            if own and may_rest:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["lr"] != 0)

    def drop_resting_gradients(self) -> None:
        """Drop the gradients that DDP makes for groups whose own schedule is at zero.

        They would count in the gradient's norm, and in the momentum with which the group goes on.
        """
        for group, own in zip(self.optimizer.param_groups, self.schedules, strict=True):
            if own and group["lr"] == 0:
                for parameter in group["params"]:
                    parameter.grad = None


def ema(network: nn.Module, *, decay: float = 0.999) -> AveragedModel:
    """An exponential moving average of weights and buffers, for the slot `average`."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def build(recipe: Recipe, data: ImageSet) -> nn.Module:
    """Build the network from the recipe's seed and try it on two images.

    Raises `UserError` where it cannot take the images or its output does not fit the classes.
    """
    torch.manual_seed(recipe.seed)
    network = recipe.model()
    name = code_name(recipe.model)
    shape = _try(network, recipe, data, name)
    expected = (2, len(data.classes))
    if shape != expected:
        raise UserError(
            f"{name} turns 2 images into an output of shape {shape}",
            expected=f"{expected}, one score for each of the {len(data.classes)} classes",
            instead="change the size of the model's last layer",
        )
    return network


def _try(network: nn.Module, recipe: Recipe, data: ImageSet, name: str) -> tuple[int, ...]:
    pixels = data.images[:1].expand(2, -1, -1, -1)
    normalize = Normalize(recipe.data, data.images.shape[1:], first_parameter(network), True)
    images = normalize(pixels)
    network.eval()
    try:
        with torch.no_grad():  # in inference_mode a lazy layer would get weights that never train
            output = network(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{name} fails on images of shape {tuple(images.shape)}: {error}",
            expected="a model that takes (n, channels, height, width)",
            instead="compare the sizes of its layers with the images",
        ) from error
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def first_parameter(network: nn.Module) -> Tensor:
    """The parameter whose type the images are given: so a model in float64 trains in float64."""
    return next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))


def initialize(network: nn.Module, recipe: Recipe, images: ImageSet, device: torch.device) -> None:
    """Move the network to the device and run the recipe's initialization, if it has one."""
    network.to(device)
    if recipe.initialize is not None:
        like = upcast(first_parameter(network))
        normalize = Normalize(recipe.data, images.images.shape[1:], like, contiguous=False)
        with torch.no_grad():
            recipe.initialize(network, normalize(images.images[:INITIAL_IMAGES].to(device)))


def upcast(values: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def prepare(network: nn.Module, recipe: Recipe, accelerator: Accelerator) -> TrainState:
    """Move the network to the device in the recipe's memory format and wrap it for training.

    Raises `UserError` for an optimizer that refuses its settings, and SyncBatchNorm on a CPU.
    """
    if recipe.sync_batch_norm:
        network = _synchronized(network, accelerator)
    network = _narrowed(network.to(accelerator.device), recipe)
    if recipe.memory_format == "channels_last":
        network = network.to(memory_format=torch.channels_last)
    average = recipe.average(network) if recipe.average else None
    optimizer = _optimizer(recipe, network)
    schedules = tuple(group.pop("schedule", None) for group in optimizer.param_groups)
    options = tuple(_options(group) for group in optimizer.param_groups)
    with warnings.catch_warnings():
        # Newer torch renames the option, older torch knows only this name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        wrapped, prepared = accelerator.prepare(network, optimizer)
    if recipe.compile:
        mode = None if recipe.compile is True else recipe.compile
        network.compile(mode=mode, dynamic=False)
        compile_steps(optimizer)
    if accelerator.scaler is not None:
        optimizer = prepared  # skips overflowed steps; without fp16 it only costs 4 % of a step
    return TrainState(network, wrapped, average, optimizer, schedules, options)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of all but the parameters and their names."""
    return {n: deepcopy(v) for n, v in group.items() if n not in ("params", "param_names")}


def _narrowed(network: nn.Module, recipe: Recipe) -> nn.Module:
    """All but BatchNorm, whose statistics need it, in the recipe's pure half precision."""
    if recipe.precision in _PURE:
        network.to(_PURE[recipe.precision])
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.float()
    return network


def _synchronized(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.device.type == "cpu":
        raise UserError(
            "sync_batch_norm=true on a CPU",
            expected="GPUs: torch synchronizes BatchNorm only there",
            instead="type sync_batch_norm=false",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]


def _optimizer(recipe: Recipe, network: nn.Module) -> Optimizer:
    try:
        return recipe.optimizer([(n, p) for n, p in network.named_parameters() if p.requires_grad])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{code_name(recipe.optimizer)} refuses its settings: {error}",
            expected="settings that this optimizer takes",
            instead="see launcher RECIPE --help",
        ) from error


def average_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    """Make running statistics (BatchNorm) the mean over ranks; each rank saw other images."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The network in evaluation mode without gradients; afterwards in training mode again."""
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: its tensors do not mix with CUDA graphs
            yield network
    finally:
        network.train()


def largest_parameter(learner: TrainState) -> Tensor:
    """The largest magnitude among what is trained and its average; finite only if each of them is.

    Buffers and frozen parameters do not count: a mask may well be infinite.
    """
    trained = [p for group in learner.optimizer.param_groups for p in group["params"]]
    if learner.average is not None:
        trained += [p for p in learner.average.parameters() if p.requires_grad]
    return get_total_norm([p.detach() for p in trained if p.numel()], math.inf)


def count_parameters(network: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
