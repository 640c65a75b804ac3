"""One run from a recipe to its weights: the wiring of all other files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.checkpoint import Writer
from launcher.checkpoint.resume import Start, initial_weights, new_run, resumed_run
from launcher.config import overrides
from launcher.config.loader import Loaded
from launcher.config.plan import EVERY_EPOCH, Plan, SaveInterval, make_plan
from launcher.data import cache, sources
from launcher.data.sources import Data
from launcher.distributed import process_group
from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    run_on_main,
)
from launcher.distributed.process_group import PATIENT, RankGroup, Timeouts
from launcher.distributed.world import World
from launcher.errors import EXIT_FAULT, EXIT_SAVED, LauncherError, TrainingError, UserError
from launcher.loggers import profiler, wandb
from launcher.loggers.console import make_console
from launcher.loggers.wandb import NullLogger
from launcher.nearby import average_nearby
from launcher.training.loop import normalization, warm_up_ddp
from launcher.training.preflight import preflight
from launcher.training.state import TrainState, build, count_parameters, initialize, prepare
from launcher.training.step import Job
from launcher.utils.redaction import cleaned, redacted
from launcher.watching import (
    Loggers,
    RunResult,
    closing_rows,
    fallback_warning,
    run_loop,
    show_header,
)

SMOKE_BATCH = 64  # images at most: a smoke test is about the code, not about the settings
SMOKE_PASSES = 4  # of a step, at most
SMOKE_FALL = 0.01  # of the loss: without learning, chance may still lower it a little


@dataclass(frozen=True)
class RunOptions:
    """What belongs to this run of a recipe and not to the experiment."""

    runs: Path = Path("runs")
    name: str | None = None
    max_steps: int | None = None
    smoke: bool = False
    wandb: str | None = None
    project: str | None = None  # in W&B; None: the user's own default, else "launcher"
    log_every: int | None = None
    resume: bool = False
    resume_changed: tuple[str, ...] = ()
    checkpoint_every: SaveInterval = EVERY_EPOCH
    timeouts: Timeouts = PATIENT
    init_from: str | None = None
    place: Mapping[str, str] = field(default_factory=dict)  # where it runs, for the header
    profile: bool = False


def train(loaded: Loaded, options: RunOptions) -> RunResult:
    """Train a recipe; every rank calls this.

    Raises `UserError` before anything is written, `TrainingError` for a loss that is not finite
    or a failed smoke test, and `RankError` where the ranks lose each other.
    """
    if options.smoke:
        loaded, options = _for_smoke(loaded, options)
    group = process_group.meet(World.from_env(), options.timeouts)
    try:
        outcome = _train(loaded, options, group)
    except LauncherError:
        raise
    except Exception as error:
        explained = group.explain(error)
        if explained is error:
            raise
        raise explained from None
    finally:
        group.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if options.smoke and not outcome.stopped:
        check_smoke(outcome.losses)
    return outcome


@dataclass(frozen=True)
class _Prepared:
    """What each rank can make without the others."""

    data: Data
    plan: Plan
    network: nn.Module
    precision: str
    facts: dict[str, str]


def _prepare(loaded: Loaded, options: RunOptions) -> _Prepared:
    recipe = loaded.recipe
    precision, origin = choose_precision(recipe.precision, torch.cuda.is_available())
    data = cache.load(recipe.data)
    plan = plan_for(loaded, data, options, World.from_env().size)
    network = build(recipe, data.train)
    facts = describe(loaded, data, plan, network) | {"precision": f"{precision} ({origin})"}
    if weights := _given_weights(loaded, options):
        checkpoint.load_weights(network, weights)
        facts |= {"weights": f"from {weights}"}
    return _Prepared(data, plan, network, precision, facts)


def _given_weights(loaded: Loaded, options: RunOptions) -> Path | None:
    """What to begin with; a file that is gone is not missed where a checkpoint takes its place."""
    if options.init_from is None:
        return None
    try:
        return initial_weights(options.runs, options.init_from)
    except UserError:
        where = (options.runs, options.name, loaded.name)
        folder = run_dir.find(*where) if options.resume else None
        if folder is None or checkpoint.newest(folder.checkpoints)[0] is None:
            raise
        return None


def _train(loaded: Loaded, options: RunOptions, group: RankGroup) -> RunResult:
    patience = options.timeouts.of_collectives
    try:
        ready = _prepare(loaded, options)
    except UserError as error:
        group.agree(error, patience)
        raise
    group.agree(None, patience)
    group.found(patience)
    accelerator = create_accelerator(ready.precision, loaded.recipe.deterministic)
    job = Job(loaded.recipe, ready.plan, accelerator)
    if options.init_from is None:
        initialize(ready.network, job.recipe, ready.data.train, accelerator.device)
    learner = prepare(ready.network, job.recipe, accelerator)
    preflight(job, learner.evaluated, ready.data.test, normalization(job, learner, ready.data))
    average_nearby(learner.wrapped, patience)
    windows = profiler.windows_for(job, learner, ready.data) if options.profile else None
    job = profiler.shortened(job, windows) if windows else job
    facts = ready.facts | {
        "devices": f"{job.plan.world_size} x {device_name(accelerator)}",
        **options.place,
    }
    if ready.data.fallback:
        facts["fallback"] = fallback_warning(ready.data)
    return _watched(job, learner, ready.data, loaded, options, cleaned(facts), windows)


def plan_for(loaded: Loaded, data: Data, options: RunOptions, world_size: int) -> Plan:
    """The plan of a recipe for these images on that many ranks."""
    cadence = options.checkpoint_every
    # A cadence of steps or minutes saves after the last epoch as well, so that more can follow.
    ends_saved = loaded.recipe.epochs if cadence.steps or cadence.minutes else None
    return make_plan(
        loaded.recipe,
        world_size=world_size,
        train_images=len(data.train),
        test_images=len(data.test),
        max_steps=options.max_steps,
        log_every=options.log_every,
        save_steps=cadence.steps,
        save_epochs=cadence.epochs or ends_saved,
    )


def describe(loaded: Loaded, data: Data, plan: Plan, network: nn.Module) -> dict[str, str]:
    """What is trained, in words: for the header, `--dry-run` and `run.json`."""
    note = loaded.note.strip().splitlines()[:1]
    name = overrides.short_name(loaded.recipe.model)
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    early = f", stopping after {plan.last_step}" if plan.last_step < plan.steps else ""
    return {
        "recipe": ": ".join([loaded.name, *note]),
        "model": f"{name}, {count_parameters(network):,} parameters",
        "data": f"{data.name}, {sizes}, {len(data.train.classes)} classes",
        "batch": plan.describe_batch(),
        "steps": f"{plan.epochs} epoch(s) x {plan.steps_per_epoch} steps{early}",
    }


def check_smoke(losses: tuple[float, ...]) -> None:
    """Raise `TrainingError` unless the second half of the losses is clearly lower."""
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    if not second < first * (1 - SMOKE_FALL):
        raise TrainingError(f"smoke test: the loss did not fall: {first:.4f}, then {second:.4f}")


def _for_smoke(loaded: Loaded, options: RunOptions) -> tuple[Loaded, RunOptions]:
    """One epoch of a few batches of embedded images; W&B off, nothing written."""
    data, accumulate = loaded.recipe.data, min(loaded.recipe.accumulate, SMOKE_PASSES)
    smallest = World.from_env().size * accumulate
    images = replace(
        data,
        source=sources.smoke_source(data),
        batch_size=max(min(data.batch_size, SMOKE_BATCH), smallest),
        fallback=None,
    )
    recipe = replace(loaded.recipe, data=images, epochs=1, accumulate=accumulate, compile=False)
    return replace(loaded, recipe=recipe), replace(
        options,
        wandb="off",
        log_every=1,
        checkpoint_every=SaveInterval(),
        resume=False,
        max_steps=None,
    )


def _watched(
    job: Job,
    learner: TrainState,
    data: Data,
    loaded: Loaded,
    options: RunOptions,
    facts: dict[str, str],
    windows: profiler.Windows | None,
) -> RunResult:
    """Train in front of those who watch."""
    locks: list[FileLock] = []  # held until this process is done with the folder
    start = None if options.smoke else _begin(job, data, loaded, options, locks)
    if start and start.checkpoint:
        warm_up_ddp(job, learner, data)
        checkpoint.restore(start.checkpoint, learner, job.accelerator)
    if start:  # what was refused until here has left the folder as it was
        start = _described(job.accelerator, start, loaded, facts)
    loggers = _gather(job.accelerator, start, data, loaded, options)
    exit_code = EXIT_FAULT
    try:
        show_header(loggers, start, loaded.name, data, facts)
        watch = profiler.Stopwatch(windows, start.folder, job) if windows and start else None
        through = watch.through if watch else iter
        outcome = run_loop(job, learner, data, start, loggers, options.checkpoint_every, through)
        exit_code = EXIT_SAVED if outcome.stopped else 0
        rows = closing_rows(outcome, loggers, data)
        if watch and not outcome.stopped:
            rows |= profiler.rows(watch, job, learner, data, facts["precision"])
        loggers.console.closing(rows)
    finally:
        loggers.console.close()
        loggers.tracker.finish(exit_code)
        for lock in locks:
            lock.release()
    return outcome


def _begin(
    job: Job,
    data: Data,
    loaded: Loaded,
    options: RunOptions,
    locks: list[FileLock],
) -> Start:
    """Choose the run folder and the checkpoint on rank 0, for all ranks."""
    where = (options.runs, options.name, loaded)

    def begin() -> Start:
        if options.resume:
            steps = job.plan.steps_per_epoch
            start = resumed_run(*where, data.name, steps, options.resume_changed)
        else:
            start = new_run(*where)
        locks.append(start.folder.lock())
        start.folder.tidy()
        return start

    return run_on_main(job.accelerator, begin)


def _described(
    accelerator: Accelerator, start: Start, loaded: Loaded, facts: dict[str, str]
) -> Start:
    """Write on rank 0 what the run is, for all ranks."""

    def describe() -> Start:
        described = facts | {"name": loaded.name}
        own = start.folder.describe(loaded.config, described, loaded.source, start.wandb_id)
        own.forget_after(start.position.epochs)
        return replace(start, folder=own)

    return run_on_main(accelerator, describe)


def _gather(
    accelerator: Accelerator,
    start: Start | None,
    data: Data,
    loaded: Loaded,
    options: RunOptions,
) -> Loggers:
    console = make_console(accelerator.is_main_process)
    if start is None or not accelerator.is_main_process:
        return Loggers(console, NullLogger(), start.folder if start else None, None, loaded)
    own_tags = filter(None, os.environ.get("WANDB_TAGS", "").split(","))
    tracker = wandb.start(
        options.wandb,
        folder=start.folder.path,
        # What is given here, W&B does not take from the environment, so that is done here, too.
        project=options.project or os.environ.get("WANDB_PROJECT", "launcher"),
        name=options.name or os.environ.get("WANDB_NAME", start.folder.path.name),
        config=loaded.config,
        tags=[loaded.name, *own_tags, *(["synthetic-data"] if data.fallback else [])],
        data=data,
        note=redacted(os.environ.get("WANDB_NOTES", loaded.note)),
        run_id=start.folder.identity,
    )
    writer = Writer(start.folder.checkpoints, start.folder.check)
    return Loggers(console, tracker, start.folder, writer, loaded)
