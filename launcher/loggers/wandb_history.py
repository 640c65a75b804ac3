"""The rows that W&B is given: what is in them, and which it was given already.

Every row is noted, so that a resumed run neither repeats one nor loses one. It trains some steps
again, whose rows W&B has already; and a killed process takes the last rows with it, which W&B's own
process had not sent or written yet.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.utils import atomic_write

# The figures that make a row that of a step, or of an epoch, and where their number stands.
_KINDS = {"step": ("train/loss", "train/step"), "epoch": ("test/accuracy", "epoch")}
ROW = "row"  # each row's own number, by which a resumed run sees what W&B has; tables have none
INSPECTION_SECONDS = 60

Row = dict[str, Any]
MOST_CLASS_CURVES = 20


def step_scalars(report: StepReport) -> dict[str, float]:
    """What a report of training is called in W&B."""
    norm = {} if report.gradient_norm is None else {"train/gradient_norm": report.gradient_norm}
    return {
        "epoch": report.epoch,
        "train/step": report.step,
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/images_per_second": report.images_per_second,
        **norm,
    }


def epoch_scalars(
    report: EpochReport, best: Best | None, classes: Sequence[str]
) -> dict[str, float]:
    """What a report of an epoch is called in W&B: `train_epoch/` is the mean of an epoch."""
    numbers = {k: v for k, v in report.metrics().items() if not isinstance(v, list)}
    scalars = {name.replace("train/", "train_epoch/"): value for name, value in numbers.items()}
    scalars["train/step"] = scalars.pop("step")
    if len(classes) <= MOST_CLASS_CURVES:
        pairs = zip(classes, report.test.per_class, strict=True)
        scalars.update({f"test/class_accuracy/{c}": a for c, a in pairs if a is not None})
    if best:
        scalars |= {"best/test_accuracy": best.accuracy, "best/epoch": best.epoch}
    return scalars


class WandbHistory:
    """The scalars of all rows of a run, in their order, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier attempts have logged; drop a line that a kill cut off."""
        self._path = folder / "wandb-rows.jsonl"
        self.rows: list[Row] = []
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    self.rows.append(json.loads(line))
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            atomic_write.replace(self._path, text.encode(), is_kept=False)
        self._last = {
            kind: max((row[number] for row in self.rows if figure in row), default=0)
            for kind, (figure, number) in _KINDS.items()
        }

    def is_new(self, kind: str, number: int) -> bool:
        """Whether no attempt has logged this step or epoch."""
        return number > self._last[kind]

    def add(self, scalars: Row) -> Row:
        """Note a row, before W&B gets it; returns it with its number, counted from 1."""
        row = {**scalars, ROW: len(self.rows) + 1}
        atomic_write.append(self._path, json.dumps(row))
        self.rows.append(row)
        for kind, (figure, number) in _KINDS.items():
            if figure in row:
                self._last[kind] = row[number]
        return row


def last_row_on_disk(parts: Iterable[Path]) -> int:
    """The number of the last row in W&B's own logs of earlier attempts; 0 if none can be read."""
    return max((row for part in parts for row in _rows_of(part)), default=0)


def _rows_of(part: Path) -> list[int]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, timeout=INSPECTION_SECONDS, check=False)
        records = map(json.loads, done.stdout.splitlines())
        return [record.get("history", {}).get("item", {}).get(ROW, 0) for record in records]
    return []
