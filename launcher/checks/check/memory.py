"""The memory that a training will take on each rank's device, predicted."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from launcher.checks.verdicts import Verdict
from launcher.config.recipe import Recipe
from launcher.config.slots import DRAWS_PER_AUGMENTATION
from launcher.data.augment import resized
from launcher.data.batches import steps_per_chunk
from launcher.data.sources import known_counts
from launcher.data.storage import Stored
from launcher.training.network import restored_afterwards, upcast, watchable_leaves
from launcher.training.state import TrainContext
from launcher.utils.text import sizes

NAME = "cost"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PURE = {"pure_bf16", "pure_fp16"}


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank's device holds at the peak of a step."""

    weights: int
    optimizer: int
    average: int
    passes: int  # activations and gradients at the moment when their sum is largest
    images: int  # the data set, and the prepared images of the next steps

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())


def describe_memory(ctx: TrainContext, recipe: Recipe) -> Verdict:
    """Describe the peak on each rank, predicted for the precision that the recipe names."""
    memory = predict_memory(ctx, recipe)
    parts = {name: size for name, size in vars(memory).items() if size}
    words = {"passes": "activations and gradients"}
    told = ", ".join(f"{words.get(name, name)} {sizes(size)}" for name, size in parts.items())
    precision = recipe.precision or "fp32"
    return Verdict(
        NAME,
        f"about {sizes(memory.total)} of memory on each rank in {precision}: {told}",
        figures={"memory": memory.total, **parts},
    )


def predict_memory(ctx: TrainContext, recipe: Recipe) -> Memory:
    """From a pass forwards on two and on four images (more, if it needs them), after a step.

    Left out are the workspace of the device's libraries and what its allocator cannot use.
    """
    state, plan, train = ctx.state, ctx.plan, ctx.data.train
    halves = 2 if recipe.precision in _PURE else 1
    weights = bytes_of(state.network.parameters()) + bytes_of(state.network.buffers())
    images = -(-plan.batch_size // plan.num_micro_batches)
    step_images = -(-plan.batch_size // plan.world_size)
    chunk = steps_per_chunk(plan, ctx.normalize.image_bytes, torch.device("cuda"))
    pictures = chunk * step_images * ctx.normalize.image_bytes // halves
    draws = len(recipe.data.augment) * plan.train_images * DRAWS_PER_AUGMENTATION * 4
    is_stored = isinstance(train.images, Stored)  # not on the device
    of_one = (0 if is_stored else math.prod(train.shape)) + train.labels[0].nbytes
    _, test = known_counts(recipe.data) or (0, len(ctx.data.test))
    others = plan.evaluated_images + (test if recipe.data.validation is not None else 0)
    return Memory(
        weights=weights // halves,
        optimizer=optimizer_bytes(ctx) // halves,
        average=weights if recipe.average else 0,
        passes=_peak(ctx, recipe, images),
        images=(plan.train_images + others) * of_one + 2 * draws + pictures,
    )


@dataclass(frozen=True)
class _Moment:
    """The bytes in use when the backward pass reaches a layer."""

    of_images: int  # kept by autograd up to this layer; gradients of its input and output
    gradients: int  # of the parameters of this layer and the later ones


def _peak(ctx: TrainContext, recipe: Recipe, images: int) -> int:
    """The largest sum of the bytes of activations and gradients within a step.

    The activations grow linearly with the number of images; two passes give the line. The
    gradients of an earlier pass stay, and so do the buckets in which DDP keeps them.
    """
    halves = 2 if recipe.precision in _PURE else 1
    trained = [p for p in ctx.state.network.parameters() if p.requires_grad]
    staying = bytes_of(trained) if ctx.plan.num_micro_batches > 1 else 0
    few, more = ctx.trial_images, 2 * ctx.trial_images
    small, larger = (_moments(ctx, recipe, size) for size in (few, more))
    sums = []
    for first, second in zip(small, larger, strict=True):
        each = (second.of_images - first.of_images) / (more - few)
        of_images = max(0, round(first.of_images + (images - few) * each))
        sums.append(of_images + max(first.gradients, staying) // halves)
    return max(sums)


def _moments(ctx: TrainContext, recipe: Recipe, size: int) -> list[_Moment]:
    """One for each call of a layer, one for the end of the forward pass, one for the update."""
    network = ctx.state.network
    weights = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    gradients = bytes_of(p for p in network.parameters() if p.requires_grad)
    # With foreach, the update makes a second copy of the gradients.
    moments = [_Moment(of_images=0, gradients=2 * gradients)]
    kept: dict[int, Tensor] = {}  # by storage; held, so that no other takes its place
    passed: set[nn.Module] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        before = {p for m in passed for p in m.parameters(recurse=False) if p.requires_grad}
        flowing = bytes_of(v for v in (*inputs, output) if isinstance(v, Tensor))
        moments.append(_Moment(held() + flowing, gradients - bytes_of(before)))
        passed.add(module)

    def held() -> int:
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)

    pixels = resized(ctx.data.train.pixels(slice(1)), ctx.plan.largest_resolution)
    images = ctx.normalize(pixels.repeat(size, 1, 1, 1))
    half = _HALF.get((recipe.precision or "").removeprefix("pure_"))
    cast = torch.autocast(images.device.type, dtype=half) if half else nullcontext()
    handles = [leaf.register_forward_hook(note) for leaf in watchable_leaves(network)]
    network.train()
    with restored_afterwards(network, images.device), saved_tensors_hooks(pack, lambda x: x), cast:
        upcast(network(images))
    for handle in handles:
        handle.remove()
    return [*moments, _Moment(of_images=held(), gradients=0)]


def optimizer_bytes(ctx: TrainContext) -> int:
    """The bytes of the optimizer's state after a step."""
    values = [v for state in ctx.state.optimizer.state.values() for v in state.values()]
    return bytes_of(value for value in values if isinstance(value, Tensor))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
