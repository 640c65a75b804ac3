"""Which images are held out: by class, by seed, as folds; and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from launcher import Images, Synthetic
from launcher.data import sources
from launcher.data.image_folder import Folder
from launcher.data.images import Data, ImageSet
from launcher.data.validation import count_held_out, held_out
from tests.support.helpers import HALF, refused, tiny_recipe
from tests.unit.data.test_image_folder import fill

LABELS = torch.arange(1000) % 10


def images_of(source: Callable[..., Any], **changes: Any) -> Images:
    return Images(source, batch_size=2, mean=HALF, std=HALF, **changes)


@pytest.mark.parametrize("validation", [0.1, 100, "3/10"])
def test_each_class_gives_the_same_part(validation: float | str) -> None:
    chosen = held_out(LABELS, validation, seed=0)
    assert torch.bincount(LABELS[chosen]).tolist() == [10] * 10
    assert chosen.tolist() == sorted(set(chosen.tolist()))


@pytest.mark.parametrize("validation", [0.037, 37, 1, 999, "2/7"])
def test_unequal_classes_give_their_part_up_to_one_image(validation: float | str) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate((700, 250, 50))])
    labels = labels[torch.from_numpy(numpy.random.default_rng(0).permutation(1000))]
    chosen = held_out(labels, validation, seed=1)
    size = count_held_out(1000, validation)
    assert len(chosen) == size
    for label, images in enumerate((700, 250, 50)):
        assert abs(int((labels[chosen] == label).sum()) - size * images / 1000) < 1


def test_the_seed_decides_and_nothing_else() -> None:
    first, again = (held_out(LABELS, 0.2, seed=3) for _ in range(2))
    assert first.equal(again)
    assert not first.equal(held_out(LABELS, 0.2, seed=4))


@pytest.mark.parametrize("folds", [2, 5, 7])
def test_the_folds_share_no_image_and_are_all_images_together(folds: int) -> None:
    parts = [held_out(LABELS, f"{k}/{folds}", seed=0) for k in range(1, folds + 1)]
    assert torch.cat(parts).sort().values.equal(torch.arange(1000))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_training_and_validation_are_the_sources_images_with_their_files() -> None:
    pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    files = tuple(f"{number}.png" for number in range(20))
    train = ImageSet(pixels, torch.arange(20) % 2, ("a", "b"), files)
    data = sources.hold_out(Data(train, train, "own"), 0.2, seed=0)
    assert data.validation is not None
    assert data.held_out is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 20)
    for half in (data.train, data.validation):
        assert [f"{int(pixel)}.png" for pixel in half.tensor[:, 0, 0, 0]] == list(half.files)
        assert half.tensor[:, 0, 0, 0].remainder(2).equal(half.labels)
    assert {*data.train.files, *data.validation.files} == {*files}
    assert [f"{place}.png" for place in data.held_out.tolist()] == list(data.validation.files)
    assert data.evaluated is data.validation
    assert data.evaluated_on == "val"


def test_without_validation_the_test_images_are_evaluated() -> None:
    data = sources.load(tiny_recipe().data)
    assert data.evaluated is data.test
    assert (data.evaluated_on, data.held_out) == ("test", None)


class ThreeHalves:
    """A source with validation images of its own."""

    classes = ("a", "b")

    def __init__(self, root: str, split: str) -> None:
        number = {"train": 6, "test": 4, "validation": 2}[split]
        self.data, self.targets = numpy.full((number, 2, 2, 3), number, "uint8"), [0, 1] * 3
        self.targets = self.targets[:number]


def test_a_source_may_have_validation_images_of_its_own() -> None:
    data = sources.load(images_of(ThreeHalves, validation="validation"))
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 4)
    assert data.held_out is None


@pytest.mark.parametrize("source", [partial(Synthetic, count=20), ThreeHalves])
def test_a_split_that_the_source_does_not_have_is_refused(source: Callable[..., Any]) -> None:
    with refused("data.source=ThreeHalves" if source is ThreeHalves else "data.validation=val"):
        sources.load(images_of(source, validation="val"))


def test_a_folder_may_have_val_beside_test(tmp_path: Path) -> None:
    for half, number in {"train": 4, "val": 2, "test": 3}.items():
        fill(tmp_path / half, {"cat": number, "dog": number})
    data = sources.load(images_of(Folder, root=str(tmp_path), validation="val"))
    assert {name: len(half) for name, half in data.splits.items()} == {
        "training": 8,
        "validation": 4,
        "test": 6,
    }


@pytest.mark.parametrize("name", ["val", "other"])
def test_a_folder_without_that_split_is_refused(name: str, tmp_path: Path) -> None:
    for half in ("train", "val"):
        fill(tmp_path / half, {"cat": 2})
    with refused(f"data.validation={name}", "data.validation=0.1"):
        sources.load(images_of(Folder, root=str(tmp_path), validation=name))


@pytest.mark.parametrize(
    "given",
    [0, -1, 0.0, 1.0, 1.5, "0/5", "6/5", "1/1", "1/0", "a/b", "train", "test", "", "x y", True],
)
def test_what_is_no_part_of_the_images_is_refused(given: float | str) -> None:
    with refused(f"data.validation={given}", "data.validation=0.1"):
        tiny_recipe(data={"validation": given})


@pytest.mark.parametrize("given", [100, 0.001, 0.999, "1/101"])
def test_an_image_must_be_left_on_both_sides(given: float | str) -> None:
    def load(labels: Tensor) -> Tensor:
        return held_out(labels, given, seed=0)

    if given == "1/101":
        assert len(load(torch.zeros(100).long())) == 1
        return
    with refused(f"data.validation={given} of 100 training images", "data.validation=0.1"):
        load(torch.zeros(100).long())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"patience": 3}, "data.validation=0.1"),
        ({"patience": 0, "data": {"validation": 0.1}}, "patience=0"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"min_delta": 1.0}, "min_delta=1.0"),
    ],
)
def test_patience_without_images_to_decide_by_is_refused(
    changes: dict[str, Any], part: str
) -> None:
    with refused(part):
        tiny_recipe(**changes)
