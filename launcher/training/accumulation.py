"""`accumulate=auto`: the smallest number of forward passes of a step that fits into memory."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.data.augment import resized
from launcher.distributed.accelerator import count_over_ranks
from launcher.errors import UserError
from launcher.training.network import upcast
from launcher.training.state import TrainContext, put_back
from launcher.utils.text import count


def choose_passes(ctx: TrainContext) -> TrainContext:
    """Find the number by trying; all ranks find the same, and the state is restored.

    It is doubled until it fits, and then bisected. This assumes that if n passes fit, more do.
    Raises `UserError` where not even single images fit.
    """
    most = ctx.plan.batch_size // ctx.plan.world_size

    def fits(passes: int) -> bool:
        size = -(-ctx.plan.batch_size // (ctx.plan.world_size * passes))
        return not count_over_ranks(ctx.accelerator, not pass_fits(ctx, size))

    passes = smallest(fits, most)
    if passes is None:
        raise UserError(
            f"accumulate=auto, but {count(most, 'pass')} of one image do not fit into memory",
            expected="a network that can train on one image here",
            instead="train a smaller network, or on devices with more memory",
        )
    note = f"accumulate=auto: {count(passes, 'forward pass')} of each step on each rank"
    if passes > 1 and any(isinstance(m, _BatchNorm) for m in ctx.state.network.modules()):
        note += (
            "; BatchNorm normalizes by the images of one pass, so another number would be another "
            "training"
        )
    return replace(
        ctx,
        recipe=replace(ctx.recipe, accumulate=passes),
        plan=replace(ctx.plan, accumulate=passes),
        notes=(*ctx.notes, note),
    )


def smallest(fits: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 1 to `most` that fits, where all above it do; None if none does."""
    too_few, enough = 0, 1
    while not fits(enough):
        if enough >= most:
            return None
        too_few, enough = enough, min(2 * enough, most)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def pass_fits(ctx: TrainContext, size: int) -> bool:
    """Whether two forward and backward passes of `size` images fit, beside all that a step keeps.

    Without communication, so that a rank that fails leaves no other one waiting. Whatever else
    goes wrong is raised.
    """
    state, train = ctx.state, ctx.data.train
    places = torch.arange(size, device=train.labels.device) % len(train)
    on_gpu = ctx.accelerator.device.type == "cuda"
    try:
        with put_back(ctx), ctx.accelerator.no_sync(state.ddp_model):
            state.network.train()
            for parameter in state.network.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            state.optimizer.step()  # which makes its state
            for _ in range(2):  # the gradients of the first are there in the second
                pixels = resized(train.pixels(places), ctx.plan.largest_resolution)
                images, labels = ctx.normalize(pixels), train.labels[places]
                targets = one_hot(labels, len(train.classes)).to(images)
                targets = targets if ctx.recipe.data.mix else labels
                with ctx.accelerator.autocast():
                    logits = upcast(state.ddp_model(images))
                    loss = ctx.loss(logits, targets, images)
                loss.backward()  # type: ignore[no-untyped-call]
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        state.optimizer.zero_grad()
        if on_gpu:
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of a CPU, for which torch has no type of its own."""
    known = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or "can't allocate memory" in str(error)
