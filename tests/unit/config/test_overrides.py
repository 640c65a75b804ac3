"""Settings by dotted names: override, list, and the resolved form."""

import copy
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

from launcher import Recipe, flip
from launcher.config import overrides
from launcher.config.serialize import resolve, short_name
from launcher.config.settings import list_settings
from launcher.errors import UserError
from tests.support.helpers import Tiny, refused, tiny_recipe


def value_of(recipe: Recipe, name: str) -> Any:
    """The setting `name` in the resolved form."""
    value = resolve(recipe)
    for part in name.split("."):
        if isinstance(value, list):
            value = next(item for item in value if item["call"].endswith(f":{part}"))
        else:
            value = value[part]
    return value


# Overrides


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("epochs=7", 7),
        ("data.batch_size=32", 32),
        ("data.root=/data/my pictures", "/data/my pictures"),
        ("data.root=10", "10"),
        ("data.root=a=b", "a=b"),
        ("data.mean=0.1,0.2,0.3", [0.1, 0.2, 0.3]),
        ("data.mean=(0.1,0.2,0.3)", [0.1, 0.2, 0.3]),
        ("data.mean=[1,0,0.5]", [1.0, 0.0, 0.5]),
        ("data.source.count=200", 200),
        ("optimizer.lr=0.01", 0.01),
        ("optimizer.lr=1e-2", 0.01),
        ("optimizer.lr=1", 1.0),
        ("optimizer.betas=0.8,0.99", [0.8, 0.99]),
        ("optimizer.amsgrad=true", True),
        ("optimizer.amsgrad=True", True),
        ("optimizer.foreach=none", None),
        ("model.width=32", 32),
        ("schedule.warmup=0.3", 0.3),
        ("schedule.end=0.1", 0.1),
        ("average.decay=0.5", 0.5),
        ("clip_norm=1", 1.0),
        ("clip_norm=none", None),
        ("precision=bf16", "bf16"),
        ("precision=None", None),
        ("memory_format=contiguous", "contiguous"),
        ("compile=true", True),
        ("seed=1_000", 1000),
        ("loss.label_smoothing=0.1", 0.1),
        ("data.augment.crop.padding=2", 2),
        ("data.augment.crop.fill=zero", "zero"),
        ("data.augment.varied.flag=true", True),
        ("data.augment.varied.count=-4", -4),
        ("data.augment.varied.mode=far", "far"),
        ("data.augment.varied.limit=5", 5),
        ("data.augment.varied.limit=null", None),
        ("data.augment.varied.box=3,4", [3, 4]),
        ("data.augment.varied.label=none", "none"),
        ("data.augment.varied.label=", ""),
        ("data.augment.varied.untyped=5", 5),
    ],
)
def test_an_override_sets_the_named_setting_and_no_other(
    recipe: Recipe, word: str, expected: object
) -> None:
    name = word.partition("=")[0]
    changed = overrides.override(recipe, [word])
    value = value_of(changed, name)
    assert value == expected
    assert type(value) is type(expected)
    before = dict(flat(resolve(recipe)))
    after = dict(flat(resolve(changed)))
    odd = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    last = name.rpartition(".")[2]
    assert all(last in key for key in odd), odd


def flat(value: Any, prefix: str = "") -> Any:
    pairs = enumerate(value) if isinstance(value, list) else value.items()
    for key, child in pairs:
        if isinstance(child, dict | list):
            yield from flat(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


@pytest.mark.parametrize("word", ["epochs=7", "--epochs=7"])
def test_a_sweeps_dashes_are_accepted(recipe: Recipe, word: str) -> None:
    assert overrides.override(recipe, [word]).epochs == 7


def test_of_two_words_for_one_setting_the_last_counts(recipe: Recipe) -> None:
    assert overrides.override(recipe, ["epochs=3", "epochs=4"]).epochs == 4


@pytest.mark.parametrize(
    "words",
    [
        ["patience=5", "data.validation=0.1"],
        ["precision=pure_bf16", "average=none"],
        ["patience=4", "patience=5", "data.validation=0.1"],
    ],
)
def test_words_that_fit_together_may_stand_in_any_order(recipe: Recipe, words: list[str]) -> None:
    changed = overrides.override(recipe, words)
    assert changed == overrides.override(recipe, [words[-1], *words[:-1]])
    assert changed.patience in (None, 5)


def test_of_several_words_that_do_not_fit_the_first_is_told(recipe: Recipe) -> None:
    with refused("epochs=0", "at least 1"):
        overrides.override(recipe, ["epochs=0", "patience=5", "seed=-1"])


def test_an_overridden_class_builds_what_was_asked_for(recipe: Recipe) -> None:
    model = overrides.override(recipe, ["model.width=7"]).model
    assert isinstance(model, partial)
    assert next(model().parameters()).shape == (7, 3)


def test_an_overridden_partial_keeps_its_other_keywords(recipe: Recipe) -> None:
    recipe = replace(recipe, optimizer=partial(SGD, lr=0.1, momentum=0.9))
    optimizer = overrides.override(recipe, ["optimizer.lr=0.5"]).optimizer(
        [("p", nn.Parameter(torch.ones(1)))]
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


def test_an_overridden_augmentation_keeps_its_place_among_the_others(recipe: Recipe) -> None:
    changed = overrides.override(recipe, ["data.augment.crop.padding=2"])
    assert [short_name(item) for item in changed.data.augment] == [
        "flip",
        "crop",
        "varied",
    ]
    assert changed.data.augment[0] is flip


def test_a_setting_that_a_partial_gave_by_position_can_be_overridden(recipe: Recipe) -> None:
    recipe = replace(recipe, model=partial(Tiny, 8))
    changed = overrides.override(recipe, ["model.width=16"])
    assert value_of(changed, "model.width") == 16
    assert next(changed.model().parameters()).shape[0] == 16


def several(width: int, /, depth: int = 2, *sizes: int) -> tuple[int, ...]:
    return width, depth, *sizes


@pytest.mark.parametrize(
    ("word", "expected"), [("model.width=16", (16, 3, 4, 5)), ("model.depth=9", (8, 9, 4, 5))]
)
def test_what_is_left_of_several_positions_keeps_its_place(
    recipe: Recipe, word: str, expected: tuple[int, ...]
) -> None:
    model: Any = partial(several, 8, 3, 4, 5)
    built: Any = overrides.override(replace(recipe, model=model), [word]).model()
    assert built == expected


def test_a_setting_behind_one_given_by_position_can_be_overridden(recipe: Recipe) -> None:
    recipe = replace(recipe, model=partial(Tiny, 8))
    model = overrides.override(recipe, ["model.dropout=0.5"]).model()
    assert next(model.parameters()).shape[0] == 8
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.5]


def test_a_keyword_that_a_partial_passes_through_is_a_setting(recipe: Recipe) -> None:
    """torchvision's networks take `num_classes` in their `**kwargs`."""
    recipe = replace(recipe, model=partial(resnet18, num_classes=10))
    assert value_of(recipe, "model.num_classes") == 10
    changed = overrides.override(recipe, ["model.num_classes=5"])
    assert value_of(changed, "model.num_classes") == 5
    assert "model.num_classes" in [setting.name for setting in list_settings(recipe)]


@pytest.mark.parametrize(
    "word", ["epochs=3", "optimizer.lr=0.5", "data.augment.crop.padding=1", "model.width=2"]
)
def test_an_override_never_changes_the_original(recipe: Recipe, word: str) -> None:
    before = copy.deepcopy(resolve(recipe))
    overrides.override(recipe, [word])
    assert resolve(recipe) == before


# Refusals


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("epoch=1", "epochs"),
        ("batch=1", "data.batch_size"),
        ("learning_rate=1", "optimizer.lr"),
        ("batch_size=1", "data.batch_size"),
        ("data.batchsize=1", "data.batch_size"),
        ("model.widht=1", "model.width"),
        ("padding=1", "data.augment.crop.padding"),
        ("data.augment.crop.paddin=1", "data.augment.crop.padding"),
        ("--optimzer.lr=1", "optimizer.lr"),
        ("model.width.x=1", "model.width"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    recipe: Recipe, word: str, meant: str
) -> None:
    name = word.removeprefix("--").partition("=")[0]
    with refused(repr(name), f"did you mean {meant}?", "--help"):
        overrides.override(recipe, [word])


@pytest.mark.parametrize("word", ["zzz=1", "=3", "--=3"])
def test_a_name_like_no_other_is_answered_with_the_top_level(recipe: Recipe, word: str) -> None:
    with refused("model, data, optimizer, epochs"):
        overrides.override(recipe, [word])


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("epochs=two", "int"),
        ("epochs=2.5", "int"),
        ("epochs=1e3", "int"),
        ("epochs=", "int"),
        ("epochs=" + "-" * 3000 + "1", "int"),
        ("epochs=" + "(" * 3000, "int"),
        ("epochs=none", "int"),
        ("seed=true", "int"),
        ("compile=1", "bool"),
        ("compile=yes", "bool"),
        ("optimizer.lr=fast", "float"),
        (f"optimizer.lr={10**400}", "float"),  # beyond every float
        ("optimizer.lr=true", "float"),
        ("optimizer.lr=(1,2)", "float"),
        ("optimizer.betas=0.9", "tuple"),
        ("optimizer.betas=0.9,0.9,0.9", "tuple"),
        ("data.mean=0.5", "tuple[float, ...]"),
        ("data.mean=a,b,c", "tuple[float, ...]"),
        ("clip_norm=much", "float | None"),
        ("precision=fp8", "fp32"),
        ("memory_format=nhwc", "channels_last"),
        ("data.augment.varied.mode=middle", "near"),
        ("data.augment.varied.box=1", "tuple[int, int]"),
        ("data.augment.varied.limit=0.5", "int"),
    ],
)
def test_an_ill_typed_value_is_refused_with_the_type_expected(
    recipe: Recipe, word: str, kind: str
) -> None:
    with refused(word, kind):
        overrides.override(recipe, [word])


@pytest.mark.parametrize(
    "word",
    ["epochs=two", "compile=1", "optimizer.lr=fast", "data.mean=0.5", "precision=fp8", "seed=true"],
)
def test_an_ill_typed_value_is_answered_with_a_word_that_can_be_typed(
    recipe: Recipe, word: str
) -> None:
    name = word.partition("=")[0]
    with pytest.raises(UserError) as caught:
        overrides.override(recipe, [word])
    words = [part.rstrip(",;") for part in caught.value.instead.split() if part.startswith(name)]
    assert words, caught.value.instead
    overrides.override(recipe, words)


@pytest.mark.parametrize(
    "word", ["precision=fp8", "memory_format=x", "data.augment.varied.limit=x"]
)
def test_types_are_named_as_people_write_them(recipe: Recipe, word: str) -> None:
    with pytest.raises(UserError) as caught:
        overrides.override(recipe, [word])
    for jargon in ("Optional", "typing", "NoneType", "Union"):
        assert jargon not in str(caught.value)


@pytest.mark.parametrize("word", ["model=resnet", "optimizer=SGD", "data.augment=none", "loss=mse"])
def test_code_is_to_be_changed_in_the_recipe_file(recipe: Recipe, word: str) -> None:
    with refused(word, "change code in the recipe file"):
        overrides.override(recipe, [word])


@pytest.mark.parametrize("word", ["data=3", "data.augment.crop=3"])
def test_a_part_of_a_recipe_is_no_setting(recipe: Recipe, word: str) -> None:
    with refused(word):
        overrides.override(recipe, [word])


@pytest.mark.parametrize(
    ("word", "instead"), [("epochs", "epochs=VALUE"), ("--epochs", "epochs=VALUE"), ("5", "--help")]
)
def test_a_word_without_an_equals_sign_is_refused(recipe: Recipe, word: str, instead: str) -> None:
    with refused(repr(word), "name=value", instead):
        overrides.override(recipe, [word])


@pytest.mark.parametrize(
    "word", ["epochs=0", "data.batch_size=0", "clip_norm=-1", "data.std=0,0,0"]
)
def test_an_override_is_validated_like_the_recipe_file(recipe: Recipe, word: str) -> None:
    with refused(word.partition("=")[0]):
        overrides.override(recipe, [word])


@pytest.mark.parametrize(
    "name",
    [
        "data.source.root",
        "data.source.train",
        "data.source.download",
        "data.source.transform",
        "optimizer.params",
        "loss.reduction",
    ],
)
def test_what_the_launcher_fills_in_cannot_be_overridden(name: str) -> None:
    recipe = tiny_recipe(data={"source": CIFAR10})
    with refused(repr(name)):
        overrides.override(recipe, [f"{name}=1"])


# Reading one value


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("3", str, "3"),
        ("3", int | None, 3),
        ("3", float | str, 3.0),
        ("none", str | None, None),
        ("none", str, "none"),
        ("'3'", str, "3"),
        ("FALSE", bool, False),
        ("2", Literal[1, 2], 2),
        ("a", Literal["a"] | None, "a"),
        ("1,", tuple[int, ...], (1,)),
        ("()", tuple[int, ...], ()),
        ("1,x", tuple[int, str], None),
        ("(1,'x')", tuple[int, str], (1, "x")),
        ("((1,2),(3,4))", tuple[tuple[int, int], ...], ((1, 2), (3, 4))),
        ("anything", Any, "anything"),
        ("0.9,0.5", tuple[float | Tensor, float | Tensor], (0.9, 0.5)),
        ("8,16", tuple, (8, 16)),
        ("8,16", list, [8, 16]),
        ("8,16", list[int], [8, 16]),
        ("8,", Sequence[int], (8,)),
        ("8,x", list[int], None),
    ],
)
def test_a_text_is_read_as_its_annotation(text: str, annotation: Any, expected: object) -> None:
    if expected is None and text != "none":
        with refused(f"x={text}"):
            overrides.parse(text, annotation, "x")
        return
    value = overrides.parse(text, annotation, "x")
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "text", (0.5, 0.25), "fp32"])
def test_a_value_is_shown_as_it_would_be_typed(value: object) -> None:
    assert overrides.parse(overrides.as_text(value), Any, "x") == value
    assert " " not in overrides.as_text(value)


@pytest.mark.parametrize("value", ["a b", "it's", "$HOME", (0.5,), (), ((1, 2), (3, 4)), [1, 2]])
def test_a_shell_passes_on_a_value_that_is_typed_as_it_is_shown(value: object) -> None:
    word = f"x={overrides.as_text(value)}"
    passed = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True)
    assert overrides.parse(passed.stdout.removeprefix("x="), type(value), "x") == value
