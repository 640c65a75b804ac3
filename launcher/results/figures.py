"""The numbers of a report: confusion matrix, calibration, the first filters.

Files may have been changed by others, so only consistent values are used. No torch is needed.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from launcher.checkpoint.outcomes import Cells, Outcomes, class_accuracies, images_of_classes

MATRIX_CLASSES = 2000  # with more, a list of the largest confusions replaces the picture
MOST_CONFUSIONS = 10
MOST_ROWS = 1000  # classes in the list of accuracies
BINS = 15  # of the reliability diagram
MOST_FILTERS = 128


@dataclass(frozen=True)
class Bin:
    """Images whose probability lies in an interval: their number, its mean, how many were right."""

    images: int
    probability: float
    accuracy: float


def reliability(outcomes: Outcomes) -> tuple[list[Bin], float]:
    """The bins that are not empty, and the expected calibration error (Guo et al., 2017)."""
    is_known = numpy.isfinite(outcomes.probability)
    probability = outcomes.probability[is_known].astype(numpy.float64).clip(0, 1)
    is_right = (outcomes.truth == outcomes.predicted)[is_known]
    numbers = numpy.minimum((probability * BINS).astype(int), BINS - 1)
    bins = [
        Bin(int(own.sum()), float(probability[own].mean()), float(is_right[own].mean()))
        for number in range(BINS)
        if (own := numbers == number).any()
    ]
    gaps = [b.images * abs(b.accuracy - b.probability) for b in bins]
    return bins, sum(gaps) / max(1, len(probability))


@dataclass(frozen=True)
class Filters:
    """The weights of a first convolution as pictures, each from its own lowest to its highest."""

    name: str
    count: int
    pictures: NDArray[Any]  # uint8 (at most MOST_FILTERS, h, w, c)


def first_filters(path: Path, channels: int | None) -> Filters | None:
    """The filters of the first convolution on `channels` (else 1 or 3) in a file of weights.

    None where there is no such weight or the file cannot be read.
    """
    if not path.is_file():  # a FIFO, say, for which one would wait
        return None
    try:
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            wanted = (channels,) if channels in (1, 3) else (3, 1)
            named = [
                name
                for depth in wanted
                for name in sorted(shapes, key=_natural)
                if len(shapes[name]) == 4
                and shapes[name][1] == depth
                and min(shapes[name]) > 0
                and 1 < max(shapes[name][2:]) <= 64
            ]
            if not named:
                return None
            weight = file.get_tensor(named[0])[:MOST_FILTERS].astype(numpy.float32)
    except (OSError, ValueError, TypeError, SafetensorError):  # or a type that numpy lacks
        return None
    weight = numpy.nan_to_num(weight, posinf=0.0, neginf=0.0).transpose(0, 2, 3, 1)
    low = weight.min(axis=(1, 2, 3), keepdims=True)
    height = weight.max(axis=(1, 2, 3), keepdims=True) - low
    shades = (weight - low) / numpy.where(height > 0, height, 1.0) * 255
    return Filters(named[0], shapes[named[0]][0], shades.round().astype(numpy.uint8))


@dataclass(frozen=True)
class ClassRow:
    """A class and its images."""

    name: str
    accuracy: float | None
    images: int


def class_rows(cells: Cells, classes: Sequence[str]) -> list[ClassRow]:
    """The accuracy of each class; with very many classes, only the lowest."""
    if not cells:
        return []
    known = class_accuracies(cells)
    rows = [ClassRow(name, *known.get(n, (None, 0))) for n, name in enumerate(classes)]
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: 2.0 if row.accuracy is None else row.accuracy)
    return rows[:MOST_ROWS]


def largest_confusions(cells: Cells, classes: Sequence[str]) -> list[dict[str, str]]:
    """The cells that hold the most mistakes, in words."""
    totals = images_of_classes(cells)
    wrong = sorted((-n, truth, found) for truth, found, n in cells if truth != found)
    return [
        {
            "cell": f"{truth},{found}",
            "truth": classes[truth],
            "predicted": classes[found],
            "images": f"{-n:,} of {totals[truth]:,}",
        }
        for n, truth, found in wrong[:MOST_CONFUSIONS]
    ]


def number(value: Any) -> float | None:
    """A finite number as a float; None for any other value from JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _natural(name: str) -> list[Any]:
    """`layers.2` before `layers.10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
