"""Class weights in the losses of torch: any number of micro-batches computes what one does."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from launcher import Synthetic
from launcher.training import evaluation
from launcher.training.evaluation import evaluate
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport
from launcher.training.preflight import preflight
from launcher.training.state import TrainContext
from tests.support.helpers import Tiny, context_of, tiny_recipe

WEIGHTS = torch.linspace(0.1, 3.0, 10, dtype=torch.float64)
LOSSES = (
    partial(cross_entropy, weight=WEIGHTS),
    partial(cross_entropy, weight=WEIGHTS, label_smoothing=0.1),
    nn.CrossEntropyLoss(weight=WEIGHTS),
)


def double() -> nn.Module:
    return Tiny().double()


def trained(loss: Any, accumulate: int) -> tuple[TrainContext, EpochReport]:
    """Two epochs of 10 steps, the last of 7 images."""
    recipe = tiny_recipe(
        model=double,
        loss=loss,
        accumulate=accumulate,
        optimizer=partial(SGD, lr=0.1),
        data={"source": partial(Synthetic, count=97)},
    )
    ctx = context_of(recipe)
    preflight(ctx)
    reports = [event for event in fit(ctx) if isinstance(event, EpochReport)]
    return ctx, reports[-1]


@pytest.mark.parametrize("loss", LOSSES, ids=["function", "smoothed", "module"])
def test_micro_batches_add_up(loss: Any) -> None:
    one, report = trained(loss, 1)
    three, other = trained(loss, 3)
    found = three.state.network.state_dict()
    for name, value in one.state.network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-13, msg=name)
    assert other.train_loss == pytest.approx(report.train_loss, abs=1e-12)


def test_the_test_loss_is_that_of_all_images_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH_ON_CPU", 3)
    ctx = context_of(tiny_recipe(model=double, loss=LOSSES[0]))
    test = ctx.data.test
    with torch.no_grad():
        logits = ctx.state.network.eval()(ctx.normalize(test.tensor))
    whole = cross_entropy(logits, test.labels, weight=WEIGHTS)
    assert evaluate(ctx, ctx.data.test).loss == pytest.approx(float(whole), abs=1e-12)


def test_a_class_that_is_ignored_counts_nothing() -> None:
    loss = partial(cross_entropy, weight=WEIGHTS, ignore_index=3)
    ctx = context_of(tiny_recipe(model=double, loss=loss))
    weights = ctx.loss.class_weights
    assert weights is not None
    assert weights.tolist() == [0 if i == 3 else w for i, w in enumerate(WEIGHTS.tolist())]
