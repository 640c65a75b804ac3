"""Augmentation and mixing of whole batches on the device.

An augmentation takes uint8 images `(n, c, h, w)` and their `Draws`, and returns images of the same
shape and type. Each image uses its own row of draws, so which rank processes an image, and
beside which others, changes nothing. Any function of this signature can stand in a recipe, and a
class of torchvision.transforms.v2, which is applied image by image.

A mixing takes normalized images, their partners (each image's successor in the global batch) and
a generator seeded by (seed, step), the same on every rank; it returns the mixed images
and the weight in [0, 1] that each image's own label keeps.
"""

import inspect
import math
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from launcher.config.slots import Augmentation, Draws
from launcher.data.decoding import Cut
from launcher.utils.user_code import function_of


def flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror each image left to right with probability one half."""
    return _mirror(images, draws.fresh[:, 0] < 0.5)


def alternating_flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror half of the images, and the other half in the next epoch.

    Source: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024).
    """
    return _mirror(images, (draws.fixed[:, 0] < 0.5) ^ (draws.epoch % 2 == 1))


def crop(
    images: Tensor,
    draws: Draws,
    *,
    padding: int = 4,
    fill: Literal["reflect", "zero"] = "reflect",
) -> Tensor:
    """Shift each image by up to `padding` pixels each way; new pixels are mirrored or black."""
    _, _, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding={padding} of images of {height} x {width} pixels")
    shifts = (draws.fresh[:, :2] * (2 * padding + 1)).long() - padding
    rows = torch.arange(height, device=images.device) + shifts[:, :1]  # (n, h)
    columns = torch.arange(width, device=images.device) + shifts[:, 1:]  # (n, w)
    shifted = _gather(images, _reflect(rows, height), _reflect(columns, width))
    if fill == "reflect":
        return shifted
    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    return shifted * inside[:, None]


def cutout(images: Tensor, draws: Draws, *, size: int = 8, fill: int = 128) -> Tensor:
    """Cover a square of `size` pixels, centred anywhere in the image, with the grey `fill`.

    Source: DeVries & Taylor, "Improved Regularization of CNNs with Cutout" (2017).
    """
    _, _, height, width = images.shape
    if size < 0 or not 0 <= fill <= 255:
        raise ValueError(f"size={size}, fill={fill}: neither may be below 0, a grey not above 255")
    rows = _span(draws.fresh[:, 0], height, size)
    columns = _span(draws.fresh[:, 1], width, size)
    hidden = rows[:, :, None] & columns[:, None, :]
    return images.masked_fill(hidden[:, None], fill)


def random_resized_crop(
    images: Tensor,
    draws: Draws,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.333),
) -> Tensor:
    """Cut out a part of each image and stretch it to the whole size, smoothly.

    `area` is a fraction of the image's, `ratio` is width over height: see `Cut`. As the
    first augmentation of pictures that are read from disk, it cuts out of the picture as it is
    stored (`cut_of`).
    """
    _, _, height, width = images.shape
    tall, wide, down, right = Cut(area, ratio).shares(draws.fresh).unbind(1)
    rows = _stretch(*_span_of(tall, down, height, height * width), height)
    columns = _stretch(*_span_of(wide, right, width, height * width), width)
    stretched = rows[:, None] @ images.float() @ columns[:, None].mT
    return stretched.round().clamp(0, 255).to(torch.uint8)


def is_cut(value: Any) -> bool:
    """Whether an augmentation is `random_resized_crop`, whatever its settings."""
    return function_of(value) is random_resized_crop


def cut_of(value: Any) -> Cut | None:
    """The crop of a `random_resized_crop` with its settings; None for other augmentations."""
    if not is_cut(value):
        return None
    settings = inspect.signature(value).parameters
    return Cut(settings["area"].default, settings["ratio"].default)


def jitter(
    images: Tensor, draws: Draws, *, brightness: float = 0.1, contrast: float = 0.1
) -> Tensor:
    """Add at most `brightness`, as a fraction of white, and scale contrast by up to `contrast`.

    Contrast is stretched around the middle grey. Both are drawn for each image; its pixels stay
    whole numbers.
    """
    if not (0 <= brightness <= 1 and 0 <= contrast <= 1):
        raise ValueError(f"brightness={brightness}, contrast={contrast}: expected parts, 0 to 1")
    signed = draws.fresh[:, :2, None, None, None] * 2 - 1  # (n, 2, 1, 1, 1)
    factor = 1 + signed[:, 1] * contrast
    shift = 127.5 * (1 - factor) + 255 * brightness * signed[:, 0]
    changed = images.float().mul_(factor).add_(shift + 0.5)  # 0.5: the cast to uint8 then rounds
    return changed.clamp_(0, 255).to(images.dtype)


def mixup(
    images: Tensor, partners: Tensor, random: numpy.random.Generator, *, alpha: float = 0.2
) -> tuple[Tensor, float]:
    """Blend each image with its partner; the weight is drawn from Beta(alpha, alpha).

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018).
    """
    weight = float(random.beta(alpha, alpha))
    return images * weight + partners * (1 - weight), weight


def cutmix(
    images: Tensor, partners: Tensor, random: numpy.random.Generator, *, alpha: float = 1.0
) -> tuple[Tensor, float]:
    """Paste a rectangle of the partner, of an area drawn from Beta(alpha, alpha).

    Source: Yun et al., "CutMix" (2019).
    """
    height, width = images.shape[-2:]
    side = (1 - float(random.beta(alpha, alpha))) ** 0.5
    top, bottom = _interval(random.random(), side, height)
    left, right = _interval(random.random(), side, width)
    images = images.clone()
    images[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def resized(images: Tensor, size: int | None) -> Tensor:
    """uint8 `(n, h, w, c)` -> `(n, size, size, c)`, smoothly; None, or their own size: as they are.

    What becomes of an image does not depend on those beside it, on any device.
    """
    if size is None or tuple(images.shape[1:3]) == (size, size):
        return images
    pixels = images.permute(0, 3, 1, 2)
    if images.device.type != "cpu":  # elsewhere torch cannot interpolate uint8
        pixels = pixels.float()
    smooth = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    if smooth.dtype != torch.uint8:
        smooth = smooth.round_().clamp_(0, 255).to(torch.uint8)
    return smooth.permute(0, 2, 3, 1)


def as_augmentation(value: Any) -> Augmentation:
    """An augmentation of a recipe as a function: a transform is applied image by image."""
    function = function_of(value)
    if isinstance(function, type) and issubclass(function, nn.Module):
        return PerImage(value())
    return value


class PerImage:
    """A transform of torchvision, for each image with torch's generator seeded from its draws.

    These transforms draw from the global generator, once for all the images that they are given. So
    each image is given alone, on the CPU, at some thousand images a second; afterwards the
    generator is as it was.
    """

    def __init__(self, transform: nn.Module) -> None:
        self._transform = transform

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 `(n, c, h, w)` to the same."""
        bits = (draws.fresh[:, :2].double() * 2**24).long().tolist()  # of a float32 draw
        changed = []
        with torch.random.fork_rng(devices=[]):
            for image, (high, low) in zip(images.cpu(), bits, strict=True):
                torch.default_generator.manual_seed(high << 24 | low)
                changed.append(self._transform(image))
        return torch.stack(changed).to(images.device)


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    mirrored = images.flip(-1)
    if images.dtype != torch.uint8:
        return torch.where(chosen[:, None, None, None], mirrored, images)
    # Like torch.where in a third of the time on a CPU: each bit is taken from one of the two.
    bits = (chosen.to(torch.uint8) * 255)[:, None, None, None]
    return mirrored.bitwise_xor_(images).bitwise_and_(bits).bitwise_xor_(images)


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)


def _reflect(positions: Tensor, length: int) -> Tensor:
    """Fold positions outside of [0, length) back, without repeating the edge."""
    return (length - 1) - ((length - 1) - positions.abs()).abs()


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pick pixel (rows[i, y], columns[i, x]) of image i: pixels are contiguous runs of channels."""
    count, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    first = torch.arange(count, device=images.device)[:, None, None] * (height * width)
    flat = first + rows[:, :, None] * width + columns[:, None, :]
    shifted = pixels.index_select(0, flat.flatten())
    return shifted.view(count, height, width, channels).permute(0, 3, 1, 2)


def _span_of(share: Tensor, place: Tensor, length: int, area: int) -> tuple[Tensor, Tensor]:
    """`decoding.span` of many images: start and size `(n,)`."""
    size = (share * math.sqrt(area)).round().clamp(1, length)
    return (place * (length - size + 1)).floor(), size


def _stretch(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Weights `(n, size, size)` that stretch `length` pixels from `start` `(n,)` to `size` pixels.

    Each new pixel is a mean of old ones, weighed by a triangle that is at least a pixel wide to
    each side: linear interpolation, and where the part shrinks, a smooth mean.
    """
    scale = length[:, None] / size
    centres = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale
    old = torch.arange(size, device=start.device)
    distances = (old + 0.5 - centres[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weights = (1 - distances).clamp(min=0)
    inside = (old >= start[:, None]) & (old < (start + length)[:, None])
    weights = weights * inside[:, None]
    return (weights / weights.sum(2, keepdim=True)).float()


def _span(draw: Tensor, length: int, size: int) -> Tensor:
    """Mark `size` positions around a drawn centre: (n,) -> (n, length)."""
    start = (draw * length).long()[:, None] - size // 2
    positions = torch.arange(length, device=draw.device)
    return (positions >= start) & (positions < start + size)


def _interval(centre: float, side: float, length: int) -> tuple[int, int]:
    middle, half = centre * length, side * length / 2
    return max(0, round(middle - half)), min(length, round(middle + half))
