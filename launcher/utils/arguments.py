"""argparse, with its complaints in the form of all others."""

import argparse
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from launcher.errors import UserError

MOST_SEEDS = 10_000  # more is a slip of the finger
_RANGE = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)


class Shown(SystemExit):
    """The text of --help was shown: the command is done."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s; it needs a `prog` and a `usage`."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong, how the command is written, and where its words are listed."""
        raise UserError(message, expected=str(self.usage), instead=f"see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Behind --help; not to be taken for a `sys.exit` of the recipe's code."""
        raise Shown(status)


def positive(text: str, least: int = 1) -> int:
    """A whole number above 0, for `type=`."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and int(text) >= least):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no whole number from {least} to 999,999,999,999"
        )
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, a thousandth at least, for `type=`."""
    with suppress(ValueError):
        if 1e-3 <= float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of seconds above 0")


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def obstacle(folder: Path) -> Path | None:
    """What is in the way of making a folder, or of writing in it; None where nothing is."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest


def refuse_no_folder(folder: Path) -> None:
    """Refuse a path at which no folder is, and none can be made."""
    if nearest := obstacle(folder):
        raise UserError(
            f"{folder}, but {nearest} is no folder in which one can write",
            expected="a folder, or a path at which one can be made",
            instead="name another one",
        )


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4,7` as 0, 1, 2, 3, 4 and 7. Raises `UserError` for what is none, or none twice."""
    seeds: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last - first >= MOST_SEEDS or last >= 2**64:
            raise _wrong_seeds(text)
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise _wrong_seeds(text)
    return tuple(seeds)


def _wrong_seeds(text: str) -> UserError:
    return UserError(
        f"--seeds {text:.60}",
        expected=f"at most {MOST_SEEDS:,} numbers, each once, as 0-9 or 0,3,5",
        instead="type --seeds 0-4, for example",
    )
