"""Signals become a flag that the loop reads, so that training stops between two steps and saves.

SIGTERM and SIGUSR1 (what schedulers send) and Ctrl-C ask for a stop; a second Ctrl-C ends the
process at once. A process whose launcher (`accelerate launch`, torchrun) is gone stops as well:
with one process Accelerate passes no signal on, and the training would go on unseen.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from launcher.errors import EXIT_INTERRUPTED

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[str] = []
_parent = os.getppid()


@contextmanager
def listening() -> Iterator[None]:
    """Note signals instead of dying of them.

    After a stop they are ignored until the end: the state is saved, and a late one must not spoil
    the exit code.
    """
    _received.clear()
    before = {number: signal.signal(number, _note) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _received else handler)


def stop_reason() -> str:
    """Why this process is to stop: the signal's name, or the end of its launcher; else empty."""
    if _received:
        return _received[0]
    return "the launcher is gone" if is_launched() and os.getppid() != _parent else ""


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun stands between the user and this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _received:
        os._exit(EXIT_INTERRUPTED)
    _received.append(name)
