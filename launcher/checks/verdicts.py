"""What `check`, `verify` and `doctor` answer: a line for each question, within a time limit."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from types import FrameType
from typing import Any, Literal

from rich.console import Console

from launcher.errors import EXIT_USER
from launcher.utils.arguments import Parser, seconds
from launcher.utils.redaction import redacted

WIDTH = 100  # characters of a line in a file or a pipe
INDENT, NARROWEST = 22, 20  # characters before an answer, and of one in a narrow terminal
Standing = Literal["good", "wrong", "notice", "not asked"]
_COLOURS = {"good": "green", "wrong": "red", "notice": "yellow", "not asked": "dim"}


@dataclass(frozen=True)
class Verdict:
    """The answer to one question; `instead` says what to do about a fault.

    `lines` are a picture or a table below it, for people; `figures` are numbers, for machines.
    """

    question: str
    answer: str
    standing: Standing = "good"
    instead: str = ""
    lines: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without `lines`, and with null for numbers that are not finite."""
        whole = asdict(self)
        del whole["lines"]
        for name, value in self.figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                whole["figures"][name] = None
        return whole


class TimeUpError(BaseException):
    """The limit of a command is reached; not an Exception, so other code does not catch it."""


class Deadline:
    """The time limit of a command, counted from the construction of this object."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begin

    @property
    def left(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self.seconds - self.spent)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise `TimeUpError` in the block at the end of the time.

        In the main thread only, and after a running operation of torch has ended.
        """

        def end(number: int, frame: FrameType | None) -> None:
            raise TimeUpError

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def answers(
    questions: Mapping[str, Callable[[], Iterable[Verdict]]], deadline: Deadline
) -> Iterator[Verdict]:
    """Ask each question in turn; those after the end of the time are reported as not asked."""
    for name, ask in questions.items():
        found: list[Verdict] = []
        try:
            if not deadline.left:
                raise TimeUpError
            with deadline.enforced():
                for verdict in ask():
                    found.append(verdict)  # noqa: PERF402 -- so they are kept when the time ends
        except TimeUpError:
            more = f"{deadline.seconds:g} s are over; type --limit SECONDS for more time"
            found.append(Verdict(name, more, "not asked"))
        yield from found


def add_options(parser: Parser, limit: float) -> None:
    """Add the options of all three commands: `--json`, and `--limit` seconds."""
    parser.add_argument("--json", action="store_true", help="for machines: one JSON object")
    text = "seconds that it may take (default: %(default)g)"
    parser.add_argument("--limit", type=seconds, default=limit, metavar="SECONDS", help=text)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0, or 2 where an answer is wrong."""
    return EXIT_USER if any(verdict.standing == "wrong" for verdict in verdicts) else 0


def show(verdict: Verdict, console: Console) -> None:
    """Print the line, and below it what to do."""
    colour = _COLOURS[verdict.standing]
    sign = f"[{colour}]{verdict.standing:<10}[/{colour}]"
    console.print(f"{verdict.question:<12}{sign}", end="")
    answer, indent = redacted(verdict.answer), " " * INDENT
    if console.is_terminal:  # one line elsewhere, and whole what may be copied from the others
        width = max(NARROWEST, console.width - INDENT)
        answer = f"\n{indent}".join(wrap(answer, width, break_on_hyphens=False))
    console.print(answer, markup=False, soft_wrap=True)
    if verdict.instead:
        console.print(indent + redacted(verdict.instead), markup=False, soft_wrap=True)
    for line in verdict.lines:
        console.print(indent + redacted(line), markup=False, soft_wrap=True)


def closing_line(deadline: Deadline) -> str:
    """The time that was used, and the limit."""
    return f"in {deadline.spent:.1f} s, of at most {deadline.seconds:g}"


def as_json(about: Mapping[str, Any], verdicts: Sequence[Verdict], deadline: Deadline) -> str:
    """One JSON object: `good`, seconds, the verdicts, and what `about` adds."""
    outcome = {
        "good": not exit_code(verdicts),
        "seconds": round(deadline.spent, 3),
        "limit": deadline.seconds,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    return redacted(json.dumps({**outcome, **about}, indent=2))
