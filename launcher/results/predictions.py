"""The predictions of a trained run for any number of other pictures.

Pictures are read in threads and go through the network in batches. Each batch is done before the
next one begins, so a hundred thousand pictures take no more memory than a hundred.
"""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from launcher.data.decoding import not_a_picture
from launcher.errors import BrokenPictureError, UserError
from launcher.results.load import TrainedRun
from launcher.utils.text import count, printable

BATCH = 128  # pictures
TOP = 5
# Suffixes of pictures in folders; files that are named themselves may have any.
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".avif", ".jp2", ".tga")
MOST_NAMED = 100  # broken files that a page lists


@dataclass(frozen=True)
class Prediction:
    """The best classes of one picture with their probabilities, the best first."""

    file: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    truth: str | None = None  # its folder, where that is a class
    probability_of_truth: float | None = None

    @property
    def is_mistake(self) -> bool:
        """Whether the true class is known, and another one."""
        return self.truth is not None and self.truth != self.classes[0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = [
            {"class": name, "probability": round(p, 6)}
            for name, p in zip(self.classes, self.probabilities, strict=True)
        ]
        truth = {} if self.truth is None else {"truth": self.truth}
        return {"file": str(self.file), "best": best, **truth}


@dataclass
class Summary:
    """Counts over all pictures."""

    seen: int = 0
    broken: int = 0
    named: list[str] = field(default_factory=list)  # the first of the broken
    confusion: dict[tuple[str, str], int] = field(default_factory=dict)  # truth, prediction

    def add(self, prediction: Prediction) -> None:
        """Count a picture."""
        self.seen += 1
        if prediction.truth is not None:
            cell = prediction.truth, prediction.classes[0]
            self.confusion[cell] = self.confusion.get(cell, 0) + 1

    def add_broken(self, path: Path, line: str) -> None:
        """Count a picture that cannot be read, and write the line to stderr."""
        self.broken += 1
        if len(self.named) < MOST_NAMED:
            self.named.append(str(path))
        sys.stderr.write(f"{printable(f'launcher: {line}')}\n")

    @property
    def known(self) -> int:
        """How many pictures have a known class."""
        return sum(self.confusion.values())

    @property
    def right(self) -> int:
        """How many of these were predicted correctly."""
        return sum(n for (truth, found), n in self.confusion.items() if truth == found)

    def lines(self) -> Iterator[str]:
        """How many there were, and of those whose class is known, how many were right."""
        broken = f", {self.broken:,} could not be read" if self.broken else ""
        yield f"{count(self.seen, 'picture')}{broken}"
        if self.known:
            share = f"{self.right / self.known:.2%}"
            yield f"accuracy {share} of {self.known:,} in a folder with the name of a class"
            mistakes = [(n, *cell) for cell, n in self.confusion.items() if cell[0] != cell[1]]
            for number, truth, found in sorted(mistakes, reverse=True)[:3]:
                yield f"  {truth} taken for {found}: {number:,}"


def found_files(words: Sequence[str]) -> list[tuple[str, bool]]:
    """The files of the words, in order; whether each was found in a folder.

    As text, which takes a tenth of the memory. Raises `UserError` for a word that names nothing.
    """
    files: list[tuple[str, bool]] = []
    for word in words:
        if os.path.isdir(word):
            own = (
                os.path.join(folder, name)
                for folder, folders, names in os.walk(word)
                for name in _visible(names, folders)
            )
            found = [(file, True) for file in own if _ending(file) in ENDINGS]
        elif os.path.isfile(word):
            found = [(word, False)]
        else:
            matches = sorted(glob.glob(word, recursive=True))
            found = [(match, True) for match in matches if os.path.isfile(match)]
        if not found:
            raise UserError(
                f"{word}, in which no picture is found",
                expected="a file, a folder of pictures, or a pattern such as 'photos/*.jpg'",
                instead="see what is there: ls",
            )
        files += found
    return files


def _visible(names: list[str], folders: list[str]) -> list[str]:
    folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
    return sorted(name for name in names if not name.startswith("."))


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def predictions(
    run: TrainedRun, files: Sequence[tuple[str, bool]], summary: Summary
) -> Iterator[Prediction]:
    """A prediction for each picture that can be read, in order; others are named on stderr.

    Raises `UserError` for scores that are no numbers.
    """
    rest = iter(files)

    def read(path: Path) -> Tensor:
        if not path.is_file():  # reading a pipe might wait for ever
            raise not_a_picture(path, "it is no file")
        return run.pixels(path)

    with ThreadPoolExecutor() as pool:

        def begin() -> list[tuple[Path, bool, Future[Tensor]]]:
            chunk = [(Path(file), inside) for file, inside in islice(rest, BATCH)]
            return [(path, inside, pool.submit(read, path)) for path, inside in chunk]

        following = begin()
        while following:
            current, following = following, begin()  # which are read while the network works
            kept, pixels = [], []
            for path, inside, future in current:
                try:
                    pixels.append(future.result())
                    kept.append((path, inside))
                except BrokenPictureError as error:
                    summary.add_broken(path, error.given)
            if kept:
                for prediction in _of_batch(run, kept, torch.stack(pixels)):
                    summary.add(prediction)
                    yield prediction


def _of_batch(
    run: TrainedRun, files: list[tuple[Path, bool]], pixels: Tensor
) -> Iterator[Prediction]:
    numbers = {name: number for number, name in enumerate(run.classes)}
    with torch.inference_mode():
        scores = run.model(run.normalize(pixels)).float().cpu()
    shares = scores.softmax(1)
    if not (is_finite := shares.isfinite().all(1)).all():
        path, _ = files[is_finite.tolist().index(False)]
        raise UserError(
            f"{path}, for which the network's scores are not finite",
            expected="weights of a training whose loss was finite",
            instead="see where it went wrong: launcher report RUN",
        )
    # Of equal scores the first, as in a run's accuracy.
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :TOP]
    rows = zip(files, shares.gather(1, best).tolist(), best.tolist(), strict=True)
    for row, ((path, inside), probabilities, places) in enumerate(rows):
        classes = tuple(run.classes[place] for place in places)
        folder = path.absolute().parent.name
        truth = numbers.get(folder) if inside else None
        if truth is None:
            yield Prediction(path, classes, tuple(probabilities))
        else:
            of_truth = float(shares[row, truth])
            yield Prediction(path, classes, tuple(probabilities), folder, of_truth)
