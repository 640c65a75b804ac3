"""The state of submitted jobs: from Slurm's queue, and from the run folders.

No accounting database is needed: the queue drops a job minutes after its end, but its logs, one
per attempt, and its run folders stay.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.checkpoint.run_files import RunFiles
from launcher.cluster.job import JOBS_FOLDER, BatchJob
from launcher.errors import UserError
from launcher.utils import atomic_write, json_text
from launcher.utils.text import printable

_HEADINGS = ("run", "job", "state", "attempt", "epoch", "best accuracy", "setting")
_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class SubmittedRun:
    """One submitted run; `number` is Slurm's job number, `17_2` in an array."""

    run: str
    number: str
    setting: str = ""  # of a sweep, with its value

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid record, which may be damaged."""
        if not (_NAME.fullmatch(self.run) and _NAME.fullmatch(self.number)):
            raise ValueError(f"{self.run!r}, {self.number!r}")


def record(job: BatchJob, number: str) -> None:
    """Write down which runs belong to job `number`."""
    path = Path(job.runs) / JOBS_FOLDER / f"{job.name}-{number}.json"
    text = json.dumps([asdict(run) for run in _submitted_runs(job, number)], indent=2)
    atomic_write.replace(path, f"{text}\n".encode())


def _submitted_runs(job: BatchJob, number: str) -> Iterator[SubmittedRun]:
    if job.sweep is None:
        yield SubmittedRun(job.name, number)
        return
    for index, (run, value) in enumerate(zip(job.run_names, job.sweep.values, strict=True)):
        yield SubmittedRun(run, f"{number}_{index}", f"{job.sweep.setting}={value}")


def show(runs: Path) -> None:
    """Print a line per submitted run: a table on a terminal, else aligned text."""
    found = (runs / JOBS_FOLDER).glob("*.json") if os.path.isdir(runs) else ()
    records = sorted(found, key=lambda path: path.lstat().st_mtime)
    if not records:
        raise UserError(
            f"no job was submitted for runs in {runs}",
            expected="a folder of runs that launcher submit has started",
            instead="type launcher submit RECIPE first, or name the folder with --runs FOLDER",
        )
    queue = ask_queue()
    rows = [tuple(map(printable, row)) for path in records for row in _rows(path, runs, queue)]
    if sys.stdout.isatty():
        _print_table(rows)
    else:
        _print_aligned([_HEADINGS, *rows])


def _print_table(rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*_HEADINGS)
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets are no markup
    Console().print(table)


def _print_aligned(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")


def _rows(path: Path, runs: Path, queue: dict[str, str] | None) -> list[tuple[str, ...]]:
    """The rows of one job, from its record at `path`."""
    try:
        submitted = [SubmittedRun(**run) for run in json_text.read(path)]
    except (OSError, ValueError, TypeError):
        return [(path.stem, "-", "damaged record", "-", "-", "-", "")]
    return [_row(run, runs, queue) for run in submitted]


def _row(run: SubmittedRun, runs: Path, queue: dict[str, str] | None) -> tuple[str, ...]:
    files = RunFiles(runs / run.run)
    done = (files.path / "final.safetensors").is_file()
    job = run.number.partition("_")[0]
    logs = re.compile(rf"{re.escape(run.run)}-{job}-\d+\.log")
    found = os.listdir(runs / JOBS_FOLDER)  # another run may be called NAME-JOB
    attempts = sum(1 for name in found if logs.fullmatch(name))
    best = files.best_accuracy
    return (
        run.run,
        run.number,
        "unknown" if queue is None else queue.get(run.number, "done" if done else "ended"),
        str(attempts) if attempts else "-",
        f"{files.epochs[-1]['epoch'] if files.epochs else 0}/{files.planned_epochs or '-'}",
        "-" if best is None else f"{best:.2%}",
        str(run.setting),  # a damaged record may hold any type
    )


def ask_queue() -> dict[str, str] | None:
    """The state of each job of this user that Slurm still knows, by its number.

    None where Slurm does not answer.
    """
    command = ("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T %r")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else dict(_states(done.stdout))


def _states(output: str) -> Iterator[tuple[str, str]]:
    for line in output.splitlines():
        number, state, reason = (*line.split(maxsplit=2), "", "", "")[:3]
        yield number, f"{state} ({reason})" if state == "PENDING" else state
