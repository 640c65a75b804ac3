"""The list of the settings of a recipe."""

import pytest

from launcher import Recipe
from launcher.config import loader, overrides
from launcher.config.serialize import resolve
from launcher.config.settings import list_settings
from tests.support.helpers import RECIPES


@pytest.mark.parametrize("name", ["simplecnn", "pictures64"])
def test_the_list_of_a_shipped_recipe_has_what_a_user_expects(name: str) -> None:
    recipe = loader.load(RECIPES / f"{name}.py").recipe
    listed = [setting.name for setting in list_settings(recipe)]
    expected = {
        "model.classes",
        "data.batch_size",
        "data.mean",
        "data.std",
        "data.root",
        "data.fallback.count",
        "optimizer.lr",
        "optimizer.weight_decay",
        "epochs",
        "accumulate",
        "clip_norm",
        "precision",
        "memory_format",
        "compile",
        "sync_batch_norm",
        "seed",
        "loss.label_smoothing",
    }
    expected.add("model.width" if name == "simplecnn" else "data.source.size")
    assert expected <= set(listed)
    assert len(listed) == len(set(listed))
    filled_in = ("root", "train", "split", "download", "transform", "target_transform", "loader")
    for part in ("data.source", "data.fallback"):
        assert not {f"{part}.{word}" for word in filled_in} & set(listed)
    last_words = {setting.rpartition(".")[2] for setting in listed}
    assert not last_words & {"params", "download", "reduction", "reduce", "size_average"}


@pytest.mark.parametrize("name", ["simplecnn", "pictures64"])
def test_every_listed_setting_can_be_typed_back_as_it_is_shown(name: str) -> None:
    recipe = loader.load(RECIPES / f"{name}.py").recipe
    listed = list_settings(recipe)
    words = [f"{setting.name}={overrides.as_text(setting.value)}" for setting in listed]
    assert resolve(overrides.override(recipe, words)) == resolve(recipe)


def test_the_list_follows_the_order_of_the_recipes_fields(recipe: Recipe) -> None:
    tops = [setting.name.split(".")[0] for setting in list_settings(recipe)]
    order = list(dict.fromkeys(tops))
    assert order == sorted(order, key=list(resolve(recipe)).index)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("epochs", "int"),
        ("data.root", "str"),
        ("data.mean", "tuple[float, ...]"),
        ("clip_norm", "float | None"),
        ("sync_batch_norm", "bool"),
        ("on_nan", "stop | skip | rollback"),
        ("optimizer.lr", "float"),
        ("optimizer.betas", "tuple[float, float]"),
        ("optimizer.foreach", "bool | None"),
        ("data.augment.varied.limit", "int | None"),
    ],
)
def test_types_are_listed_as_people_write_them(recipe: Recipe, name: str, kind: str) -> None:
    found = {setting.name: setting.type_name for setting in list_settings(recipe)}
    assert found[name] == kind
