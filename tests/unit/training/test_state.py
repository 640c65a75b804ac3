"""The network: tried on the data, averaged, given to Accelerate."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic, ema
from launcher.data import sources
from launcher.data.images import ImageSet
from launcher.distributed.accelerator import create_accelerator
from launcher.errors import UserError
from launcher.training.model import build_network
from launcher.training.network import count_parameters
from launcher.training.state import TrainState, average_buffers, evaluating, make_state
from tests.support.helpers import context_of, tiny_recipe
from tests.support.world_worker import Small, Small64

DATA = Images(partial(Synthetic, count=50), 10, mean=(0.5,) * 3, std=(0.5,) * 3)
RECIPE = Recipe(model=Small, data=DATA, optimizer=partial(SGD, lr=1.0), epochs=1)


class Tuple(nn.Module):
    """Returns what no loss can take."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def state_of(recipe: Recipe) -> TrainState:
    return context_of(recipe).state


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return sources.load(DATA).train


def test_the_seed_alone_decides_the_first_weights(images: ImageSet) -> None:
    one, same = build_network(RECIPE, images), build_network(RECIPE, images)
    other = build_network(replace(RECIPE, seed=1), images)
    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (partial(nn.Linear, 5, 5), "fails on images of shape (2, 3, 32, 32)"),
        (Tuple, "Tuple returns a tuple; expected one tensor of scores"),
        (nn.Identity, "output of shape (2, 3, 32, 32)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model: Any, message: str, images: ImageSet) -> None:
    with pytest.raises(UserError) as caught:
        build_network(replace(RECIPE, model=model), images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_in_double_precision_is_given_images_in_it(images: ImageSet) -> None:
    network = build_network(replace(RECIPE, model=Small64), images)
    assert next(network.parameters()).dtype == torch.float64


def test_a_lazy_layer_trains_all_of_its_weights(images: ImageSet) -> None:
    lazy = partial(nn.Sequential, nn.Flatten(), nn.LazyLinear(10))
    network = build_network(replace(RECIPE, model=lazy), images)
    network(torch.ones(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_average_follows_its_formula(images: ImageSet) -> None:
    network = build_network(RECIPE, images)
    average = ema(network, decay=0.75)
    first = [p.detach().clone() for p in network.parameters()]
    average.update_parameters(network)  # the first update copies
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    average.update_parameters(network)
    for start, averaged in zip(first, average.module.parameters(), strict=True):
        torch.testing.assert_close(averaged, start + 0.25)


def test_rates_are_scaled_from_the_recipes_own_each_time() -> None:
    state = state_of(RECIPE)
    for multiplier in (0.5, 0.25):
        state.set_learning_rates(multiplier, float)  # a schedule that returns the fraction itself
        assert state.learning_rate == multiplier


def test_the_average_is_what_is_evaluated() -> None:
    state = state_of(replace(RECIPE, average=ema))
    assert state.ema_model is not None
    assert state.eval_model is state.ema_model.module
    assert state_of(RECIPE).ema_model is None


def test_parameters_lie_in_the_memory_format_of_the_recipe() -> None:
    for memory_format in ("channels_last", "contiguous"):
        state = state_of(replace(RECIPE, memory_format=memory_format))
        weight = next(state.network.parameters())
        assert weight.is_contiguous() == (memory_format == "contiguous")


def test_evaluating_restores_training_even_after_an_error() -> None:
    network = nn.Sequential(nn.Dropout())
    with evaluating(network) as score:
        images = torch.ones(100)
        assert torch.equal(score(images), images)  # dropout is at rest
    assert network.training
    with pytest.raises(RuntimeError), evaluating(network):
        torch.ones(2) @ torch.ones(3)
    assert network.training


def test_frozen_parameters_are_neither_counted_nor_optimized(images: ImageSet) -> None:
    network = build_network(RECIPE, images)
    whole = count_parameters(network)
    frozen = next(network.parameters())
    frozen.requires_grad = False
    assert count_parameters(network) == whole - frozen.numel()
    state = make_state(network, RECIPE, create_accelerator("fp32"))
    optimized = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert all(p is not frozen for p in optimized)


def test_buffers_of_one_process_stay_as_they_are() -> None:
    network = nn.BatchNorm2d(3)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    average_buffers(network, create_accelerator("fp32"))
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_a_schedule_of_steps_is_told_in_a_note() -> None:
    (note,) = context_of(tiny_recipe(schedule=lambda step: min(1.0, step / 500))).notes
    assert "called with the fraction of the training" in note
