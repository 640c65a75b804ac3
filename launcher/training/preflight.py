"""What a recipe's own functions refuse is known before training, and before anything is written.

Augmentations, mixing, loss and views are tried on two images. The loss must be a mean: where the
micro-batches do not add up to the whole batch, N processes would not equal one.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from launcher.config.plan import Plan
from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name
from launcher.config.slots import DRAWS_PER_AUGMENTATION, Draws, Loss
from launcher.data.augment import as_augmentation
from launcher.errors import UserError
from launcher.training.model import upcast
from launcher.training.state import TrainContext, evaluating
from launcher.utils.text import count

MOST_CLASSES = 100  # whose losses are compared
_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def preflight(ctx: TrainContext) -> None:
    """Try what the recipe does with images; raises `UserError` that names the function."""
    recipe, images, network = ctx.recipe, ctx.data.test.images, ctx.state.eval_model
    two = images[:1].repeat(2, 1, 1, 1)
    pictures = ctx.normalize(two)
    _try_augmentations(recipe, two.permute(0, 3, 1, 2))
    if recipe.data.mix:
        with _no_global_draws(recipe.data.mix, "the generator that it is given"):
            mixed, share = _tried(recipe.data.mix, pictures, pictures, numpy.random.default_rng(0))
        fits = isinstance(share, float | int) and 0 <= share <= 1
        _refuse_unless(fits, recipe.data.mix, "a weight in [0, 1] beside the images")
        _refuse_unless(mixed.shape == pictures.shape, recipe.data.mix, "images of the same shape")
    with evaluating(network), ctx.accelerator.autocast():
        logits = network.forward(pictures)  # not through a compiled call
        if recipe.views:
            viewed = _tried(recipe.views, network.forward, pictures)
            _refuse_unless(viewed.shape == logits.shape, recipe.views, "a score for each class")
        _try_loss(recipe.loss, upcast(logits[:1]), ctx.plan.num_micro_batches)
        _try_one_image(ctx.plan, network, pictures[:1])


def _try_one_image(plan: Plan, network: nn.Module, picture: Tensor) -> None:
    """BatchNorm of single values refuses one image, which may be all that the last batch leaves."""
    last = plan.step_images(plan.steps_per_epoch)
    if last < 2 * plan.num_micro_batches:
        try:
            deepcopy(network).train().forward(picture)
        except ValueError as error:
            raise UserError(
                f"a last batch of {count(last, 'image')} over "
                f"{count(plan.num_micro_batches, 'micro-batch')}: {error}",
                expected="two images for each, which BatchNorm needs",
                instead="type another data.batch_size",
            ) from error


def _try_augmentations(recipe: Recipe, images: Tensor) -> None:
    """Each on `(2, c, h, w)`: on one image with the smallest draws, on the other the largest."""
    extremes = torch.tensor([[0.0], [1 - 2**-24]], device=images.device)
    draws = extremes.repeat(1, DRAWS_PER_AUGMENTATION)
    for augmentation in recipe.data.augment:
        with _no_global_draws(augmentation, "draws.fresh, the numbers of each image"):
            function = as_augmentation(augmentation)
            result = _tried(function, images, Draws(draws, draws, epoch=1), name=augmentation)
        fits = result.shape == images.shape and result.dtype == images.dtype
        _refuse_unless(fits, augmentation, "images of the same shape and type")


def _try_loss(loss: Loss, logits: Tensor, num_micro_batches: int) -> None:
    """Compare the loss of a batch with those of its images: the scores `(1, classes)` for each."""
    classes = logits.shape[1]
    # Each class, and not as many labels as classes: one could be taken for the other.
    size = classes + 1 if classes <= MOST_CLASSES else MOST_CLASSES
    labels = torch.arange(size, device=logits.device) % classes
    whole = _tried(loss, logits.expand(size, -1), labels)
    _refuse_unless(torch.is_tensor(whole) and whole.ndim == 0, loss, "one number")
    if not whole.isfinite():
        return  # training stops at it, or skips it, as the recipe says
    each = [_tried(loss, logits, label[None]) for label in labels]
    mean = float(torch.stack(each).mean())
    is_sum = mean != 0 and math.isclose(whole, mean * size, rel_tol=1e-3)
    _refuse_unless(not is_sum, loss, "the mean over the images, not the sum")
    # As class weights in cross_entropy: it divides by their sum, another one in each micro-batch.
    if num_micro_batches > 1 and not math.isclose(whole, mean, rel_tol=1e-3, abs_tol=1e-6):
        raise UserError(
            f"{code_name(loss)}, which is not the mean over {num_micro_batches} micro-batches",
            expected="the mean of the losses of single images, which ranks and passes can add up",
            instead="with class weights, multiply them into cross_entropy(..., reduction='none') "
            "and return the mean",
        )


@contextmanager
def _no_global_draws(function: Callable[..., Any], instead: str) -> Iterator[None]:
    """Refuse a function that draws from a global generator, whose state no checkpoint holds.

    Ranks and resumed runs would see other images than 1 rank that was never interrupted.
    """
    before = _global_states()
    yield
    used = [name for name, state in _global_states().items() if state != before[name]]
    if used:
        raise UserError(
            f"{code_name(function)} draws from the global generator of {' and '.join(used)}",
            expected="the same images on any number of ranks, and after a resume",
            instead=f"use {instead}, or a class of torchvision.transforms.v2 without brackets",
        )


def _global_states() -> dict[str, Any]:
    """Of the generators that Python code draws from when it names none, in comparable form."""
    kind, keys, *rest = numpy.random.get_state()
    states = [torch.default_generator.get_state().numpy().tobytes()]
    if torch.cuda.is_available():
        states += [torch.cuda.get_rng_state().numpy().tobytes()]
    return {
        "torch": states,
        "numpy": (kind, numpy.asarray(keys).tobytes(), *rest),
        "Python": random.getstate(),
    }


def _tried(function: Callable[..., Any], *arguments: Any, name: Any = None) -> Any:
    try:
        return function(*arguments)
    except _FAULTS as error:
        raise _unfit(
            name or function, f"fails on two images: {error}", "code that takes them"
        ) from error


def _refuse_unless(holds: bool, function: Callable[..., Any], expected: str) -> None:
    if not holds:
        raise _unfit(function, "returns something else for two images", expected)


def _unfit(function: Callable[..., Any], what: str, expected: str) -> UserError:
    return UserError(
        f"{code_name(function)} {what}",
        expected=expected,
        instead="compare it with launcher/data/augment.py or launcher/training/tta.py, "
        "or for a loss with cross_entropy of torch.nn.functional",
    )
