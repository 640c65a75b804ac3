"""One run from a recipe to its weights: the wiring of all other files."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from launcher import checkpoints, cluster, datasets, runs, settings, tracking
from launcher.console import Console, first_step_line, make_console, tta_note
from launcher.datasets import Data
from launcher.errors import TrainingError
from launcher.loading import Loaded
from launcher.loop import Job, fit
from launcher.metrics import EpochReport, StepReport
from launcher.model import Learner, build, count_parameters, initialise, prepare
from launcher.plan import Plan, make_plan
from launcher.runs import RunFolder
from launcher.tracking import NullTracker, Tracker

SMOKE_BATCH = 64  # images at most: a smoke test is about the code, not about the settings
SMOKE_FALL = 0.01  # of the loss; without learning, chance moves the halves by about 0.001


@dataclass(frozen=True)
class Occasion:
    """What belongs to this run of a recipe and not to the experiment."""

    runs: Path = Path("runs")
    name: str | None = None
    max_steps: int | None = None
    smoke: bool = False
    wandb: str | None = None
    project: str | None = None  # in W&B; None: the user's own default, else "launcher"
    log_every: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The epoch of the highest test accuracy, the last epoch, and the losses that were read."""

    best: EpochReport
    last: EpochReport
    losses: tuple[float, ...]


def train(loaded: Loaded, occasion: Occasion) -> Outcome:
    """Train a recipe; every rank calls this.

    Raises `UserError` before anything is written, and `TrainingError` for a failed smoke test.
    """
    if occasion.smoke:
        loaded, occasion = _for_smoke(loaded, occasion)
    recipe = loaded.recipe
    precision, origin = cluster.choose_precision(recipe.precision, torch.cuda.is_available())
    data = datasets.load(recipe.data)
    plan = plan_for(loaded, data, occasion, cluster.announced().size)
    network = build(recipe, data.train)
    accelerator = cluster.join(precision)
    job = Job(recipe, plan, accelerator)
    initialise(network, recipe, data.train, accelerator.device)
    learner = prepare(network, recipe, accelerator)
    facts = describe(loaded, data, plan, network) | {
        "devices": f"{plan.world_size} x {cluster.device_name(accelerator)}",
        "precision": f"{precision} ({origin})",
    }
    if data.fallback:
        facts["fallback"] = fallback_warning(data)
    try:
        outcome = _watched(job, learner, data, loaded, occasion, facts)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if occasion.smoke:
        check_smoke(outcome.losses)
    return outcome


def plan_for(loaded: Loaded, data: Data, occasion: Occasion, world_size: int) -> Plan:
    """The plan of a recipe for these images on that many ranks."""
    return make_plan(
        loaded.recipe,
        world_size=world_size,
        train_images=len(data.train),
        test_images=len(data.test),
        max_steps=occasion.max_steps,
        log_every=occasion.log_every,
    )


def describe(loaded: Loaded, data: Data, plan: Plan, network: nn.Module) -> dict[str, str]:
    """What is trained, in words: for the header, `--dry-run` and `run.json`."""
    note = loaded.note.strip().splitlines()[:1]
    name = settings.short_name(loaded.recipe.model)
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    early = f", stopping after {plan.last_step}" if plan.last_step < plan.steps else ""
    return {
        "recipe": ": ".join([loaded.name, *note]),
        "model": f"{name}, {count_parameters(network):,} parameters",
        "data": f"{data.name}, {sizes}, {len(data.train.classes)} classes",
        "batch": plan.describe_batch(),
        "steps": f"{plan.epochs} epoch(s) x {plan.steps_per_epoch} steps{early}",
    }


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""


def check_smoke(losses: tuple[float, ...]) -> None:
    """Raise `TrainingError` unless all losses are finite and their second half is clearly lower."""
    if not all(math.isfinite(loss) for loss in losses):
        raise TrainingError(f"smoke test: the loss is not finite: {losses[-1]}")
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    if not second < first * (1 - SMOKE_FALL):
        raise TrainingError(f"smoke test: the loss did not fall: {first:.4f}, then {second:.4f}")


def _for_smoke(loaded: Loaded, occasion: Occasion) -> tuple[Loaded, Occasion]:
    """One epoch of a few batches of embedded images; W&B off, nothing written."""
    data = loaded.recipe.data
    smallest = cluster.announced().size * loaded.recipe.accumulate
    images = replace(
        data,
        source=datasets.smoke_source(data),
        batch_size=max(min(data.batch_size, SMOKE_BATCH), smallest),
        fallback=None,
    )
    recipe = replace(loaded.recipe, data=images, epochs=1, compile=False)
    return replace(loaded, recipe=recipe), replace(occasion, wandb="off", log_every=1)


def _watched(
    job: Job,
    learner: Learner,
    data: Data,
    loaded: Loaded,
    occasion: Occasion,
    facts: dict[str, str],
) -> Outcome:
    """Train in front of those who watch: console, run folder, W&B. Only rank 0 has them."""
    folder = None if occasion.smoke else _make_folder(job.accelerator, loaded, occasion, facts)
    console = make_console(job.accelerator.is_main_process)
    tracker: Tracker = NullTracker()
    exit_code = 1
    try:
        if folder and job.accelerator.is_main_process:
            tracker = _start_tracker(loaded, data, occasion, folder)
        rows = {name: fact for name, fact in facts.items() if name != "fallback"}
        rows |= {"W&B": f"{tracker.mode} {tracker.where}".strip()}
        rows |= {"run folder": str(folder.path)} if folder else {}
        console.header(f"launcher: {loaded.name}", rows, fallback_warning(data))
        if tracker.notice:
            console.say(tracker.notice)
        outcome = _consume(job, learner, data, folder, console, tracker)
        console.closing(_closing_rows(outcome, folder, tracker, data))
        exit_code = 0
    finally:
        console.close()
        tracker.finish(exit_code)
    return outcome


def _make_folder(
    accelerator: Accelerator, loaded: Loaded, occasion: Occasion, facts: dict[str, str]
) -> RunFolder:
    def make() -> RunFolder:
        folder = runs.create(occasion.runs, occasion.name, loaded.name)
        folder.describe(settings.as_dict(loaded.recipe), facts, loaded.source)
        return folder

    return cluster.on_main(accelerator, make)


def _start_tracker(loaded: Loaded, data: Data, occasion: Occasion, folder: RunFolder) -> Tracker:
    return tracking.start(
        occasion.wandb,
        folder=folder.path,
        project=occasion.project or os.environ.get("WANDB_PROJECT", "launcher"),
        name=folder.path.name,
        config=settings.as_dict(loaded.recipe),
        tags=[loaded.name, *(["synthetic-data"] if data.fallback else [])],
        data=data,
        note=loaded.note,
    )


def _consume(
    job: Job,
    learner: Learner,
    data: Data,
    folder: RunFolder | None,
    console: Console,
    tracker: Tracker,
) -> Outcome:
    """Run the loop and pass its reports on."""
    losses: list[float] = []
    best = last = None
    writes = folder is not None and job.accelerator.is_main_process
    for report in fit(job, learner, data):
        if isinstance(report, StepReport):
            losses.append(report.loss)
            if report.first_predictions:
                console.say(first_step_line(report, data.train.classes))
            console.step(report, job.plan)
            tracker.log_step(report)
            continue
        last = report
        is_best = best is None or report.test.accuracy > best.test.accuracy
        best = report if best is None or is_best else best
        console.epoch(report, job.plan, is_best)
        tracker.log_epoch(report, best)
        if folder is not None and writes:
            folder.record(report.metrics() | {"data": data.name})
            if is_best:
                checkpoints.save_weights(learner.evaluated, folder.best)
    if folder is not None and writes:
        checkpoints.save_weights(learner.evaluated, folder.final)
    assert best is not None
    assert last is not None
    return Outcome(best, last, tuple(losses))


def _closing_rows(
    outcome: Outcome, folder: RunFolder | None, tracker: Tracker, data: Data
) -> dict[str, str]:
    best, last = outcome.best, outcome.last
    rows = {
        "best epoch": f"{best.epoch}, test accuracy {best.test.accuracy:.2%}{tta_note(best)}",
        "last epoch": f"{last.epoch}, test accuracy {last.test.accuracy:.2%}{tta_note(last)}",
    }
    if data.fallback:
        rows["data"] = fallback_warning(data)
    if folder is not None:
        rows |= {
            "weights": f"{folder.best} and {folder.final.name}",
            "run folder": str(folder.path),
        }
    if tracker.where:
        rows["W&B"] = f"{tracker.mode} {tracker.where}"
    return rows
