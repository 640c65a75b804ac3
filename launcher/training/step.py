"""One training step: forward, backward, and the optimizer's update.

This rank's pieces of the global batch run forward and backward so that the gradients add up to that
of the mean loss over the whole global batch; then the optimizer steps at the rate that was set.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.data.batches import MicroBatch
from launcher.training.metrics import LossTracker
from launcher.training.state import TrainState, upcast


@dataclass(frozen=True)
class Job:
    """What is to be done, in which numbers, and where."""

    recipe: Recipe
    plan: Plan
    accelerator: Accelerator
    skip_steps: frozenset[int] = frozenset()  # steps whose update is skipped, after a roll back

    def over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""
        return self.accelerator.reduce(values, reduction="sum")


def train_step(
    job: Job, learner: TrainState, pieces: list[MicroBatch], step: int, tracker: LossTracker
) -> tuple[Tensor, bool]:
    """One optimizer step; returns the logits of its first piece, and whether it was taken."""
    accelerator = job.accelerator
    images = job.plan.step_images(step)
    may_skip = job.recipe.on_nan == "skip" or step in job.skip_steps
    before = [buffer.clone() for buffer in learner.network.buffers()] if may_skip else []
    first_logits = None
    for piece in pieces:
        waits = piece is not pieces[-1]  # gradients travel between ranks once per step
        with accelerator.no_sync(learner.wrapped) if waits else nullcontext():
            logits = upcast(learner.wrapped(piece.images))
            loss = job.recipe.loss(logits, piece.targets)
            # DDP averages gradients over the ranks; the world size turns that into their sum.
            scale = job.plan.world_size * (images if job.recipe.sum_loss else 1)
            backward(loss, piece.share * scale, accelerator)
        tracker.add(step, loss, piece.share * images)
        first_logits = logits if first_logits is None else first_logits
    assert first_logits is not None
    learner.drop_resting_gradients()
    norm = gradient_norm(job, learner, step)
    is_taken = update(job, learner, step, norm)
    if is_taken:
        tracker.count(images, norm)
    else:
        tracker.drop(step)
        for buffer, value in zip(learner.network.buffers(), before, strict=True):
            buffer.copy_(value)  # running statistics saw the bad activations
    return first_logits, is_taken


def gradient_norm(job: Job, learner: TrainState, step: int) -> Tensor | None:
    """Clip the gradient; its norm before that, which is also measured where the step is reported.

    It is the same on all ranks.
    """
    clip, skips = job.recipe.clip_norm, job.recipe.on_nan == "skip"
    if clip is None and not skips and not job.plan.is_reported(step):
        return None
    parameters = learner.network.parameters()
    return job.accelerator.clip_grad_norm_(parameters, math.inf if clip is None else clip)


def update(job: Job, learner: TrainState, step: int, norm: Tensor | None) -> bool:
    """Let the optimizer step, unless the recipe wants this step skipped; whether it did."""
    accelerator, optimizer = job.accelerator, learner.optimizer
    is_skipped = step in job.skip_steps
    if job.recipe.on_nan == "skip" and norm is not None:
        is_skipped = not math.isfinite(float(norm))  # waits for the device
    if not is_skipped or accelerator.scaler is not None:  # the scaler skips by itself, and adapts
        optimizer.step()
    optimizer.zero_grad()
    average = None if is_skipped else learner.average
    if average is not None and not accelerator.optimizer_step_was_skipped:
        average.update_parameters(learner.network)
    return not is_skipped


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
