"""Words for numbers, and the end of a pipe to which they are written."""

import os
import sys


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `3 passes`, `4 micro-batches`, `5 epochs`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{number:,} {noun}{ending}"


def sizes(number: int) -> str:
    """`12.3 MB`, in powers of a thousand."""
    for unit, power in (("GB", 3), ("MB", 2), ("KB", 1)):
        if number >= 0.95 * 1000**power:
            return f"{number / 1000**power:.1f} {unit}"
    return f"{number} bytes"


def drop_stdout() -> None:
    """Write to nowhere from now on: who read the output, such as `head`, has ended.

    Python would else end with a complaint of its own when it flushes what is left.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
