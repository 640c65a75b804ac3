"""Writes the report of a run that has ended, in a process of its own.

So no fault of it is the training's, and none of its imports. Rank 0 waits for it, at most
`SECONDS`: a batch system ends what a job leaves behind as soon as the job's own processes have
ended, so a page that nobody waits for would be missing there now and then. It takes about a second,
while nothing is left to lose and no other rank has anything to do. What takes longer is ended, and
said.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import TrainingError

SECONDS = 10.0


def page_of(folder: Path) -> Path:
    """Where the report of a run is."""
    return folder / "report" / "index.html"


@contextmanager
def report_at_end(say: Callable[[str], None]) -> Iterator[list[Path]]:
    """A context around a run, and around its lock: only when that is free the run has ended.

    Yields a list, which takes the folder of the run if there is one to report, on this rank; `say`
    shows a line to the user. The report is written where all ranks end alike: with the run, a stop,
    or a training that failed. After any other exception the ranks have to find out at once which of
    them was the first.
    """
    folders: list[Path] = []
    failure = None
    try:
        yield folders
    except TrainingError as error:
        failure = error
    for folder in folders:
        if complaint := write(folder):
            say(f"!!! no report ({complaint}); type launcher report {folder} !!!")
    if failure is not None:
        raise failure


def write(folder: Path) -> str:
    """Write the page, unless that was done since the end; returns what went wrong, or nothing."""
    if _is_fresh(folder):
        return ""
    command = [sys.executable, "-m", "launcher", "report", str(folder.absolute())]
    try:
        # Its own session, and nothing of this process's output: who waits for the end of that
        # does not wait for it, and Ctrl-C is not for it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return str(error)
    try:
        errors = process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it took more than {SECONDS:.0f} s"
    lines = errors.strip().splitlines()
    if process.returncode == 0:
        return ""
    return lines[-1] if lines else f"exit code {process.returncode}"


def _is_fresh(folder: Path) -> bool:
    """Whether W&B, which takes the page along, had it written already."""
    try:
        written = page_of(folder).stat().st_mtime_ns
        return written > (folder / "end.json").stat().st_mtime_ns
    except OSError:
        return False
