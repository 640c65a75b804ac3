"""Signals become a flag that the loop reads, so that training stops between two steps and saves.

SIGTERM and SIGUSR1 (what schedulers send) and Ctrl-C ask for a stop, and so does the end of a batch
job's time; a second Ctrl-C ends the process at once. A process whose launcher (`accelerate launch`,
torchrun) has ended stops as well: with one process Accelerate forwards no signal, and the training
would continue as an orphan.

The state is the module's, since signal handlers belong to the process.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

from launcher.distributed.world import LAUNCH_MARKS
from launcher.errors import EXIT_INTERRUPTED, StoppedBeforeTrainingError

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NEVER = (math.inf, "")
_received: list[str] = []
_end = _NEVER
_parent = os.getppid()
_watches_launcher = False
_listens = False
_asked = ""


@contextmanager
def listening(*, ends_process: bool = True) -> Iterator[None]:
    """Record signals instead of being ended by them.

    After a stop, whatever its reason, they are ignored until the end of the process, if that
    follows: the state is saved, and a late one must not change the exit code. At a time limit,
    Slurm's own comes at the same moment. Outside the main thread, where Python allows no handlers,
    signals stay with the program that started the thread; the other reasons stop there as well.
    """
    global _listens
    _forget()
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = _STOPPING if in_main_thread else ()
    before = {number: signal.signal(number, _record) for number in numbers}
    was_listening, _listens = _listens, True
    try:
        yield
    finally:
        _listens = was_listening
        stopped = ends_process and (bool(_received) or time.time() >= _end[0])
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)
        if not _listens:
            _forget()


@contextmanager
def interrupting() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end what goes on by an exception: it loses nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is _record:  # what else it may be stays: of nohup, for one
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        if _received:
            raise KeyboardInterrupt
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget() -> None:
    """What came to one run is not for the next one in this process."""
    global _end, _watches_launcher
    _received.clear()
    _end, _watches_launcher = _NEVER, False


def stop_at(moment: float, reason: str) -> None:
    """Ask for a stop at `moment`, in seconds since 1970."""
    global _end
    _end = (moment, reason)


def ask_to_stop(reason: str) -> None:
    """Stop this process's training as a signal would; until `withdraw`."""
    global _asked
    _asked = reason


def withdraw() -> None:
    """What was asked for is done: another training may begin."""
    ask_to_stop("")


def watch_launcher() -> None:
    """Ask for a stop when the parent process, which is a launcher, has ended."""
    global _watches_launcher
    _watches_launcher = True


def stop_reason() -> str:
    """Why this process has to stop: a signal's name, the time, its launcher's end; else empty."""
    if _received:
        return _received[0]
    if _asked:
        return _asked
    moment, reason = _end
    if time.time() >= moment:
        return reason
    if _watches_launcher and (os.getppid() != _parent or _is_orphan(_parent)):
        return "the end of its launcher"
    return ""


def end_if_stopped(name: str) -> None:
    """Raise `StoppedBeforeTrainingError` after a signal, in a wait before training.

    Outside of `listening` a signal ends the process itself, and an earlier one is of the past.
    """
    if _listens and (reason := stop_reason()):
        raise StoppedBeforeTrainingError(stopped_line(name, reason))


def stopped_line(name: str, reason: str) -> str:
    """What a process says that a signal ended before it began to train."""
    return (
        f"{name} was stopped by {reason} before training began; "
        "nothing is lost: run it again with --resume"
    )


@cache
def _is_orphan(parent_pid: int) -> bool:
    """Whether the launcher had ended before this process began: init or systemd is its parent.

    Only where that is certain: they are not Python, as all launchers are, and have none of the
    launcher's variables, as a shell that a launcher started would have.
    """
    import psutil

    try:
        parent = psutil.Process(parent_pid)
        words = [parent.name(), *parent.cmdline()[:1]]
        if (parent_pid != 1 and words[0] != "systemd") or "python" in " ".join(words):
            return False
        return "python" not in parent.exe() and LAUNCH_MARKS.isdisjoint(parent.environ())
    except psutil.AccessDenied:
        return True  # it belongs to root, and this process to a user
    except psutil.Error:
        return False


def _record(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _received:
        os._exit(EXIT_INTERRUPTED)
    _received.append(name)
