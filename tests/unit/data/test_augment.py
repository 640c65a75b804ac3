"""Augmentations change what they should, image by image; mixing keeps the right share of labels."""

import numpy
import pytest
import torch
from torch import Tensor

from launcher import Draws, alternating_flip, crop, cutmix, cutout, flip, jitter, mixup

SIZE = 8


def pictures(count: int) -> Tensor:
    """Images in which no two pixels are alike, in the launcher's memory layout."""
    values = torch.arange(count * SIZE * SIZE * 3) % 251
    return values.to(torch.uint8).view(count, SIZE, SIZE, 3).permute(0, 3, 1, 2)


def draws(count: int, first: float = 0.0, second: float = 0.0, epoch: int = 1) -> Draws:
    table = torch.zeros(count, 4)
    table[:, 0], table[:, 1] = first, second
    return Draws(fresh=table, fixed=table, epoch=epoch)


def random_draws(count: int) -> Draws:
    generator = torch.Generator().manual_seed(1)
    fresh, fixed = torch.rand(2, count, 4, generator=generator)
    return Draws(fresh, fixed, epoch=1)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The picture that a shift by that many pixels should give, by the definition of reflection."""
    result = torch.empty_like(image)
    for y in range(SIZE):
        for x in range(SIZE):
            source_y, source_x = reflected(y + down), reflected(x + right)
            result[:, y, x] = image[:, source_y, source_x]
    return result


def reflected(position: int) -> int:
    if position < 0:
        return -position
    return position if position < SIZE else 2 * (SIZE - 1) - position


def test_flip_mirrors_the_images_whose_draw_is_below_one_half() -> None:
    images = pictures(2)
    drawn = Draws(torch.tensor([[0.4] * 4, [0.6] * 4]), torch.zeros(2, 4), epoch=1)
    result = flip(images, drawn)
    assert torch.equal(result[0], images[0].flip(-1))
    assert torch.equal(result[1], images[1])


@pytest.mark.parametrize("fixed", [0.2, 0.8])
def test_alternating_flip_shows_each_image_both_ways_in_two_epochs(fixed: float) -> None:
    images = pictures(1)
    odd = alternating_flip(images, draws(1, fixed, epoch=1))
    even = alternating_flip(images, draws(1, fixed, epoch=2))
    assert torch.equal(odd, even.flip(-1))
    assert torch.equal(odd, images) == (fixed < 0.5)


@pytest.mark.parametrize(("draw", "shift"), [(0.0, -2), (0.5, 0), (0.999, 2), (0.25, -1)])
def test_crop_shifts_by_the_drawn_number_of_pixels_and_reflects(draw: float, shift: int) -> None:
    images = pictures(1)
    result = crop(images, draws(1, first=draw, second=0.5), padding=2)
    assert torch.equal(result[0], shifted(images[0], shift, 0))
    result = crop(images, draws(1, first=0.5, second=draw), padding=2)
    assert torch.equal(result[0], shifted(images[0], 0, shift))


def test_crop_with_zero_padding_fills_with_black() -> None:
    images = pictures(1).clamp(min=1)
    result = crop(images, draws(1), padding=3, fill="zero")
    assert (result[0, :, :3] == 0).all()
    assert (result[0, :, :, :3] == 0).all()
    assert torch.equal(result[0, :, 3:, 3:], images[0, :, :-3, :-3])


def test_cutout_covers_a_square_around_the_drawn_centre() -> None:
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    result = cutout(images, draws(1, first=0.5, second=0.0), size=4, fill=9)
    assert (result[0, :, 2:6, :2] == 9).all()
    assert int((result == 9).sum()) == 3 * 4 * 2  # the part left of the picture is lost


@pytest.mark.parametrize(
    ("brightness", "contrast", "expected"),
    [(0.5, 0.5, [20, 100, 250]), (0.999999, 0.5, [71, 151, 255]), (0.0, 0.5, [0, 49, 199])],
)
def test_jitter_shifts_by_a_part_of_white(
    brightness: float, contrast: float, expected: list[int]
) -> None:
    images = torch.tensor([20, 100, 250], dtype=torch.uint8).view(1, 1, 1, 3)
    result = jitter(images, draws(1, brightness, contrast), brightness=0.2, contrast=0.4)
    assert result.flatten().tolist() == expected


@pytest.mark.parametrize(("draw", "expected"), [(0.0, [64, 114, 191]), (0.999999, [0, 86, 255])])
def test_jitter_stretches_contrast_around_the_middle_grey(draw: float, expected: list[int]) -> None:
    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    result = jitter(images, draws(1, 0.5, draw), brightness=0.2, contrast=0.5)
    assert result.flatten().tolist() == expected


def test_jitter_by_nothing_changes_nothing() -> None:
    images = pictures(9)
    assert torch.equal(jitter(images, random_draws(9), brightness=0, contrast=0), images)
    with pytest.raises(ValueError, match="contrast=2"):
        jitter(images, random_draws(9), contrast=2)


@pytest.mark.parametrize("augmentation", [flip, alternating_flip, crop, cutout, jitter])
def test_an_image_is_augmented_alike_in_any_batch(augmentation: object) -> None:
    assert callable(augmentation)
    images, drawn = pictures(16), random_draws(16)
    together = augmentation(images, drawn)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    assert not torch.equal(together, images)
    for index in range(16):
        part = slice(index, index + 1)
        alone = Draws(drawn.fresh[part], drawn.fixed[part], drawn.epoch)
        assert torch.equal(augmentation(images[part], alone)[0], together[index])


def test_mixup_weighs_images_as_it_weighs_labels() -> None:
    ones, zeros = torch.ones(4, 3, SIZE, SIZE), torch.zeros(4, 3, SIZE, SIZE)
    weights = set()
    for seed in range(20):
        mixed, weight = mixup(ones, zeros, numpy.random.default_rng(seed), alpha=1.0)
        assert torch.allclose(mixed, torch.full_like(mixed, weight))
        weights.add(round(weight, 3))
    assert len(weights) > 10


def test_cutmix_keeps_the_label_share_of_the_uncovered_area() -> None:
    ones, zeros = torch.ones(4, 3, SIZE, SIZE), torch.zeros(4, 3, SIZE, SIZE)
    weights = set()
    for seed in range(20):
        mixed, weight = cutmix(ones, zeros, numpy.random.default_rng(seed))
        assert float(mixed.mean()) == pytest.approx(weight)
        weights.add(round(weight, 3))
    assert len(weights) > 5
    assert torch.equal(ones, torch.ones_like(ones))  # the batch itself is not painted over
