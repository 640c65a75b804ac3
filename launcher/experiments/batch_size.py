"""`launcher tune RECIPE --batch`: how many images a device takes at once, and how fast it is.

It runs the recipe's own steps and restores the state. The result is the batch of one device and one
pass: a global batch may be any number of them (`accumulate`).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from launcher.checks.timing import measure
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.distributed import signals
from launcher.distributed.accelerator import count_over_ranks
from launcher.distributed.stop_sync import StoppedError
from launcher.distributed.world import World
from launcher.errors import EXIT_SAVED
from launcher.run.events import why_stopped
from launcher.run.prepare import training_of
from launcher.run.train import ranks_together
from launcher.training.accumulation import pass_fits
from launcher.training.state import TrainContext, put_back
from launcher.utils.text import count

FIRST = 8  # images, doubled from size to size
ENOUGH = 0.95  # fraction of the highest speed
SLOWER = 2  # sizes in a row that are no faster, after which a CPU tries no larger ones
STEPS = 5  # measured for each size


@dataclass(frozen=True)
class Speed:
    """The speed with `images` at once on each device, over all ranks."""

    size: int
    images_per_second: float


@dataclass(frozen=True)
class Found:
    """The sizes that were tried, and why no larger one was: memory, images or speed."""

    speeds: tuple[Speed, ...]
    ended_by: str

    @property
    def enough(self) -> Speed:
        """The smallest size that is nearly as fast as the fastest."""
        fastest = max(speed.images_per_second for speed in self.speeds)
        return next(s for s in self.speeds if s.images_per_second >= ENOUGH * fastest)


def find_sizes(ctx: TrainContext) -> Found:
    """Try one size after the other; every rank calls this, and all find the same.

    Raises `StoppedError` where a signal came to any rank.
    """
    speeds: list[Speed] = []
    on_cpu, images = ctx.accelerator.device.type == "cpu", len(ctx.data.train)
    for size in _sizes(images):
        if count_over_ranks(ctx.accelerator, bool(signals.stop_reason())):
            raise StoppedError
        if count_over_ranks(ctx.accelerator, not pass_fits(ctx, size)):
            return Found(tuple(speeds), "memory")
        ranks = ctx.plan.world_size
        plan = replace(ctx.plan, batch_size=size * ranks, accumulate=1)
        # Without communication, as each rank ends when its own time is over.
        with put_back(ctx), ctx.accelerator.no_sync(ctx.state.ddp_model):
            own = measure(replace(ctx, plan=plan), STEPS).total
        seconds = ctx.sum_over_ranks(torch.tensor(own, device=ctx.accelerator.device)) / ranks
        speeds.append(Speed(size, size * ranks / float(seconds)))
        best = max(range(len(speeds)), key=lambda n: speeds[n].images_per_second)
        if on_cpu and best < len(speeds) - SLOWER:
            return Found(tuple(speeds), "speed")
    return Found(tuple(speeds), "images")


def _sizes(images: int) -> Iterator[int]:
    size = min(FIRST, images)
    while size <= images:
        yield size
        size *= 2


def run(loaded: LoadedRecipe, options: RunOptions, world: World) -> int:
    """Show a line for each size; every rank calls this. Returns the exit code."""
    with ranks_together(world, options.timeouts) as group:
        ctx = training_of(loaded, options, group).ctx
        try:
            found = find_sizes(ctx)
        except StoppedError:
            if world.is_main:
                sys.stderr.write(f"launcher: stopped by {why_stopped()}: no size was found\n")
            return EXIT_SAVED
    if world.is_main:
        for line in describe(found, ctx.plan.world_size):
            sys.stdout.write(f"{line}\n")
    return 0


def describe(found: Found, ranks: int) -> list[str]:
    """The sizes, the smallest that is fast enough, and the largest."""
    if not found.speeds:
        return [f"not even {count(FIRST, 'image')} fit into memory at once"]
    fastest = max(speed.images_per_second for speed in found.speeds)
    lines = ["images per device   images/s"]
    for speed in found.speeds:
        bar = "█" * round(30 * speed.images_per_second / fastest)
        lines.append(f"{speed.size:>17,}  {speed.images_per_second:>9,.0f}  {bar}")
    enough, largest = found.enough, found.speeds[-1].size
    why = {
        "memory": f"{2 * largest:,} do not fit into memory",
        "images": "there are fewer than twice as many training images",
        "speed": "larger sizes are no faster, though they fit into memory",
    }
    lines.append(f"{largest:,} images at once is the largest tried: {why[found.ended_by]}")
    lines.append(
        f"sizes above {enough.size:,} gain little: data.batch_size={enough.size * ranks} on "
        f"{count(ranks, 'rank')}, or accumulate=N for a global batch of N times that"
    )
    return lines
