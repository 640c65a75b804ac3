"""Training as a generator: `fit()` yields measurements, and the caller decides what to do.

One training step is in `step.py`; here is what happens around it: the order of epochs and steps,
the rate that belongs to each, the measurements, the evaluation, and the moments between two steps
at which a run can be saved and stopped.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from launcher.config.plan import START, Position
from launcher.data.batches import Batches, Normalize, layer_seeds
from launcher.data.sources import Data, ImageSet
from launcher.distributed.stop_sync import StoppedError, StopSync
from launcher.errors import NotFiniteError, UserError
from launcher.training.evaluation import evaluate, score_samples
from launcher.training.metrics import EpochReport, LossTracker, Reading, StepReport
from launcher.training.state import (
    TrainState,
    average_buffers,
    first_parameter,
    largest_parameter,
    upcast,
)
from launcher.training.step import Job, seed_layers, train_step

MOST_SKIPPED = 20  # steps in a row without an update, before the run stops
FIRST_PREDICTIONS = 5  # images whose predicted classes are shown after the first step


@dataclass(frozen=True)
class SavePoint:
    """All ranks stand between the same two steps: their state can be saved, and ends if `stops`."""

    position: Position
    stops: bool = False


Event = StepReport | EpochReport | SavePoint


def never() -> tuple[bool, bool]:
    """The wishes of a caller who neither stops nor saves out of turn."""
    return False, False


def fit(
    job: Job,
    learner: TrainState,
    data: Data,
    start: Position = START,
    wishes: Callable[[], tuple[bool, bool]] = never,
) -> Iterator[Event]:
    """Train from `start` on: a `StepReport` at each log interval, an `EpochReport` per epoch.

    After each step `wishes` is asked whether this rank wants to stop, and whether it wants to save;
    a `SavePoint` follows when any rank does, or the plan. A stop within an evaluation leaves it
    to the resumed run. Every rank must run it to its end, since reports add sums over the ranks.
    Raises `NotFiniteError` when the loss or a parameter is not finite.
    """
    plan, device = job.plan, job.accelerator.device
    test, normalize = data.test.to(device), normalization(job, learner, data)
    batches = batches_of(job, data, normalize)
    agreement = StopSync(job.over_ranks, plan.world_size, device, wishes)
    learner.network.train()
    for epoch in range(start.epochs + 1, plan.last_epoch + 1):
        started = time.perf_counter()
        tracker = yield from train_epoch(job, learner, batches, epoch, start, agreement)
        if tracker is None:
            return
        buffers = [buffer.clone() for buffer in learner.evaluated.buffers()]
        try:
            report = epoch_report(job, learner, test, normalize, epoch, tracker, started, agreement)
        except StoppedError:
            for buffer, value in zip(learner.evaluated.buffers(), buffers, strict=True):
                buffer.copy_(value)  # a mean over ranks, averaged again, may be rounded again
            yield SavePoint(position_within(epoch, plan.epoch_steps(epoch)[-1], tracker), True)
            return
        yield report
        if plan.is_saved_after_epoch(epoch):
            yield SavePoint(plan.position_after(epoch))


def epoch_report(
    job: Job,
    learner: TrainState,
    test: ImageSet,
    normalize: Normalize,
    epoch: int,
    tracker: LossTracker,
    started: float,
    agreement: StopSync,
) -> EpochReport:
    """Evaluate what an epoch has trained. Raises `StoppedError` where the ranks agree to stop."""
    recipe, plan = job.recipe, job.plan
    step = plan.epoch_steps(epoch)[-1]
    loss, images_per_second = tracker.epoch()
    average_buffers(learner.evaluated, job.accelerator)
    evaluation = evaluate(job, learner.evaluated, test, normalize, agreement=agreement)
    augmented = None
    if recipe.views is not None and epoch == plan.last_epoch:
        augmented = evaluate(job, learner.evaluated, test, normalize, recipe.views, agreement)
    return EpochReport(
        epoch=epoch,
        step=step,
        train_loss=loss,
        # Not the optimizer's: in a run resumed before this evaluation it has not been set yet.
        learning_rate=learner.rate_at(plan.progress(step), recipe.schedule),
        images_per_second=images_per_second,
        seconds=time.perf_counter() - started,
        test=evaluation,
        probabilities=score_samples(job, learner.evaluated, test, normalize),
        test_tta=augmented,
    )


def normalization(job: Job, learner: TrainState, data: Data) -> Normalize:
    """Bytes to what the network takes."""
    like, contiguous = first_parameter(learner.network), job.recipe.memory_format == "contiguous"
    return Normalize(job.recipe.data, data.train.images.shape[1:], like, contiguous)


def batches_of(job: Job, data: Data, normalize: Normalize) -> Batches:
    """This rank's pieces of all global batches."""
    accelerator = job.accelerator
    train = data.train.to(accelerator.device)
    return Batches(train, job.recipe, job.plan, normalize, accelerator.process_index)


def warm_up_ddp(job: Job, learner: TrainState, data: Data) -> None:
    """Run one piece forward and backward for nothing, before a checkpoint is restored.

    After its first backward pass, DDP reorders the gradients that it sums over the ranks; from
    three ranks on, the order decides how a sum is rounded. So a run that goes on from a checkpoint
    has that first pass behind it, as the uninterrupted run has.
    """
    if job.plan.world_size > 1:
        batches = batches_of(job, data, normalization(job, learner, data))
        _, pieces = next(iter(batches.epoch(1)))
        learner.network.train()
        loss = job.recipe.loss(upcast(learner.wrapped(pieces[-1].images)), pieces[-1].targets)
        loss.backward()  # type: ignore[no-untyped-call]
        learner.optimizer.zero_grad()


def train_epoch(
    job: Job,
    learner: TrainState,
    batches: Batches,
    epoch: int,
    start: Position = START,
    agreement: StopSync | None = None,
) -> Generator[StepReport | SavePoint, None, LossTracker | None]:
    """Train one epoch, or what `start` leaves of it; return its measurements.

    Returns None where the ranks agreed to stop before its end.
    """
    recipe, plan, accelerator = job.recipe, job.plan, job.accelerator
    tracker = resumed_meter(job, epoch, start)
    seeds = layer_seeds(recipe.seed, epoch, accelerator.process_index, plan.steps_per_epoch)
    skips = 0
    for step, pieces in batches.epoch(epoch, after=start.step):
        with located(step, epoch):
            learner.set_rates(plan.progress(step), recipe.schedule)
            seed_layers(seeds[(step - 1) % plan.steps_per_epoch], accelerator.device)
            logits, is_taken = train_step(job, learner, pieces, step, tracker)
            skips = 0 if is_taken else skips + 1
            stops, saves = agreement.after_step() if agreement else never()
            saves = saves or stops or plan.is_saved_after_step(step)
            reading = tracker.read() if saves or plan.is_reported(step) else None
        if reading is not None:
            refuse_infinite(job, learner, reading, skips, step)
        if saves or step == plan.epoch_steps(epoch)[-1] or step <= max(job.skip_steps, default=0):
            refuse_infinite_parameters(job, learner, step)
        if reading is not None:
            first = first_classes(logits) if step == 1 else ()
            yield step_report(epoch, step, reading, learner.learning_rate, first)
        if saves:
            yield SavePoint(position_within(epoch, step, tracker), stops)
        if stops:
            return None
    return tracker


@contextmanager
def located(step: int, epoch: int) -> Iterator[None]:
    """Note on an exception where the training was; explain what torch refuses of a recipe."""
    try:
        yield
    except Exception as error:
        operation, refusal, _ = str(error).partition(" does not have a deterministic impl")
        if refusal:
            raise UserError(
                f"deterministic=true, and {operation} in step {step}",
                expected="operations for which torch has a deterministic algorithm",
                instead="use another layer, or type deterministic=false",
            ) from None
        if "parameters that were not used in producing loss" in str(error):
            numbers = str(error).partition("did not receive grad for rank ")[2].partition("\n")[0]
            raise UserError(
                f"parameters without a gradient up to step {step}, by number on rank {numbers}",
                expected="a gradient for each parameter in each step, for which several ranks wait",
                instead="leave out what the loss does not need, or call its requires_grad_(False)",
            ) from None
        error.add_note(f"in step {step} (epoch {epoch})")
        raise


def position_within(epoch: int, step: int, tracker: LossTracker) -> Position:
    """After a step of an epoch that is not evaluated yet."""
    return Position(step, epoch - 1, tracker.loss_sum, tracker.images)


def resumed_meter(job: Job, epoch: int, start: Position) -> LossTracker:
    """The epoch's tracker, with what `start` has behind it of this epoch."""
    device, over_ranks = job.accelerator.device, job.over_ranks
    if start.step < job.plan.epoch_steps(epoch).start:
        return LossTracker(device, over_ranks)
    return LossTracker(device, over_ranks, loss_sum=start.epoch_loss, images=start.epoch_images)


def step_report(
    epoch: int, step: int, reading: Reading, learning_rate: float, first: tuple[int, ...]
) -> StepReport:
    """A reading in the form in which it leaves the loop."""
    loss = math.nan if reading.loss is None else reading.loss
    rate, norm = reading.images_per_second, reading.gradient_norm
    return StepReport(epoch, step, loss, learning_rate, rate, norm, reading.skipped, first)


def refuse_infinite(job: Job, learner: TrainState, reading: Reading, skips: int, step: int) -> None:
    """Raise `NotFiniteError` before a state that is not finite can replace a good one."""
    bad = reading.infinite_step
    if bad is not None:
        rate = learner.rate_at(job.plan.progress(bad), job.recipe.schedule)
        raise NotFiniteError(
            f"the loss is not finite at step {bad} (epoch {job.plan.epoch_of(bad)}, learning rate "
            f"{rate:g}, gradient norm {reading.gradient_norm} at step {step}); the last "
            "checkpoint is kept; try a lower rate, clip_norm=1, precision=bf16 or on_nan=skip",
            bad,
        )
    if skips >= MOST_SKIPPED:
        raise NotFiniteError(
            f"the gradient was not finite in each of the {skips} steps up to {step}; "
            "the last checkpoint is kept; try a lower rate or clip_norm=1",
            step,
        )


def refuse_infinite_parameters(job: Job, learner: TrainState, step: int) -> None:
    """Raise `NotFiniteError` where a gradient spoilt the parameters, though its loss was finite.

    Called where the device is waited for: before a state is saved or evaluated; and in the steps
    that are repeated after a roll back, so that a second one leaves out the very step that did it.
    With on_nan=skip no such gradient is taken, so if it happens all the same, the run stops.
    """
    is_bad = ~largest_parameter(learner).isfinite()
    if float(job.over_ranks(is_bad.float())) > 0:  # every rank takes the same way
        raise NotFiniteError(
            f"a parameter is not finite after step {step} (epoch {job.plan.epoch_of(step)}, "
            f"learning rate {learner.learning_rate:g}): the gradient of this step or of one before "
            "was not; the last checkpoint is kept; try a lower rate, precision=bf16 or on_nan=skip",
            step,
        )


def first_classes(logits: Tensor) -> tuple[int, ...]:
    """The predicted classes of the first images of a batch."""
    return tuple(logits[:FIRST_PREDICTIONS].argmax(dim=1).tolist())
