"""The smoke test of a recipe: 16 small batches of embedded images, and does the network learn?

Whether the loss fell is no answer after so few steps: batches differ by more than that, and with
shuffled labels it falls as well, where a network only unlearns its first guesses. So the same
images are scored before and after, and what counts is whether their classes can be told from the
change.
"""

import json
import math
import time
from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.config.options import RunOptions
from launcher.config.plan import NEVER, make_plan
from launcher.config.recipe import Recipe
from launcher.config.slots import Precision
from launcher.data import sources
from launcher.data.batches import Normalize
from launcher.data.images import Data
from launcher.distributed.accelerator import choose_precision, run_on_main, runs_on_cpu
from launcher.distributed.process_group import RankGroup
from launcher.distributed.world import World
from launcher.errors import TrainingError
from launcher.training.loop import fit
from launcher.training.model import build_network
from launcher.training.network import first_parameter, restored_afterwards, upcast
from launcher.training.state import TrainContext, evaluating, make_context

STEPS = 16
LARGEST_BATCH, SMALLEST_BATCH = 64, 8  # images: a smoke test is about the code, not the settings
MOST_PASSES = 4  # of a step
SECONDS_PER_STEP = 0.5  # on a CPU, where a smaller batch keeps to it
FEW = 2  # images, to compare precisions
IMITATED = 3.0  # times the seconds of fp32: the processor has no instructions for this precision
MOST_SCORED = 512  # images, before training and after it
LEARNS = 2.0  # standard deviations, which a normal distribution exceeds in 1 of 44 cases
SURE = 3.0  # of the control: in 1 of 741
NOTHING = 1.0  # below this the longer training has taught nothing
LONGER, LONGEST = 4, 16  # times the steps, where fewer leave a doubt


def smoke_options(options: RunOptions) -> RunOptions:
    """W&B off, every step shown, nothing written."""
    return replace(
        options, wandb="off", log_every=1, checkpoint_every=NEVER, resume=False, max_steps=None
    )


def smoke_version(recipe: Recipe, group: RankGroup) -> Recipe:
    """One epoch of 16 small batches of embedded images; to be called within `sync_errors`.

    Rank 0 finds out how large a batch may be, and whether the precision is a fast one on this
    processor, so that all takes about 20 seconds on two cores.
    """
    accumulate = min(recipe.passes, MOST_PASSES)
    own = json.dumps(_in_time(recipe, group.world)) if group.world.is_main else None
    size, precision = json.loads(group.broadcast("smoke", own))
    size = max(size, 2 * group.world.size * accumulate)  # two images for BatchNorm
    images = replace(sources.stand_in(recipe.data, STEPS * size), batch_size=size)
    # At once: a recipe refuses patience without the validation images, which are left out too.
    recipe = replace(recipe, data=images, patience=None, precision=precision)
    return replace(recipe, accumulate=accumulate, epochs=1, compile=False)


def _in_time(recipe: Recipe, world: World) -> tuple[int, Precision | None]:
    """The images of a batch, and the precision: fp32 where a CPU only imitates its own."""
    largest = min(recipe.data.batch_size, LARGEST_BATCH)
    if not runs_on_cpu(world):
        return largest, recipe.precision
    few = sources.load(sources.stand_in(recipe.data, SMALLEST_BATCH))
    precision, _ = choose_precision(recipe.precision, False, world.mixed_precision)
    own = replace(recipe, precision=cast(Precision, precision))
    if precision != "fp32":
        full = replace(recipe, precision="fp32")
        in_time = SECONDS_PER_STEP * FEW / SMALLEST_BATCH
        most = max(in_time, IMITATED * _seconds_of_pass(full, few, FEW))
        if most < _seconds_of_pass(own, few, FEW) < math.inf:
            recipe = own = full
    if largest > SMALLEST_BATCH:
        seconds = _seconds_of_pass(own, few, SMALLEST_BATCH)
        if math.isfinite(seconds):  # else it may need more images in a pass
            fitting = int(SMALLEST_BATCH * SECONDS_PER_STEP / seconds)
            largest = max(SMALLEST_BATCH, min(largest, fitting))
    return largest, recipe.precision


def _seconds_of_pass(recipe: Recipe, few: Data, images: int) -> float:
    """Forward and backward, the second time; infinite where that fails, which is told later."""
    network = build_network(recipe, few.train).train()
    like = first_parameter(network)
    normalize = Normalize(recipe.data, few.train.shape, like, contiguous=True)
    batch = normalize(few.train.tensor[:images])
    seconds = math.inf
    try:
        for _ in range(2):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                scores = network(batch)
            upcast(scores).sum().backward()  # type: ignore[no-untyped-call]
            seconds = time.perf_counter() - begin
    except Exception:
        return math.inf
    return seconds


class SmokeTest:
    """The images' scores before a training, and what they say after it."""

    def __init__(self, ctx: TrainContext) -> None:
        """To be made before the training of `ctx`."""
        self._ctx, self._before = ctx, _scores(ctx)
        self._untrained = deepcopy(ctx.state.network)

    def verdict(self) -> str:
        """What to tell of a test that is passed, if anything; raises `TrainingError` if it is not.

        Where the recipe taught nothing, its network is trained again by plain cross entropy, of
        images as they are. If that does teach it, the recipe gets four times as many steps, then
        sixteen times, since strong augmentation and mixing may have held it up; if those teach
        nothing either, it is at fault.
        """
        scale = _scale(self._ctx)
        own = self._learning(self._ctx)
        if own is None:
            raise TrainingError(
                "smoke test: no score has changed: is the rate 0, or the loss cut off from them?"
            )
        if own >= LEARNS * scale:
            return ""
        recipe = self._ctx.recipe
        plain = replace(
            recipe,
            data=replace(recipe.data, augment=(), mix=None),
            loss=cross_entropy,
            average=None,
            views=None,
            uncertain=None,
        )
        if self._trained_by(plain) >= SURE * scale:
            learnt = self._trained_by(replace(recipe, epochs=LONGER))
            if learnt < NOTHING * scale:
                learnt = self._trained_by(replace(recipe, epochs=LONGEST))
            if learnt >= LEARNS * scale:
                return ""
            if learnt < NOTHING * scale:
                raise TrainingError(
                    "smoke test: nothing learnt, while plain cross_entropy does teach this "
                    "network: look for images without their labels in augment, mix and loss"
                )
        return f"smoke test: {STEPS} steps are too few to tell whether this network learns"

    def _trained_by(self, recipe: Recipe) -> float:
        """What another recipe teaches the same network, from the beginning."""
        ctx = self._ctx
        plan = make_plan(
            recipe,
            world_size=ctx.plan.world_size,
            train_images=ctx.plan.train_images,
            evaluated_images=ctx.plan.evaluated_images,
        )
        network = deepcopy(self._untrained)
        other = make_context(network, recipe, plan, ctx.accelerator, ctx.data)
        for _ in fit(other):
            pass
        return self._learning(other) or 0.0

    def _learning(self, ctx: TrainContext) -> float | None:
        return run_on_main(ctx.accelerator, lambda: learning(ctx, self._before))


def learning(ctx: TrainContext, before: Tensor) -> float | None:
    """How well the change of scores fits the images' classes; None where nothing has changed.

    From the mean change of each class's score in the images of each class, both centred: a matrix
    whose trace a network raises by learning. In units of the standard deviation that it has when
    the classes are named at random, ||M|| / sqrt(C - 1) (Hoeffding, A combinatorial central limit
    theorem, 1951); so about 0 +- 1 without learning, and at most C - 1.
    """
    rise = _scores(ctx) - before
    if not rise.any():
        return None
    labels = ctx.data.train.labels[: len(rise)]
    present = torch.unique(labels)
    of_class = torch.stack([rise[labels == label].mean(0) for label in present])[:, present]
    of_class = of_class - of_class.mean(0)  # what rose in all images alike
    of_class = of_class - of_class.mean(1, keepdim=True)
    return float(of_class.trace() / of_class.norm()) * math.sqrt(len(present) - 1)


def _scale(ctx: TrainContext) -> float:
    """Of the thresholds: with less than five classes, the highest value is below them."""
    return min(1.0, (len(ctx.data.train.classes) - 1) / 4)


def _scores(ctx: TrainContext) -> Tensor:
    """`(n, classes)`; with BatchNorm's statistics of the batch, as running ones come too late."""
    network, images = ctx.state.network, ctx.data.train.pixels(slice(MOST_SCORED))
    scores = []
    with restored_afterwards(network, ctx.accelerator.device), evaluating(network):
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        with ctx.accelerator.autocast():
            for first in range(0, len(images), LARGEST_BATCH):
                part = ctx.normalize(images[first : first + LARGEST_BATCH])
                scores.append(upcast(network(part)).double())
    return torch.cat(scores)
