"""The resolution of the training images: a function of the training's progress, once per epoch."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest

from launcher import growing
from launcher.config.overrides import override
from launcher.config.plan import make_plan
from launcher.config.slots import Resolution
from launcher.errors import UserError
from tests.support.helpers import complaint, refused, tiny_recipe

FFCV = partial(growing, first=160, last=192, start=11 / 15, end=13 / 15, multiple=32)


def resolutions(
    resolution: Resolution, epochs: int, size: tuple[int, int] | None = None
) -> tuple[int, ...]:
    recipe = tiny_recipe(epochs=epochs, data={"train_resolution": resolution})
    plan = make_plan(
        recipe, world_size=1, train_images=100, evaluated_images=20, max_steps=3, image_size=size
    )
    return plan.resolutions


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        ({"first": 16, "last": 32}, 5, (16, 24, 24, 32, 32)),  # 20 and 28 are as near to both
        ({"first": 16, "last": 32, "multiple": 4}, 5, (16, 20, 24, 28, 32)),
        ({"first": 16, "last": 32, "start": 0.25, "end": 0.5}, 5, (16, 16, 32, 32, 32)),
        ({"first": 16, "last": 32, "start": 0.5, "end": 0.5}, 5, (16, 16, 16, 32, 32)),
        # 176 pixels, which floats make a little less
        (
            {"first": 128, "last": 224, "start": 7 / 9, "multiple": 32},
            10,
            (*[128] * 8, 192, 224),
        ),
        ({"first": 24, "last": 24}, 2, (24, 24)),
        ({"first": 16, "last": 32}, 1, (32,)),
    ],
)
def test_it_grows_from_the_first_epoch_to_the_last(
    settings: dict[str, Any], epochs: int, expected: tuple[int, ...]
) -> None:
    assert resolutions(partial(growing, **settings), epochs) == expected


def test_the_published_schedule_is_that_of_its_code() -> None:
    """`get_resolution` of FFCV's training of ImageNet, which counts epochs from 0."""

    def theirs(epoch: int) -> int:
        if epoch <= 11:
            return 160
        if epoch >= 13:
            return 192
        return int(numpy.round(numpy.interp([epoch], [11, 13], [160, 192])[0] / 32)) * 32

    assert resolutions(FFCV, 16) == tuple(map(theirs, range(16)))


def test_the_plan_says_it_of_every_epoch_however_early_it_ends() -> None:
    recipe = tiny_recipe(epochs=3, data={"train_resolution": partial(growing, first=8, last=24)})
    plan = make_plan(recipe, world_size=1, train_images=100, evaluated_images=20, max_steps=3)
    assert [plan.resolution(epoch) for epoch in (1, 2, 3)] == [8, 16, 24]
    assert plan.largest_resolution == 24
    plain = make_plan(tiny_recipe(), world_size=1, train_images=100, evaluated_images=20)
    assert plain.resolution(1) is None
    assert plain.largest_resolution is None


def of_numpy(progress: float) -> int:
    return numpy.int64(24)  # type: ignore[return-value]


def test_a_whole_number_of_numpy_is_one() -> None:
    assert resolutions(of_numpy, 2) == (24, 24)


def fraction(progress: float) -> float:
    return 16 + 8 * progress


def late(progress: float) -> int:
    return 24 if progress < 0.9 else 0


def truth(progress: float) -> bool:
    return True


def raising(progress: float) -> int:
    raise KeyError("missing")


def endless(progress: float) -> float:
    return math.inf


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (fraction, "fraction makes 16.0 of the progress 0;"),
        (late, "late makes 0 of the progress 1;"),
        (truth, "truth makes True"),
        (endless, "endless makes inf"),
        (raising, "raising fails: KeyError: 'missing'"),
        (partial(growing, first=24, last=64), "growing makes 48 of the progress 0.5;"),
        (partial(growing, first=24), "missing 1 required"),
        (partial(growing, first=0, last=32), "first=0, last=32"),
        (partial(growing, first=32, last=24), "the smaller number first"),
        (partial(growing, first=20, last=32), "multiples of multiple=8"),
        (partial(growing, first=16, last=32, multiple=0), "multiples of multiple=0"),
        (partial(growing, first=16, last=32, start=0.9, end=0.5), "start=0.9, end=0.5"),
        (partial(growing, first=16, last=32, end=1.5), "end=1.5"),
    ],
)
def test_what_is_no_resolution_is_refused(resolution: Any, message: str) -> None:
    with refused("data.train_resolution", message, "data.train_resolution=none"):
        resolutions(resolution, 5, (32, 32))


def test_images_that_are_not_square_are_refused() -> None:
    with refused("images of 28 x 32 pixels", "data.train_resolution=none"):
        resolutions(partial(growing, first=16, last=24), 3, (28, 32))


def test_its_settings_can_be_changed_for_one_run() -> None:
    recipe = tiny_recipe(epochs=3, data={"train_resolution": partial(growing, first=8, last=24)})
    changed = override(recipe, ["data.train_resolution.first=16"])
    assert changed.data.train_resolution is not None
    assert changed.data.train_resolution(0.0) == 16
    assert override(recipe, ["data.train_resolution=none"]).data.train_resolution is None
    with pytest.raises(UserError, match="change code in the recipe file"):
        override(recipe, ["data.train_resolution=160"])


RECIPE = """
from functools import partial
from torch import nn
from torch.optim import SGD
from launcher import Images, Recipe, Synthetic, growing

def network(pixels: int = 16):
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * pixels * pixels, 10))

recipe = Recipe(
    model=network,
    data=Images(
        partial(Synthetic, count=40), 8, (0.5,) * 3, (0.5,) * 3,
        train_resolution=partial(growing, first=16, last=32),
    ),
    optimizer=partial(SGD, lr=0.01),
    epochs=2,
)
"""


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.train_resolution.last=64", "makes 64"),
        ("data.train_resolution.first=-8", "first=-8"),
        ("epochs=2", "training images of 16 x 16 pixels, at which"),
    ],
)
def test_it_is_one_line_before_anything_is_written(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grown.py"
    path.write_text(RECIPE)
    words = (str(path), "--runs", str(tmp_path / "runs"), "--wandb", "off", word)
    assert message in complaint(capsys, *words)
    assert not (tmp_path / "runs").exists()
