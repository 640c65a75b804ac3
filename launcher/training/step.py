"""One optimizer step, from a batch to new parameters.

The learning rate of the step is set; the micro-batches of this rank run forward and backward, so
that the gradients add up to that of the mean loss over the whole global batch; then the optimizer
steps.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from launcher.data.batches import MicroBatch
from launcher.training.metrics import LossTracker
from launcher.training.model import unused_parameters
from launcher.training.network import names_of, upcast
from launcher.training.state import TrainContext
from launcher.utils.text import some

Gradients = dict[nn.Parameter, tuple[Tensor, int]]


def train_step(
    ctx: TrainContext, micro_batches: list[MicroBatch], step: int, tracker: LossTracker
) -> tuple[Tensor, bool]:
    """One step; returns the logits of its first micro-batch, and whether parameters changed."""
    recipe, accelerator, state = ctx.recipe, ctx.accelerator, ctx.state
    state.set_learning_rates(ctx.plan.fraction(step), recipe.schedule)
    images = ctx.plan.step_images(step)
    # DDP divides the sum of the ranks' gradients by the world size; the scale takes that back. A
    # micro-batch's weight is its share of the global batch, so the weighted losses of all ranks add
    # up to the mean loss of the global batch; times its images, with sum_loss, to their sum.
    scale = ctx.plan.world_size * (images if recipe.sum_loss else 1)
    may_skip = recipe.on_nan == "skip" or step in ctx.skip_steps
    buffers_before = [buffer.clone() for buffer in state.network.buffers()] if may_skip else []
    first_logits = None
    for micro_batch in micro_batches:
        # Gradients travel between ranks once per step: in its last backward pass.
        is_last = micro_batch is micro_batches[-1]
        before = gradients_before(ctx) if is_last else {}
        with nullcontext() if is_last else accelerator.no_sync(state.ddp_model):
            with ctx.phase("forward"):
                logits = upcast(state.ddp_model(micro_batch.images))
                loss = ctx.loss(logits, micro_batch.targets, micro_batch.images)
            with ctx.phase("backward"):
                weight = micro_batch.weight * scale
                weighted = loss if weight == 1 else loss * weight
                if accelerator.scaler is None:  # accelerator.backward's division by 1 costs 1 %
                    weighted.backward()  # type: ignore[no-untyped-call]
                else:
                    accelerator.backward(weighted)
        tracker.add(step, loss, micro_batch.weight * images)
        first_logits = logits if first_logits is None else first_logits
    refuse_unused_parameters(ctx, step, before)
    with ctx.phase("update"):
        state.drop_frozen_gradients()
        norm = clip_gradients(ctx, step)
        # Parameters stay as they are in a step that a rollback leaves out, with on_nan=skip where
        # the gradient is not finite, and in fp16 where it overflows. The gradient scaler has to see
        # the last two: it skips them itself, and lowers its scale.
        is_left_out = step in ctx.skip_steps
        has_bad_gradient = False
        if recipe.on_nan == "skip" and norm is not None:
            has_bad_gradient = not math.isfinite(float(norm))  # waits for the device
        is_discarded = is_left_out or has_bad_gradient
        if not is_discarded or (accelerator.scaler is not None and not is_left_out):
            state.optimizer.step()
        elif accelerator.scaler is not None and norm is not None:
            accelerator.scaler.update()  # the clipping has unscaled the gradients
        state.optimizer.zero_grad()
        updated = not (is_discarded or accelerator.optimizer_step_was_skipped)
        if updated and state.ema_model is not None:
            state.ema_model.update_parameters(state.network)
        if not is_discarded:
            tracker.end_step(images, norm)
        else:
            tracker.skip_step(step)
            for buffer, value in zip(state.network.buffers(), buffers_before, strict=True):
                buffer.copy_(value)  # running statistics saw the bad activations
    assert first_logits is not None
    return first_logits, updated


def gradients_before(ctx: TrainContext) -> Gradients:
    """What the earlier passes of a step have left, with how often each was written.

    Only where the last pass is the one in which every parameter needs a gradient: see below.
    """
    if not needs_all_gradients(ctx):
        return {}
    return {p: (p.grad, p.grad._version) for p in trained(ctx) if p.grad is not None}


def refuse_unused_parameters(ctx: TrainContext, step: int, before: Gradients) -> None:
    """Raise `UserError` where the last pass gives a parameter no gradient.

    Which the preflight has not seen. The other ranks would wait for it, or add other numbers to it,
    also where an earlier pass gave it one.
    """
    if needs_all_gradients(ctx):
        unused = [p for p in trained(ctx) if p.requires_grad and is_as_before(p, before)]
        if unused:
            names = names_of(ctx.state.network, unused)
            raise unused_parameters(ctx.recipe, some(names), f"in step {step}")


def needs_all_gradients(ctx: TrainContext) -> bool:
    """Whether DDP waits for the gradient of each parameter."""
    return ctx.plan.world_size > 1 and ctx.recipe.unused_parameters == "refuse"


def trained(ctx: TrainContext) -> Iterator[nn.Parameter]:
    """The parameters that the optimizer changes."""
    return (p for group in ctx.state.optimizer.param_groups for p in group["params"])


def is_as_before(parameter: nn.Parameter, before: Gradients) -> bool:
    """Whether nothing has been added to its gradient, which is one that is not there, or was."""
    kept, version = before.get(parameter, (None, 0))
    return parameter.grad is kept and (kept is None or kept._version == version)


def clip_gradients(ctx: TrainContext, step: int) -> Tensor | None:
    """Clip the gradient to the recipe's norm; returns its norm before that, equal on all ranks.

    It is also measured where the step is reported; None elsewhere.
    """
    clip_norm, skips = ctx.recipe.clip_norm, ctx.recipe.on_nan == "skip"
    if clip_norm is None and not skips and not ctx.plan.is_reported(step):
        return None
    largest = math.inf if clip_norm is None else clip_norm
    return ctx.accelerator.clip_grad_norm_(ctx.state.network.parameters(), largest)


def seed_layers(seed: int, device: torch.device) -> None:
    """Seed the random layers. `torch.manual_seed` does the same but takes 80 microseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
