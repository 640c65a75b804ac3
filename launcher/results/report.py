"""`launcher report RUN ...`: a page of each run, for a browser, from the run folder alone.

A page loads nothing from the network: plotly's script, which draws the curves, lies beside it.
"""

import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from launcher.checkpoint.run_files import RunFiles, find
from launcher.loggers.report import page_of
from launcher.results import html
from launcher.results.html import SCRIPT
from launcher.results.page import render
from launcher.utils.arguments import Parser
from launcher.utils.text import printable

if TYPE_CHECKING:
    from launcher.results.gradcam import Looks

SECONDS = 5  # between two checks of --watch
_USAGE = "launcher report RUN [RUN ...] [--output DIR] [--open] [--watch] [--gradcam]"
_INSTEAD = "type --output FOLDER"
_State = tuple[object, ...]
_WATCHED = ("metrics.jsonl", "details.jsonl", "best.npz", "last.npz", "end.json", "run.json")


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher report`."""
    parser = Parser(prog="launcher report", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="RUN", help="a run folder, or the name of a run")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs")
    add("--output", type=Path, metavar="DIR", help="where to write; default: report/ in the run")
    add("--open", action="store_true", help="show it in the browser")
    watches = "write it again whenever there is something new, until the run has ended"
    add("--watch", action="store_true", help=watches)
    looks = "show where the network looked in its worst mistakes; loads it, so runs its recipe"
    add("--gradcam", action="store_true", help=looks)
    arguments = parser.parse_args(words)
    if not arguments.names:
        parser.error("no run is named")
    if arguments.gradcam and arguments.watch:
        parser.error("--gradcam cannot be combined with --watch")
    runs = [find(name, arguments.runs) for name in arguments.names]
    pages = places(runs, arguments.output)
    before = [_state(run) for run in runs]  # an epoch may end while the pages are written
    first = _write_all(runs, pages, arguments.output, arguments.watch, arguments.gradcam)
    for path in dict.fromkeys((first, *pages)):
        sys.stdout.write(f"{printable(str(path))}\n")
    sys.stdout.flush()
    if arguments.open:
        webbrowser.open(first.absolute().as_uri())
    if arguments.watch:
        try:
            _watch(runs, pages, arguments.output, before)
        except KeyboardInterrupt:  # the usual way to end it
            return 0
    return 0


def places(runs: Sequence[RunFiles], output: Path | None) -> list[Path]:
    """Where the page of each run goes."""
    if output is None:
        return [page_of(run.path) for run in runs]
    if len(runs) == 1:
        return [output / "index.html"]
    taken = {"index"}
    pages = []
    for run in runs:
        names = [run.name, *(f"{run.name}-{number}" for number in range(2, len(runs) + 2))]
        name = next(name for name in names if name not in taken)
        taken.add(name)
        pages.append(output / f"{name}.html")
    return pages


def _looks_of(run: RunFiles) -> "Looks | None":
    from launcher.results import gradcam  # and torch

    return gradcam.of_mistakes(run)


def _write_all(
    runs: Sequence[RunFiles],
    pages: Sequence[Path],
    output: Path | None,
    is_watched: bool,
    with_looks: bool,
) -> Path:
    """Write the pages, their script and, for several in one folder, a list of them.

    Returns the page to open first.
    """
    for run, path in zip(runs, pages, strict=True):
        seconds = SECONDS if is_watched and run.state == "running" else 0
        looks = _looks_of(run) if with_looks else None
        html.write(path, render(run, SCRIPT, seconds, looks), instead=_INSTEAD)
    for folder in dict.fromkeys(path.parent for path in pages):
        html.write_script(folder, instead=_INSTEAD)
    if output is None or len(runs) == 1:
        return pages[0]
    links = {quote(path.name): run for path, run in zip(pages, runs, strict=True)}
    html.write(output / "index.html", html.render("index.html", pages=links), instead=_INSTEAD)
    return output / "index.html"


def _watch(
    runs: Sequence[RunFiles], pages: Sequence[Path], output: Path | None, seen: list[_State]
) -> None:
    """Write again what has changed since it was `seen`, until no run is running.

    The last page does not reload itself.
    """
    is_running = True
    while is_running:
        is_running = any(run.state == "running" for run in runs)
        fresh = [RunFiles(run.path) for run in runs]  # what is read of one is kept by it
        found = [_state(run) for run in fresh]
        if found != seen or not is_running:
            _write_all(fresh, pages, output, is_running, with_looks=False)
        seen = found
        if is_running:
            time.sleep(SECONDS)


def _state(run: RunFiles) -> _State:
    """A value that changes after each epoch, and at the end."""
    stats = []
    for name in _WATCHED:
        try:
            found = (run.path / name).stat()
            stats.append((found.st_mtime_ns, found.st_size))
        except OSError:
            stats.append((0, 0))
    return (run.state, *stats)
