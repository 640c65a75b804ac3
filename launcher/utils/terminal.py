"""A terminal, or a page where there is none: curves and pictures of block characters."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"
COLUMNS, HEIGHT = 60, 4  # characters


def make_console(page_width: int) -> Console:
    """For stdout: as wide as the terminal, or so many characters where it is a file or a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = page_width
    return console


def plot(values: Sequence[float], first: str, last: str) -> tuple[str, ...]:
    """Bars from zero to the highest value, which stands beside them; the axis from first to last.

    `values` are as many as there are columns, and not negative.
    """
    highest = max(values) or 1.0
    label = f"{highest:.3g} "
    rows = []
    for row in range(HEIGHT - 1, -1, -1):
        levels = [round(value / highest * HEIGHT * 8) - row * 8 for value in values]
        bars = "".join(_EIGHTHS[min(8, max(0, level))] for level in levels)
        rows.append((label if row == HEIGHT - 1 else " " * len(label)) + bars)
    axis = first + last.rjust(len(values) - len(first))
    return (*rows, " " * len(label) + axis)


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
