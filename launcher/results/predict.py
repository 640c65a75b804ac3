"""`launcher predict RUN PICTURE ...`: the classes that a trained run predicts for other pictures.

Each row is written as soon as it is known.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from launcher.checkpoint.run_files import find
from launcher.errors import EXIT_USER, UserError
from launcher.results import html
from launcher.results.gallery import Gallery, thumbnail
from launcher.results.load import load_run
from launcher.results.predictions import TOP, Prediction, Summary, found_files, predictions
from launcher.utils import terminal
from launcher.utils.arguments import Parser
from launcher.utils.text import printable

SHOWN, SHOWN_PIXELS = 8, 24  # pictures in a truecolor terminal, and their height
_USAGE = (
    "launcher predict RUN PICTURE|FOLDER|GLOB [...] [--weights final] [--csv FILE] [--html FILE] "
    "[--json]"
)
_CSV = b"file,truth,class1,"  # how a table begins
_OTHER_PAGE = "type --html predictions.html, for example"


class _Output(Protocol):
    def row(self, prediction: Prediction) -> None: ...


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher predict`; exit code 2 where no picture could be read."""
    parser = Parser(prog="launcher predict", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder, or the name of a run")
    add("pictures", nargs="*", metavar="PICTURE", help="files, folders, or patterns in quotes")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs")
    add("--weights", choices=("best", "final"), default="best", help="default: best")
    add("--csv", type=Path, metavar="FILE", help="write a row for each picture")
    add("--html", type=Path, metavar="FILE", help="write a page with pictures, for a browser")
    add("--json", action="store_true", help="print a JSON object for each picture, one a line")
    arguments = parser.parse_intermixed_args(words)
    if arguments.run is None or not arguments.pictures:
        parser.error("no run or no picture is named")
    if arguments.html is not None:
        html.refuse_taken(arguments.html, instead=_OTHER_PAGE)
    if arguments.csv is not None:
        _refuse_no_table(arguments.csv)
    files = found_files(arguments.pictures)
    folder = find(arguments.run, arguments.runs)
    run = load_run(folder.path, weights=arguments.weights)
    device = torch.accelerator.current_accelerator(check_available=True)
    run.model.to(device or "cpu")
    gallery = Gallery(folder, run)
    summary = Summary()
    with ExitStack() as stack:
        outputs = list(_outputs(arguments.json, arguments.csv, stack))
        if arguments.html is not None:
            outputs.append(gallery)
        advance, done = stack.enter_context(_progress(len(files))), 0
        for prediction in predictions(run, files, summary):
            for output in outputs:
                output.row(prediction)
            advance(summary.seen + summary.broken - done)
            done = summary.seen + summary.broken
    if arguments.html is not None and summary.seen:
        html.write(arguments.html, gallery.render(summary), instead=_OTHER_PAGE)
        if summary.known:  # there is a chart
            html.write_script(arguments.html.parent, instead=_OTHER_PAGE)
    if not arguments.json:
        sys.stdout.writelines(f"{line}\n" for line in summary.lines())
    return 0 if summary.seen else EXIT_USER


# Outputs


def _outputs(as_json: bool, csv_file: Path | None, stack: ExitStack) -> Iterator[_Output]:
    if as_json:
        yield _JsonLines()
    else:
        yield _Lines()
    if csv_file is not None:
        yield _Csv(csv_file, stack)


def _refuse_no_table(path: Path) -> None:
    """Refuse to write a table over a picture, say, whose name follows --csv by mistake."""
    begin = b""
    try:
        if path.is_file():  # and no pipe or device
            with path.open("rb") as file:
                begin = file.read(len(_CSV))
    except OSError as error:
        raise _unwritable(path, error) from None
    if begin not in (b"", _CSV):
        raise UserError(
            f"--csv {path}, which is there and no table of launcher predict",
            expected="the name of a new file, or of an earlier table",
            instead="type --csv predictions.csv, for example",
        )


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"--csv {path} ({error.strerror})",
        expected="a file that can be written",
        instead="type --csv predictions.csv, for example",
    )


class _JsonLines:
    def row(self, prediction: Prediction) -> None:
        sys.stdout.write(json.dumps(prediction.as_dict()) + "\n")


class _Lines:
    """Prints a line for each picture, and the first pictures where the terminal can show them."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._left = SHOWN if self._console.color_system == "truecolor" else 0

    def row(self, prediction: Prediction) -> None:
        """The file and its best classes."""
        if self._left:
            self._left -= 1
            self._console.print(
                terminal.half_blocks(thumbnail(prediction.file, (SHOWN_PIXELS, SHOWN_PIXELS))),
                end="",
            )
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        best = "  ".join(f"{name} {p:.1%}" for name, p in pairs)
        text = f"{prediction.file}  {best}"
        sys.stdout.write(printable(text) + "\n")


class _Csv:
    """A table whose every line is written at once; names of pictures may be no UTF-8."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        options: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with self._explained():
            self._file = path.open("w", buffering=1, **options)
        stack.callback(self._close)
        self._writer = csv.writer(self._file)
        numbers = range(1, TOP + 1)
        heads = [part for n in numbers for part in (f"class{n}", f"probability{n}")]
        self._write(["file", "truth", *heads])

    def row(self, prediction: Prediction) -> None:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = [part for name, p in pairs for part in (name, f"{p:.6f}")]
        self._write([str(prediction.file), prediction.truth or "", *cells])

    def _write(self, cells: list[str]) -> None:
        with self._explained():
            self._writer.writerow(cells)

    def _close(self) -> None:
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self._path, error) from None


def _progress(pictures: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar, except where the rows go to the terminal."""
    if sys.stdout.isatty():
        return nullcontext(lambda more: None)
    return terminal.progress("predicting", pictures, "picture")
