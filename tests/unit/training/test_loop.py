"""What happens around the steps."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout

from launcher.errors import NotFiniteError
from launcher.training.evaluation import evaluate, score_samples
from launcher.training.loop import MOST_SKIPPED, fit
from launcher.training.metrics import EpochReport, StepReport
from tests.support.helpers import Tiny, context_of, refused, tiny_recipe


def without_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Finite, with a gradient that is not: that of a root at 0."""
    return cross_entropy(logits, targets) + (logits - logits).abs().sum().sqrt()


def with_sparse_tensors(logits: Tensor, targets: Tensor) -> Tensor:
    """Calls what torch has for dense tensors only."""
    torch.eye(2).to_sparse().sigmoid()
    return cross_entropy(logits, targets)


def test_what_torch_cannot_compute_of_sparse_tensors_is_one_line() -> None:
    with refused("in step 1: could not run 'aten::sigmoid' on a sparse tensor", "sparse=False"):
        list(fit(context_of(tiny_recipe(loss=with_sparse_tensors))))


def test_steps_without_an_update_are_counted_over_epochs() -> None:
    recipe = tiny_recipe(loss=without_gradient, on_nan="skip", epochs=9)
    assert MOST_SKIPPED > 10  # steps of an epoch
    with pytest.raises(NotFiniteError, match="in each of the 20 steps up to 20"):
        list(fit(context_of(recipe, log_every=1)))


def test_a_step_that_is_skipped_changes_nothing_but_the_count() -> None:
    ctx = replace(context_of(tiny_recipe(epochs=1), log_every=1), skip_steps=frozenset({1}))
    before = [parameter.clone() for parameter in ctx.state.network.parameters()]
    events = fit(ctx)
    first = next(events)
    assert isinstance(first, StepReport)
    assert first.skipped == (1,)
    assert all(map(torch.equal, before, ctx.state.network.parameters()))
    assert ctx.state.skips_in_a_row == 1
    next(events)
    assert not all(map(torch.equal, before, ctx.state.network.parameters()))
    assert ctx.state.skips_in_a_row == 0


class Unfreezing(Tiny):
    """Trains its first layer from the second epoch on, as tutorials on fine-tuning do."""

    steps: Tensor

    def __init__(self, after: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.after = after
        self.layers[2].requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.layers[2].requires_grad_(bool(self.steps > self.after))
        return super().forward(images)


def test_what_begins_to_be_trained_too_late_is_refused() -> None:
    """The optimizer does not have it, so it would stay as it is, and nobody would know."""
    ctx = context_of(tiny_recipe(model=partial(Unfreezing, after=15), epochs=3))
    events, reports = fit(ctx), []
    with refused("Unfreezing, which begins to train layers.2.weight, layers.2.bias later"):
        for event in events:
            reports += [event.epoch] if isinstance(event, EpochReport) else []
    assert reports == [1]
    list(fit(context_of(tiny_recipe(model=partial(Unfreezing, after=99), epochs=2))))


class Drawing(Tiny):
    """Drops in evaluations, too: `dropout(x)`, as people write it, for `nn.Dropout`."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(dropout(images))


def test_what_an_evaluation_draws_does_not_depend_on_what_came_before() -> None:
    """A run that was stopped in one, or after it, makes it again without the steps before."""
    ctx = context_of(tiny_recipe(model=Drawing))
    first, samples = evaluate(ctx, ctx.data.test), score_samples(ctx)
    torch.rand(1)
    assert evaluate(ctx, ctx.data.test) == first
    torch.rand(1)
    assert (score_samples(ctx) == samples).all()
    other = replace(ctx, recipe=replace(ctx.recipe, seed=1))
    assert evaluate(other, ctx.data.test) != first
