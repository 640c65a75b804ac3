"""Progress of long work: on stderr, a bar on a terminal, and now and then a line elsewhere."""

import os
import pty
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from launcher.utils import terminal
from launcher.utils.terminal import progress


@contextmanager
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """What is on stderr can be read from a real terminal's other end."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with open(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stderr)
        yield ours
    os.close(ours)


def seen(shown: int, until: str = "") -> str:
    """What was written, up to a text at least: a terminal passes it on a little later."""
    content, end = b"", time.monotonic() + 20
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            content += os.read(shown, 100_000)
        if until in content.decode(errors="replace"):
            break
        time.sleep(0.01)
    return content.decode()


def test_work_of_less_than_a_second_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch) as shown:
        with progress("decoding pictures", 3, "picture") as advance:
            advance(3)
        assert seen(shown) == ""


def test_of_two_at_the_same_time_one_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_A_BAR", 0.0)
    with screen(monkeypatch) as shown:
        with progress("first", 4, "picture") as first:
            with progress("second", 4, "picture") as second:
                first(2)
                second(1)
            first(1)
        text = seen(shown, "50%")
        assert "first" in text
        with progress("third", 4, "picture") as third:
            third(1)
        text += seen(shown, "third")
        assert "third" in text
        assert "second" not in text


def test_without_a_terminal_a_line_is_written_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("decoding pictures", 2000, "picture") as advance:
        advance(1000)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(terminal, "SECONDS_OF_A_LINE", 0.0)
    with progress("decoding pictures", 2000, "picture") as advance:
        advance(1200)
    assert capsys.readouterr() == ("", "decoding pictures: 1,200 of 2,000 pictures\n")
