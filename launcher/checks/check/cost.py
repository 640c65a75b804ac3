"""The disk space and the time of a training."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.checkpoint import KEPT
from launcher.checks import timing
from launcher.checks.check.memory import NAME, bytes_of, optimizer_bytes
from launcher.checks.verdicts import Verdict
from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.distributed.accelerator import device_name
from launcher.errors import UserError
from launcher.training.state import TrainContext, evaluating
from launcher.utils.arguments import nearest_folder, refuse_no_folder
from launcher.utils.text import duration, sizes

_MEASURED = 5  # steps at most; the fastest counts
_LONG_STEP = 0.3  # seconds: a step of fewer images that takes so long is measured instead


# On the disk


def describe_disk(ctx: TrainContext, runs: Path) -> Verdict:
    """The size of the checkpoints kept at once, and of one being written; the free space."""
    network, state = ctx.state.network, ctx.state
    weights = bytes_of(network.state_dict().values())
    average = weights if state.ema_model is not None else 0
    checkpoint = weights + average + optimizer_bytes(ctx)
    needed = (KEPT + 1) * checkpoint + 2 * weights
    folder = nearest_folder(runs)
    free = shutil.disk_usage(folder).free
    answer = f"a checkpoint has {sizes(checkpoint)}, a run up to {sizes(needed)}; "
    answer += f"{sizes(free)} are free in {folder}"
    figures = {"checkpoint": checkpoint, "run": needed, "free": free}
    try:
        refuse_no_folder(runs)
    except UserError as error:
        return Verdict(NAME, error.given, "wrong", "name another folder with --runs")
    if needed > free:
        advice = "make room there, or name another folder with --runs"
        return Verdict(NAME, answer, "wrong", advice, figures=figures)
    return Verdict(NAME, answer, figures=figures)


# In time


def describe_time(ctx: TrainContext) -> Verdict:
    """The time of an epoch on this machine, from a few steps and one batch of evaluation.

    Steps are measured at the largest resolution; at others a step takes its share of the pixels.
    """
    plan = ctx.plan
    size, seconds = _measured_step(ctx)
    steps = plan.train_images / size * seconds
    tested = _evaluation_of_one(ctx) * plan.evaluated_images
    device = device_name(ctx.accelerator)
    shares = [(pixels / max(plan.resolutions)) ** 2 for pixels in plan.resolutions]
    epochs = [share * steps + tested for share in shares or [1.0] * plan.epochs]
    whole, least, most = sum(epochs), duration(min(epochs)), duration(max(epochs))
    return Verdict(
        NAME,
        f"an epoch takes about {least if least == most else f'{least} to {most}'} on this machine "
        f"alone ({device}, fp32, not compiled), all {plan.epochs:,} of them {duration(whole)}",
        figures={"epoch_seconds": max(epochs), "seconds": whole},
    )


def _measured_step(ctx: TrainContext) -> tuple[int, float]:
    """A number of images, up to the batch size, and the seconds of a step on them."""
    plan: Plan = replace(ctx.plan, world_size=1)
    size = min(8, plan.batch_size) if ctx.trial_images == 2 else ctx.trial_images
    while True:
        alone = replace(plan, batch_size=size, accumulate=1)
        seconds = timing.measure(replace(ctx, plan=alone), _MEASURED).total
        if size == plan.batch_size or seconds > _LONG_STEP:
            return size, seconds
        size = min(plan.batch_size, 4 * size)


def _evaluation_of_one(ctx: TrainContext) -> float:
    images, taken = ctx.data.train.pixels(slice(64)), []
    with evaluating(ctx.state.eval_model) as score:
        for _ in range(3):  # the first is a warm-up
            begin = time.perf_counter()
            score(ctx.normalize(images)).sum().item()
            taken.append(time.perf_counter() - begin)
    return min(taken) / len(images)


def describe_ranks(ctx: TrainContext, recipe: Recipe) -> Verdict:
    """The prediction of docs/scaling.md for the plan's number of ranks."""
    lines = timing.scaling_lines(recipe, ctx.plan, ctx.state.network, ctx.data)
    return Verdict("ranks", ctx.plan.describe_batch(), lines=tuple(lines))
