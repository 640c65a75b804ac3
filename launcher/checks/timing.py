"""The compute time of a step on a given number of images on this machine, for the prediction."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from launcher.checks import scaling
from launcher.checks.scaling import Compute
from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.config.slots import Precision
from launcher.data.augment import resized
from launcher.data.images import Data
from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    reset_accelerator,
    synchronize,
)
from launcher.distributed.world import ALONE, World
from launcher.training.network import upcast
from launcher.training.state import TrainContext, make_context

STEPS, SECONDS = 20, 2.0  # measured at most, for each number of images
_DOCUMENT = "docs/scaling.md"
LEAST_IMAGES = 2  # BatchNorm may refuse a single one, and a second costs little


def scaling_lines(
    recipe: Recipe, plan: Plan, network: nn.Module, data: Data, world: World = ALONE
) -> list[str]:
    """What `check --world-size` prints: measured compute, assumed links, predicted steps.

    An Accelerator that was made before, in another precision, cannot be used afterwards.
    """
    wanted, _ = choose_precision(recipe.precision, has_gpu=True)
    precision = wanted if torch.cuda.is_available() else wanted.replace("fp16", "bf16")
    reset_accelerator()
    accelerator = create_accelerator(precision, world)
    recipe = replace(recipe, precision=cast(Precision, precision), compile=False)
    recipe = replace(recipe, sync_batch_norm=False)  # not possible on a CPU
    ctx = make_context(network, recipe, plan, accelerator, data)
    shown = scaling.SHOWN_WORLDS if ctx.trial_images == 2 else (1,)  # it may refuse other passes
    worlds = sorted({*shown, plan.world_size})
    possible = [world for world in worlds if world * plan.accumulate <= plan.batch_size]
    computes = {
        world: measure(replace(ctx, plan=replace(plan, world_size=world))) for world in possible
    }
    gradients = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    device = device_name(accelerator)
    note = f" (for {wanted})" if precision != wanted else ""
    lines = [
        f"scaling predicted from the measured compute of 1 rank and assumed links: {_DOCUMENT}",
        f"  {gradients / 1e6:.2f} MB of gradients; compute on {device} in {precision}{note},",
        "  not compiled; a faster device has less compute for the links to hide behind",
        *scaling.table(computes, gradients, plan.batch_size),
    ]
    if len(possible) < len(worlds):
        least = worlds[-1] * plan.accumulate
        lines.append(f"  {worlds[-1]:,} ranks need a batch of at least {least:,} images")
    return lines


def measure(ctx: TrainContext, most: int = STEPS) -> Compute:
    """The compute of one rank in a full step of `ctx.plan`: the fastest of at most so many steps.

    Not the mean, since other work on the machine only adds time.
    """
    recipe, plan, state, data = ctx.recipe, ctx.plan, ctx.state, ctx.data.train
    size = max(LEAST_IMAGES, -(-plan.batch_size // plan.num_micro_batches))
    places = torch.arange(size) % len(data)  # the embedded images may be fewer
    pixels = resized(data.pixels(places), plan.largest_resolution)
    labels = data.labels[places]
    # With mixing, a loss is given class probabilities.
    like = ctx.normalize(pixels[:1])
    targets = one_hot(labels, len(data.classes)).to(like) if recipe.data.mix else labels
    state.network.train()

    def step() -> tuple[float, ...]:
        losses: list[Tensor] = []

        def forward() -> None:
            images = ctx.normalize(pixels)
            logits = upcast(state.ddp_model(images))
            losses.append(ctx.loss(logits, targets, images))

        def update() -> None:
            state.optimizer.step()
            state.optimizer.zero_grad()

        def backward() -> None:
            losses[0].backward()  # type: ignore[no-untyped-call]

        return _seconds(forward), _seconds(backward), _seconds(update)

    step()  # warm-up
    forward, backward, update = min(_repeated(step, most), key=sum)
    return Compute(plan.accumulate * (forward + backward) + update, backward)


def _repeated(step: Callable[[], tuple[float, ...]], most: int) -> Iterable[tuple[float, ...]]:
    until = time.perf_counter() + SECONDS
    for number in range(most):
        if number and time.perf_counter() > until:
            return
        yield step()


def _seconds(work: Callable[[], object]) -> float:
    """The seconds of `work`, including what it has queued on the device."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started
