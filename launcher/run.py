"""One training: prepare it, run `fit`, hand each event to the loggers, save.

`train_loaded` is what the command line calls on each rank: prepare -> TrainContext -> run_loop.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.checkpoint import Snapshot, Writer
from launcher.checkpoint.resume import ResumePoint, initial_weights, new_run, resumed_run
from launcher.checkpoint.run_dir import RunDir
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import NEVER, START, Plan, Progress, SaveInterval, make_plan
from launcher.config.serialize import short_name
from launcher.config.slots import Precision
from launcher.data import cache, sources
from launcher.data.sources import Data
from launcher.distributed import process_group, signals
from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    run_on_main,
)
from launcher.distributed.process_group import RankGroup
from launcher.distributed.stop_sync import Requests
from launcher.distributed.world import ALONE, World
from launcher.errors import (
    EXIT_FAULT,
    EXIT_SAVED,
    LauncherError,
    NotFiniteError,
    TrainingError,
    UserError,
)
from launcher.loggers import wandb
from launcher.loggers.console import Console, first_step_line, make_console, tta_note
from launcher.loggers.profiler import Profiler
from launcher.loggers.wandb import NullLogger
from launcher.training.loop import Event, SavePoint, fit, warm_up_ddp
from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.training.model import build_network, count_parameters, initialize
from launcher.training.preflight import preflight
from launcher.training.state import TrainContext, make_context
from launcher.utils.redaction import cleaned, redacted
from launcher.utils.text import count

MOST_ROLLBACKS = 10  # a run that needs more does not get better by skipping steps
SMOKE_BATCH = 64  # images at most: a smoke test is about the code, not about the settings
SMOKE_PASSES = 4  # of a step, at most
SMOKE_FALL = 0.01  # of the loss: without learning, chance may still lower it a little


@dataclass(frozen=True)
class RunResult:
    """The best epoch whose weights are kept, the last epoch, and the losses that were read.

    `highest` is the epoch of the highest test accuracy: the best one, unless the disk refused its
    weights. `stopped` says that a signal ended the run early, with its state saved. `folder` is the
    run folder; None for a smoke test.
    """

    best: Best | None
    highest: Best | None
    last: Best | None
    losses: tuple[float, ...]
    stopped: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class Loggers:
    """Where measurements go. On ranks other than 0 both do nothing."""

    console: Console
    wandb: NullLogger


@dataclass
class ActiveRun:
    """A training in progress, and what its events have told so far.

    `folder` is None in a smoke test, `writer` also on ranks other than 0. `unsaved` says what it
    means that the state could not be saved when the run was stopped.
    """

    ctx: TrainContext
    loaded: LoadedRecipe
    loggers: Loggers
    folder: RunDir | None = None
    writer: Writer | None = None
    best: Best | None = None
    highest: Best | None = None
    last: Best | None = None
    losses: list[float] = field(default_factory=list)
    stopped: bool = False
    unsaved: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.ctx.accelerator.is_main_process

    def result(self) -> RunResult:
        """What is left of it at its end."""
        folder = self.folder.path if self.folder else None
        losses = tuple(self.losses)
        return RunResult(self.best, self.highest, self.last, losses, self.stopped, folder)


def train_loaded(loaded: LoadedRecipe, options: RunOptions, world: World = ALONE) -> RunResult:
    """Train a recipe; every rank calls this.

    Raises `UserError` before anything is written, `TrainingError` for a loss that is not finite
    or a failed smoke test, and `RankError` where the ranks lose each other.
    """
    if options.smoke:
        loaded, options = smoke_version(loaded, options, world.size)
    group = process_group.rendezvous(world, options.timeouts)
    try:
        with report_first_failure(group, lambda: "outside training"):
            result = prepare_and_run(loaded, options, group)
    except BaseException:
        group.stop_heartbeat()
        raise
    group.leave()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if options.smoke and not result.stopped:
        check_smoke(result.losses)
    return result


@contextmanager
def report_first_failure(group: RankGroup, moment: Callable[[], str]) -> Iterator[None]:
    """Find out which rank failed first, where an exception ends the run: only that one reports."""
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        attributed_error = group.attribute_failure(error, moment())
        if attributed_error is error:
            raise
        raise attributed_error from None


def prepare_and_run(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> RunResult:
    """From the recipe to the result, on a rank that has met the others."""
    prepared = prepare_on_all_ranks(loaded, options, group)
    data = prepared.data
    # What a resumed run is compared with is the precision that it had, whoever chose it.
    recipe = replace(loaded.recipe, precision=cast(Precision, prepared.precision))
    accelerator = create_accelerator(prepared.precision, group.world, recipe.deterministic)
    if options.init_from is None:
        initialize(prepared.network, recipe, data.train, accelerator.device)
    ctx = make_context(prepared.network, recipe, prepared.plan, accelerator, data)
    loaded = replace(loaded, recipe=ctx.recipe)
    preflight(ctx)
    facts = prepared.facts | {
        "memory": ctx.recipe.memory_format,
        "devices": f"{ctx.plan.world_size} x {device_name(accelerator)}",
        **options.host_facts,
    }
    if data.fallback:
        facts["fallback"] = fallback_warning(data)
    profiler = Profiler(ctx) if options.profile else None
    ctx = profiler.ctx if profiler else ctx
    with report_first_failure(group, lambda: describe_position(ctx)):
        return log_and_run(ctx, loaded, options, cleaned(facts), profiler)


def describe_position(ctx: TrainContext) -> str:
    """Where the training is, in words."""
    step = ctx.state.current_step
    return f"in step {step} (epoch {ctx.plan.epoch_of(step)})" if step else "outside training"


# What is trained


@dataclass(frozen=True)
class Prepared:
    """What each rank can make without the others."""

    data: Data
    plan: Plan
    network: nn.Module
    precision: str
    facts: dict[str, str]


def prepare_on_all_ranks(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Prepare here, and go on when all ranks have; a `UserError` of one ends all."""
    with group.sync_errors():
        prepared = prepare(loaded, options, group)
    group.init_process_group()
    return prepared


def prepare(loaded: LoadedRecipe, options: RunOptions, group: RankGroup) -> Prepared:
    """Open the images, count the steps, build the network."""
    recipe = loaded.recipe
    world, has_gpu = group.world, torch.cuda.is_available()
    precision, origin = choose_precision(recipe.precision, has_gpu, world.mixed_precision)
    data = cache.load(recipe.data, group)
    plan = plan_for(loaded, data, options, world.size)
    network = build_network(recipe, data.train)
    facts = describe(loaded, data, plan, network) | {"precision": f"{precision} ({origin})"}
    if weights := given_weights(loaded, options):
        checkpoint.load_weights(network, weights)
        facts |= {"weights": f"from {weights}"}
    return Prepared(data, plan, network, precision, facts)


def given_weights(loaded: LoadedRecipe, options: RunOptions) -> Path | None:
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


def plan_for(loaded: LoadedRecipe, data: Data, options: RunOptions, world_size: int) -> Plan:
    """The plan of a recipe for these images on that many ranks."""
    save = options.checkpoint_every
    if save.steps or save.minutes:  # also after the last epoch, so that more can follow
        save = replace(save, epochs=loaded.recipe.epochs)
    return make_plan(
        loaded.recipe,
        world_size=world_size,
        train_images=len(data.train),
        test_images=len(data.test),
        max_steps=options.max_steps,
        log_every=options.log_every,
        save=save,
    )


def describe(loaded: LoadedRecipe, data: Data, plan: Plan, network: nn.Module) -> dict[str, str]:
    """What is trained, in words: for the header, `--dry-run` and `run.json`."""
    note = loaded.note.strip().splitlines()[:1]
    name = short_name(loaded.recipe.model)
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    early = f", stopping after {plan.last_step}" if plan.last_step < plan.steps else ""
    return {
        "recipe": ": ".join([loaded.name, *note]),
        "model": f"{name}, {count_parameters(network):,} parameters",
        "data": f"{data.name}, {sizes}, {len(data.train.classes)} classes",
        "batch": plan.describe_batch(),
        "steps": f"{count(plan.epochs, 'epoch')} x {plan.steps_per_epoch} steps{early}",
    }


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""


# Smoke tests


def smoke_version(
    loaded: LoadedRecipe, options: RunOptions, world_size: int
) -> tuple[LoadedRecipe, RunOptions]:
    """One epoch of a few batches of embedded images; W&B off, nothing written."""
    data, accumulate = loaded.recipe.data, min(loaded.recipe.accumulate, SMOKE_PASSES)
    smallest = world_size * accumulate
    images = replace(
        data,
        source=sources.smoke_source(data),
        batch_size=max(min(data.batch_size, SMOKE_BATCH), smallest),
        fallback=None,
    )
    recipe = replace(loaded.recipe, data=images, epochs=1, accumulate=accumulate, compile=False)
    return replace(loaded, recipe=recipe), replace(
        options, wandb="off", log_every=1, checkpoint_every=NEVER, resume=False, max_steps=None
    )


def check_smoke(losses: tuple[float, ...]) -> None:
    """Raise `TrainingError` unless the second half of the losses is clearly lower."""
    if len(losses) < 2:
        raise TrainingError("smoke test: one step shows nothing; start fewer processes")
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    if not second < first * (1 - SMOKE_FALL):
        raise TrainingError(f"smoke test: the loss did not fall: {first:.4f}, then {second:.4f}")


# From the first line of the header to the closing table


def log_and_run(
    ctx: TrainContext,
    loaded: LoadedRecipe,
    options: RunOptions,
    facts: dict[str, str],
    profiler: Profiler | None = None,
) -> RunResult:
    """Begin or continue the run folder, train in front of the loggers, and close them."""
    with ExitStack() as exit_stack:  # the lock of the folder, until this process is done with it
        start = None if options.smoke else open_run(ctx, loaded, options, exit_stack)
        if start and start.checkpoint:
            warm_up_ddp(ctx)
            checkpoint.restore(start.checkpoint, ctx)
        if start:  # what was refused until here has left the folder as it was
            start = describe_run(ctx, start, loaded, facts)
        run = ActiveRun(ctx, loaded, make_loggers(ctx, start, loaded, options))
        exit_code = EXIT_FAULT
        try:
            if start:
                run.folder, run.best, run.highest = start.folder, start.best, start.best
                if run.is_main:
                    run.writer = Writer(start.folder.checkpoints, start.folder.check)
            show_header(run, start, facts)
            progress = start.progress if start else START
            through = profiler.through(run.folder) if profiler else iter
            run_loop(run, progress, options.checkpoint_every, through)
            exit_code = EXIT_SAVED if run.stopped else 0
            rows = closing_rows(run)
            if profiler and not run.stopped:
                rows |= profiler.rows(facts["precision"])
            run.loggers.console.closing(rows)
        finally:
            run.loggers.console.close()
            run.loggers.wandb.finish(exit_code)
    return run.result()


def open_run(
    ctx: TrainContext, loaded: LoadedRecipe, options: RunOptions, exit_stack: ExitStack
) -> ResumePoint:
    """Choose the run folder and the checkpoint on rank 0, for all ranks, and hold its lock."""

    def choose() -> ResumePoint:
        if options.resume:
            steps = ctx.plan.steps_per_epoch
            start = resumed_run(options, loaded, ctx.data.name, steps)
        else:
            start = new_run(options, loaded)
        exit_stack.callback(start.folder.lock().release)
        start.folder.tidy()
        return start

    return run_on_main(ctx.accelerator, choose)


def describe_run(
    ctx: TrainContext, start: ResumePoint, loaded: LoadedRecipe, facts: dict[str, str]
) -> ResumePoint:
    """Write on rank 0 what the run is, for all ranks."""

    def write() -> ResumePoint:
        train = ctx.data.train
        shape = list(train.images.shape[1:])
        about = {"name": loaded.name, "classes": list(train.classes), "image_shape": shape}
        own = start.folder.describe(loaded.config, facts | about, loaded.source, start.wandb_id)
        own.forget_after(start.progress.epochs)
        return replace(start, folder=own)

    return run_on_main(ctx.accelerator, write)


def make_loggers(
    ctx: TrainContext, start: ResumePoint | None, loaded: LoadedRecipe, options: RunOptions
) -> Loggers:
    """The console and W&B, on rank 0."""
    is_main = ctx.accelerator.is_main_process
    console = make_console(is_main)
    if start is None or not is_main:
        return Loggers(console, NullLogger())
    data = ctx.data.to(torch.device("cpu"))
    own_tags = filter(None, os.environ.get("WANDB_TAGS", "").split(","))
    shown = wandb.WandbRun(
        folder=start.folder.path,
        # What is given here, W&B does not take from the environment, so that is done here, too.
        project=options.project or os.environ.get("WANDB_PROJECT", "launcher"),
        name=options.name or os.environ.get("WANDB_NAME", start.folder.path.name),
        config=loaded.config,
        tags=[loaded.name, *own_tags, *(["synthetic-data"] if data.fallback else [])],
        note=redacted(os.environ.get("WANDB_NOTES", loaded.note)),
        run_id=start.folder.identity,
    )
    return Loggers(console, wandb.start(options.wandb, shown, data))


def show_header(run: ActiveRun, start: ResumePoint | None, facts: dict[str, str]) -> None:
    """What is about to run, and what the user should know about its beginning."""
    console, wandb, data = run.loggers.console, run.loggers.wandb, run.ctx.data
    rows = {name: fact for name, fact in facts.items() if name != "fallback"}
    rows |= {"W&B": f"{wandb.mode} {wandb.where}".strip()}
    rows |= {"run folder": str(run.folder.path)} if run.folder else {}
    console.header(f"launcher: {run.loaded.name}", rows, fallback_warning(data))
    for note in (*run.ctx.notes, wandb.notice, *(start.notes if start else ())):
        if note:
            console.say(note)


def closing_rows(run: ActiveRun) -> dict[str, str]:
    """What was reached and where it lies."""
    rows = {}
    if run.stopped:
        rows["stopped"] = f"by {stop_reason()}; the same command with --resume goes on from here"
    for label, epoch in (("best epoch", run.best), ("last epoch", run.last)):
        if epoch:
            note = tta_note(epoch.accuracy_tta)
            rows[label] = f"{epoch.epoch}, test accuracy {epoch.accuracy:.2%}{note}"
    if run.highest and run.highest != run.best:
        note = "its weights could not be written"
        figure = f"epoch {run.highest.epoch}, test accuracy {run.highest.accuracy:.2%}"
        rows["not kept"] = f"{figure}: {note}"
    if run.ctx.data.fallback:
        rows["data"] = fallback_warning(run.ctx.data)
    if run.folder:
        if not run.stopped:
            best, final = run.folder.best, run.folder.final
            rows["weights"] = f"{best} and {final.name}" if run.best else f"{final}"
        rows["run folder"] = str(run.folder.path)
    if run.loggers.wandb.where:
        rows["W&B"] = f"{run.loggers.wandb.mode} {run.loggers.wandb.where}"
    return rows


# The loop and its events


class RequestPoll:
    """What this rank wants after a step: to stop at a signal, to save when minutes have passed."""

    def __init__(self, interval: SaveInterval) -> None:
        self._seconds = interval.minutes * 60 if interval.minutes else math.inf
        self.saved = time.monotonic()

    def __call__(self) -> Requests:
        """Asked after each step, so it has to be fast."""
        due = time.monotonic() - self.saved >= self._seconds
        return Requests(bool(signals.stop_reason()), due)


def run_loop(
    run: ActiveRun,
    progress: Progress = START,
    interval: SaveInterval = NEVER,
    through: Callable[[Iterator[Event]], Iterator[Event]] = iter,
) -> None:
    """Run `fit` and handle its events, which go `through` the profiler first.

    Raises `NotFiniteError` where the recipe does not say to roll back, or that did not help; and
    `TrainingError` where the final weights, or the state at a stop, could not be written.
    """
    poll = RequestPoll(interval)
    while True:
        try:
            for event in through(fit(run.ctx, progress, poll)):
                handle_event(run, event)
                if isinstance(event, SavePoint):
                    poll.saved = time.monotonic()
            break
        except NotFiniteError as error:
            progress = roll_back(run, error)
            # Later steps may have been suspected only for what this one did to them.
            before = {step for step in run.ctx.skip_steps if step < error.step}
            run.ctx = replace(run.ctx, skip_steps=frozenset(before | {error.step}))
    lost = run.unsaved if run.stopped else save_weights(run, "final")
    wait_for_writer(run)
    accelerator = run.ctx.accelerator
    accelerator.wait_for_everyone()  # no rank ends while the state is being written
    if lost_on_main := run_on_main(accelerator, lambda: lost):
        raise TrainingError(lost_on_main)


def handle_event(run: ActiveRun, event: Event) -> None:
    """Show, log, record and save what the loop has measured."""
    if isinstance(event, StepReport):
        run.losses.append(event.loss)
        show_step(run, event)
    elif isinstance(event, EpochReport):
        run.last = Best.of(event)
        if is_better(event, run.highest):
            run.highest = run.last
        is_best = is_better(event, run.best) and not save_weights(run, "best")
        if is_best:
            run.best = run.last
        show_epoch(run, event, is_best)
    else:
        run.stopped = event.stops
        run.unsaved = save_checkpoint(run, event)


def is_better(report: EpochReport, best: Best | None) -> bool:
    """Whether an epoch is the best so far; never where its test loss is not a number."""
    has_more = best is None or report.test.accuracy > best.accuracy
    return has_more and not math.isnan(report.test.loss)


def show_step(run: ActiveRun, report: StepReport) -> None:
    """One log interval, on the console and in W&B."""
    console = run.loggers.console
    if report.first_predictions:
        console.say(first_step_line(report, run.ctx.data.train.classes))
    if report.skipped:
        steps = ", ".join(map(str, report.skipped))
        console.say(f"no update in step {steps}: the gradient is not finite, or skipped")
    console.step(report, run.ctx.plan)
    run.loggers.wandb.log_step(report)


def show_epoch(run: ActiveRun, report: EpochReport, is_best: bool) -> None:
    """One epoch, on the console, in W&B and in metrics.jsonl."""
    run.loggers.console.epoch(report, run.ctx.plan, is_best)
    run.loggers.wandb.log_epoch(report, run.best)
    if run.folder and run.is_main:
        if not run.folder.is_described:
            complain(run, f"{run.folder.path} was removed: what is still to come cannot be resumed")
        row = report.metrics() | {"data": run.ctx.data.name}
        attempt(run, "metrics.jsonl", partial(run.folder.record, row))


def roll_back(run: ActiveRun, error: NotFiniteError) -> Progress:
    """Restore the newest whole checkpoint on all ranks, which all have met the same error."""
    ctx, folder, skipped = run.ctx, run.folder, run.ctx.skip_steps
    if ctx.recipe.on_nan != "rollback" or folder is None:
        raise error
    wait_for_writer(run)
    found = run_on_main(ctx.accelerator, lambda: checkpoint.newest(folder.checkpoints)[0])
    if found is None or len(skipped) >= MOST_ROLLBACKS or error.step in skipped:
        raise error
    checkpoint.restore(found, ctx)
    progress, best = checkpoint.progress_of(found)
    run.best = run.highest = best
    if run.is_main:
        attempt(run, "metrics.jsonl", partial(folder.forget_after, progress.epochs))
    run.loggers.console.say(f"{error}")
    run.loggers.console.say(f"rolled back to step {progress.step}; step {error.step} is skipped")
    return progress


# Saving: a disk that refuses costs a line, not the training


def save_checkpoint(run: ActiveRun, point: SavePoint) -> str:
    """Save a checkpoint: every rank takes part, rank 0 writes, and waits for it before a stop.

    Returns what it means where that last one could not be written, or an empty text.
    """
    if run.folder is None:
        return ""
    snapshot = checkpoint.capture(run.ctx, checkpoint_details(run, point, run.folder))
    if run.writer is None:
        return ""
    complain(run, run.writer.submit(snapshot))
    if not point.stops or is_written(run, run.writer, snapshot):
        return ""
    found, _ = checkpoint.newest(run.folder.checkpoints)
    newest = f"step {checkpoint.progress_of(found)[0].step}" if found else "the beginning"
    return f"stopped by {stop_reason()}, not saved: --resume goes on from {newest}"


def checkpoint_details(run: ActiveRun, point: SavePoint, folder: RunDir) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    config = run.loaded.config
    return {
        "progress": asdict(point.progress),
        "best": asdict(run.best) if run.best else None,
        "world_size": run.ctx.plan.world_size,
        "steps_per_epoch": run.ctx.plan.steps_per_epoch,
        "wandb_id": folder.identity,
        "data": run.ctx.data.name,
        "config": config,
        "config_sha256": sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "source": redacted(run.loaded.source),
        "versions": run_dir.versions(),
    }


def is_written(run: ActiveRun, writer: Writer, snapshot: Snapshot) -> bool:
    """Wait for the last checkpoint; where the disk refuses it, try a second time."""
    complaint = writer.wait()
    if complaint:
        complain(run, complaint)
        complaint = writer.submit(snapshot) or writer.wait()
    return not complaint


def save_weights(run: ActiveRun, which: Literal["best", "final"]) -> str:
    """Write the present weights, on rank 0; returns what went wrong, or an empty text."""
    if run.writer is None or run.folder is None:
        return ""
    path = run.folder.best if which == "best" else run.folder.final
    save = partial(checkpoint.save_weights, run.ctx.state.eval_model, path)
    return attempt(run, f"the {which} weights", save)


def wait_for_writer(run: ActiveRun) -> None:
    """Until the checkpoint that is being written is on the disk."""
    if run.writer:
        complain(run, run.writer.wait())


def attempt(run: ActiveRun, what: str, action: Callable[[], None]) -> str:
    """Write something; returns what went wrong, or an empty text."""
    try:
        if run.folder:
            run.folder.check()
        action()
    except OSError as error:
        complaint = f"{what} could not be written ({error})"
        complain(run, complaint)
        return complaint
    return ""


def complain(run: ActiveRun, text: str) -> None:
    """Say what went wrong, if anything did."""
    if text:
        run.loggers.console.say(f"!!! {text} !!!")


def stop_reason() -> str:
    """Why the run was stopped."""
    return signals.stop_reason() or "a signal to another rank"
