"""The embedded image set: shapes drawn by code, for smoke tests and where CIFAR-10 is missing.

It needs no file and no network. Each class is one shape in a random place, size and colour on a
noisy background of another colour, so a network has to learn the shape. No benchmark: an
accuracy reached on it says nothing about CIFAR-10.
"""

from collections.abc import Callable
from typing import Any

import numpy

from launcher.data.limits import refuse_too_large
from launcher.errors import UserError

Grid = Any  # float array (n, size, size): each pixel's distance from the shape's centre, in radii

_SHAPES: dict[str, Callable[[Grid, Grid], Any]] = {
    "disk": lambda x, y: x**2 + y**2 < 1,
    "ring": lambda x, y: (x**2 + y**2 < 1.2) & (x**2 + y**2 > 0.5),
    "square": lambda x, y: (abs(x) < 0.9) & (abs(y) < 0.9),
    "frame": lambda x, y: (
        (numpy.maximum(abs(x), abs(y)) < 1.1) & (numpy.maximum(abs(x), abs(y)) > 0.7)
    ),
    "cross": lambda x, y: ((abs(x) < 0.3) | (abs(y) < 0.3)) & (numpy.maximum(abs(x), abs(y)) < 1.2),
    "bars": lambda x, y: numpy.sin(6 * x) > 0,
    "stripes": lambda x, y: numpy.sin(6 * y) > 0,
    "rising": lambda x, y: numpy.sin(4.5 * (x + y)) > 0,
    "falling": lambda x, y: numpy.sin(4.5 * (x - y)) > 0,
    "checks": lambda x, y: numpy.sin(5 * x) * numpy.sin(5 * y) > 0,
}


MOST_OF_A_KIND, MOST_PICTURES = 10_000, 10_000_000  # more is taken for a typing mistake


class Synthetic:
    """Pictures of `classes` classes, `size` pixels square, as uint8 `(n, size, size, channels)`.

    With more than ten classes the shapes repeat in other brightnesses. `count` is the number of
    training pictures; there are a fifth as many test pictures. The arguments `root` and
    `download` are those of torchvision's data sets and are ignored.
    """

    def __init__(
        self,
        root: str = "",
        train: bool = True,
        download: bool = False,
        *,
        size: int = 32,
        channels: int = 3,
        classes: int = 10,
        count: int = 10_000,
    ) -> None:
        """Draw the set: the same pictures every time; no test picture is a training picture.

        Raises `UserError` for numbers that are too small, or too large for the memory.
        """
        for name, number in (("size", size), ("channels", channels), ("classes", classes)):
            _refuse_beyond(name, number, MOST_OF_A_KIND)
        _refuse_beyond("count", count, MOST_PICTURES)
        refuse_too_large("Synthetic", count, size, channels)
        random = numpy.random.default_rng([2026, int(train)])
        number = count if train else max(1, count // 5)
        self.targets = numpy.arange(number) % classes
        self.classes = [_class_name(index) for index in range(classes)]
        self.data = numpy.empty((number, size, size, channels), numpy.uint8)
        for start in range(0, number, 1000):
            part = slice(start, start + 1000)
            self.data[part] = _draw(self.targets[part], size, channels, random)


def _refuse_beyond(name: str, number: Any, most: int) -> None:
    if not isinstance(number, int) or not 1 <= number <= most:
        raise UserError(
            f"{name}={number} of Synthetic",
            expected=f"a whole number from 1 to {most:,}",
            instead=f"give it another {name}, in the recipe file or for this run",
        )


def _class_name(index: int) -> str:
    tone, shape = divmod(index, len(_SHAPES))
    return list(_SHAPES)[shape] + (f" {tone + 1}" if tone else "")


def _draw(targets: Any, size: int, channels: int, random: numpy.random.Generator) -> Any:
    count = len(targets)
    axis = numpy.linspace(-1, 1, size, dtype=numpy.float32)
    centre = random.uniform(-0.25, 0.25, (2, count, 1, 1)).astype(numpy.float32)
    radius = random.uniform(0.5, 0.7, (count, 1, 1)).astype(numpy.float32)
    x = (axis[None, None, :] - centre[0]) / radius
    y = (axis[None, :, None] - centre[1]) / radius
    x, y = numpy.broadcast_arrays(x, y)
    mask = numpy.empty((count, size, size), bool)
    for index, shape in enumerate(_SHAPES.values()):
        chosen = targets % len(_SHAPES) == index
        mask[chosen] = shape(x[chosen], y[chosen])
    return _paint(mask, targets // len(_SHAPES), channels, random)


def _paint(mask: Any, tone: Any, channels: int, random: numpy.random.Generator) -> Any:
    """Light shapes on dark ground, noise over both; a higher tone darkens the whole picture."""
    shape_colour = random.uniform(130, 255, (len(mask), 1, 1, channels))
    ground_colour = random.uniform(0, 110, (len(mask), 1, 1, channels))
    noise = random.normal(0, 12, (*mask.shape, channels))
    picture = numpy.where(mask[..., None], shape_colour, ground_colour) + noise
    picture *= 0.75 ** tone[:, None, None, None]
    return numpy.clip(picture, 0, 255).astype(numpy.uint8)
