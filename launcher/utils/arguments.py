"""argparse, with its complaints in the form of all others."""

import argparse
from contextlib import suppress
from typing import NoReturn

from launcher.errors import UserError


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


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and int(text) > 0):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is no whole number from 1 to 999,999,999,999"
        )
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, a thousandth at least, for `type=`."""
    with suppress(ValueError):
        if 1e-3 <= float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of seconds above 0")
