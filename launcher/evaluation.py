"""The test images, each exactly once, over all ranks; and what the samples among them look like."""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from launcher.agreement import Agreement, StoppedError
from launcher.batches import Normalise, piece_bounds
from launcher.datasets import ImageSet
from launcher.errors import UserError
from launcher.metrics import Evaluation, Tally, sample_indices
from launcher.model import evaluating, widened
from launcher.recipe import Loss, Views
from launcher.settings import code_name
from launcher.step import Job

# Images per rank and forward pass of an evaluation; on a CPU, as many as its caches hold.
EVALUATION_BATCH, EVALUATION_BATCH_ON_CPU = 1000, 250


def evaluate(
    job: Job,
    network: nn.Module,
    test: ImageSet,
    normalise: Normalise,
    views: Views | None = None,
    agreement: Agreement | None = None,
) -> Evaluation:
    """Evaluate each test image exactly once, on whichever rank; by its `views` where given.

    Raises `StoppedError` where the ranks agree to stop: they are asked before each batch that all
    of them have.
    """
    accelerator = job.accelerator
    tally = Tally(len(test.classes), accelerator.device)
    start, stop = piece_bounds(len(test), accelerator.num_processes, accelerator.process_index)
    on_cpu = accelerator.device.type == "cpu"
    size = EVALUATION_BATCH_ON_CPU if on_cpu else EVALUATION_BATCH
    with evaluating(network) as score, accelerator.autocast():
        for first in range(start, stop, size):
            is_shared = first - start < len(test) // accelerator.num_processes
            if agreement and is_shared and agreement.stops():
                raise StoppedError
            part = slice(first, min(first + size, stop))
            images = normalise(test.images[part])
            logits = widened(views(score, images) if views else score(images))
            labels = test.labels[part]
            tally.add(logits, labels, job.recipe.loss(logits, labels))
    evaluation = tally.evaluation(job.over_ranks(tally.counts))
    assert evaluation.images == len(test), "an image was counted twice or not at all"
    return evaluation


def rehearse(job: Job, network: nn.Module, test: ImageSet, normalise: Normalise) -> None:
    """Try loss and views as evaluations use them: what they refuse is known before training.

    Raises `UserError` for views that return no scores, and a loss that is no mean over the batch.
    """
    recipe, device = job.recipe, job.accelerator.device
    images = normalise(test.images[:1].to(device).expand(2, -1, -1, -1))
    labels = test.labels[:1].to(device).expand(2)
    with evaluating(network), job.accelerator.autocast():
        logits = network.forward(images)
        if recipe.views is not None:
            viewed = _tried(recipe.views, network.forward, images)
            _refuse_unless(viewed.shape == logits.shape, recipe.views, "a score for each class")
        two = _tried(recipe.loss, widened(logits), labels)
        one = _tried(recipe.loss, widened(logits[:1]), labels[:1])
        _refuse_unless(two.ndim == 0, recipe.loss, "one number")
        # An image that is there twice has its own loss for a mean.
        _refuse_unless(not abs(two - one) > 0.01 * abs(one), recipe.loss, "the mean, not the sum")
        if job.plan.pieces > 1:
            _refuse_weighted(recipe.loss, widened(logits[:1]), job.plan.pieces)


def _refuse_weighted(loss: Loss, logits: Tensor, pieces: int) -> None:
    """Refuse a mean that the pieces of a batch do not add up to, as with class weights.

    It divides by the sum of the weights of a piece, which is another one on each rank.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    whole = loss(logits.expand(len(classes), -1), classes)
    each = torch.stack([loss(logits, label[None]) for label in classes]).mean()
    if whole.isfinite() and not abs(whole - each) <= 0.001 * abs(whole):
        raise UserError(
            f"{code_name(loss)} over {pieces} pieces of a batch, of which it is not the mean",
            expected="the mean of the losses of single images, which ranks and passes can add up",
            instead="with class weights, multiply them into cross_entropy(..., reduction='none') "
            "and return the mean",
        )


def _tried(function: Callable[..., Any], *arguments: Any) -> Tensor:
    """What a function of the recipe makes of two test images."""
    try:
        return torch.as_tensor(function(*arguments))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise _unfit(function, f"fails on two test images: {error}", "scores or a loss") from error


def _refuse_unless(holds: object, function: Callable[..., Any], expected: str) -> None:
    if not holds:
        raise _unfit(function, "returns something else for two test images", expected)


def _unfit(function: Callable[..., Any], what: str, expected: str) -> UserError:
    return UserError(
        f"{code_name(function)} {what}",
        expected=expected,
        instead="compare it with cross_entropy of torch.nn.functional, or launcher/views.py",
    )


def score_samples(
    job: Job, network: nn.Module, test: ImageSet, normalise: Normalise
) -> NDArray[Any]:
    """Class probabilities `(36, classes)` of the fixed sample images."""
    chosen = test.images[sample_indices(len(test))]
    with evaluating(network), job.accelerator.autocast():
        # Not through a compiled call: these few images are not worth another compilation.
        return widened(network.forward(normalise(chosen))).softmax(dim=1).cpu().numpy()
