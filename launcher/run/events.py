"""The loop of a run: each event of `fit` is shown, logged, recorded and saved.

A loss that is not finite rolls back to a checkpoint, where the recipe says so; the test images of a
run that has validation images are evaluated at the end.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint import checkpoint, outcomes, run_dir
from launcher.checkpoint.compiled import CompiledCode
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.weights import load_weights
from launcher.config.loader import LoadedRecipe
from launcher.config.plan import NEVER, START, Progress, SaveInterval
from launcher.config.recipe import Recipe
from launcher.distributed import signals
from launcher.distributed.accelerator import run_on_main
from launcher.distributed.stop_sync import Requests
from launcher.errors import NotFiniteError, TrainingError
from launcher.loggers.console import Console, first_step_line
from launcher.loggers.logger import Logger
from launcher.training.evaluation import evaluate
from launcher.training.loop import Event, SavePoint, fit
from launcher.training.metrics import IMAGES_OF, Best, EpochReport, FinalReport, StepReport
from launcher.training.state import TrainContext, broadcast_state
from launcher.utils.redaction import redacted
from launcher.utils.text import count

MOST_ROLLBACKS = 10  # a run that needs more does not get better by skipping steps


@dataclass(frozen=True)
class RunResult:
    """The best epoch whose weights are kept, the last epoch, and the losses that were read.

    Best is the epoch of the highest accuracy of the images that are evaluated after each epoch:
    the validation images, or the test images where there are none. `highest` is the best one, too,
    unless the disk refused its weights. `tested` are the figures of the test images at the end of
    a run that has validation images. `stopped` says that a signal ended the run early, with its
    state saved. `folder` is the run folder; None for a smoke test.
    """

    best: Best | None
    highest: Best | None
    last: Best | None
    losses: tuple[float, ...]
    stopped: bool = False
    folder: Path | None = None
    tested: FinalReport | None = None


@dataclass
class ActiveRun:
    """A training in progress, and what its events have told so far.

    `loggers` are all that hear of it, the console first; on ranks other than 0 it shows nothing.
    `unsaved` says what it means that the state could not be saved when the run was stopped.
    """

    ctx: TrainContext
    loaded: LoadedRecipe
    console: Console
    loggers: tuple[Logger, ...]
    saver: Saver
    code: CompiledCode | None = None
    best: Best | None = None
    highest: Best | None = None
    losses: list[float] = field(default_factory=list)
    report: EpochReport | None = None  # of the last evaluation
    tested: FinalReport | None = None
    stopped: bool = False
    unsaved: str = ""
    is_tested: bool = False  # by an earlier attempt, after which nothing is left to train

    @property
    def folder(self) -> RunDir | None:
        """The run folder; None in a smoke test."""
        return self.saver.folder

    @property
    def last(self) -> Best | None:
        """The figures of the last evaluation."""
        return Best.of(self.report) if self.report else None

    def result(self) -> RunResult:
        """What is left of it at its end."""
        folder = self.folder.path if self.folder else None
        losses = tuple(self.losses)
        return RunResult(
            self.best, self.highest, self.last, losses, self.stopped, folder, self.tested
        )


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
    `TrainingError` where the final weights, or the state at a stop, could not be written, or the
    last test loss is not finite.
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
    lost = run.unsaved if run.stopped else run.saver.weights(run.ctx.state.eval_model, "final")
    if run.report and run.stopped:
        run.saver.outcomes(run.report, run.ctx.data.evaluated, "last")
    if run.ctx.data.validation is not None and not run.stopped and not run.is_tested:
        run.tested = evaluate_test_images(run)
        run.saver.tested(run.tested)
        for logger in run.loggers:
            logger.tested(run.tested)
    run.saver.wait()
    accelerator = run.ctx.accelerator
    accelerator.wait_for_everyone()  # no rank ends while the state is being written
    if lost_on_main := run_on_main(accelerator, lambda: lost):
        raise TrainingError(lost_on_main)
    loss = run.report.evaluation.loss if run.report else 0.0
    if not run.stopped and not math.isfinite(loss):
        images = IMAGES_OF[run.ctx.data.evaluated_on]
        raise TrainingError(f"the {images} loss at the end is {loss}, not a finite number")


def evaluate_test_images(run: ActiveRun) -> FinalReport:
    """The only look at the test images of a run that has others to choose by; on every rank.

    First with the weights of the end, then with the best ones, which the network has afterwards.
    """
    ctx = run.ctx
    best = run_on_main(ctx.accelerator, lambda: run.best)  # which it alone may have failed to keep
    test, views = ctx.data.test, ctx.recipe.views
    last = evaluate(ctx, test)
    last_tta = evaluate(ctx, test, views) if views else None
    if best is None or run.folder is None:
        return FinalReport(last, last_tta, None)
    if run.last and best.epoch == run.last.epoch:
        return FinalReport(last, last_tta, last)
    network, path = ctx.state.eval_model, run.folder.best
    run_on_main(ctx.accelerator, lambda: load_weights(network, path))
    broadcast_state(network, ctx.accelerator)
    return FinalReport(last, last_tta, evaluate(ctx, test))


def handle_event(run: ActiveRun, event: Event) -> None:
    """Show, log, record and save what the loop has measured."""
    plan, saver = run.ctx.plan, run.saver
    if isinstance(event, StepReport):
        run.losses.append(event.loss)
        if event.first_predictions:
            run.console.say(first_step_line(event, run.ctx.data.train.classes))
        for logger in run.loggers:
            logger.step(event, plan)
    elif isinstance(event, EpochReport):
        run.report = event
        # An epoch that --max-steps cuts is the best one only if there is no other: a resumed run
        # trains all of it.
        is_whole = event.step == event.epoch * plan.steps_per_epoch or run.best is None
        if is_whole and is_better(event, run.highest):
            run.highest = run.last
        is_best = is_whole and is_better(event, run.best)
        if is_best and saver.best(run.ctx.state.eval_model, event, run.ctx.data.evaluated):
            run.best = run.last
        if event.ends_training:  # before the last checkpoint, from which nothing is evaluated anew
            saver.outcomes(event, run.ctx.data.evaluated, "last")
        for logger in run.loggers:
            logger.epoch(event, plan, run.best)
        loss = event.evaluation.loss
        if not math.isfinite(loss):
            saver.complain(f"the {event.images} loss of epoch {event.epoch} is {loss}")
        if event.ends_training and event.epoch < plan.last_epoch:
            run.console.say(early_stop_line(run.ctx.recipe, event))
        size = plan.resolution(event.epoch)
        row = event.metrics() | ({"train/resolution": size} if size else {})
        row |= {"data": run.ctx.data.name, "best": run.best == run.last, "ranks": plan.world_size}
        saver.epoch(row, outcomes.details(event))
    else:
        run.stopped = event.stops
        details = partial(checkpoint_details, run, event.progress)
        if not saver.checkpoint(run.ctx, details, event.stops):
            run.unsaved = f"stopped by {why_stopped()}, not saved: --resume goes on from "
            run.unsaved += newest_progress(run)
        saver.compiled(run.code)


def early_stop_line(recipe: Recipe, report: EpochReport) -> str:
    """Why no further epoch is trained."""
    waited = f"{count(recipe.patience or 0, 'epoch')} without a better {report.images} accuracy"
    delta = f" (by more than {recipe.min_delta:g})" if recipe.min_delta else ""
    return f"training ends with epoch {report.epoch}: {waited}{delta}"


def is_better(report: EpochReport, best: Best | None) -> bool:
    """Whether an epoch is the best so far: by accuracy, and never with a loss that is NaN."""
    has_more = best is None or report.evaluation.accuracy > best.accuracy
    return has_more and not math.isnan(report.evaluation.loss)


def roll_back(run: ActiveRun, error: NotFiniteError) -> Progress:
    """Restore the newest whole checkpoint on all ranks, which all have met the same error."""
    ctx, folder, skipped = run.ctx, run.folder, run.ctx.skip_steps
    if ctx.recipe.on_nan != "rollback" or folder is None:
        raise error
    run.saver.wait()
    found = run_on_main(ctx.accelerator, lambda: checkpoint.newest(folder.checkpoints)[0])
    if found is None or len(skipped) >= MOST_ROLLBACKS or error.step in skipped:
        raise error
    checkpoint.restore(found, ctx)

    def read() -> tuple[checkpoint.SavedState, Best | None]:
        state = checkpoint.read_state(found)
        return state, best_that_is_kept(folder, state.best, state.progress)

    state, run.best = run_on_main(ctx.accelerator, read)
    progress, run.highest = state.progress, state.best
    if run.report and run.report.epoch > progress.epochs:
        run.report = None
    ctx.state.skips_in_a_row = 0
    run.saver.forget_after(progress.epochs)
    run.console.say(f"{error}")
    run.console.say(f"rolled back to step {progress.step}; step {error.step} is skipped")
    return progress


def best_that_is_kept(folder: RunDir, best: Best | None, progress: Progress) -> Best | None:
    """The best epoch; None where its weights are gone.

    Or where a later one, which is trained again, has replaced them: if that then comes out
    otherwise, they would pass for those of an epoch that they are not of.
    """
    kept = outcomes.read(folder.path / "best.npz")
    is_replaced = kept is not None and kept.epoch > progress.epochs
    return None if is_replaced or not folder.best.is_file() else best


def checkpoint_details(run: ActiveRun, progress: Progress) -> dict[str, Any]:
    """What state.json of a checkpoint says."""
    return {
        "progress": asdict(progress),
        "best": asdict(run.best) if run.best else None,
        "world_size": run.ctx.plan.world_size,
        "steps_per_epoch": run.ctx.plan.steps_per_epoch,
        "wandb_id": run.folder.identity if run.folder else "",
        "data": run.ctx.data.name,
        "data_digest": run.ctx.data.digest,
        "config": run.loaded.config,
        "source": redacted(run.loaded.source),
        "versions": run_dir.versions(),
    }


def newest_progress(run: ActiveRun) -> str:
    """Where a resumed run would begin."""
    found = checkpoint.newest(run.folder.checkpoints)[0] if run.folder else None
    return f"step {checkpoint.read_state(found).progress.step}" if found else "the beginning"


def why_stopped() -> str:
    """Why the run was stopped."""
    return signals.stop_reason() or "a signal to another rank"
