"""The first loss, and whether 32 images can be learnt by heart."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam

from launcher import Recipe, cutmix, flip
from launcher.checks.check.learning import first_loss, overfit
from launcher.checks.verdicts import Verdict
from launcher.training.model import build_network
from tests.support.helpers import context_of, tiny_recipe


class Small(nn.Module):
    """Learns anything; its scores are `scale` times as large."""

    def __init__(self, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.layers(images)


def recipe_of(**changes: Any) -> Recipe:
    return tiny_recipe(**{"model": Small, "optimizer": partial(Adam, lr=1e-3), **changes})


def trained(recipe: Recipe) -> Verdict:
    ctx = context_of(recipe)
    return overfit(ctx, build_network(recipe, ctx.data.train))


@pytest.mark.parametrize(("scale", "standing"), [(1.0, "good"), (100.0, "notice")])
def test_the_first_loss_is_compared_with_equal_scores(scale: float, standing: str) -> None:
    ctx = context_of(recipe_of(model=partial(Small, scale=scale)))
    before = {name: value.clone() for name, value in ctx.state.network.state_dict().items()}
    verdict = first_loss(ctx)
    assert verdict.standing == standing
    assert verdict.figures["even"] == pytest.approx(math.log(10))
    images = ctx.normalize(ctx.data.train.tensor[:64])
    loss = cross_entropy(ctx.state.network(images), ctx.data.train.labels[:64]).item()
    assert verdict.figures["first_loss"] == pytest.approx(loss, rel=1e-4)
    after = ctx.state.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_first_loss_that_is_not_finite_is_wrong() -> None:
    ctx = context_of(recipe_of(model=partial(Small, scale=math.inf)))
    assert first_loss(ctx).standing == "wrong"


def test_a_network_that_learns_is_good_whatever_the_recipe_does_to_its_images() -> None:
    verdict = trained(recipe_of(data={"augment": (flip,), "mix": cutmix}))
    assert verdict.standing == "good"
    assert verdict.figures["last"] < 0.1 * verdict.figures["first"]
    assert verdict.figures["accuracy"] == 1
    assert len(verdict.lines) == 5


def test_smoothed_labels_have_no_loss_of_zero_and_are_learnt() -> None:
    verdict = trained(recipe_of(loss=partial(cross_entropy, label_smoothing=0.3)))
    assert verdict.standing == "good"
    assert verdict.figures["last"] > 0.1 * verdict.figures["first"]


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": partial(SGD, lr=1e-9)}, {"optimizer": partial(SGD, lr=1e-4, maximize=True)}],
)
def test_a_network_that_does_not_learn_is_told(changes: dict[str, Any]) -> None:
    verdict = trained(recipe_of(**changes))
    assert verdict.standing == "wrong"
    assert "optimizer.lr" in verdict.instead


def test_what_stops_a_training_is_told() -> None:
    verdict = trained(recipe_of(optimizer=partial(SGD, lr=1e12)))
    assert verdict.standing == "wrong"
    assert "step" in verdict.answer
