"""Training as a generator: `fit()` yields measurements, and the caller decides what to do.

One training step, in short: gather this rank's pieces of the global batch, run them forward and
backward so that the gradients add up to that of the mean loss over the whole global batch,
then let the optimizer step at the learning rate that belongs to this point of the training.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from launcher.agreement import Agreement
from launcher.batches import Batches, Normalise, Piece, layer_seeds, piece_bounds
from launcher.datasets import Data, ImageSet
from launcher.errors import TrainingError
from launcher.metrics import EpochReport, Evaluation, Meter, StepReport, Tally, sample_indices
from launcher.model import Learner, average_buffers, evaluating, first_parameter, widened
from launcher.plan import START, Plan, Position
from launcher.recipe import Recipe, Views

EVALUATION_BATCH = 1000  # images per rank and forward pass; changes no result
FIRST_PREDICTIONS = 5  # images whose predicted classes are shown after the first step


@dataclass(frozen=True)
class Job:
    """What is to be done, in which numbers, and where."""

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""
        return self.accelerator.reduce(values, reduction="sum")


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
    learner: Learner,
    data: Data,
    start: Position = START,
    wishes: Callable[[], tuple[bool, bool]] = never,
) -> Iterator[Event]:
    """Train from `start` on: a `StepReport` at each log interval, an `EpochReport` per epoch.

    After each step `wishes` is asked whether this rank wants to stop, and whether it wants to save;
    a `SavePoint` follows when any rank does, or the plan. Every rank must run it to its end, since
    reports add sums over the ranks. Raises `TrainingError` when the loss is not finite.
    """
    recipe, plan, device = job.recipe, job.plan, job.accelerator.device
    train, test = data.train.to(device), data.test.to(device)
    like, contiguous = first_parameter(learner.network), recipe.memory_format == "contiguous"
    normalise = Normalise(recipe.data, train.images.shape[1:], like, contiguous)
    batches = Batches(train, recipe, plan, normalise, job.accelerator.process_index)
    agreement = Agreement(job.over_ranks, plan.world_size, device, wishes)
    learner.network.train()
    for epoch in range(start.epochs + 1, plan.last_epoch + 1):
        started = time.perf_counter()
        trained = yield from train_epoch(job, learner, batches, epoch, start, agreement)
        if trained is None:
            return
        loss, images_per_second = trained
        average_buffers(learner.evaluated, job.accelerator)
        evaluation = evaluate(job, learner.evaluated, test, normalise)
        augmented = None
        if recipe.views is not None:
            augmented = evaluate(job, learner.evaluated, test, normalise, recipe.views)
        yield EpochReport(
            epoch=epoch,
            step=plan.epoch_steps(epoch)[-1],
            train_loss=loss,
            learning_rate=learner.learning_rate,
            images_per_second=images_per_second,
            seconds=time.perf_counter() - started,
            test=evaluation,
            probabilities=score_samples(job, learner.evaluated, test, normalise),
            test_tta=augmented,
        )
        if plan.is_saved_after_epoch(epoch):
            yield SavePoint(plan.position_after(epoch))


def train_epoch(
    job: Job,
    learner: Learner,
    batches: Batches,
    epoch: int,
    start: Position = START,
    agreement: Agreement | None = None,
) -> Generator[StepReport | SavePoint, None, tuple[float, float] | None]:
    """Train one epoch, or what `start` leaves of it; return its mean loss and images/s.

    Returns None where the ranks agreed to stop before its end.
    """
    recipe, plan, accelerator = job.recipe, job.plan, job.accelerator
    meter = resumed_meter(job, epoch, start)
    seeds = layer_seeds(recipe.seed, epoch, accelerator.process_index, plan.steps_per_epoch)
    for step, pieces in batches.epoch(epoch, after=start.step):
        learner.set_rates(plan.progress(step), recipe.schedule)
        seed_layers(seeds[(step - 1) % plan.steps_per_epoch], accelerator.device)
        logits = train_step(job, learner, pieces, plan.step_images(step), meter)
        stops, saves = agreement.after_step() if agreement else never()
        saves = saves or stops or plan.is_saved_after_step(step)
        if saves or plan.is_reported(step):
            loss, images_per_second = meter.read()
            refuse_infinite(loss, epoch, step, learner.learning_rate)
            first = first_classes(logits) if step == 1 else ()
            yield StepReport(epoch, step, loss, learner.learning_rate, images_per_second, first)
        if saves:
            yield SavePoint(Position(step, epoch - 1, meter.loss_sum), stops)
        if stops:
            return None
    return meter.epoch()


def resumed_meter(job: Job, epoch: int, start: Position) -> Meter:
    """The epoch's meter, with what `start` has behind it of this epoch."""
    before = start.step - job.plan.epoch_steps(epoch).start + 1
    if before <= 0:
        return Meter(job.accelerator.device, job.over_ranks)
    images = min(before * job.plan.batch_size, job.plan.train_images)
    return Meter(job.accelerator.device, job.over_ranks, loss_sum=start.epoch_loss, images=images)


def refuse_infinite(loss: float, epoch: int, step: int, learning_rate: float) -> None:
    """Raise `TrainingError` before a state that is not finite can replace a good one."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is not finite ({loss}) at step {step} (epoch {epoch}, "
            f"learning rate {learning_rate:g}); the last checkpoint is kept; "
            "try a lower rate, clip_norm=1 or precision=bf16"
        )


def train_step(
    job: Job, learner: Learner, pieces: list[Piece], images: int, meter: Meter
) -> Tensor:
    """One optimizer step on a global batch of `images`; returns the logits of the first piece."""
    accelerator, optimizer = job.accelerator, learner.optimizer
    first_logits = None
    for piece in pieces:
        waits = piece is not pieces[-1]  # gradients travel between ranks once per step
        with accelerator.no_sync(learner.wrapped) if waits else nullcontext():
            logits = widened(learner.wrapped(piece.images))
            loss = job.recipe.loss(logits, piece.targets)
            # DDP averages gradients over the ranks; the world size turns that into their sum.
            scale = job.plan.world_size * (images if job.recipe.sum_loss else 1)
            backward(loss, piece.share * scale, accelerator)
        meter.add(loss, piece.share * images)
        first_logits = logits if first_logits is None else first_logits
    meter.count(images)
    if job.recipe.clip_norm is not None:
        accelerator.clip_grad_norm_(learner.network.parameters(), job.recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if learner.average is not None and not accelerator.optimizer_step_was_skipped:
        learner.average.update_parameters(learner.network)
    assert first_logits is not None
    return first_logits


def backward(loss: Tensor, weight: float, accelerator: Accelerator) -> None:
    """Add the gradients of `weight` times `loss`; with fp16, scaled by Accelerate."""
    weighted = loss if weight == 1 else loss * weight
    if accelerator.scaler is not None:
        accelerator.backward(weighted)
    else:  # accelerator.backward would divide by one, which costs 1 % of a small step
        weighted.backward()  # type: ignore[no-untyped-call]


def seed_layers(seed: int, device: torch.device) -> None:
    """Seed the random layers. `torch.manual_seed` does the same but takes 80 microseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def first_classes(logits: Tensor) -> tuple[int, ...]:
    """The predicted classes of the first images of a batch."""
    return tuple(logits[:FIRST_PREDICTIONS].argmax(dim=1).tolist())


def evaluate(
    job: Job, network: nn.Module, test: ImageSet, normalise: Normalise, views: Views | None = None
) -> Evaluation:
    """Evaluate each test image exactly once, on whichever rank; by its `views` where given."""
    accelerator = job.accelerator
    tally = Tally(len(test.classes), accelerator.device)
    start, stop = piece_bounds(len(test), accelerator.num_processes, accelerator.process_index)
    with evaluating(network) as score, accelerator.autocast():
        for first in range(start, stop, EVALUATION_BATCH):
            part = slice(first, min(first + EVALUATION_BATCH, stop))
            images = normalise(test.images[part])
            logits = widened(views(score, images) if views else score(images))
            labels = test.labels[part]
            tally.add(logits, labels, job.recipe.loss(logits, labels))
    evaluation = tally.evaluation(job.over_ranks(tally.counts))
    assert evaluation.images == len(test), "an image was counted twice or not at all"
    return evaluation


def score_samples(job: Job, network: nn.Module, test: ImageSet, normalise: Normalise) -> Tensor:
    """Class probabilities `(36, classes)` of the fixed sample images, on the CPU."""
    chosen = test.images[sample_indices(len(test))]
    with evaluating(network), job.accelerator.autocast():
        # Not through a compiled call: these few images are not worth another compilation.
        return widened(network.forward(normalise(chosen))).softmax(dim=1).cpu()
