"""Settings by dotted names: override, list, and the resolved form."""

import copy
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

from launcher import Draws, Recipe, Synthetic, crop, cutout, ema, flip, linear
from launcher.config import loader, overrides
from launcher.errors import UserError
from tests.support.helpers import RECIPES, Tiny, refused, tiny_recipe


def value_of(recipe: Recipe, name: str) -> Any:
    """The setting `name` in the resolved form."""
    value = overrides.as_dict(recipe)
    for part in name.split("."):
        if isinstance(value, list):
            value = next(item for item in value if item["call"].endswith(f":{part}"))
        else:
            value = value[part]
    return value


def varied(  # type: ignore[no-untyped-def]
    images: Tensor,
    draws: Draws,
    *,
    flag: bool = False,
    count: int = 3,
    strength: float = 0.5,
    mode: Literal["near", "far"] = "near",
    limit: Optional[int] = None,  # noqa: UP045 - the older spelling is what many recipes have
    box: tuple[int, int] = (1, 2),
    label: str = "x",
    untyped=None,
) -> Tensor:
    return images


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe(
        data={"source": partial(Synthetic, count=100), "augment": (flip, crop, varied)},
        schedule=partial(linear, warmup=0.1),
        average=partial(ema, decay=0.9),
    )


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
    before = dict(flat(overrides.as_dict(recipe)))
    after = dict(flat(overrides.as_dict(changed)))
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
    assert [overrides.short_name(item) for item in changed.data.augment] == [
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
    assert "model.num_classes" in [setting.name for setting in overrides.list_settings(recipe)]


@pytest.mark.parametrize(
    "word", ["epochs=3", "optimizer.lr=0.5", "data.augment.crop.padding=1", "model.width=2"]
)
def test_an_override_never_changes_the_original(recipe: Recipe, word: str) -> None:
    before = copy.deepcopy(overrides.as_dict(recipe))
    overrides.override(recipe, [word])
    assert overrides.as_dict(recipe) == before


# Refusals


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optimizer.lrr=1", "optimizer.lr"),
        ("lr=1", "optimizer.lr"),
        ("epoch=1", "epochs"),
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
        ("epochs=none", "int"),
        ("seed=true", "int"),
        ("compile=1", "bool"),
        ("compile=yes", "bool"),
        ("optimizer.lr=fast", "float"),
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


# The resolved form


def test_the_resolved_form_is_plain_json_with_defaults_filled_in(recipe: Recipe) -> None:
    form = overrides.as_dict(recipe)
    assert json.loads(json.dumps(form)) == form
    assert form["optimizer"]["call"] == "torch.optim.adam:Adam"
    assert form["optimizer"]["lr"] == 1e-3
    assert form["optimizer"]["eps"] == 1e-8
    assert form["model"] == {"call": "tests.support.helpers:Tiny", "width": 4, "dropout": 0.0}
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
    assert overrides.as_dict(one) == overrides.as_dict(two)


def test_a_default_written_out_changes_nothing() -> None:
    written = tiny_recipe(optimizer=partial(Adam, lr=1e-3, eps=1e-8), model=partial(Tiny, width=4))
    assert overrides.as_dict(written) == overrides.as_dict(tiny_recipe())


def test_a_keyword_and_a_position_have_the_same_form() -> None:
    one, two = partial(Tiny, 8), partial(Tiny, width=8)
    assert overrides.as_dict(one) == overrides.as_dict(two)


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
    assert overrides.as_dict(build()) != overrides.as_dict(tiny_recipe())
    assert overrides.as_dict(build()) == overrides.as_dict(build())


def test_the_order_of_augmentations_is_part_of_the_form() -> None:
    one = tiny_recipe(data={"augment": (flip, cutout)})
    two = tiny_recipe(data={"augment": (cutout, flip)})
    assert overrides.as_dict(one) != overrides.as_dict(two)


def test_class_weights_appear_as_numbers() -> None:
    loss = partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0]))
    assert overrides.as_dict(loss)["weight"] == [1.0, 2.0]


def activated(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return activation()


def test_code_as_a_setting_appears_with_its_own_settings() -> None:
    form = overrides.as_dict(partial(activated, activation=nn.GELU))
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
        overrides.as_dict(NAMELESS[place]())


# The list


@pytest.mark.parametrize("name", ["simplecnn", "pictures64"])
def test_the_list_of_a_shipped_recipe_has_what_a_user_expects(name: str) -> None:
    recipe = loader.load(RECIPES / f"{name}.py").recipe
    listed = [setting.name for setting in overrides.list_settings(recipe)]
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
    listed = overrides.list_settings(recipe)
    words = [f"{setting.name}={overrides.as_text(setting.value)}" for setting in listed]
    assert overrides.as_dict(overrides.override(recipe, words)) == overrides.as_dict(recipe)


def test_the_list_follows_the_order_of_the_recipes_fields(recipe: Recipe) -> None:
    tops = [setting.name.split(".")[0] for setting in overrides.list_settings(recipe)]
    order = list(dict.fromkeys(tops))
    assert order == sorted(order, key=list(overrides.as_dict(recipe)).index)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("epochs", "int"),
        ("data.root", "str"),
        ("data.mean", "tuple[float, ...]"),
        ("clip_norm", "float | None"),
        ("sync_batch_norm", "bool"),
    ],
)
def test_types_are_listed_as_people_write_them(recipe: Recipe, name: str, kind: str) -> None:
    found = {setting.name: setting.type_name for setting in overrides.list_settings(recipe)}
    assert found[name] == kind


def test_short_names_leave_the_module_out() -> None:
    assert overrides.short_name(partial(Tiny, width=3)) == "Tiny"
    assert overrides.code_name(Tiny) == "tests.support.helpers:Tiny"
