"""Those who look on while a recipe trains: they take the loop's events and change nothing in it."""

import math
import time
from dataclasses import asdict, dataclass

from launcher import checkpoints, runs, settings, signals
from launcher.checkpoints import Writer
from launcher.console import Console, first_step_line, tta_note
from launcher.datasets import Data
from launcher.loop import Job, SavePoint, fit
from launcher.metrics import Best, EpochReport, StepReport
from launcher.model import Learner
from launcher.plan import START, Cadence
from launcher.resuming import Start
from launcher.runs import RunFolder
from launcher.tracking import Tracker


@dataclass(frozen=True)
class Outcome:
    """The epoch of the highest test accuracy, the last epoch, and the losses that were read.

    `stopped` says that a signal ended the run early, with its state saved.
    """

    best: Best | None
    last: Best | None
    losses: tuple[float, ...]
    stopped: bool = False


@dataclass(frozen=True)
class Watchers:
    """Those who look on: the console, W&B, and what is written into the run folder.

    On the other ranks the console is silent, W&B off, and nothing is written.
    """

    console: Console
    tracker: Tracker
    folder: RunFolder | None
    writer: Writer | None


def fallback_warning(data: Data) -> str:
    """What no reader of this run may miss; empty where the right images are used."""
    return f"NOT THE REAL DATA: {data.fallback}; using {data.name}" if data.fallback else ""


def show_header(
    watchers: Watchers, start: Start | None, name: str, data: Data, facts: dict[str, str]
) -> None:
    """What is about to run, and what the user should know about its beginning."""
    tracker, console = watchers.tracker, watchers.console
    rows = {name: fact for name, fact in facts.items() if name != "fallback"}
    rows |= {"W&B": f"{tracker.mode} {tracker.where}".strip()}
    rows |= {"run folder": str(watchers.folder.path)} if watchers.folder else {}
    console.header(f"launcher: {name}", rows, fallback_warning(data))
    for note in (tracker.notice, *(start.notes if start else ())):
        if note:
            console.say(note)


class _Wishes:
    """What this rank wants after a step: to stop at a signal, to save when minutes have passed."""

    def __init__(self, cadence: Cadence) -> None:
        self._seconds = cadence.minutes * 60 if cadence.minutes else math.inf
        self._saved = time.monotonic()

    def __call__(self) -> tuple[bool, bool]:
        due = time.monotonic() - self._saved >= self._seconds
        if due:
            self._saved = time.monotonic()
        return bool(signals.stop_reason()), due


def consume(
    job: Job,
    learner: Learner,
    data: Data,
    start: Start | None,
    watchers: Watchers,
    cadence: Cadence,
) -> Outcome:
    """Run the loop and pass its events on."""
    position, wishes = start.position if start else START, _Wishes(cadence)
    losses: list[float] = []
    best = start.best if start else None
    last = None
    stopped = False
    for event in fit(job, learner, data, position, wishes):
        if isinstance(event, StepReport):
            losses.append(event.loss)
            _show_step(event, job, data, watchers)
        elif isinstance(event, EpochReport):
            last = Best.of(event)
            is_best = best is None or last.accuracy > best.accuracy
            best = last if best is None or is_best else best
            _show_epoch(event, best, is_best, job, learner, data, watchers)
        else:
            stopped = event.stops
            _save(event, best, job, learner, data, watchers)
    if watchers.writer and watchers.folder:
        _complain(watchers.writer.wait(), watchers)
        if not stopped:
            checkpoints.save_weights(learner.evaluated, watchers.folder.final)
    job.accelerator.wait_for_everyone()  # no rank ends while the state is being written
    return Outcome(best, last, tuple(losses), stopped)


def _show_step(report: StepReport, job: Job, data: Data, watchers: Watchers) -> None:
    if report.first_predictions:
        watchers.console.say(first_step_line(report, data.train.classes))
    watchers.console.step(report, job.plan)
    watchers.tracker.log_step(report)


def _show_epoch(
    report: EpochReport,
    best: Best,
    is_best: bool,
    job: Job,
    learner: Learner,
    data: Data,
    watchers: Watchers,
) -> None:
    watchers.console.epoch(report, job.plan, is_best)
    watchers.tracker.log_epoch(report, best)
    if watchers.folder and job.accelerator.is_main_process:
        watchers.folder.record(report.metrics() | {"data": data.name})
        if is_best:
            checkpoints.save_weights(learner.evaluated, watchers.folder.best)


def _save(
    point: SavePoint,
    best: Best | None,
    job: Job,
    learner: Learner,
    data: Data,
    watchers: Watchers,
) -> None:
    """Save a checkpoint: every rank takes part, rank 0 writes."""
    if watchers.folder is None:
        return
    state = {
        "position": asdict(point.position),
        "best": asdict(best) if best else None,
        "world_size": job.plan.world_size,
        "data": data.name,
        "config": settings.as_dict(job.recipe),
        "versions": runs.versions(),
    }
    snapshot = checkpoints.capture(learner, job.accelerator, state)
    if watchers.writer:
        _complain(watchers.writer.submit(snapshot), watchers)


def _complain(text: str, watchers: Watchers) -> None:
    if text:
        watchers.console.say(f"!!! {text} !!!")


def closing_rows(outcome: Outcome, watchers: Watchers, data: Data) -> dict[str, str]:
    """What was reached and where it lies."""
    rows = {}
    if outcome.stopped:
        reason = signals.stop_reason() or "a signal to another rank"
        rows["stopped"] = f"by {reason}; the same command with --resume goes on from here"
    for label, epoch in (("best epoch", outcome.best), ("last epoch", outcome.last)):
        if epoch:
            note = tta_note(epoch.accuracy_tta)
            rows[label] = f"{epoch.epoch}, test accuracy {epoch.accuracy:.2%}{note}"
    if data.fallback:
        rows["data"] = fallback_warning(data)
    if watchers.folder:
        if not outcome.stopped:
            rows["weights"] = f"{watchers.folder.best} and {watchers.folder.final.name}"
        rows["run folder"] = str(watchers.folder.path)
    if watchers.tracker.where:
        rows["W&B"] = f"{watchers.tracker.mode} {watchers.tracker.where}"
    return rows
