"""What happens around the steps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from launcher.errors import NotFiniteError
from launcher.training.loop import MOST_SKIPPED, fit
from launcher.training.metrics import StepReport
from tests.support.helpers import context_of, tiny_recipe


def without_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Finite, with a gradient that is not: that of a root at 0."""
    return cross_entropy(logits, targets) + (logits - logits).abs().sum().sqrt()


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
