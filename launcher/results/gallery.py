"""The page of `launcher predict --html`: pictures, and the classes that a run predicts."""

import heapq
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from launcher.checkpoint.run_files import RunFiles
from launcher.data.decoding import fitted, open_picture
from launcher.errors import BrokenPictureError
from launcher.results import figures, html
from launcher.results.figures import ClassRow
from launcher.results.load import TrainedRun
from launcher.results.predictions import Prediction, Summary
from launcher.results.sprites import SHOWN, Sheet, sheet
from launcher.utils.redaction import redacted

MOST = 250  # pictures of mistakes, and of others, that a page shows


class Gallery:
    """Takes each prediction, and keeps those that the page shows.

    These are the most certain mistakes, and the least certain of all others.
    """

    def __init__(self, files: RunFiles, run: TrainedRun) -> None:
        """Empty, for what a run says."""
        self.files, self.classes = files, list(run.classes)
        height, width, _ = run.image_shape
        self._size = width, height
        self._numbers = {each: number for number, each in enumerate(run.classes)}
        self._mistakes: list[tuple[float, int, Prediction]] = []
        self._others: list[tuple[float, int, Prediction]] = []
        self._answers: Counter[str] = Counter()
        self._seen = 0

    def row(self, prediction: Prediction) -> None:
        """Keep it if it ranks high enough."""
        self._seen += 1
        self._answers[prediction.classes[0]] += 1
        share = prediction.probabilities[0]
        heap = self._mistakes if prediction.is_mistake else self._others
        worth = share if prediction.is_mistake else -share
        entry = (worth, -self._seen, prediction)  # of equal ones, the first
        if len(heap) < MOST:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def render(self, summary: Summary) -> bytes:
        """The page."""
        data = {
            "classes": self.classes,
            "matrix": self.cells(summary) if len(self.classes) <= figures.MATRIX_CLASSES else [],
            "pictures": [self._entry(each) for each in self.shown],
            "columns": self.sheet.columns if self.sheet else 0,
            "size": [self.sheet.width, self.sheet.height] if self.sheet else [0, 0],
        }
        return html.render(
            "predict.html",
            title=f"What {self.files.name} says of pictures",
            subtitle=redacted(str(self.files.about.get("recipe", self.files.recipe))),
            page=self,
            summary=summary,
            data=data,
            confusions=figures.largest_confusions(self.cells(summary), self.classes),
            class_rows=figures.class_rows(self.cells(summary), self.classes),
            script=html.SCRIPT if summary.known else "",
        )

    @cached_property
    def mistakes(self) -> list[Prediction]:
        """The mistakes that are kept, the most certain first."""
        return [entry[2] for entry in sorted(self._mistakes, reverse=True)]

    @cached_property
    def others(self) -> list[Prediction]:
        """Right answers and those of unknown truth, the least certain first."""
        return [entry[2] for entry in sorted(self._others, reverse=True)]

    @property
    def shown(self) -> list[Prediction]:
        """All predictions that are kept, in the order of the sheet."""
        return [*self.mistakes, *self.others]

    @property
    def answers(self) -> list[ClassRow]:
        """How often each class was predicted, the most frequent first."""
        rows = self._answers.most_common(figures.MOST_ROWS)
        return [ClassRow(name, n / self._seen, n) for name, n in rows]

    def cells(self, summary: Summary) -> list[tuple[int, int, int]]:
        """The cells of the confusion matrix."""
        numbers = self._numbers
        return [(numbers[t], numbers[found], n) for (t, found), n in summary.confusion.items()]

    @cached_property
    def sheet(self) -> Sheet | None:
        """The pictures that are shown, cropped as for the network."""
        if not self.shown:
            return None
        scale = SHOWN / max(self._size)
        width, height = (max(1, round(side * scale)) for side in self._size)
        with ThreadPoolExecutor() as pool:
            files = [prediction.file for prediction in self.shown]
            pictures = list(pool.map(lambda file: thumbnail(file, (width, height)), files))
        return sheet(numpy.stack(pictures))

    def _entry(self, prediction: Prediction) -> list[Any]:
        """Name, truth, answer and the two probabilities, for the script of the page."""
        truth = None if prediction.truth is None else self._numbers[prediction.truth]
        found = self._numbers[prediction.classes[0]]
        shares = (prediction.probabilities[0], prediction.probability_of_truth)
        rounded = [None if s is None else figures.number(round(s, 4)) for s in shares]
        return [str(prediction.file), truth, found, *rounded]


def thumbnail(file: Path, size: tuple[int, int]) -> NDArray[Any]:
    """The middle of a picture, uint8 `(h, w, 3)`; black where the file has gone meanwhile."""
    try:
        with open_picture(file) as picture:
            picture.draft(None, (2 * size[0], 2 * size[1]))  # a large JPEG is read smaller
            return fitted(picture, size)
    except BrokenPictureError:
        return numpy.zeros((size[1], size[0], 3), numpy.uint8)
