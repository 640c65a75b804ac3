"""Those who look on while a recipe trains: they take the loop's events and change nothing in it."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Literal

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.checkpoint import Snapshot, Writer
from launcher.checkpoint.resume import Start
from launcher.checkpoint.run_dir import RunFolder
from launcher.config.loader import Loaded
from launcher.config.plan import START, Position, SaveInterval
from launcher.data.sources import Data
from launcher.distributed import signals
from launcher.distributed.accelerator import run_on_main
from launcher.errors import NotFiniteError, TrainingError
from launcher.loggers.console import Console, first_step_line, tta_note
from launcher.loggers.wandb import Tracker
from launcher.training.loop import Event, SavePoint, fit
from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.training.state import TrainState
from launcher.training.step import Job
from launcher.utils.redaction import redacted

MOST_ROLLBACKS = 10  # a run that needs more does not get better by leaving steps out


@dataclass(frozen=True)
class RunResult:
    """The best epoch whose weights are kept, the last epoch, and the losses that were read.

    `highest` is the epoch of the highest test accuracy: the best one, unless the disk refused its
    weights. `stopped` says that a signal ended the run early, with its state saved.
    """

    best: Best | None
    highest: Best | None
    last: Best | None
    losses: tuple[float, ...]
    stopped: bool = False


@dataclass(frozen=True)
class Loggers:
    """Those who look on: the console, W&B, and what is written into the run folder.

    On the other ranks the console is silent, W&B off, and nothing is written.
    """

    console: Console
    tracker: Tracker
    folder: RunFolder | None
    writer: Writer | None
    loaded: Loaded  # what a checkpoint says of its recipe


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""


def show_header(
    loggers: Loggers, start: Start | None, name: str, data: Data, facts: dict[str, str]
) -> None:
    """What is about to run, and what the user should know about its beginning."""
    tracker, console = loggers.tracker, loggers.console
    rows = {name: fact for name, fact in facts.items() if name != "fallback"}
    rows |= {"W&B": f"{tracker.mode} {tracker.where}".strip()}
    rows |= {"run folder": str(loggers.folder.path)} if loggers.folder else {}
    console.header(f"launcher: {name}", rows, fallback_warning(data))
    for note in (tracker.notice, *(start.notes if start else ())):
        if note:
            console.say(note)


class _Wishes:
    """What this rank wants after a step: to stop at a signal, to save when minutes have passed."""

    def __init__(self, cadence: SaveInterval) -> None:
        self._seconds = cadence.minutes * 60 if cadence.minutes else math.inf
        self.saved = time.monotonic()

    def __call__(self) -> tuple[bool, bool]:
        return bool(signals.stop_reason()), time.monotonic() - self.saved >= self._seconds


@dataclass
class _Seen:
    """What the events so far have told."""

    best: Best | None
    highest: Best | None
    last: Best | None = None
    losses: list[float] = field(default_factory=list)
    stopped: bool = False
    unsaved: str = ""  # that the state could not be saved at the stop


def run_loop(
    job: Job,
    learner: TrainState,
    data: Data,
    start: Start | None,
    loggers: Loggers,
    cadence: SaveInterval,
    through: Callable[[Iterator[Event]], Iterator[Event]] = iter,
) -> RunResult:
    """Run the loop and pass its events on, `through` whoever looks at them first.

    Raises `NotFiniteError` where the recipe does not say to roll back, or that did not help; and
    `TrainingError` where the final weights, or the state at a stop, could not be written.
    """
    position, best = (start.position, start.best) if start else (START, None)
    seen = _Seen(best, highest=best)
    wishes = _Wishes(cadence)
    while True:
        try:
            for event in through(fit(job, learner, data, position, wishes)):
                _take(event, seen, job, learner, data, loggers)
                if isinstance(event, SavePoint):
                    wishes.saved = time.monotonic()
            break
        except NotFiniteError as error:
            position, seen.best = _roll_back(job, learner, loggers, error)
            seen.highest = seen.best
            # Later steps may have been suspected only for what this one did to them.
            before = {step for step in job.skip_steps if step < error.step}
            job = replace(job, skip_steps=frozenset(before | {error.step}))
    lost = seen.unsaved if seen.stopped else _save_weights("final", learner, loggers)
    _wait_for_writer(loggers)
    job.accelerator.wait_for_everyone()  # no rank ends while the state is being written
    if lost_by_main := run_on_main(job.accelerator, lambda: lost):
        raise TrainingError(lost_by_main)
    return RunResult(seen.best, seen.highest, seen.last, tuple(seen.losses), seen.stopped)


def _take(
    event: Event, seen: _Seen, job: Job, learner: TrainState, data: Data, loggers: Loggers
) -> None:
    if isinstance(event, StepReport):
        seen.losses.append(event.loss)
        _show_step(event, job, data, loggers)
    elif isinstance(event, EpochReport):
        seen.last = Best.of(event)
        seen.highest = seen.last if _beats(event, seen.highest) else seen.highest
        is_best = _beats(event, seen.best) and not _save_weights("best", learner, loggers)
        seen.best = seen.last if is_best else seen.best
        _show_epoch(event, seen.best, is_best, job, data, loggers)
    else:
        seen.stopped = event.stops
        seen.unsaved = _save(event, seen.best, job, learner, data, loggers)


def _beats(report: EpochReport, best: Best | None) -> bool:
    """Whether an epoch is the best so far; never where its test loss is not a number."""
    is_better = best is None or report.test.accuracy > best.accuracy
    return is_better and not math.isnan(report.test.loss)


def _roll_back(
    job: Job, learner: TrainState, loggers: Loggers, error: NotFiniteError
) -> tuple[Position, Best | None]:
    """Restore the newest whole checkpoint on all ranks, which all have met the same error."""
    folder = loggers.folder
    if job.recipe.on_nan != "rollback" or folder is None:
        raise error
    _wait_for_writer(loggers)
    found = run_on_main(job.accelerator, lambda: checkpoint.newest(folder.checkpoints)[0])
    if found is None or len(job.skip_steps) >= MOST_ROLLBACKS or error.step in job.skip_steps:
        raise error
    checkpoint.restore(found, learner, job.accelerator)
    position, best = checkpoint.place_of(found)
    if job.accelerator.is_main_process:
        _attempt("metrics.jsonl", partial(folder.forget_after, position.epochs), loggers)
    loggers.console.say(f"{error}")
    loggers.console.say(f"rolled back to step {position.step}; step {error.step} is left out")
    return position, best


def _show_step(report: StepReport, job: Job, data: Data, loggers: Loggers) -> None:
    if report.first_predictions:
        loggers.console.say(first_step_line(report, data.train.classes))
    if report.skipped:
        steps = ", ".join(map(str, report.skipped))
        loggers.console.say(f"no update in step {steps}: the gradient is not finite, or left out")
    loggers.console.step(report, job.plan)
    loggers.tracker.log_step(report)


def _show_epoch(
    report: EpochReport,
    best: Best | None,
    is_best: bool,
    job: Job,
    data: Data,
    loggers: Loggers,
) -> None:
    loggers.console.epoch(report, job.plan, is_best)
    loggers.tracker.log_epoch(report, best)
    folder = loggers.folder
    if folder and job.accelerator.is_main_process:
        if not folder.is_described:
            _complain(
                f"{folder.path} was removed: what is still to come cannot be resumed", loggers
            )
        row = report.metrics() | {"data": data.name}
        _attempt("metrics.jsonl", partial(folder.record, row), loggers)


def _save(
    point: SavePoint,
    best: Best | None,
    job: Job,
    learner: TrainState,
    data: Data,
    loggers: Loggers,
) -> str:
    """Save a checkpoint: every rank takes part, rank 0 writes, and waits for it before a stop.

    Returns what it means where that last one could not be written, or an empty text.
    """
    if loggers.folder is None:
        return ""
    config = loggers.loaded.config
    state = {
        "position": asdict(point.position),
        "best": asdict(best) if best else None,
        "world_size": job.plan.world_size,
        "steps_per_epoch": job.plan.steps_per_epoch,
        "wandb_id": loggers.folder.identity,
        "data": data.name,
        "config": config,
        "config_sha256": sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "source": redacted(loggers.loaded.source),
        "versions": run_dir.versions(),
    }
    snapshot = checkpoint.capture(learner, job.accelerator, state)
    if loggers.writer is None:
        return ""
    _complain(loggers.writer.submit(snapshot), loggers)
    if not point.stops or _is_written(loggers.writer, snapshot, loggers):
        return ""
    found, _ = checkpoint.newest(loggers.folder.checkpoints)
    newest = f"step {checkpoint.place_of(found)[0].step}" if found else "the beginning"
    return f"stopped by {_reason()}, not saved: --resume goes on from {newest}"


def _is_written(writer: Writer, snapshot: Snapshot, loggers: Loggers) -> bool:
    """Wait for the last checkpoint; where the disk refuses it, try a second time."""
    complaint = writer.wait()
    if complaint:
        _complain(complaint, loggers)
        complaint = writer.submit(snapshot) or writer.wait()
    return not complaint


def _save_weights(which: Literal["best", "final"], learner: TrainState, loggers: Loggers) -> str:
    """Write the present weights, on rank 0; returns what went wrong, or an empty text."""
    if loggers.writer is None or loggers.folder is None:
        return ""
    path = loggers.folder.best if which == "best" else loggers.folder.final
    save = partial(checkpoint.save_weights, learner.evaluated, path)
    return _attempt(f"the {which} weights", save, loggers)


def _wait_for_writer(loggers: Loggers) -> None:
    if loggers.writer:
        _complain(loggers.writer.wait(), loggers)


def _attempt(what: str, action: Callable[[], None], loggers: Loggers) -> str:
    """Write something; a disk that refuses costs a line, not the training."""
    try:
        if loggers.folder:
            loggers.folder.check()
        action()
    except OSError as error:
        complaint = f"{what} could not be written ({error})"
        _complain(complaint, loggers)
        return complaint
    return ""


def _complain(text: str, loggers: Loggers) -> None:
    if text:
        loggers.console.say(f"!!! {text} !!!")


def _reason() -> str:
    return signals.stop_reason() or "a signal to another rank"


def closing_rows(outcome: RunResult, loggers: Loggers, data: Data) -> dict[str, str]:
    """What was reached and where it lies."""
    rows = {}
    if outcome.stopped:
        rows["stopped"] = f"by {_reason()}; the same command with --resume goes on from here"
    for label, epoch in (("best epoch", outcome.best), ("last epoch", outcome.last)):
        if epoch:
            note = tta_note(epoch.accuracy_tta)
            rows[label] = f"{epoch.epoch}, test accuracy {epoch.accuracy:.2%}{note}"
    highest = outcome.highest
    if highest and highest != outcome.best:
        note = "its weights could not be written"
        rows["not kept"] = f"epoch {highest.epoch}, test accuracy {highest.accuracy:.2%}: {note}"
    if data.fallback:
        rows["data"] = fallback_warning(data)
    if loggers.folder:
        if not outcome.stopped:
            best, final = loggers.folder.best, loggers.folder.final
            rows["weights"] = f"{best} and {final.name}" if outcome.best else f"{final}"
        rows["run folder"] = str(loggers.folder.path)
    if loggers.tracker.where:
        rows["W&B"] = f"{loggers.tracker.mode} {loggers.tracker.where}"
    return rows
