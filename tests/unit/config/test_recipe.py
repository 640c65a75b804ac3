"""The recipe's own validation: what no machine could train is refused on creation."""

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
from torch.nn.functional import cross_entropy

from launcher import Images, Recipe, Synthetic, constant, crop, ema
from launcher.config import overrides
from launcher.errors import UserError
from tests.support.helpers import HALF, Tiny, refused, tiny_recipe, words_to_type

FIELDS = [
    ("epochs", 0),
    ("epochs", -3),
    ("accumulate", 0),
    ("seed", -1),
    ("seed", 2**64),
    ("clip_norm", 0),
    ("clip_norm", -1.5),
    ("clip_norm", math.nan),
]


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_a_number_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with refused(f"{name}={value}", "type"):
        tiny_recipe(**{name: value})


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_what_the_refusal_says_to_type_is_accepted(name: str, value: float) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(**{name: value})
    words = words_to_type(caught.value)
    assert len(words) == 1
    overrides.override(tiny_recipe(), words)


@pytest.mark.parametrize("value", [0, -64])
def test_a_batch_without_images_is_refused(value: int) -> None:
    with refused(f"data.batch_size={value}", "at least 1", "type data.batch_size=1"):
        tiny_recipe(data={"batch_size": value})


@pytest.mark.parametrize("std", [(0.5, 0.0, 0.5), (-1.0,), (math.nan,), (math.inf,), (63.0,)])
def test_a_standard_deviation_that_is_not_positive_is_refused(std: tuple[float, ...]) -> None:
    with refused("data.std=", "positive", "standard deviation"):
        tiny_recipe(data={"std": std})


@pytest.mark.parametrize("value", [math.nan, -math.inf, 125.3, -0.5])
def test_a_mean_that_is_none_of_pixels_is_refused(value: float) -> None:
    with refused("data.mean=", "in [0, 1]", "of the bytes (0 to 255) by 255"):
        tiny_recipe(data={"mean": (0.5, 0.5, value)})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_average_of_weights_in_half_precision_is_refused(precision: str) -> None:
    """It would stand still without a word: 0.999 + 0.001 * 1.01 is 1 in bfloat16."""
    with refused(f"average with precision=pure_{precision}", f"type precision={precision}"):
        tiny_recipe(average=ema, precision=f"pure_{precision}")
    tiny_recipe(average=ema, precision=precision)


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 1), ("accumulate", 1), ("seed", 0), ("clip_norm", None)]
)
def test_the_least_allowed_values_are_accepted(name: str, value: Any) -> None:
    assert getattr(tiny_recipe(**{name: value}), name) == value


def test_an_augmentation_outside_of_a_tuple_is_refused() -> None:
    with refused("data.augment", "tuple"):
        tiny_recipe(data={"augment": crop})


def test_a_recipe_cannot_be_changed_after_its_checks() -> None:
    recipe = tiny_recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.data.batch_size = 0  # type: ignore[misc]


def test_the_smallest_recipe_says_only_what_is_its_own() -> None:
    data = Images(Synthetic, batch_size=64, mean=HALF, std=HALF)
    recipe = Recipe(model=Tiny, data=data, optimizer=partial(object), epochs=1)  # type: ignore[arg-type]
    assert recipe.loss is cross_entropy
    assert recipe.schedule is constant
    assert (recipe.accumulate, recipe.seed, recipe.precision) == (1, 0, None)
    assert (data.augment, data.mix, data.fallback) == ((), None, None)


def test_the_machine_has_no_field_in_a_recipe() -> None:
    names = {field.name for kind in (Recipe, Images) for field in dataclasses.fields(kind)}
    assert not names & {"gpus", "devices", "nodes", "world_size", "num_workers", "wandb", "output"}
