"""`launcher predict RUN PICTURE ...`: what a trained run says of pictures that it has not seen.

Pictures are read in threads and go through the network in batches; a row is written as soon as it
is known, so that a hundred thousand take no more memory than a hundred.
"""

import csv
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from launcher.checkpoint.run_files import find
from launcher.data.image_folder import BROKEN
from launcher.errors import EXIT_USER, UserError
from launcher.results.load import TrainedRun, load_run
from launcher.utils.arguments import Parser
from launcher.utils.terminal import half_blocks
from launcher.utils.text import count, printable

BATCH = 128  # pictures
TOP = 5
SHOWN, SHOWN_PIXELS = 8, 24  # pictures in a truecolor terminal, and their height
_USAGE = "launcher predict RUN PICTURE|FOLDER|GLOB [...] [--weights final] [--csv FILE] [--json]"


@dataclass(frozen=True)
class Prediction:
    """Of one picture: its best classes with their probabilities, the best first."""

    file: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    truth: str | None = None  # its folder, where that is a class

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
    """What there is to say when all pictures have been seen."""

    seen: int = 0
    broken: int = 0
    confusion: dict[tuple[str, str], int] = field(default_factory=dict)  # truth, prediction

    def add(self, prediction: Prediction) -> None:
        """Count a picture."""
        self.seen += 1
        if prediction.truth is not None:
            cell = prediction.truth, prediction.classes[0]
            self.confusion[cell] = self.confusion.get(cell, 0) + 1

    def lines(self) -> Iterator[str]:
        """How many there were, and of those whose class is known, how many were right."""
        broken = f", {self.broken:,} could not be read" if self.broken else ""
        yield f"{count(self.seen, 'picture')}{broken}"
        known = sum(self.confusion.values())
        if known:
            right = sum(n for (truth, found), n in self.confusion.items() if truth == found)
            yield f"accuracy {right / known:.2%} of {known:,} whose folder is a class"
            mistakes = [(n, *cell) for cell, n in self.confusion.items() if cell[0] != cell[1]]
            for number, truth, found in sorted(mistakes, reverse=True)[:3]:
                yield f"  {truth} taken for {found}: {number:,}"


class _Output(Protocol):
    def row(self, prediction: Prediction) -> None: ...


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher predict`; exit code 2 where no picture could be read."""
    parser = Parser(prog="launcher predict", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder, or the name of a run")
    add("pictures", nargs="*", metavar="PICTURE", help="files, folders, or patterns in quotes")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs of names are")
    add("--weights", choices=("best", "final"), default="best", help="default: best")
    add("--csv", type=Path, metavar="FILE", help="write a row for each picture")
    add("--json", action="store_true", help="for machines: an object for each picture, a line each")
    arguments = parser.parse_intermixed_args(words)
    if arguments.run is None or not arguments.pictures:
        parser.error("no run or no picture is named")
    files = found_files(arguments.pictures)
    run = load_run(find(arguments.run, arguments.runs).path, weights=arguments.weights)
    device = torch.accelerator.current_accelerator(check_available=True)
    run.model.to(device or "cpu")
    summary = Summary()
    with ExitStack() as stack:
        outputs = list(_outputs(arguments.json, arguments.csv, stack))
        bar = stack.enter_context(_progress(quiet=len(files) <= BATCH or sys.stdout.isatty()))
        task = bar.add_task("pictures", total=len(files))
        for prediction in predictions(run, files, summary):
            for output in outputs:
                output.row(prediction)
            bar.update(task, completed=summary.seen + summary.broken)
    if not arguments.json:
        sys.stdout.writelines(f"{line}\n" for line in summary.lines())
    return 0 if summary.seen else EXIT_USER


def found_files(words: Sequence[str]) -> list[tuple[Path, bool]]:
    """The files of the words, in order; whether each was found in a folder.

    Raises `UserError` for a word that names nothing.
    """
    files: list[tuple[Path, bool]] = []
    for word in words:
        if os.path.isdir(word):
            own = [
                Path(folder, name)
                for folder, folders, names in os.walk(word)
                for name in _visible(names, folders)
            ]
            found = [(path, True) for path in own if path.suffix.lower() in IMG_EXTENSIONS]
        elif os.path.isfile(word):
            found = [(Path(word), False)]
        else:
            matches = sorted(glob.glob(word, recursive=True))
            found = [(Path(match), True) for match in matches if os.path.isfile(match)]
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


def predictions(
    run: TrainedRun, files: Sequence[tuple[Path, bool]], summary: Summary
) -> Iterator[Prediction]:
    """One for each picture that can be read, in their order; others are named on stderr."""
    rest = iter(files)
    with ThreadPoolExecutor() as pool:

        def begin() -> list[tuple[Path, bool, Future[Tensor]]]:
            chunk = islice(rest, BATCH)
            return [(path, inside, pool.submit(run.pixels, path)) for path, inside in chunk]

        following = begin()
        while following:
            current, following = following, begin()  # which are read while the network works
            kept, pixels = [], []
            for path, inside, future in current:
                try:
                    pixels.append(future.result())
                    kept.append((path, inside))
                except BROKEN as error:
                    summary.broken += 1
                    sys.stderr.write(f"launcher: {path} cannot be read as a picture ({error})\n")
            if kept:
                for prediction in _of_batch(run, kept, torch.stack(pixels)):
                    summary.add(prediction)
                    yield prediction


def _of_batch(
    run: TrainedRun, files: list[tuple[Path, bool]], pixels: Tensor
) -> Iterator[Prediction]:
    with torch.inference_mode():
        shares = run.model(run.normalize(pixels)).float().softmax(1).cpu()
    best = shares.topk(min(TOP, len(run.classes)))
    rows = zip(files, best.values.tolist(), best.indices.tolist(), strict=True)
    for (path, inside), probabilities, places in rows:
        folder = path.absolute().parent.name
        truth = folder if inside and folder in run.classes else None
        yield Prediction(path, tuple(run.classes[p] for p in places), tuple(probabilities), truth)


# Outputs


def _outputs(as_json: bool, csv_file: Path | None, stack: ExitStack) -> Iterator[_Output]:
    if as_json:
        yield _JsonLines()
    else:
        yield _Lines()
    if csv_file is not None:
        try:
            yield _Csv(stack.enter_context(csv_file.open("w", newline="")))
        except OSError as error:
            raise UserError(
                f"--csv {csv_file} ({error.strerror})",
                expected="a file that can be written",
                instead="type --csv predictions.csv, for example",
            ) from None


class _JsonLines:
    def row(self, prediction: Prediction) -> None:
        sys.stdout.write(json.dumps(prediction.as_dict()) + "\n")


class _Lines:
    """A line for each, and the first pictures where the terminal can show them."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._left = SHOWN if self._console.color_system == "truecolor" else 0

    def row(self, prediction: Prediction) -> None:
        """The file and its best classes."""
        if self._left:
            self._left -= 1
            self._console.print(half_blocks(_thumbnail(prediction.file)), end="")
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        best = "  ".join(f"{name} {p:.1%}" for name, p in pairs)
        text = f"{prediction.file}  {best}"
        sys.stdout.write(printable(text) + "\n")


class _Csv:
    def __init__(self, file: Any) -> None:
        self._writer = csv.writer(file)
        numbers = range(1, TOP + 1)
        heads = [part for n in numbers for part in (f"class{n}", f"probability{n}")]
        self._writer.writerow(["file", "truth", *heads])

    def row(self, prediction: Prediction) -> None:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = [part for name, p in pairs for part in (name, f"{p:.6f}")]
        self._writer.writerow([prediction.file, prediction.truth or "", *cells])


def _thumbnail(file: Path) -> Any:
    with Image.open(file) as picture:
        width = max(1, round(SHOWN_PIXELS * picture.width / picture.height))
        small = picture.convert("RGB").resize((min(80, width), SHOWN_PIXELS))
    return numpy.array(small)


def _progress(*, quiet: bool) -> Progress:
    """On stderr, where the rows do not go to a terminal beside it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
