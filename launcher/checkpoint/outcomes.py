"""What the model said of each evaluated image, with some of the pictures: plain files of a run.

`best.npz` and `last.npz` hold arrays that numpy reads without pickle; `details.jsonl` has a line
for each epoch. So a report needs neither the data set nor the network.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray
from PIL import Image

from launcher.utils import atomic_write

if TYPE_CHECKING:  # torch: seconds, for those who only read
    from launcher.data.images import ImageSet
    from launcher.training.metrics import EpochReport

LARGEST = 64  # pixels: larger pictures are kept smaller
WORST, SUREST = 48, 24  # pictures of mistakes, and of right answers, that are kept at least
OF_A_CELL = 4  # ... of each cell of the confusion matrix
MOST_PICTURES = 500
MOST_CLASSES = 100_000  # a file that says more is damaged
TOP = 5  # classes of each sample
_IN_COLOUR = (3, 4)  # channels: RGB and RGBA; of any other number the first is shown, in grey
Cells = Sequence[tuple[int, int, int]]  # of a confusion matrix: truth, prediction, images


@dataclass(frozen=True)
class Outcomes:
    """Of n test or validation images, in the order of the data set; pictures of k of them.

    `loss` is minus the logarithm of `probability_of_truth`.
    """

    epoch: int
    truth: NDArray[Any]  # int32 (n,)
    predicted: NDArray[Any]  # int32 (n,)
    probability_of_truth: NDArray[Any]  # float32 (n,)
    probability: NDArray[Any]  # float32 (n,), of the predicted class
    loss: NDArray[Any]  # float32 (n,)
    files: NDArray[Any]  # text (n,), or (0,) where the images have no files of their own
    pictured: NDArray[Any]  # int32 (k,): the places of the images whose pictures are kept
    pictures: NDArray[Any]  # uint8 (k, h, w, c)

    @property
    def mistakes(self) -> NDArray[Any]:
        """The places of the images that were taken for another class, the highest loss first."""
        return _by(-self.loss, self.truth != self.predicted)

    @property
    def confusion(self) -> list[tuple[int, int, int]]:
        """Truth, prediction and images of each cell of the matrix that is not zero."""
        pairs = numpy.stack([self.truth, self.predicted], axis=1)
        cells, counts = numpy.unique(pairs, axis=0, return_counts=True)
        return [(int(t), int(p), int(n)) for (t, p), n in zip(cells, counts, strict=True)]

    @property
    def surest(self) -> NDArray[Any]:
        """The places of those that were recognized, the highest probability first."""
        return _by(-self.probability, self.truth == self.predicted)

    def write(self, path: Path) -> None:
        """The arrays under their names; whole, or not at all."""
        content = io.BytesIO()
        numpy.savez(content, **{f.name: getattr(self, f.name) for f in fields(self)})
        atomic_write.replace(path, content.getvalue(), is_kept=False)


def read(path: Path) -> Outcomes | None:
    """What `write` wrote; None where there is no such file, or not a whole one that fits."""
    if not path.is_file():  # a FIFO, say, for which one would wait
        return None
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(Outcomes)}
            epoch = int(values["epoch"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
        return None
    found = Outcomes(**{**values, "epoch": epoch})
    return found if _fits(found) else None


def _fits(found: Outcomes) -> bool:
    """Whether the arrays belong together, each as long as it is to be, with classes for numbers."""
    columns = (found.probability_of_truth, found.probability, found.loss)
    classes, size = (found.truth, found.predicted), len(numpy.atleast_1d(found.truth))
    places, pictures = found.pictured, found.pictures
    has_kinds = (
        all(column.dtype.kind == "i" for column in (*classes, places))
        and all(column.dtype.kind == "f" for column in columns)
        and all(column.shape == (size,) for column in (*classes, *columns))
        and found.files.dtype.kind == "U"
    )
    if not has_kinds or size == 0 or places.ndim != 1 or len(places) != len(pictures):
        return False
    if min(map(numpy.min, classes)) < 0 or max(map(numpy.max, classes)) >= MOST_CLASSES:
        return False
    if len(places) == 0:
        return True
    are_pictures = pictures.ndim == 4 and pictures.dtype == numpy.uint8 and pictures.size > 0
    return bool(are_pictures and places.min() >= 0 and places.max() < size)


def of_epoch(report: "EpochReport", images: "ImageSet") -> Outcomes:
    """From an evaluation of these images, on whichever device they are."""
    from launcher.training.metrics import sample_indices

    table = report.evaluation.outcomes
    assert table is not None
    truth = images.labels.cpu().numpy().astype(numpy.int32)
    columns = (table[:, number].astype(numpy.float32) for number in (1, 2, 3))
    of_truth, probability, loss = columns
    none = numpy.zeros(0, numpy.int32)
    outcomes = Outcomes(
        epoch=report.epoch,
        truth=truth,
        predicted=table[:, 0].astype(numpy.int32),
        probability_of_truth=of_truth,
        probability=probability,
        loss=loss,
        files=numpy.array(images.files, dtype=numpy.str_),
        pictured=none,
        pictures=none,
    )
    pictured = _to_picture(outcomes, sample_indices(len(truth)))
    pictures = images.pixels(pictured.tolist()).cpu().numpy()
    values = {f.name: getattr(outcomes, f.name) for f in fields(outcomes)}
    return Outcomes(**{**values, "pictured": pictured, "pictures": _small(pictures)})


def details(report: "EpochReport") -> dict[str, Any]:
    """A line of `details.jsonl`: the cells of the confusion matrix that are not zero, as
    `[truth, prediction, images]`; and of each sample its best classes, as `[class, probability]`,
    null where the scores are not finite.
    """
    confusion = numpy.array(report.evaluation.confusion)
    cells = [[*map(int, place), int(confusion[*place])] for place in numpy.argwhere(confusion)]
    best = numpy.argsort(-report.probabilities, axis=1, kind="stable")[:, :TOP]
    samples = [
        [
            [int(c), round(float(p), 4) if numpy.isfinite(p) else None]
            for c, p in zip(row, scores[row], strict=True)
        ]
        for row, scores in zip(best, report.probabilities, strict=True)
    ]
    return {"epoch": report.epoch, "confusion": cells, "samples": samples}


def class_accuracies(cells: Cells) -> dict[int, tuple[float, int]]:
    """Of each class that has images: the part of them that is recognized, and their number."""
    right = {truth: images for truth, found, images in cells if truth == found}
    totals = images_of_classes(cells)
    return {c: (right.get(c, 0) / images, images) for c, images in totals.items() if images}


def images_of_classes(cells: Cells) -> dict[int, int]:
    """How many images each class has."""
    totals: dict[int, int] = {}
    for truth, _, images in cells:
        totals[truth] = totals.get(truth, 0) + images
    return totals


def as_picture(pixels: NDArray[Any]) -> Image.Image:
    """What is shown of uint8 `(h, w, c)` with any number of channels."""
    return Image.fromarray(pixels if pixels.shape[-1] in _IN_COLOUR else pixels[..., 0])


def _by(keys: NDArray[Any], chosen: NDArray[Any]) -> NDArray[Any]:
    """The places that are `chosen`, by their keys; equal ones by their place."""
    order = numpy.argsort(keys, kind="stable")
    return order[chosen[order]]


def _to_picture(outcomes: Outcomes, samples: list[int]) -> NDArray[Any]:
    """The samples, the worst and the surest, and then some of each cell of the matrix."""
    mistakes, surest = outcomes.mistakes, outcomes.surest
    order = numpy.concatenate([mistakes, surest[::-1]])  # of each cell, the worst or least sure
    cells = outcomes.truth[order].astype(numpy.int64) * (outcomes.predicted.max() + 1)
    cells += outcomes.predicted[order]
    by_cell = numpy.argsort(cells, kind="stable")
    starts = numpy.searchsorted(cells[by_cell], cells[by_cell], side="left")
    is_first = numpy.zeros(len(order), bool)
    is_first[by_cell[numpy.arange(len(order)) - starts < OF_A_CELL]] = True
    chosen = [
        numpy.array(samples),
        *(mistakes[:WORST], surest[:SUREST], order[is_first]),
    ]
    places = dict.fromkeys(numpy.concatenate(chosen).tolist())
    return numpy.array(list(places)[:MOST_PICTURES], numpy.int32)


def _small(images: NDArray[Any]) -> NDArray[Any]:
    """uint8 `(k, h, w, c)` with no side above `LARGEST`, and then no more channels than are shown.

    Each channel is scaled by itself: Pillow takes a second or a fourth one for transparency, and
    would turn the others black where it is 0.
    """
    height, width, channels = images.shape[1:]
    if max(height, width) <= LARGEST:
        return images
    scale = LARGEST / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = channels if channels in _IN_COLOUR else 1
    planes = images[..., :shown].transpose(0, 3, 1, 2).reshape(-1, height, width)
    resized = [Image.fromarray(plane).resize(size, Image.Resampling.BOX) for plane in planes]
    small = numpy.stack([numpy.asarray(r) for r in resized])
    return small.reshape(-1, shown, size[1], size[0]).transpose(0, 2, 3, 1)
