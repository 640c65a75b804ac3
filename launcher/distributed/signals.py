"""Signals become a flag that the loop reads, so that training stops between two steps and saves.

SIGTERM and SIGUSR1 (what schedulers send) and Ctrl-C ask for a stop, and so does the end of a batch
job's time; a second Ctrl-C ends the process at once. A process whose launcher (`accelerate launch`,
torchrun) is gone stops as well: with one process Accelerate passes no signal on, and the training
would go on unseen.
"""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FrameType

from launcher.errors import EXIT_INTERRUPTED

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NEVER = (math.inf, "")
_received: list[str] = []
_end = _NEVER
_parent = os.getppid()
# What only launching programs set; ACCELERATE_MIXED_PRECISION may be the user's own.
_MARKS = frozenset(("ACCELERATE_DYNAMO_USE_FULLGRAPH", "TORCHELASTIC_RUN_ID"))


@contextmanager
def listening() -> Iterator[None]:
    """Note signals instead of dying of them.

    After a stop, whatever its reason, they are ignored until the end: the state is saved, and a
    late one must not spoil the exit code. At a time limit, Slurm's own comes at the same moment.
    """
    global _end
    _received.clear()
    _end = _NEVER
    before = {number: signal.signal(number, _note) for number in _STOPPING}
    try:
        yield
    finally:
        stopped = bool(_received) or time.time() >= _end[0]
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)


def stop_at(moment: float, reason: str) -> None:
    """Ask for a stop at `moment`, in seconds since 1970."""
    global _end
    _end = (moment, reason)


def stop_reason() -> str:
    """Why this process is to stop: a signal's name, its time, its launcher's end; else empty."""
    if _received:
        return _received[0]
    moment, reason = _end
    if time.time() >= moment:
        return reason
    if is_launched() and (os.getppid() != _parent or _is_adopted(_parent)):
        return "the launcher is gone"
    return ""


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` or torchrun stands between the user and this process."""
    return any(mark in environ for mark in _MARKS)


@cache
def _is_adopted(pid: int) -> bool:
    """Whether the parent was gone when this process began, and `pid` had taken its place.

    Only where that is certain: init or systemd, which is not Python as all launchers are, and has
    none of their variables, as a shell that a launcher started would have.
    """
    if _MARKS.isdisjoint(os.environ):
        return False
    import psutil

    try:
        parent = psutil.Process(pid)
        words = [parent.name(), *parent.cmdline()[:1]]
        if (pid != 1 and words[0] != "systemd") or "python" in " ".join(words):
            return False
        return "python" not in parent.exe() and _MARKS.isdisjoint(parent.environ())
    except psutil.AccessDenied:
        return True  # it belongs to root, and this process to a user
    except psutil.Error:
        return False


def _note(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _received:
        os._exit(EXIT_INTERRUPTED)
    _received.append(name)
