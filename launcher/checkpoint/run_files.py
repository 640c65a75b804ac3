"""What a run folder says: for those who only look, while the run goes on or after its end.

Whatever is absent, damaged or half written is left out; nothing here writes or waits.
"""

import fcntl
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_type_hints

from launcher.checkpoint import outcomes
from launcher.checkpoint.outcomes import Outcomes
from launcher.config import annotations
from launcher.errors import EXIT_SAVED, UserError
from launcher.utils import json_text
from launcher.utils.redaction import redacted
from launcher.utils.text import count

State = Literal["running", "done", "stopped", "failed"]
_ACCURACY = {n: re.compile(rb'"%s/accuracy": ([0-9.eE+-]+)' % n.encode()) for n in ("test", "val")}
_IS_BEST = b'"best": true'
_SHOWN = 5  # names of runs, in a refusal


@dataclass(frozen=True)
class Change:
    """What a resumed run has otherwise than its checkpoint, in words.

    That stood behind so many epochs, and steps of the next one. `forgets_best`: what was best until
    then was so of other images, or with other answers.
    """

    epochs: int
    steps: int
    what: tuple[str, ...]
    forgets_best: bool

    @property
    def place(self) -> tuple[int, int]:
        """By which changes have an order."""
        return self.epochs, self.steps

    def __str__(self) -> str:
        """As on the page of a run."""
        counts = {"epoch": self.epochs, "step": self.steps}
        where = " and ".join(count(n, kind) for kind, n in counts.items() if n)
        return f"after {where or '0 steps'}: {', '.join(self.what)}"


def chosen_after(changes: Iterable[Change]) -> int:
    """The epoch behind which the best one is chosen: those before had other images or answers."""
    return max((change.epochs for change in changes if change.forgets_best), default=0)


@dataclass(frozen=True)
class RunFiles:
    """The files of one run folder."""

    path: Path

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.path.name

    @cached_property
    def about(self) -> dict[str, Any]:
        """`run.json`: classes, versions, devices, data."""
        return json_text.read_object(self.path / "run.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`: the settings of the recipe."""
        return json_text.read_object(self.path / "config.json")

    @cached_property
    def source(self) -> str:
        """The text of the recipe file; empty where there was none."""
        path = self.path / "recipe.py"
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            return ""

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The whole lines of `metrics.jsonl`."""
        return self._figures(_read_lines(self.path / "metrics.jsonl"))

    def _figures(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that have an accuracy."""
        return [
            row
            for row in rows
            if isinstance(accuracy := row.get(self.key("accuracy")), int | float)
            and 0 <= accuracy <= 1
        ]

    @property
    def evaluated_on(self) -> Literal["test", "val"]:
        """Which images were evaluated after each epoch, as figures are named."""
        return "val" if self.about.get("evaluated_on") == "val" else "test"

    @property
    def images(self) -> str:
        """Which images those are, in words."""
        return "validation" if self.evaluated_on == "val" else "test"

    def key(self, figure: str) -> str:
        """The name in `epochs` of a figure of the evaluated images, such as accuracy."""
        return f"{self.evaluated_on}/{figure}"

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes; empty where they cannot be read."""
        names = self.about.get("classes")
        return [redacted(str(name)) for name in names] if isinstance(names, list) else []

    def class_name(self, number: int) -> str:
        """Of a class that may have no name."""
        return self.classes[number] if number < len(self.classes) else f"class {number}"

    @cached_property
    def held_out(self) -> list[int]:
        """Where the validation images stood in the training split of the source, if there."""
        images = json_text.read_object(self.path / "validation.json").get("images")
        return [n for n in images if isinstance(n, int)] if isinstance(images, list) else []

    def image_name(self, place: int) -> str:
        """The file of an evaluated image, or what else tells it from others."""
        found = self.outcomes
        if found is not None and found.files.shape == found.truth.shape:
            return redacted(str(found.files[place]))
        if 0 <= place < len(self.held_out):
            return f"training image {self.held_out[place]}"
        return f"image {place}"

    @cached_property
    def tested(self) -> dict[str, dict[str, Any]]:
        """With validation images: the figures of the test images at the end, best and last."""
        found = json_text.read_object(self.path / "test.json")
        return {name: row for name, row in found.items() if isinstance(row, dict)}

    def test_accuracy(self, which: Literal["best", "last"]) -> float | None:
        """At the end of a run with validation images, by its best or its last weights."""
        accuracy = self.tested.get(which, {}).get("test/accuracy")
        if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
            return None
        return float(accuracy)

    @cached_property
    def details(self) -> list[dict[str, Any]]:
        """The whole lines of `details.jsonl`."""
        return _read_lines(self.path / "details.jsonl")

    @cached_property
    def best(self) -> Outcomes | None:
        """What was said of the evaluated images in the best epoch."""
        return outcomes.read(self.path / "best.npz")

    @cached_property
    def last(self) -> Outcomes | None:
        """... and in the last one."""
        return outcomes.read(self.path / "last.npz")

    @property
    def outcomes(self) -> Outcomes | None:
        """What was said in the best epoch, or in the last one where that cannot be read."""
        return self.best or self.last

    @property
    def recipe(self) -> str:
        """The name of the recipe."""
        return str(self.about.get("name", "?"))

    @property
    def planned_epochs(self) -> int | None:
        """How many epochs the run was to have."""
        epochs = self.config.get("epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def cut(self) -> str:
        """After how many steps --max-steps ends it; empty where it is to have all."""
        return str(self.about.get("steps")).partition("stopping after ")[2]

    @property
    def uncertain(self) -> float | None:
        """The part of the images to which test-time augmentation was limited."""
        part = self.config.get("uncertain")
        return part if isinstance(part, float) and 0 < part < 1 else None

    @property
    def changes(self) -> list[Change]:
        """What was changed where the run was resumed, in the order of its epochs."""
        found = self.about.get("changes")
        parts = map(_change_of, found if isinstance(found, list) else ())
        return [change for change in parts if change]

    @property
    def first_weights(self) -> tuple[str, str]:
        """With which weights it began, by their digest if it is known, and without which of them.

        Both are empty where it began with its own.
        """
        where, _, without = str(self.about.get("weights", "")).partition(", without ")
        return str(self.about.get("weights_digest") or where), without

    @property
    def chosen_after(self) -> int:
        """How many epochs are not compared with those since: see `chosen_after`."""
        return chosen_after(self.changes)

    @cached_property
    def best_row(self) -> dict[str, Any] | None:
        """The figures of the epoch whose weights are kept as the best ones.

        Only that line is parsed: of a thousand runs all would take long.
        """
        lines = _bytes(self.path, "metrics.jsonl").splitlines()
        marked = [line for line in lines if _IS_BEST in line][-1:]
        rows = self._figures(_read_rows(marked)) if marked else self.epochs
        rows = [row for row in rows if row["epoch"] > self.chosen_after]
        return max(rows, key=lambda row: row[self.key("accuracy")], default=None)

    @property
    def last_row(self) -> dict[str, Any] | None:
        """The figures of the last epoch, unless the run has had other images or answers since."""
        last = self.epochs[-1] if self.epochs else None
        return last if last and last["epoch"] > self.chosen_after else None

    @property
    def best_accuracy(self) -> float | None:
        """That of the best epoch, of the images by which it was chosen."""
        return self.best_row[self.key("accuracy")] if self.best_row else None

    @property
    def epoch(self) -> int:
        """How many epochs are in `metrics.jsonl`."""
        return len(self._accuracies)

    @cached_property
    def _accuracies(self) -> list[float]:
        """Without parsing every line: of a thousand runs that would take long."""
        try:
            accuracy = _ACCURACY[self.evaluated_on]
            found = map(float, accuracy.findall(_bytes(self.path, "metrics.jsonl")))
            return [accuracy for accuracy in found if 0 <= accuracy <= 1]
        except ValueError:
            return [row[self.key("accuracy")] for row in self.epochs]

    @property
    def end(self) -> dict[str, Any]:
        """`end.json`: the exit code of the last attempt, when it ended, and why it failed."""
        return json_text.read_object(self.path / "end.json")

    @property
    def state(self) -> State:
        """Whether it runs, and how it ended; a process that was killed has said nothing.

        What has said how it ended may hold the folder for a while, as until W&B has it all.
        """
        code = self.end.get("exit_code")
        if code is None and self.is_locked:
            return "running"
        return "done" if code == 0 else "stopped" if code == EXIT_SAVED else "failed"

    @property
    def is_locked(self) -> bool:
        """Whether a process holds the folder: as far as the file system tells other machines."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    @property
    def started(self) -> datetime | None:
        """When the last attempt began."""
        try:
            return datetime.fromisoformat(str(self.about.get("started", "")))
        except ValueError:
            return None

    @property
    def size(self) -> int:
        """The bytes of all its files."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except OSError:  # gone meanwhile
                    continue
        return total


def all_runs(runs: Path) -> list[RunFiles]:
    """Those in a folder of runs, by their names."""
    found = runs.glob("*/run.json") if os.path.isdir(runs) else ()
    return [RunFiles(path.parent) for path in sorted(found)]


def find(word: str, runs: Path = Path("runs")) -> RunFiles:
    """The run of a path, or of a name below `runs`. Raises `UserError` where there is none."""
    for path in (Path(word), runs / word):
        if os.path.isfile(path / "run.json"):
            return RunFiles(path)
    known = [run.name for run in all_runs(runs)]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    names = ", ".join(known[-_SHOWN:]) + more if known else f"no run in {runs} yet"
    raise UserError(
        f"{word}, which is no run folder",
        expected="the folder of a run, or its name",
        instead=f"there {'are' if known[1:] else 'is'} {names}; see launcher runs",
    )


def _change_of(said: Any) -> Change | None:
    values = said if isinstance(said, dict) else {}
    hints = get_type_hints(Change).items()
    found = [annotations.convert(values.get(name), annotation) for name, annotation in hints]
    return Change(*(value for _, value in found)) if all(fits for fits, _ in found) else None


def _bytes(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes() if (folder / name).is_file() else b""
    except OSError:
        return b""


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The last line may be being written."""
    return _read_rows(_bytes(path.parent, path.name).splitlines())


def _read_rows(lines: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        try:
            row = json_text.parse(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int):
            rows.append(row)
    return rows
