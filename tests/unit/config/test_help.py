"""The settings of a recipe as `launcher RECIPE --help` shows them."""

from dataclasses import replace
from functools import partial

import pytest
from torch.optim import AdamW
from torchvision.models import resnet18

from launcher import Recipe
from launcher.config import loader
from launcher.config.help import describe_settings
from launcher.config.overrides import as_text
from launcher.config.settings import list_settings
from tests.support.helpers import RECIPES, tiny_recipe

INTERNALS = {"foreach", "fused", "capturable", "differentiable", "maximize"}


def shown(text: str) -> dict[str, list[str]]:
    """The words behind each name."""
    words = [line.split() for line in text.splitlines() if line.startswith("  ")]
    return {name: rest for name, *rest in words}


@pytest.mark.parametrize("with_internals", [False, True])
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_a_shipped_recipe_fits_80_columns(path: str, with_internals: bool) -> None:
    recipe = loader.load(RECIPES / path).recipe
    text = describe_settings(recipe, with_internals=with_internals)
    assert max(map(len, text.splitlines())) <= 80
    found = shown(text)
    for setting in list_settings(recipe):
        if with_internals or setting.name.split(".")[-1] not in INTERNALS:
            assert found[setting.name][-1] == as_text(setting.value)


def test_torchs_internals_are_shown_on_request_or_where_the_recipe_sets_them() -> None:
    recipe = tiny_recipe(optimizer=partial(AdamW, lr=1e-3, fused=True))
    names = {name.split(".")[-1] for name in shown(describe_settings(recipe))}
    assert names & INTERNALS == {"fused"}
    everything = shown(describe_settings(recipe, with_internals=True))
    assert {name.split(".")[-1] for name in everything} >= INTERNALS


def test_a_setting_stands_below_its_slot_with_the_first_line_of_its_docstring(
    recipe: Recipe,
) -> None:
    recipe = replace(recipe, model=partial(resnet18, num_classes=10))
    blocks = {b.split(maxsplit=1)[0]: b for b in describe_settings(recipe).split("\n\n")}
    assert "model: resnet18 - ResNet-18 from Deep Residual Learning" in blocks["model:"]
    assert "  model.num_classes " in blocks["model:"]
    assert "  optimizer.lr " in blocks["optimizer:"]
    assert "  data.augment.crop.padding " in blocks["data.augment.crop"]
    assert "Shift each image" in blocks["data.augment.crop"]
    assert "  data.batch_size " in blocks["data"]
    assert "  epochs " in blocks["training"]
    assert list(blocks)[-1] == "training"


def test_a_long_type_goes_on_below_itself() -> None:
    lines = describe_settings(tiny_recipe()).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("  precision "))
    column = lines[first].index("fp32")
    assert lines[first].split()[-1] == "none"
    assert lines[first + 1][column:].startswith("pure_bf16")
    assert not lines[first + 1][:column].strip()
