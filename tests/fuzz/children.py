"""The launcher in children forked from this process, which has imported all of it: 50 ms each.

A child is not a new process: what the launcher reads while it is imported is this process's.
"""

import faulthandler
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from launcher import cli

MOST_MEMORY = 6 << 30  # bytes: what a case asks for beyond is refused by the kernel
_IMPORTED = (
    *("launcher.api", "launcher.cluster.submit", "launcher.checks.check.command"),
    *("launcher.checks.verify.command", "launcher.checks.doctor.command"),
    "launcher.data.packing",
    *(f"launcher.results.{name}" for name in ("runs", "report", "compare", "predict", "export")),
)
_OUT, _ERR = "output", "errors"


@dataclass(frozen=True)
class Outcome:
    """How a child ended: a signal as its number below zero, the time limit as None."""

    code: int | None
    out: str
    err: str
    left: tuple[str, ...]  # the new files and folders in its working folder


def warm() -> None:
    """Fork only what has no threads, knows no network and asks nobody."""
    torch.set_num_threads(1)
    for module in _IMPORTED:
        import_module(module)
    CIFAR10.url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    os.environ.update(WANDB_MODE="disabled", ACCELERATE_USE_CPU="true")


def run(words: Sequence[str], folder: Path, seconds: float = 30.0) -> Outcome:
    """`launcher WORDS` in the `folder`, which is there already; the output lies beside it."""
    before = _below(folder)
    outputs = [folder.with_name(f"{folder.name}.{kind}") for kind in (_OUT, _ERR)]
    sys.stdout.flush()
    sys.stderr.flush()
    if not (child := os.fork()):
        _become(words, folder, outputs, seconds)
    descriptor = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)
    if not ended:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (path.read_text(errors="replace") for path in outputs)
    for path in outputs:
        path.unlink()
    return Outcome(code if ended else None, out, err, tuple(sorted(_below(folder) - before)))


def _below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _become(words: Sequence[str], folder: Path, outputs: Sequence[Path], seconds: float) -> None:
    """In the child: never returns."""
    code = 70
    try:
        os.chdir(folder)
        for number, path in enumerate(outputs, 1):
            with path.open("wb") as file:
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - pytest's may be no file
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        faulthandler.dump_traceback_later(seconds * 0.9, file=sys.stderr)
        sys.argv = ["launcher", *words]
        code = cli.main(words)
    except BaseException:  # which main lets nobody see
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
