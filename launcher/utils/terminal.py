"""A terminal, or a page where there is none: curves and pictures of block characters."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.style import Style
from rich.text import Text

from launcher.utils.text import count

_EIGHTHS = " ▁▂▃▄▅▆▇█"
COLUMNS, HEIGHT = 60, 4  # characters
SECONDS_OF_A_LINE = 10.0  # of progress, where there is no terminal
SECONDS_BEFORE_A_BAR = 1.0
_shown = Lock()  # by the one bar of this process


def make_console(page_width: int = 110) -> Console:
    """For stdout: as wide as the terminal, or so many characters where it is a file or a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = page_width
    return console


@contextmanager
def progress(doing: str, total: int, noun: str) -> Iterator[Callable[[int], None]]:
    """Yields what is told how many more of `total` are done: a bar, or now and then a line.

    On stderr, since what is on stdout may be for a program, and only once it has taken a second. Of
    several at the same time, in threads, one is shown.
    """
    console = Console(stderr=True, highlight=False)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(doing, total=total)
    done, next_line = 0, time.monotonic() + SECONDS_OF_A_LINE
    bar_begins = time.monotonic() + SECONDS_BEFORE_A_BAR

    def advance(more: int) -> None:
        nonlocal done, next_line
        done += more
        bar.update(task, completed=done)
        now = time.monotonic()
        if console.is_terminal:
            if not bar.live.is_started and now >= bar_begins and _shown.acquire(blocking=False):
                bar.start()
        elif now >= next_line:
            next_line = now + SECONDS_OF_A_LINE
            with suppress(OSError):  # the log is on a full disk, which is not what is being done
                sys.stderr.write(f"{doing}: {done:,} of {count(total, noun)}\n")

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
            _shown.release()


def plot(values: Sequence[float], first: str, last: str, base: float = 0.0) -> tuple[str, ...]:
    """Bars from `base` to the highest value, which stand beside them; the axis from first to last.

    `values` are as many as there are columns, and none is below `base`.
    """
    highest = max(values)
    scale = HEIGHT * 8 / ((highest - base) or 1.0)
    labels = {HEIGHT - 1: f"{highest or 1.0:.3g} "} | ({0: f"{base:.3g} "} if base else {})
    width = max(map(len, labels.values()))
    rows = []
    for row in range(HEIGHT - 1, -1, -1):
        levels = [round((value - base) * scale) - row * 8 for value in values]
        bars = "".join(_EIGHTHS[min(8, max(0, level))] for level in levels)
        rows.append(labels.get(row, "").ljust(width) + bars)
    axis = first + last.rjust(len(values) - len(first))
    return (*rows, " " * width + axis)


def half_blocks(pixels: Any) -> Text:
    """A picture, uint8 `(h, w, 3)`, in a truecolor terminal: two rows of pixels in each line."""
    text = Text()
    for row in range(0, len(pixels) - 1, 2):
        for upper, lower in zip(pixels[row].tolist(), pixels[row + 1].tolist(), strict=True):
            colours = Style(color=_rgb(upper), bgcolor=_rgb(lower))
            text.append("▀", colours)
        text.append("\n")
    return text


def _rgb(colour: list[int]) -> str:
    return "rgb({},{},{})".format(*colour)
