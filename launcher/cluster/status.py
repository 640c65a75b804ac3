"""What has become of submitted jobs: from the queue, and from the folders of their runs.

No accounting database is needed: the queue forgets a job minutes after its end, but its logs, one
for each attempt, and its run folders stay.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.job import JOBS_FOLDER, BatchJob
from launcher.errors import UserError
from launcher.utils import atomic_write


@dataclass(frozen=True)
class Submitted:
    """One run of a job, as it was submitted; `number` is Slurm's, `17_2` in an array."""

    run: str
    number: str
    setting: str = ""  # the value of a sweep

    @property
    def logs(self) -> str:
        """The names of its logs, as a pattern."""
        return f"{self.run}-{self.number.partition('_')[0]}-*.log"


def remember(job: BatchJob, number: str) -> None:
    """Write down which runs belong to job `number`."""
    path = Path(job.runs) / JOBS_FOLDER / f"{job.name}-{number}.json"
    text = json.dumps([asdict(run) for run in _runs(job, number)], indent=2)
    atomic_write.replace(path, f"{text}\n".encode())


def _runs(job: BatchJob, number: str) -> Iterator[Submitted]:
    if job.sweep is None:
        yield Submitted(job.name, number)
        return
    for index, (run, value) in enumerate(zip(job.run_names, job.sweep.values, strict=True)):
        yield Submitted(run, f"{number}_{index}", f"{job.sweep.setting}={value}")


def table(runs: Path, ask: Callable[[], dict[str, str] | None]) -> str:
    """One line per submitted run: state, attempt, epoch, best figure.

    `ask` gives the state of each job that is known, or None where nobody could be asked.
    """
    known = sorted((runs / JOBS_FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime)
    submitted = [Submitted(**run) for path in known for run in json.loads(path.read_text())]
    if not submitted:
        raise UserError(
            f"no job was submitted for runs in {runs}",
            expected="a folder of runs that launcher submit has started",
            instead="type launcher submit RECIPE first, or name the folder with --runs FOLDER",
        )
    queue = ask()
    heads = ("run", "job", "state", "attempt", "epoch", "best accuracy", "setting")
    rows = [heads, *(_row(runs, run, queue) for run in submitted)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _row(runs: Path, run: Submitted, queue: dict[str, str] | None) -> tuple[str, ...]:
    folder = runs / run.run
    epochs = [row for row in map(_parsed, _lines(folder / "metrics.jsonl")) if row]
    done = (folder / "final.safetensors").is_file()
    attempts = len(list((runs / JOBS_FOLDER).glob(run.logs)))
    best = max((row["test/accuracy"] for row in epochs), default=None)
    return (
        run.run,
        run.number,
        "unknown" if queue is None else queue.get(run.number, "done" if done else "ended"),
        str(attempts) if attempts else "-",
        f"{epochs[-1]['epoch'] if epochs else 0}/{_planned(folder)}",
        "-" if best is None else f"{best:.2%}",
        run.setting,
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # being written
        return {}


def _planned(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["epochs"])
    except (OSError, ValueError, KeyError):
        return "-"


def queue() -> dict[str, str] | None:
    """The state of each job of this user that Slurm still knows, by its number.

    None where Slurm does not answer.
    """
    words = ("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T %r")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else dict(_states(done.stdout))


def _states(shown: str) -> Iterator[tuple[str, str]]:
    for line in shown.splitlines():
        number, state, reason = line.split(maxsplit=2)
        yield number, f"{state} ({reason})" if state == "PENDING" else state
