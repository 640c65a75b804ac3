"""Test or validation images, each exactly once, over all ranks; and the samples among them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.config.slots import Score, Views
from launcher.data.batches import layer_seeds, shard_bounds
from launcher.data.images import ImageSet
from launcher.distributed.stop_sync import StoppedError, StopSync
from launcher.training.metrics import ConfusionAccumulator, Evaluation, OutcomeTable, sample_indices
from launcher.training.network import first_parameter, upcast
from launcher.training.state import TrainContext, evaluating
from launcher.training.step import seed_layers

# Images per rank and forward pass of an evaluation; on a CPU, as many as its caches hold.
EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU = 1000, 250
BEFORE_TRAINING = 0  # the epoch whose random numbers no step draws


def evaluate(
    ctx: TrainContext,
    images: ImageSet,
    views: Views | None = None,
    stop_sync: StopSync | None = None,
) -> Evaluation:
    """Evaluate each of `images` exactly once, on whichever rank.

    With `views`, those of all images are scored, or of those alone that the recipe's `uncertain`
    chooses. Without, the outcome of each image is kept. A network or a loss that draws here, too,
    draws the same each time: a resumed run has not made the steps before.

    Raises `StoppedError` where the ranks agree to stop: they are asked before each batch that all
    of them have.
    """
    accelerator, count = ctx.accelerator, len(images)
    accumulator = ConfusionAccumulator(
        len(images.classes), accelerator.device, ctx.loss.class_weights
    )
    table = OutcomeTable(count, accelerator.device) if views is None else None
    uncertain = ctx.recipe.uncertain if views else None
    _seed(ctx)
    with evaluating(ctx.state.eval_model) as score, accelerator.autocast():
        if views and uncertain is not None:
            scored = score_uncertain(ctx, score, images, views, uncertain, stop_sync)
        else:
            scored = score_all(ctx, score, images, views, stop_sync)
        for part, batch, logits in scored:
            labels = images.labels[part]
            accumulator.add(logits, labels, ctx.loss(logits, labels, batch))
            if table:
                table.add(part.start, logits, labels)
    evaluation = accumulator.evaluation(ctx.sum_over_ranks(accumulator.counts))
    if table:
        outcomes = ctx.sum_over_ranks(table.values).cpu().numpy()
        evaluation = replace(evaluation, outcomes=outcomes)
    assert evaluation.images == count, "an image was counted twice or not at all"
    return evaluation


Scored = Iterator[tuple[slice, Tensor, Tensor]]  # places of images, they themselves, their logits


def score_all(
    ctx: TrainContext,
    score: Score,
    images: ImageSet,
    views: Views | None = None,
    stop_sync: StopSync | None = None,
) -> Scored:
    """This rank's images, batch by batch."""
    for part, pixels in images.in_parts(_parts(ctx, len(images), stop_sync)):
        batch = ctx.normalize(pixels)
        yield part, batch, upcast(views(score, batch) if views else score(batch))


def score_uncertain(
    ctx: TrainContext,
    score: Score,
    images: ImageSet,
    views: Views,
    uncertain: float,
    stop_sync: StopSync | None = None,
) -> Scored:
    """Like `score_all`, but with views for the least certain fraction of the images only.

    Certainty is the margin between the two largest probabilities. A fixed fraction, and not a
    threshold of the margin, makes the shapes known: the chosen images are divided anew among the
    ranks and padded to batches of the first pass's size, so nothing is compiled again. Of equal
    margins, the images that come first are chosen.
    """
    count, device = len(images), ctx.accelerator.device
    kind = upcast(first_parameter(ctx.state.eval_model)).dtype
    # Each rank fills in its own rows, and the others are zero, so that a sum over the ranks is
    # exact and all of them choose alike.
    logits = torch.zeros(count, len(images.classes), dtype=kind, device=device)
    margins, size = torch.zeros(count, device=device), 1
    for part, _, found in score_all(ctx, score, images, stop_sync=stop_sync):
        logits[part], margins[part] = found.to(kind), margin(found)
        size = max(size, len(found))
    order = ctx.sum_over_ranks(margins).argsort(stable=True)
    chosen = order[: max(1, round(uncertain * count))]
    again = torch.zeros_like(logits[: len(chosen)])
    for part in _parts(ctx, len(chosen), stop_sync, size):
        places = chosen[part]
        filled = places.repeat(-(-size // len(places)))[:size]
        batch = ctx.normalize(images.pixels(filled))
        again[part] = upcast(views(score, batch))[: len(places)].to(kind)
    logits[chosen] = ctx.sum_over_ranks(again)
    for part, pixels in images.in_parts(_parts(ctx, count)):
        yield part, ctx.normalize(pixels), logits[part]


def margin(logits: Tensor) -> Tensor:
    """The largest minus the second largest probability: `(n, classes)` -> float32 `(n,)`.

    With a single class, 1.
    """
    largest = logits.float().softmax(dim=1).topk(min(2, logits.shape[1])).values
    return largest[:, 0] - largest[:, 1:].sum(dim=1)


def _parts(
    ctx: TrainContext, count: int, stop_sync: StopSync | None = None, size: int | None = None
) -> Iterator[slice]:
    """The places of this rank's batches among so many images."""
    accelerator = ctx.accelerator
    start, stop = shard_bounds(count, accelerator.num_processes, accelerator.process_index)
    on_cpu = accelerator.device.type == "cpu"
    size = size or (EVALUATION_BATCH_ON_CPU if on_cpu else EVALUATION_BATCH)
    for first in range(start, stop, size):
        all_ranks_have_it = first - start < count // accelerator.num_processes
        if stop_sync and all_ranks_have_it and stop_sync.stops():
            raise StoppedError
        yield slice(first, min(first + size, stop))


def _seed(ctx: TrainContext) -> None:
    """Let layers and losses draw the same numbers each time, whatever has been drawn before."""
    rank = ctx.accelerator.process_index
    (seed,) = layer_seeds(ctx.recipe.seed, BEFORE_TRAINING, rank, steps=1)
    seed_layers(seed, ctx.accelerator.device)


def score_samples(ctx: TrainContext) -> NDArray[Any]:
    """Class probabilities `(36, classes)` of the fixed sample images."""
    images, network = ctx.data.evaluated, ctx.state.eval_model
    chosen = ctx.normalize(images.pixels(sample_indices(len(images))))
    _seed(ctx)
    with evaluating(network), ctx.accelerator.autocast():
        # Not through a compiled call: these few images are not worth another compilation.
        return upcast(network.forward(chosen)).softmax(dim=1).cpu().numpy()
