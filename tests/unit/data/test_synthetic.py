"""The embedded image set: the same pictures everywhere, and shapes that a small network learns."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy
import pytest
import torch

from launcher import Recipe, Synthetic
from launcher.config import loader
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport
from tests.support.helpers import RECIPES, context_of, refused


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (32, 32, 3)),
        ({"size": 64, "classes": 5}, (64, 64, 3)),
        ({"size": 28, "channels": 1}, (28, 28, 1)),
        ({"classes": 100}, (32, 32, 3)),
        ({"size": 9, "channels": 4, "classes": 2}, (9, 9, 4)),
    ],
)
def test_pictures_have_the_size_channels_and_classes_asked_for(
    settings: dict[str, int], shape: tuple[int, ...]
) -> None:
    source: Any = partial(Synthetic, count=1000, **settings)  # type: ignore[arg-type]
    train, test = source(train=True), source(train=False)
    classes = settings.get("classes", 10)
    for half, count in ((train, 1000), (test, 200)):
        assert half.data.shape == (count, *shape)
        assert half.data.dtype == numpy.uint8
        assert len(half.targets) == count
        assert len(set(half.classes)) == classes
        assert set(half.targets.tolist()) == set(range(classes)), "every class is present"


def test_classes_are_of_equal_size() -> None:
    counts = numpy.bincount(Synthetic(count=1000).targets)
    assert counts.tolist() == [100] * 10


def test_the_set_is_the_same_every_time() -> None:
    one, two = Synthetic(count=1500), Synthetic(count=1500)
    assert numpy.array_equal(one.data, two.data)
    assert numpy.array_equal(one.targets, two.targets)


def test_no_test_picture_is_among_the_training_pictures() -> None:
    """5000 make a test half of 1000, which is drawn in as large a part as the training half."""
    train = {picture.tobytes() for picture in Synthetic(count=5000).data}
    test = {picture.tobytes() for picture in Synthetic(train=False, count=5000).data}
    assert len(train) == 5000, "no picture occurs twice"
    assert not train & test


def test_pictures_are_bright_shapes_on_dark_ground() -> None:
    pictures = Synthetic(count=500).data
    assert pictures.min() < 30
    assert pictures.max() > 225
    assert pictures.reshape(500, -1).std(axis=1).min() > 10, "no picture is blank"


def test_more_than_ten_classes_differ_in_brightness() -> None:
    pictures = Synthetic(count=2000, classes=100)
    brightness = pictures.data.mean(axis=(1, 2, 3))
    first = brightness[pictures.targets == 0].mean()
    last = brightness[pictures.targets == 90].mean()
    assert last < first / 4
    assert pictures.classes[0] == "disk"
    assert pictures.classes[90] == "disk 10"


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_even_the_smallest_set_has_a_test_picture(count: int) -> None:
    assert len(Synthetic(count=count).data) == count
    assert len(Synthetic(train=False, count=count).data) == 1


def test_the_arguments_of_torchvisions_data_sets_are_accepted() -> None:
    assert len(Synthetic("anywhere", False, True, count=50).data) == 10


@pytest.fixture
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trained(recipe: Recipe) -> list[EpochReport]:
    """Train in this process, as the launcher does, but on one core: others may be busy."""
    ctx = context_of(recipe)
    torch.set_num_threads(1)
    return [event for event in fit(ctx) if isinstance(event, EpochReport)]


@pytest.mark.usefixtures("same_threads")
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("simplecnn", partial(Synthetic, count=5000)),
        pytest.param(
            "pictures64",
            partial(Synthetic, size=64, classes=5, count=2500),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_shipped_network_learns_the_shapes_within_two_epochs(name: str, source: Any) -> None:
    recipe = loader.load(RECIPES / f"{name}.py").recipe
    recipe = replace(recipe, epochs=2, data=replace(recipe.data, source=source))
    first, second = trained(recipe)
    assert second.evaluation.accuracy > 0.95
    assert second.train_loss < first.train_loss


def test_more_than_the_memory_holds_is_refused() -> None:
    with refused("10,000,000 images of 10000 x 10000 pixels need", "GB of memory"):
        Synthetic(count=10**7, size=10**4)


@pytest.mark.parametrize("name", ["size", "channels", "classes", "count"])
@pytest.mark.parametrize("number", [0, -1, 2**31, 10**40, (3,), 1.5])
def test_numbers_of_which_there_is_no_set_are_refused(name: str, number: Any) -> None:
    with refused(f"{name}={number} of Synthetic", "from 1 to 10,000"):
        Synthetic(**{name: number})
