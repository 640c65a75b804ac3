"""Where two runs begin to differ: the step, the layer, and the probable cause."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from launcher.checks.verify.trial import Sighting
from launcher.config.recipe import Recipe
from launcher.config.serialize import short_name
from launcher.config.slots import DRAWS_PER_AUGMENTATION, Augmentation, Draws, Mixing
from launcher.data.augment import as_augmentation
from launcher.data.images import ImageSet
from launcher.training.network import takes_hooks
from launcher.utils.text import count
from launcher.utils.user_code import global_states, place_of

EXACT = 1e-8  # in float64, for numbers around 1: rounding is far below, a fault far above
ROUNDING = 1e-12  # of a loss in float64
AT_ONCE = 100.0  # times: a difference from rounding grows by less in one step
OF_WEIGHTS = 1e3  # times: a difference of the weights over that of the loss
CALLS = 40  # of an augmentation, with the same images and draws


@dataclass(frozen=True)
class Parting:
    """The first place at which two runs of the same steps differ, and in what."""

    step: int
    what: str  # images, layer, loss, weights
    layer: str = ""

    def describe(self) -> str:
        """The difference in words."""
        return {
            "images": f"step {self.step} sees other images",
            "layer": f"they differ from step {self.step} on, in {self.layer}",
            "loss": f"they differ from step {self.step} on, in the loss",
            "weights": f"they differ from step {self.step} on, in the optimizer's update",
        }[self.what]


def first_different_bit(one: Sequence[Sighting], two: Sequence[Sighting]) -> Parting | None:
    """The first difference of two runs on as many ranks, in the steps that both have made."""
    for step in sorted(set(one[0].steps) & set(two[0].steps)):
        pairs = [
            (mine.steps[step], other.steps[step]) for mine, other in zip(one, two, strict=True)
        ]
        if any(mine.images != other.images for mine, other in pairs):
            return Parting(step, "images")
        for mine, other in pairs:
            for (name, made), (_, others) in zip(mine.layers, other.layers, strict=False):
                if made != others:
                    return Parting(step, "layer", layer_name(name, one[0].kinds))
        if any(mine.loss != other.loss for mine, other in pairs if not math.isnan(mine.loss)):
            return Parting(step, "loss")
        if any(mine.weights != other.weights for mine, other in pairs):
            return Parting(step, "weights")
    return None


def layer_name(name: str, kinds: dict[str, str]) -> str:
    """`layers.3 (BatchNorm2d)`."""
    kind = kinds.get(name, "?")
    return f"{name} ({kind})" if name else f"the forward of {kind}"


def first_other_images(one: Sequence[Sighting], many: Sequence[Sighting]) -> int | None:
    """The first step in which the ranks of two runs together see different images.

    As sets: a rank without an image of its own in a small batch sees one of another rank's.
    """
    for step in sorted(set(one[0].steps) & set(many[0].steps)):
        mine, others = (
            {image for rank in run for image in rank.steps[step].images} for run in (one, many)
        )
        if mine != others:
            return step
    return None


@dataclass(frozen=True)
class Deviation:
    """How far two runs of the same steps in float64 are apart.

    Training may double a difference in each step: what rounding begins with 1e-16 is 1e-7 after 20
    steps of a deep network at a high rate. A fault does not grow, it is there at once. So `step` is
    the first whose loss differs by much more than those before it, and `loss` the largest
    difference of all, by which that of the weights is measured.
    """

    weights: float
    step: int | None
    loss: float = 0.0

    @property
    def is_rounding(self) -> bool:
        """Whether only the order of additions differs."""
        return self.weights <= max(EXACT, OF_WEIGHTS * self.loss) and self.step is None


def deviation_of(one: Sighting, two: Sighting, weights: float) -> Deviation:
    """From the losses of the common steps, and the difference of the weights at the end."""
    largest = 0.0
    for step in sorted(set(one.steps) & set(two.steps)):
        mine, other = one.steps[step].loss, two.steps[step].loss
        apart = abs(mine - other) / max(1.0, abs(mine))
        if not apart <= AT_ONCE * max(ROUNDING, largest):
            return Deviation(weights, step, largest)
        largest = max(largest, apart)
    return Deviation(weights, None, largest)


def first_mixing_layer(one: Sequence[Sighting], many: Sequence[Sighting]) -> str:
    """The first layer whose output for an image depends on the other images of the batch."""
    (alone, *_), kinds = one, one[0].kinds
    for rank in many:
        for (name, mine), (_, others) in zip(alone.each_image, rank.each_image, strict=False):
            for image in mine.keys() & others.keys():
                if not math.isclose(mine[image], others[image], rel_tol=EXACT, abs_tol=EXACT):
                    return layer_name(name, kinds)
    return ""


def largest_difference(one: Path, two: Path) -> float:
    """The largest difference of two files of weights; relative, where a tensor exceeds 1."""
    mine, other = load_file(one), load_file(two)
    worst = 0.0
    for name, tensor in mine.items():
        if tensor.is_floating_point() and tensor.numel():
            scale = max(1.0, float(tensor.abs().max()))
            worst = max(worst, float((tensor.double() - other[name].double()).abs().max()) / scale)
    return worst


def same_state(one: Any, two: Any) -> bool:
    """Whether two nested states of an optimizer have the same bits."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        same_keys = isinstance(two, dict) and one.keys() == two.keys()
        return same_keys and all(same_state(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        same_length = isinstance(two, list | tuple) and len(one) == len(two)
        return same_length and all(map(same_state, one, two))
    return one == two


# What is known to differ, and why


@dataclass(frozen=True)
class OwnLayers:
    """Layers that differ between ranks in training."""

    batch_norms: tuple[str, ...]
    random: tuple[str, ...]
    kinds: dict[str, str]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.batch_norms or self.random)

    def describe(self) -> str:
        """`BatchNorm and the random numbers of Dropout`."""
        parts = [f"BatchNorm ({count(len(self.batch_norms), 'layer')})"] if self.batch_norms else []
        if self.random:
            kinds = dict.fromkeys(self.kinds[name] for name in self.random)
            parts.append(f"the random numbers of {' and '.join(kinds)}")
        return " and ".join(parts)

    def describe_remedy(self) -> str:
        """How they are made equal on any number of ranks."""
        remedies = ["with BatchNorm synchronized"] if self.batch_norms else []
        remedies += ["without random numbers"] if self.random else []
        return " and ".join(remedies)


def own_layers(network: nn.Module, images: Tensor) -> OwnLayers:
    """Find BatchNorm, and the layers that draw random numbers in a pass of the network as it is."""
    random_layers: list[str] = []
    stack: list[tuple[bytes, bool]] = []

    def state() -> bytes:
        own = torch.default_generator.get_state().numpy().tobytes()
        return own + torch.cuda.get_rng_state().numpy().tobytes() if images.is_cuda else own

    def before(module: nn.Module, given: Any) -> None:
        if stack and stack[-1][0] != state():  # drawn by the parent module, between its children
            stack[-1] = (state(), True)
        stack.append((state(), False))

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, given: Any, made: Any) -> None:
            last, draws = stack.pop()
            if (draws or last != state()) and name not in random_layers:
                random_layers.append(name)
            if stack:
                stack[-1] = (state(), stack[-1][1])

        return after

    named = [pair for pair in network.named_modules() if takes_hooks(pair[1])]
    handles = [module.register_forward_pre_hook(before) for _, module in named]
    handles += [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    norms = tuple(
        name
        for name, module in named
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
    )
    kinds = {name: type(module).__name__ for name, module in named}
    return OwnLayers(norms, tuple(random_layers), kinds)


def unsteady_functions(recipe: Recipe, images: ImageSet) -> list[str]:
    """The functions of `data` that are not deterministic for the same images and draws, and why."""
    pixels = images.pixels(slice(8)).permute(0, 3, 1, 2)
    random = numpy.random.default_rng(0)
    draws = torch.from_numpy(random.random((len(pixels), DRAWS_PER_AUGMENTATION), "float32"))

    def augmented(function: Augmentation) -> Tensor:
        return function(pixels.clone(), Draws(draws, draws, epoch=1))

    def mixed(function: Mixing) -> tuple[Tensor, float]:
        floats = pixels.float() / 255
        return function(floats, floats.flip(0), numpy.random.default_rng(0))

    calls: list[tuple[Callable[..., Any], Callable[[], Any]]] = [
        (named, partial(augmented, as_augmentation(named))) for named in recipe.data.augment
    ]
    if recipe.data.mix is not None:
        calls.append((recipe.data.mix, partial(mixed, recipe.data.mix)))
    found = []
    for function, call in calls:
        before = global_states()
        first, *others = (call() for _ in range(CALLS))
        draws_any = global_states() != before
        if draws_any or not all(same_state(first, other) for other in others):
            why = "draws from a global generator" if draws_any else "keeps a state between calls"
            found.append(f"{short_name(function)}{place_of(function)} {why}")
    return found
