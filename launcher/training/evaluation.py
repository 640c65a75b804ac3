"""Test or validation images, each exactly once, over all ranks; and the samples among them."""

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from launcher.config.slots import Views
from launcher.data.batches import shard_bounds
from launcher.data.sources import ImageSet
from launcher.distributed.stop_sync import StoppedError, StopSync
from launcher.training.metrics import ConfusionAccumulator, Evaluation, OutcomeTable, sample_indices
from launcher.training.model import upcast
from launcher.training.state import TrainContext, evaluating

# Images per rank and forward pass of an evaluation; on a CPU, as many as its caches hold.
EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU = 1000, 250


def evaluate(
    ctx: TrainContext,
    images: ImageSet,
    views: Views | None = None,
    stop_sync: StopSync | None = None,
) -> Evaluation:
    """Evaluate each of `images` exactly once, on whichever rank; by its `views` where given.

    Without views, the outcome of each image is kept.

    Raises `StoppedError` where the ranks agree to stop: they are asked before each batch that all
    of them have.
    """
    accelerator, count = ctx.accelerator, len(images)
    accumulator = ConfusionAccumulator(
        len(images.classes), accelerator.device, ctx.loss.class_weights
    )
    table = OutcomeTable(count, accelerator.device) if views is None else None
    start, stop = shard_bounds(count, accelerator.num_processes, accelerator.process_index)
    on_cpu = accelerator.device.type == "cpu"
    size = EVALUATION_BATCH_ON_CPU if on_cpu else EVALUATION_BATCH
    parts = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
    pixels = images.in_parts(parts)
    with evaluating(ctx.state.eval_model) as score, accelerator.autocast():
        for part in parts:
            first = part.start
            all_ranks_have_it = first - start < count // accelerator.num_processes
            if stop_sync and all_ranks_have_it and stop_sync.stops():
                raise StoppedError
            batch, labels = ctx.normalize(next(pixels)), images.labels[part]
            logits = upcast(views(score, batch) if views else score(batch))
            accumulator.add(logits, labels, ctx.loss(logits, labels, batch))
            if table:
                table.add(first, logits, labels)
    evaluation = accumulator.evaluation(ctx.sum_over_ranks(accumulator.counts))
    if table:
        outcomes = ctx.sum_over_ranks(table.values).cpu().numpy()
        evaluation = replace(evaluation, outcomes=outcomes)
    assert evaluation.images == count, "an image was counted twice or not at all"
    return evaluation


def score_samples(ctx: TrainContext) -> NDArray[Any]:
    """Class probabilities `(36, classes)` of the fixed sample images."""
    images, network = ctx.data.evaluated, ctx.state.eval_model
    chosen = ctx.normalize(images.pixels(sample_indices(len(images))))
    with evaluating(network), ctx.accelerator.autocast():
        # Not through a compiled call: these few images are not worth another compilation.
        return upcast(network.forward(chosen)).softmax(dim=1).cpu().numpy()
