"""Draw benchmarks/speed.svg, the README's bars of images per second, from the JSON results.

    python benchmarks/picture.py

It shows the medians of peers.json, and nothing that was not measured.
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
WIDTH, BAR, GAP, LEFT, RIGHT = 760, 22, 8, 110, 190  # pixels
HEAD, BETWEEN, FOOT = 34, 30, 34
OWN, OTHER = "#1a7f5a", "#9aa5b1"
STYLE = "font-family:system-ui,sans-serif;font-size:14px;fill:#57606a"

Figures = dict[str, Any]


def rows(figures: Figures) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each precision with its competitors, the slowest first."""
    precisions = [name for name in ("fp32", "bf16") if name in figures]
    return [
        (name, sorted(figures[name]["median"].items(), key=lambda row: row[1]))
        for name in precisions
    ]


def draw(figures: Figures) -> str:
    """The picture as SVG; it can be read on a light and on a dark page."""
    groups = rows(figures)
    fastest = max(rate for _, bars in groups for _, rate in bars)
    scale = (WIDTH - LEFT - RIGHT) / fastest
    parts, top = [], HEAD
    for precision, bars in groups:
        ratios = figures[precision]  # the medians of the rounds' ratios
        parts.append(text(LEFT, top - 8, f"{precision}, images per second", weight="bold"))
        for name, rate in bars:
            colour = OWN if name == "launcher" else OTHER
            middle = top + BAR / 2 + 5
            note = f"{rate:,}"
            if name != "launcher":
                note += f" (launcher x {ratios[f'launcher/{name}']:.2f})"
            parts.append(text(LEFT - 10, middle, name, anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{top}" width="{rate * scale:.1f}" height="{BAR}" rx="3" '
                f'fill="{colour}"/>'
            )
            parts.append(text(LEFT + rate * scale + 8, middle, note))
            top += BAR + GAP
        top += BETWEEN
    parts.append(text(LEFT, top - BETWEEN + FOOT - 14, caption(figures), size=12))
    height = top - BETWEEN + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="images per second">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal", size: int = 14
) -> str:
    """A line of text."""
    style = f"{STYLE};font-size:{size}px;font-weight:{weight};text-anchor:{anchor}"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{escape(words)}</text>'


def caption(figures: Figures) -> str:
    """What was measured, on what."""
    machine = figures["machine"]
    return (
        f"SimpleCNN, {figures['data']}, batch {figures['batch_size']}, "
        f"{machine['device']} of {machine['processor']}, torch {machine['torch']}"
    )


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--input", type=Path, default=FOLDER / "peers.json")
    parser.add_argument("--output", type=Path, default=FOLDER / "speed.svg")
    words = parser.parse_args()
    figures = json.loads(words.input.read_text(encoding="utf-8"))
    words.output.write_text(draw(figures), encoding="utf-8")
    print(words.output)


if __name__ == "__main__":
    main()
