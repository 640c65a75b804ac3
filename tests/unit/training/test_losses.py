"""Losses as people write them: modules of torch, one-hot targets, a teacher."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    dropout,
    one_hot,
)

from launcher import mixup
from launcher.config.overrides import override
from launcher.config.serialize import resolve
from launcher.training.evaluation import evaluate
from launcher.training.loop import fit
from launcher.training.preflight import preflight
from tests.support.helpers import context_of, refused, tiny_recipe


def dropping(scores: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(dropout(scores, 0.1), targets)


def test_a_loss_that_draws_is_not_told_to_leave_out_class_weights() -> None:
    """It is another one for an image alone, as dropout in a network is."""
    preflight(context_of(tiny_recipe(loss=dropping, accumulate=2)))


def with_criterion(scores: Tensor, targets: Tensor, *, criterion: Any) -> Tensor:
    return criterion(scores, targets)


def test_a_loss_module_within_a_partial_is_told_where_to_make_it() -> None:
    """The advice was partial(CrossEntropyLoss, ...), which would make one in each call."""
    with refused("a CrossEntropyLoss that is built already", "in the code of the loss"):
        resolve(tiny_recipe(loss=partial(with_criterion, criterion=nn.CrossEntropyLoss())))


def weights_after(loss: Any, **changes: Any) -> list[Tensor]:
    ctx = context_of(tiny_recipe(loss=loss, epochs=1, **changes))
    preflight(ctx)
    list(fit(ctx))
    return list(ctx.state.network.parameters())


def by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = one_hot(targets, 10).to(logits) if targets.ndim == 1 else targets
    return binary_cross_entropy_with_logits(logits, wanted)


@pytest.mark.parametrize("mix", [None, mixup])
@pytest.mark.parametrize(
    ("loss", "same"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), partial(cross_entropy, label_smoothing=0.1)),
        (nn.BCEWithLogitsLoss(), by_hand),
        (binary_cross_entropy_with_logits, by_hand),
    ],
)
def test_a_loss_module_trains_as_the_function_does(loss: Any, same: Any, mix: Any) -> None:
    data = {"mix": mix}
    assert all(map(torch.equal, weights_after(loss, data=data), weights_after(same, data=data)))


def test_the_settings_of_a_module_are_the_arguments_that_it_keeps() -> None:
    recipe = tiny_recipe(loss=nn.CrossEntropyLoss(torch.ones(10), label_smoothing=0.1))
    changed = override(recipe, ["loss.label_smoothing=0.2"])
    form = resolve(changed)["loss"]
    assert form == {
        "call": "torch.nn.modules.loss:CrossEntropyLoss",
        "weight": [1.0] * 10,
        "ignore_index": -100,
        "label_smoothing": 0.2,
    }
    assert isinstance(recipe.loss, nn.CrossEntropyLoss)
    assert recipe.loss.label_smoothing == 0.1
    assert context_of(recipe).loss.function is not recipe.loss


class Forgetful(nn.Module):
    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.power = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) ** self.power


def test_a_module_that_does_not_keep_an_argument_is_refused() -> None:
    with refused("Forgetful", "gamma", "self.gamma = gamma"):
        resolve(tiny_recipe(loss=Forgetful()))


SEEN: list[torch.Size] = []


def with_teacher(logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
    SEEN.append(images.shape)
    return cross_entropy(logits, targets) + (logits[:, 0] - images.mean((1, 2, 3))).square().mean()


def with_strength(logits: Tensor, targets: Tensor, images: float = 1.0) -> Tensor:
    return cross_entropy(logits, targets) * images


def test_a_third_argument_called_images_is_given_them() -> None:
    ctx = context_of(tiny_recipe(loss=with_teacher, epochs=1))
    preflight(ctx)
    SEEN.clear()
    next(iter(fit(ctx)))
    evaluate(ctx, ctx.data.test)
    assert SEEN[0] == (10, 3, 32, 32)
    assert SEEN[-1][1:] == (3, 32, 32)
    assert not context_of(tiny_recipe(loss=with_strength)).loss.takes_images


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) * self.scale


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return cross_entropy(logits, targets)


def detached(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.detach(), targets)


def constant_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.sum() * 0 + 1


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (nn.CrossEntropyLoss(label_smoothing=-0.1), ("loss.label_smoothing=-0.1", "=0.1,")),
        (partial(cross_entropy, label_smoothing=1.5), ("loss.label_smoothing=1.5", "=0.1,")),
        (partial(cross_entropy, label_smoothing=1.0), ("loss.label_smoothing=1.0", "below 1")),
        (nn.CrossEntropyLoss, ("CrossEntropyLoss", "nn.CrossEntropyLoss(...)")),
        (Trained(), ("Trained has parameters", "scale")),
        (Counting(), ("Counting changes its own buffers",)),
        (detached, ("detached has no gradient", "detach()")),
        (constant_loss, ("constant_loss has no gradient",)),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(loss: Any, parts: tuple[str, ...]) -> None:
    with refused(*parts):
        preflight(context_of(replace(tiny_recipe(), loss=loss)))


def exchanged(logits: Tensor, targets: Tensor) -> Tensor:
    """It runs, since one-hot labels are taken for scores, and scores for probabilities."""
    return cross_entropy(targets, logits)


def test_a_loss_whose_arguments_are_exchanged_is_refused() -> None:
    with refused("exchanged, which is larger for right scores", "cross_entropy(logits, targets)"):
        preflight(context_of(replace(tiny_recipe(), loss=exchanged)))


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.HuberLoss(), nn.L1Loss()]
)
def test_a_loss_of_one_hot_targets_is_not(loss: Any) -> None:
    preflight(context_of(replace(tiny_recipe(), loss=loss)))


class Annealed(nn.Module):
    steps = 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        return cross_entropy(logits, targets) * min(1.0, self.steps / 100)


def counted(logits: Tensor, targets: Tensor) -> Tensor:
    SEEN.append(logits.shape)
    return cross_entropy(logits / len(SEEN), targets)


@pytest.mark.parametrize("loss", [Annealed(), counted])
def test_a_loss_that_counts_its_calls_is_refused(loss: Any) -> None:
    """A resumed run began to count anew."""
    with refused(", which is ", "called again", "leave out what it keeps or counts"):
        preflight(context_of(tiny_recipe(loss=loss)))


def drawing(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits + torch.randn_like(logits), targets)


def test_a_loss_that_draws_from_torch_is_not() -> None:
    preflight(context_of(tiny_recipe(loss=drawing)))


def centred(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits - logits.mean(0), targets)


def by_all_images(logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
    return cross_entropy(logits, targets) * images.std()


@pytest.mark.parametrize("loss", [centred, by_all_images])
def test_a_loss_that_mixes_up_images_is_refused_for_several_passes(loss: Any) -> None:
    """Of equal scores it is the mean."""
    preflight(context_of(tiny_recipe(loss=loss)))
    with refused(f"{loss.__name__}, which is not the mean over 2 micro-batches"):
        preflight(context_of(tiny_recipe(loss=loss, accumulate=2)))
