"""Training as a generator: `fit()` yields measurements, and the caller decides what to do.

One step is in `step.py`; here is what happens around it: the order of epochs and steps, the
measurements, the evaluation, and the moments between two steps at which a run can be saved and
stopped.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from launcher.config.plan import START, Progress
from launcher.config.serialize import code_name
from launcher.data.batches import Batches, MicroBatch, layer_seeds
from launcher.distributed.stop_sync import PollRequests, StoppedError, StopSync, no_requests
from launcher.errors import NotFiniteError, UserError
from launcher.training.evaluation import evaluate, score_samples
from launcher.training.metrics import EpochReport, LossTracker, StepReport
from launcher.training.network import names_of, upcast
from launcher.training.state import TrainContext, average_buffers, put_back
from launcher.training.step import seed_layers, train_step
from launcher.training.trial_passes import explain_torch_error
from launcher.utils.text import some

MOST_SKIPPED = 20  # steps in a row without an update, before the run stops
FIRST_PREDICTIONS = 5  # images whose predicted classes are shown after the first step


@dataclass(frozen=True)
class SavePoint:
    """All ranks stand between the same two steps: their state can be saved, and ends if `stops`."""

    progress: Progress
    stops: bool = False


Event = StepReport | EpochReport | SavePoint


def fit(
    ctx: TrainContext, start: Progress = START, poll_requests: PollRequests = no_requests
) -> Iterator[Event]:
    """Train from `start` on: a `StepReport` at each log interval, an `EpochReport` per epoch.

    After each step `poll_requests` says whether this rank wants to stop, and whether it wants to
    save; a `SavePoint` follows if any rank wants one, or if the plan has one there. If the ranks
    agree to stop during an evaluation, it is discarded, and the resumed run repeats it. Every rank
    must run the generator to its end, since reports add sums over the ranks. Raises
    `NotFiniteError` when the loss or a parameter is not finite.
    """
    plan, state, patience, progress = ctx.plan, ctx.state, ctx.recipe.patience, start
    batches = make_batches(ctx)
    stop_sync = StopSync(ctx.sum_over_ranks, plan.world_size, ctx.accelerator.device, poll_requests)
    state.network.train()
    for epoch in range(start.epochs + 1, plan.last_epoch + 1):
        if progress.has_waited(patience):
            return
        tracker = yield from train_epoch(ctx, batches, epoch, progress, stop_sync)
        if tracker is None:
            return
        refuse_unfrozen(ctx)
        last_step = plan.epoch_steps(epoch)[-1]
        # The evaluation averages the running statistics over the ranks. Where it is stopped that is
        # undone: the resumed run averages them, and to do so twice does not give the same bits.
        buffers = [buffer.clone() for buffer in state.eval_model.buffers()]
        try:
            report, progress = evaluate_epoch(ctx, epoch, tracker, progress, stop_sync)
        except StoppedError:
            for buffer, value in zip(state.eval_model.buffers(), buffers, strict=True):
                buffer.copy_(value)
            yield SavePoint(progress_within(epoch, last_step, tracker, progress), True)
            return
        yield report
        if plan.is_saved_after_epoch(epoch, is_last=report.ends_training):
            yield SavePoint(progress)


def train_epoch(
    ctx: TrainContext,
    batches: Batches,
    epoch: int,
    start: Progress = START,
    stop_sync: StopSync | None = None,
) -> Generator[StepReport | SavePoint, None, LossTracker | None]:
    """Train one epoch, or what `start` leaves of it; return its measurements.

    Returns None where the ranks agreed to stop before its end.
    """
    recipe, plan, state, device = ctx.recipe, ctx.plan, ctx.state, ctx.accelerator.device
    is_resumed = start.step >= plan.epoch_steps(epoch).start
    tracker = LossTracker(epoch, device, ctx.gather, start if is_resumed else START)
    rank = ctx.accelerator.process_index
    seeds = layer_seeds(recipe.seed, epoch, rank, plan.steps_per_epoch)
    for step, micro_batches in in_data_phase(ctx, batches.epoch(epoch, after=start.step)):
        with annotated_errors(ctx, step):
            seed_layers(seeds[(step - 1) % plan.steps_per_epoch], device)
            logits, updated = train_step(ctx, micro_batches, step, tracker)
            state.skips_in_a_row = 0 if updated else state.skips_in_a_row + 1
            stops, saves = stop_sync.after_step() if stop_sync else no_requests()
            saves = saves or stops or plan.is_saved_after_step(step)
            is_reported = saves or plan.is_reported(step)
            report = tracker.report(step, state.learning_rate) if is_reported else None
        if report is not None:
            refuse_nonfinite_loss(ctx, tracker, report)
        is_last = step == plan.epoch_steps(epoch)[-1]
        # After a rollback each repeated step is checked, so that the next one finds the very step.
        is_repeated = step <= max(ctx.skip_steps, default=0)
        if saves or is_last or is_repeated:
            refuse_nonfinite_parameters(ctx, step)
        if report is not None:
            yield replace(report, first_predictions=first_classes(logits)) if step == 1 else report
        if saves:
            yield SavePoint(progress_within(epoch, step, tracker, start), stops)
        if stops:
            return None
    return tracker


def evaluate_epoch(
    ctx: TrainContext, epoch: int, tracker: LossTracker, before: Progress, stop_sync: StopSync
) -> tuple[EpochReport, Progress]:
    """Evaluate what an epoch has trained; also returns where the training then stands.

    Raises `StoppedError` where the ranks agree to stop.
    """
    recipe, plan, state, images = ctx.recipe, ctx.plan, ctx.state, ctx.data.evaluated
    step = plan.epoch_steps(epoch)[-1]
    loss, images_per_second = tracker.epoch()
    average_buffers(state.eval_model, ctx.accelerator)
    evaluation = evaluate(ctx, images, stop_sync=stop_sync)
    # Counts of images, so that every rank decides alike.
    progress = before.after_epoch(epoch, step, evaluation.accuracy, recipe.min_delta)
    is_last = epoch == plan.last_epoch or progress.has_waited(recipe.patience)
    has_views = recipe.views is not None and is_last
    evaluation_tta = evaluate(ctx, images, recipe.views, stop_sync) if has_views else None
    report = EpochReport(
        epoch=epoch,
        step=step,
        train_loss=loss,
        # Not the optimizer's: in a run resumed before this evaluation it has not been set yet.
        learning_rate=state.learning_rate_at(plan.fraction(step), recipe.schedule),
        images_per_second=images_per_second,
        seconds=tracker.seconds,
        evaluation=evaluation,
        evaluated_on=ctx.data.evaluated_on,
        probabilities=score_samples(ctx),
        evaluation_tta=evaluation_tta,
        uncertain=recipe.uncertain,
        ends_training=is_last,
    )
    return report, progress


def make_batches(ctx: TrainContext) -> Batches:
    """This rank's micro-batches of all steps."""
    rank = ctx.accelerator.process_index
    # Mixing turns the targets into probabilities of classes. A loss of torch then divides by the
    # number of images, and no longer by the sum of their classes' weights.
    weights = None if ctx.recipe.data.mix else ctx.loss.class_weights
    return Batches(ctx.data.train, ctx.recipe, ctx.plan, ctx.normalize, rank, weights)


def in_data_phase(
    ctx: TrainContext, steps: Iterator[tuple[int, list[MicroBatch]]]
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Mark the making of batches for a profiler."""
    while True:
        with ctx.phase("data"):
            item = next(steps, None)
        if item is None:
            return
        yield item


def warm_up_ddp(ctx: TrainContext) -> None:
    """Run one micro-batch forward and backward, and discard the gradients.

    After its first backward pass DDP reorders the gradients that it sums over the ranks, and from
    three ranks on the order decides how a sum is rounded. Called before a checkpoint is restored,
    so that the resumed run sums in the order of the uninterrupted one.
    """
    if ctx.plan.world_size > 1:
        _, micro_batches = next(iter(make_batches(ctx).epoch(1)))
        images, targets = micro_batches[-1].images, micro_batches[-1].targets
        ctx.state.network.train()
        logits = upcast(ctx.state.ddp_model(images))
        ctx.loss(logits, targets, images).backward()  # type: ignore[no-untyped-call]
        ctx.state.optimizer.zero_grad()


def forget_passes(ctx: TrainContext) -> None:
    """Make DDP forget passes without communication, which were tried before the training.

    Where parameters may be unused, it notes which of them any pass has used, until gradients travel
    next. That would be in the first step, which may use others, and be refused for it.
    """
    if ctx.plan.world_size > 1 and ctx.recipe.unused_parameters == "allow":
        with put_back(ctx):
            for parameter in ctx.state.network.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            warm_up_ddp(ctx)


@contextmanager
def annotated_errors(ctx: TrainContext, step: int) -> Iterator[None]:
    """Note where the training is, for whoever has to explain an exception of this step."""
    ctx.state.current_step = step
    try:
        yield
    except Exception as error:
        if refusal := explain_torch_error(error, f"in step {step}"):
            raise refusal from None
        error.add_note(f"in step {step} (epoch {ctx.plan.epoch_of(step)})")
        raise
    ctx.state.current_step = None


def progress_within(epoch: int, step: int, tracker: LossTracker, before: Progress) -> Progress:
    """Where the training stands after a step of an epoch that is not evaluated yet.

    `before` is the progress at any earlier moment of the training.
    """
    return replace(
        before,
        step=step,
        epochs=epoch - 1,
        epoch_loss_sum=tracker.loss_sum,
        epoch_images=tracker.images,
    )


def advice(ctx: TrainContext) -> str:
    """What can be tried against numbers that are not finite."""
    recipe, tries = ctx.recipe, ["a lower rate"]
    tries += ["clip_norm=1"] * (recipe.clip_norm is None)
    is_fp16 = str(recipe.precision or ctx.accelerator.mixed_precision).endswith("fp16")
    tries += ["precision=bf16"] * is_fp16 + ["on_nan=skip"] * (recipe.on_nan == "stop")
    return f"what was saved before is kept; try {' or '.join(tries)}"


def refuse_nonfinite_loss(ctx: TrainContext, tracker: LossTracker, report: StepReport) -> None:
    """Raise `NotFiniteError` before a state that is not finite can replace a good one."""
    bad, plan = tracker.first_nonfinite_step, ctx.plan
    if bad is not None:
        rate = ctx.state.learning_rate_at(plan.fraction(bad), ctx.recipe.schedule)
        raise NotFiniteError(
            f"the loss is not finite at step {bad} (epoch {plan.epoch_of(bad)}, learning rate "
            f"{rate:g}, gradient norm {report.gradient_norm} at step {report.step}); {advice(ctx)}",
            bad,
        )
    skips = ctx.state.skips_in_a_row
    if skips >= MOST_SKIPPED:
        raise NotFiniteError(
            f"the gradient was not finite in each of the {skips} steps up to "
            f"{report.step}; {advice(ctx)}",
            report.step,
        )


def refuse_nonfinite_parameters(ctx: TrainContext, step: int) -> None:
    """Raise `NotFiniteError` where a gradient spoilt the parameters, though its loss was finite.

    Called where the device is waited for anyway, before a state is saved or evaluated, and in the
    steps that are repeated after a rollback. With on_nan=skip no such gradient is applied, so if
    it happens all the same, the run stops.
    """
    is_bad = ~ctx.state.largest_parameter().isfinite()
    if float(ctx.sum_over_ranks(is_bad.float())) > 0:  # every rank takes the same way
        raise NotFiniteError(
            f"a parameter is not finite after step {step} (epoch {ctx.plan.epoch_of(step)}, "
            f"learning rate {ctx.state.learning_rate:g}): the gradient of this step or of one "
            f"before was not; {advice(ctx)}",
            step,
        )


def refuse_unfrozen(ctx: TrainContext) -> None:
    """Raise `UserError` where code of the network has begun to train what was frozen.

    The optimizer does not have it, and DDP does not sum its gradients: it would stay as it is.
    """
    if unfrozen := [p for p in ctx.state.frozen if p.requires_grad]:
        names = names_of(ctx.state.network, unfrozen)
        raise UserError(
            f"{code_name(ctx.recipe.model)}, which begins to train {some(names)} later",
            expected="the same parameters in all of the training: the optimizer has no others",
            instead="leave out requires_grad_(False), and give them a group of the optimizer "
            "whose own schedule is 0 at first, as launcher/training/optimizers.py shows",
        )


def first_classes(logits: Tensor) -> tuple[int, ...]:
    """The predicted classes of the first images of a batch."""
    return tuple(logits[:FIRST_PREDICTIONS].argmax(dim=1).tolist())
