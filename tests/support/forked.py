"""Programs forked from one process that has imported torch already, instead of started anew.

Starting Python and importing torch takes four seconds, and the tests start hundreds of programs.
`Popen` runs `python -m MODULE ...` or `python SCRIPT ...` as `subprocess.Popen` does: arguments,
environment, folder, output, signals and exit code are those of a new process. Not so are its
command line, as others see it, and what is read while Python starts and torch is imported: all
have one hash seed, OMP_NUM_THREADS=1 and TORCH_CPP_LOG_LEVEL=ERROR. Tests that depend on one of
these start a new process.
"""

import atexit
import fcntl
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

# Nothing of the launcher: its modules may read the environment when they are imported.
_IMPORTED = (
    *("torch", "torchvision.datasets", "torchvision.transforms.v2", "accelerate"),
    *("PIL.Image", "coverage", "filelock", "psutil", "rich.console", "safetensors.torch"),
)
_LONGEST = 200_000  # bytes of a request
MEASURED = "COVERAGE_PROCESS_CONFIG"  # how coverage tells a new Python to measure itself
measured = ""  # what the tests began with; tests/conftest.py keeps it from other new processes


class Popen:
    """A program that runs: the part of `subprocess.Popen` that the tests use."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> None:
        """`command` begins with the Python that runs the tests."""
        assert command[0] == sys.executable, command
        request = {
            "words": list(command[1:]),
            "folder": str(cwd),
            "environment": {MEASURED: measured, **env},
        }
        self._told, teller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with teller:
            files = [teller.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(_server(), [json.dumps(request).encode()], files)
        self.pid = self._read()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or a signal's number below zero; None while the program runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the program has ended."""
        if self.returncode is None:
            self._told.settimeout(timeout)
            try:
                self.returncode = self._read()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0) from None
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since, as for subprocess.Popen
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _read(self) -> int:
        said = self._told.recv(16)
        assert said, "the process that forks is gone"
        return int(said)


def run(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Exit code and output of a program, as `subprocess.run` returns them."""
    with ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(os.memfd_create("output"), "w+")) for _ in "12"]
        for file in files:  # or processes that write at the same moment overwrite each other
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
        process = Popen(command, cwd=cwd, env=env, stdout=files[0], stderr=files[1])
        code = process.wait(timeout)
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(command, code, files[0].read(), files[1].read())


@cache
def _server() -> socket.socket:
    """The connection to the process that forks; it ends when the connection does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HOME": "/nonexistent"}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as launcher.cli says before it imports torch
    environment |= {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    command = [sys.executable, __file__, str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# In the process that forks


def serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork at each request. In the new process, what it is to run; else None, at the end of all."""
    children: dict[int, tuple[int, socket.socket]] = {}
    with requests, selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is not requests:
                    selector.unregister(ready.fileobj)
                    os.close(ready.fd)
                    pid, teller = children.pop(ready.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with teller, suppress(BrokenPipeError):
                        teller.send(str(code).encode())
                    continue
                request, files, _, _ = socket.recv_fds(requests, _LONGEST, 3)
                if not request:
                    return None
                if not (pid := os.fork()):
                    for process, (_, teller) in children.items():
                        os.close(process)
                        teller.close()
                    return json.loads(request), files
                teller = socket.socket(fileno=files[0])
                teller.send(str(pid).encode())
                process = os.pidfd_open(pid)
                children[process] = pid, teller
                selector.register(process, selectors.EVENT_READ)
                for file in files[1:]:
                    os.close(file)


def become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run `python WORDS` to its end, which is that of this process."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if environment.get(MEASURED):  # what a new process begins with
        import coverage

        coverage.process_startup()
    is_module = words[0] == "-m"
    named = words[1:] if is_module else words
    first = folder if is_module else str(Path(named[0]).parent)
    paths = environment.get("PYTHONPATH", "")
    sys.path[:0] = [first, *(path for path in paths.split(os.pathsep) if path)]
    sys.argv = named
    if is_module:
        runpy.run_module(named[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(named[0], run_name="__main__")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; it is for the tests
    del sys.path[0]  # this folder
    for name in _IMPORTED:
        import_module(name)
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked:
        request, files = asked
        for file, number in zip(files, (-1, 1, 2), strict=True):
            if number > 0:
                os.dup2(file, number)
            os.close(file)
        become(**request)


if __name__ == "__main__":
    main()
