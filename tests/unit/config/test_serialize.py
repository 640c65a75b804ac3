"""The resolved form of a recipe: plain JSON, equal for equal recipes."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from launcher import Recipe, Synthetic, cutout, flip
from launcher.config.serialize import code_name, resolve, short_name
from tests.support.helpers import Tiny, refused, tiny_recipe


def test_the_resolved_form_is_plain_json_with_defaults_filled_in(recipe: Recipe) -> None:
    form = resolve(recipe)
    assert json.loads(json.dumps(form)) == form
    assert form["optimizer"]["call"] == "torch.optim.adam:Adam"
    assert form["optimizer"]["lr"] == 1e-3
    assert form["optimizer"]["eps"] == 1e-8
    assert form["model"] == {
        "call": "tests.support.helpers:Tiny",
        "width": 4,
        "dropout": 0.0,
        "classes": 10,
    }
    assert form["data"]["augment"][1] == {
        "call": "launcher.data.augment:crop",
        "padding": 4,
        "fill": "reflect",
    }
    assert form["average"] == {"call": "launcher.training.state:ema", "decay": 0.9}
    assert form["precision"] is None
    assert form["seed"] == 0


def test_two_separately_built_equal_recipes_have_equal_forms() -> None:
    one, two = tiny_recipe(), tiny_recipe()
    assert one != two, "partials compare unequal: that is why there is a resolved form"
    assert resolve(one) == resolve(two)


def test_a_default_written_out_changes_nothing() -> None:
    written = tiny_recipe(optimizer=partial(Adam, lr=1e-3, eps=1e-8), model=partial(Tiny, width=4))
    assert resolve(written) == resolve(tiny_recipe())


def test_a_keyword_and_a_position_have_the_same_form() -> None:
    one, two = partial(Tiny, 8), partial(Tiny, width=8)
    assert resolve(one) == resolve(two)


CHANGES: list[Callable[[], Recipe]] = [
    lambda: tiny_recipe(epochs=3),
    lambda: tiny_recipe(seed=1),
    lambda: tiny_recipe(model=partial(Tiny, width=5)),
    lambda: tiny_recipe(optimizer=partial(Adam, lr=2e-3)),
    lambda: tiny_recipe(optimizer=partial(SGD, lr=1e-3)),
    lambda: tiny_recipe(data={"augment": (flip,)}),
    lambda: tiny_recipe(data={"source": partial(Synthetic, count=101)}),
    lambda: tiny_recipe(loss=partial(nn.functional.cross_entropy, weight=torch.ones(10))),
    lambda: tiny_recipe(compile=True),
]


@pytest.mark.parametrize("build", CHANGES)
def test_the_form_changes_when_a_setting_changes(build: Callable[[], Recipe]) -> None:
    assert resolve(build()) != resolve(tiny_recipe())
    assert resolve(build()) == resolve(build())


def test_the_order_of_augmentations_is_part_of_the_form() -> None:
    one = tiny_recipe(data={"augment": (flip, cutout)})
    two = tiny_recipe(data={"augment": (cutout, flip)})
    assert resolve(one) != resolve(two)


def test_class_weights_appear_as_numbers() -> None:
    loss = partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0]))
    assert resolve(loss)["weight"] == [1.0, 2.0]


def activated(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return activation()


def test_code_as_a_setting_appears_with_its_own_settings() -> None:
    form = resolve(partial(activated, activation=nn.GELU))
    assert form["activation"] == {
        "call": "torch.nn.modules.activation:GELU",
        "approximate": "none",
    }


NAMELESS: dict[str, Callable[[], Recipe]] = {
    "model": lambda: tiny_recipe(model=lambda: Tiny()),
    "schedule": lambda: tiny_recipe(schedule=lambda progress: 1 - progress),
    "augment": lambda: tiny_recipe(data={"augment": (lambda images, draws: images,)}),
    "in a partial": lambda: tiny_recipe(model=partial(lambda width=3: Tiny(width))),
}


@pytest.mark.parametrize("place", NAMELESS)
def test_a_lambda_is_refused_since_a_run_could_not_say_what_it_ran(place: str) -> None:
    with refused("lambda", "with def"):
        resolve(NAMELESS[place]())


def test_short_names_leave_the_module_out() -> None:
    assert short_name(partial(Tiny, width=3)) == "Tiny"
    assert code_name(Tiny) == "tests.support.helpers:Tiny"
