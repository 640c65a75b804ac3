"""The recipe's loss in the form in which a step calls it: on its device, with what it wants to see.

A loss is called with scores and labels. One that refuses labels and takes class probabilities, as
nn.BCEWithLogitsLoss does, is given one-hot ones; which of both is tried before training. One whose
third required argument is called `images` is given the normalized images, for a teacher.
"""

import inspect
import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss, one_hot

from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name
from launcher.config.settings import children
from launcher.errors import UserError
from launcher.utils.user_code import function_of

MOST_CLASSES = 100  # whose losses are compared


@dataclass(frozen=True)
class BatchLoss:
    """A recipe's loss and what it is called with."""

    function: Any
    takes_images: bool = False
    takes_one_hot: bool = False

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss of a batch; `targets` are labels, or probabilities where images are mixed."""
        if self.takes_one_hot and targets.ndim == 1:
            targets = one_hot(targets, logits.shape[1]).to(logits)
        if self.takes_images:
            return self.function(logits, targets, images)
        return self.function(logits, targets)

    @property
    def class_weights(self) -> Tensor | None:
        """`(classes,)`: what a loss of torch weighs the images by; None if it does not.

        A loss of torch then divides by the sum of the weights of the batch's labels. So that sum,
        and not the number of images, is the weight of a micro-batch in its global batch.
        """
        function = self.function
        if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
            weights, ignored = function.weight, function.ignore_index
        elif isinstance(function, partial) and function.func in (cross_entropy, nll_loss):
            weights = function.keywords.get("weight")
            ignored = function.keywords.get("ignore_index", -1)
        else:
            return None
        if weights is None or ignored not in range(len(weights)):
            return weights
        return weights.index_fill(0, torch.tensor([ignored], device=weights.device), 0)


def make_loss(recipe: Recipe, classes: int, image: Tensor) -> BatchLoss:
    """The recipe's loss for a number of classes; `image` is a normalized one, `(1, c, h, w)`.

    Raises `UserError` for settings out of range, and a loss that would have to be trained itself.
    """
    function: Any = recipe.loss
    dtype = torch.promote_types(image.dtype, torch.float32)  # of the scores
    _refuse_class(function)
    _refuse_smoothing(function)
    if isinstance(function, nn.Module):
        function = deepcopy(function).to(image.device, dtype)
        _refuse_trained(function)
    if isinstance(function, partial):
        function = partial(
            function.func, *function.args, **_placed(function.keywords, image.device, dtype)
        )
    loss = BatchLoss(function, _takes_images(function))
    labels = example_labels(classes, image.device)
    logits = torch.zeros(len(labels), classes, dtype=dtype, device=image.device)
    devices = [image.device] if image.device.type == "cuda" else []
    for choice in (loss, replace(loss, takes_one_hot=True)):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that do not fit
                choice(logits, labels, image.expand(len(labels), -1, -1, -1))
        except Exception:  # preflight says what it is
            continue
        return choice
    return loss  # preflight says what it refuses


def _placed(settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Class weights on the device, in the type of the scores."""
    return {
        name: value.to(device, dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in settings.items()
    }


def example_labels(classes: int, device: torch.device) -> Tensor:
    """Each class, and not as many labels as classes: one could be taken for the other."""
    size = classes + 1 if classes <= MOST_CLASSES else MOST_CLASSES
    return torch.arange(size, device=device) % classes


def _takes_images(function: Any) -> bool:
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except ValueError:  # written in C
        return False
    third = parameters[2] if len(parameters) > 2 else None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        third is not None
        and third.name == "images"
        and third.kind in positional
        and third.default is third.empty
    )


def _refuse_class(function: Any) -> None:
    kind = function_of(function)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        raise UserError(
            f"loss={kind.__name__}, the class and not an object of it",
            expected="a function of scores and targets, or an object of a loss class of torch",
            instead=f"write loss=nn.{kind.__name__}(...), with its settings in the brackets",
        )


def _refuse_smoothing(function: Any) -> None:
    for setting in children(function, "loss."):
        is_smoothing = setting.name == "loss.label_smoothing" and isinstance(setting.value, Real)
        if is_smoothing and not 0 <= setting.value < 1:  # at 1 nothing is left of the labels
            raise UserError(
                f"loss.label_smoothing={setting.value}",
                expected="a number of at least 0 and below 1",
                instead="type loss.label_smoothing=0.1, for example",
            )


def _refuse_trained(module: nn.Module) -> None:
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    if trained:
        raise UserError(
            f"{code_name(module)} has parameters of its own to train: {trained[0]}",
            expected="a loss without any: the optimizer is given those of the network",
            instead="move them into the network, or call requires_grad_(False) on the loss",
        )
