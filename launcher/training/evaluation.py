"""The test images, each exactly once, over all ranks; and what the samples among them look like."""

from typing import Any

from numpy.typing import NDArray
from torch import nn

from launcher.config.slots import Views
from launcher.data.batches import Normalize, shard_bounds
from launcher.data.sources import ImageSet
from launcher.distributed.stop_sync import StoppedError, StopSync
from launcher.training.metrics import ConfusionAccumulator, Evaluation, sample_indices
from launcher.training.state import evaluating, upcast
from launcher.training.step import Job

# Images per rank and forward pass of an evaluation; on a CPU, as many as its caches hold.
EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU = 1000, 250


def evaluate(
    job: Job,
    network: nn.Module,
    test: ImageSet,
    normalize: Normalize,
    views: Views | None = None,
    agreement: StopSync | None = None,
) -> Evaluation:
    """Evaluate each test image exactly once, on whichever rank; by its `views` where given.

    Raises `StoppedError` where the ranks agree to stop: they are asked before each batch that all
    of them have.
    """
    accelerator = job.accelerator
    accumulator = ConfusionAccumulator(len(test.classes), accelerator.device)
    start, stop = shard_bounds(len(test), accelerator.num_processes, accelerator.process_index)
    on_cpu = accelerator.device.type == "cpu"
    size = EVALUATION_BATCH_ON_CPU if on_cpu else EVALUATION_BATCH
    with evaluating(network) as score, accelerator.autocast():
        for first in range(start, stop, size):
            is_shared = first - start < len(test) // accelerator.num_processes
            if agreement and is_shared and agreement.stops():
                raise StoppedError
            part = slice(first, min(first + size, stop))
            images = normalize(test.images[part])
            logits = upcast(views(score, images) if views else score(images))
            labels = test.labels[part]
            accumulator.add(logits, labels, job.recipe.loss(logits, labels))
    evaluation = accumulator.evaluation(job.over_ranks(accumulator.counts))
    assert evaluation.images == len(test), "an image was counted twice or not at all"
    return evaluation


def score_samples(
    job: Job, network: nn.Module, test: ImageSet, normalize: Normalize
) -> NDArray[Any]:
    """Class probabilities `(36, classes)` of the fixed sample images."""
    chosen = test.images[sample_indices(len(test))]
    with evaluating(network), job.accelerator.autocast():
        # Not through a compiled call: these few images are not worth another compilation.
        return upcast(network.forward(normalize(chosen))).softmax(dim=1).cpu().numpy()
