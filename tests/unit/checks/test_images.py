"""What `check` says of the images, and the pictures that it makes of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from launcher import Draws, flip, growing, mixup
from launcher.checks.check.images import describe_images, joined, near_pairs, samples, write_samples
from launcher.checks.verdicts import Verdict
from launcher.config.recipe import Images, Recipe
from launcher.data import sources
from launcher.data.images import Data, ImageSet
from tests.support.helpers import tiny_recipe

Change = Callable[[Data], Data]


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe()


@pytest.fixture
def data(recipe: Recipe) -> Data:
    return sources.load(recipe.data)


def told(data: Data, images: Images, near: bool = False) -> list[Verdict]:
    return list(describe_images(data, images, near=near))


def test_equal_classes_and_right_numbers_are_good(recipe: Recipe, data: Data) -> None:
    verdicts = told(data, recipe.data, near=True)
    classes, twice, near, statistics = verdicts
    assert {verdict.standing for verdict in verdicts} == {"good"}
    assert sum(classes.figures["train"]) == len(data.train)
    assert sum(classes.figures["test"]) == len(data.test)
    assert twice.figures == {"train_twice": 0, "with_two_labels": 0, "in_both": 0}
    assert near.figures == {"near": 0}
    pixels = data.train.tensor.double() / 255
    assert statistics.figures["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-5)
    std = pixels.std((0, 1, 2), correction=0)
    assert statistics.figures["std"] == pytest.approx(std.tolist(), abs=1e-5)


def test_validation_images_are_counted_and_looked_for_in_training(recipe: Recipe) -> None:
    images = replace(recipe.data, validation=0.2)
    data = sources.load(images)
    classes, twice, *_ = told(data, images)
    assert "8 training images of each, 2 validation images of each" in classes.answer
    assert classes.figures["validation"] == [2] * 10
    assert twice.answer == "no validation or test image is a training image as well"
    assert data.validation is not None
    leaked = replace(data.train, images=data.train.tensor.clone())
    leaked.tensor[7] = data.validation.tensor[3]
    verdict = told(replace(data, train=leaked), images)[1]
    assert verdict.standing == "notice"
    assert "1 validation image of 20 in training as well, counted from 0: 3 = 7" in verdict.answer


def test_a_rare_class_is_told_with_weights_that_count_all_alike(recipe: Recipe, data: Data) -> None:
    few = (data.train.labels == 3).nonzero()[:2, 0]
    kept = torch.cat([few, (data.train.labels != 3).nonzero()[:, 0]])
    train = ImageSet(data.train.tensor[kept], data.train.labels[kept], data.train.classes)
    verdict = told(replace(data, train=train), recipe.data)[0]
    assert verdict.standing == "notice"
    assert f"from 2 ({data.train.classes[3]})" in verdict.answer
    advised = verdict.instead.partition("loss=")[2]
    loss = eval(advised, {"partial": partial, "cross_entropy": cross_entropy, "torch": torch})
    weights = loss.keywords["weight"]
    each = torch.bincount(train.labels, minlength=10)
    assert weights * each == pytest.approx(torch.full((10,), len(train) / 10), rel=0.01)


def test_a_class_without_images_is_named(recipe: Recipe, data: Data) -> None:
    classes = (*data.train.classes, "unicorn")
    train, test = (replace(half, classes=classes) for half in (data.train, data.test))
    answers = [
        verdict.answer for verdict in told(replace(data, train=train, test=test), recipe.data)
    ]
    assert "no training image of unicorn" in answers
    assert "no test image of unicorn" in answers


def test_images_that_stand_twice_are_counted(recipe: Recipe, data: Data) -> None:
    images, labels = data.train.tensor.clone(), data.train.labels.clone()
    images[5], images[7], images[9] = data.test.tensor[2], images[6], images[8]
    labels[6], labels[7] = 1, 2
    labels[8] = labels[9] = 0
    train = ImageSet(images, labels, data.train.classes)
    verdict = told(replace(data, train=train), recipe.data)[1]
    assert verdict.standing == "notice"
    assert verdict.figures == {"train_twice": 2, "with_two_labels": 1, "in_both": 1}
    assert "1 test image of" in verdict.answer
    assert "2 = 5" in verdict.answer
    only_labels = ImageSet(images[6:], labels[6:], data.train.classes)
    verdict = told(replace(data, train=only_labels), recipe.data)[1]
    assert verdict.instead == "decide on one label for each"


def test_pictures_that_are_nearly_the_same_are_found(recipe: Recipe, data: Data) -> None:
    images = data.train.tensor.clone()
    images[4] = (data.test.tensor[3].float() * 0.98 + 3).byte()  # a little paler
    images[6] = data.test.tensor[1].flip(1)  # another picture, to the eye
    assert near_pairs(data.test, replace(data.train, images=images)) == [(3, 4)]
    train = ImageSet(images, data.train.labels, data.train.classes)
    verdict = told(replace(data, train=train), recipe.data, near=True)[2]
    assert (verdict.standing, verdict.figures) == ("notice", {"near": 1})
    assert "3 ~ 4" in verdict.answer


def test_numbers_that_are_far_from_the_images_are_told(recipe: Recipe, data: Data) -> None:
    wrong = replace(recipe.data, mean=(0.0,) * 3, std=(0.01,) * 3)
    verdict = told(data, wrong)[-1]
    assert verdict.standing == "notice"
    mean, std = (
        eval(part.partition("=")[2])
        for part in verdict.instead.removeprefix("write ").split(", std")
    )
    assert told(data, replace(wrong, mean=mean, std=std))[-1].standing == "good"


def test_samples_are_what_training_sees(recipe: Recipe, data: Data) -> None:
    seen: list[torch.Tensor] = []

    def noting(images: torch.Tensor, draws: Draws) -> torch.Tensor:
        seen.append(flip(images, draws))
        return seen[-1]

    recipe = replace(recipe, data=replace(recipe.data, augment=(noting,)))
    pictures = samples(recipe, data.train)
    assert pictures.shape == (6, 8, *data.train.images.shape[1:])
    for row in pictures[1:]:
        for own, picture in zip(pictures[0], row, strict=True):  # each below its own
            assert torch.equal(picture, own) or torch.equal(picture, own.flip(1))
    trained = {image.permute(1, 2, 0).numpy().tobytes() for image in torch.cat(seen)}
    assert {picture.numpy().tobytes() for picture in pictures[1:].flatten(0, 1)} == trained
    mixed = replace(recipe, data=replace(recipe.data, augment=(), mix=mixup))
    assert not torch.equal(samples(mixed, data.train)[1], pictures[0])


def test_samples_of_smaller_images_are_enlarged(recipe: Recipe, data: Data) -> None:
    sizes = partial(growing, first=8, last=32, end=0.75)
    pictures = samples(
        replace(recipe, data=replace(recipe.data, train_resolution=sizes)), data.train
    )
    assert pictures.shape == (6, 8, *data.train.images.shape[1:])
    assert torch.equal(pictures[0], pictures[5])
    pixels = pictures[1][:, ::4, ::4]  # of the first epoch
    assert torch.equal(pictures[1], pixels.repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_strip_is_a_picture(channels: int, tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (2, 3, 4, 4, channels), dtype=torch.uint8)
    whole = joined(pictures)
    assert whole.shape == (8, 12, 3)
    assert torch.equal(whole[4:, 8:, :channels], pictures[1, 2])
    write_samples(pictures, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (12 * 16, 8 * 16)
        assert image.getpixel((0, 0)) == tuple(whole[0, 0].tolist())
