"""Words for numbers and names, and the end of a pipe to which they are written."""

import os
from collections.abc import Iterable, Sequence
from typing import TextIO, TypeVar

T = TypeVar("T")


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 passes`, `4 micro-batches`, `5 epochs`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number:,} {noun}{ending}"


def sizes(number: float) -> str:
    """`12.3 MB`, `256 MB`, in powers of a thousand."""
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("KB", 1)):
        amount = number / 1000**power
        if amount >= 0.95:
            return f"{amount:,.0f} {unit}" if amount >= 99.95 else f"{amount:.1f} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """`12.3 s`, `3 min 17 s`, `5 h 12 min`, `3 d 4 h`."""
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    parts: list[str] = []
    rest = round(seconds)
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        number, rest = divmod(rest, unit)
        if number or parts:
            parts.append(f"{number} {name}")
    return " ".join(parts[:2])


def is_named(name: str, words: Iterable[str]) -> bool:
    """Whether one of the words is a dotted name, or its beginning up to a dot."""
    return any(name == word or name.startswith(f"{word}.") for word in words)


def some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def spread(values: Sequence[T], most: int) -> list[T]:
    """So many of them at most, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def have_changed(names: Sequence[str]) -> str:
    """`net.py has changed since`, or `net.py and head.py have changed since`."""
    return f"{some(names)} {'have' if names[1:] else 'has'} changed since"


def printable(text: str) -> str:
    """What no terminal shows, as an escape in the name of a file, is a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def drop(stream: TextIO) -> None:
    """Write to nowhere from now on: who read it, such as `head`, has ended, or the disk is full.

    Python would else end with a complaint, and an exit code, of its own when it flushes the rest.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run_of_seed(name: str, seed: int | str) -> str:
    """What one of the repeats of `name` is called."""
    return f"{name}-seed{seed}"


def of_uncertain(part: float | None) -> str:
    """` of the uncertain 25%`: of which images several views were scored; empty for all."""
    return "" if part is None else f" of the uncertain {100 * part:.3g}%"
