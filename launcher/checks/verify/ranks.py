"""The processes that `verify` starts: ranks of a run, killed with all that they started.

They are forked from a process that has imported torch, which takes seconds; or each is a new
Python, with a hash seed of its own. Nothing heavy is imported here, so that it begins while the
command itself still imports.
"""

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launcher.distributed.world import PLACE

_PRELOADED = ["torch", "torchvision", "accelerate", "launcher.checks.verify.trial"]
_ENDING = (signal.SIGINT, signal.SIGTERM)
_LONGEST_FOLDER = 60  # bytes


@dataclass(frozen=True)
class Surroundings:
    """The start of a process: working folder, environment variables, and the file of its output."""

    folder: Path
    variables: Mapping[str, str]
    output: Path


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, and a process that imports torch, from which the ranks are forked.

    Both are gone at the end, also after SIGTERM and Ctrl-C.
    """
    from multiprocessing import forkserver, resource_tracker

    with (
        tempfile.TemporaryDirectory(prefix="launcher-") as name,
        _terminated_like_interrupted(),
        # torch makes a folder there when it is imported, and compiles into it.
        _variable("TORCHINDUCTOR_CACHE_DIR", str(Path(name, "compiled"))),
        _variable("TORCHINDUCTOR_COMPILE_THREADS", "1"),  # without further processes
    ):
        # It would warn about resources of ranks that were killed on purpose.
        quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
        others = os.environ.get("PYTHONWARNINGS")
        with _variable("PYTHONWARNINGS", ",".join(filter(None, (others, quiet)))):
            resource_tracker.ensure_running()
        multiprocessing.set_forkserver_preload(_PRELOADED)
        with _short_temporary_folder():
            forkserver.ensure_running()
        try:
            yield Path(name)
        finally:
            _end_server()


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """For the socket of the process that forks, whose path may have 107 bytes, and has 40 itself.

    TMPDIR of a job on a cluster, or of macOS, may be longer than the rest.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > _LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on either signal, whatever it has interrupted."""
    received = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ENDING}
    try:
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_server() -> None:
    """Kill it at once, as it may still be importing; also a rank whose start was interrupted."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                child.suspend()  # else it might fork meanwhile
                ranks = child.children(recursive=True)
                for process in (*ranks, child):
                    with suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(ranks, timeout=10)
                # Not waited for here: multiprocessing does that when it starts another one.
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


@dataclass
class Ranks:
    """The running ranks of one run."""

    processes: Sequence[BaseProcess] = field(default_factory=list)

    def wait(self) -> list[int]:
        """The exit codes. If one rank is killed, so are the others, which would wait for it."""
        running = list(self.processes)
        while running:
            connection.wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
            if any((process.exitcode or 0) < 0 for process in self.processes):
                self.kill()
        return [process.exitcode or 0 for process in self.processes]

    def kill(self) -> None:
        """Kill all ranks at once, and the processes that they have started."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                with suppress(ProcessLookupError):
                    _kill_group(process.pid)
        for process in self.processes:
            process.join(10)


def start(
    size: int,
    surroundings: Surroundings,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    is_new: bool = False,
) -> Ranks:
    """Start `work(*arguments)` as so many ranks; `is_new`: each is a new Python."""
    context: Any = multiprocessing.get_context("spawn" if is_new else "forkserver")
    port = _free_port()
    ranks = Ranks([])
    try:
        for rank in range(size):
            place = _place(rank, size, port)
            own = Surroundings(
                surroundings.folder, {**surroundings.variables, **place}, surroundings.output
            )
            process = context.Process(target=_begin, args=(own, work, arguments), daemon=True)
            process.start()
            ranks.processes = [*ranks.processes, process]
    except BaseException:
        ranks.kill()
        raise
    return ranks


def without_place(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank."""
    return {name: value for name, value in variables.items() if name not in PLACE}


def _place(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a rank; none for a single one."""
    if size == 1:
        return {}
    values = (rank, rank, size, size, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(PLACE, values, strict=True)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(pid, signal.SIGKILL)


# In the new process


def _begin(
    surroundings: Surroundings, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.setpgid(0, 0)  # so that it can be killed together with what it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent kills this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(surroundings.folder)
    os.environ.clear()
    os.environ.update(surroundings.variables)
    with surroundings.output.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    work(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)
