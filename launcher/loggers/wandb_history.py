"""The rows of a run in W&B: what is in them, and which of them W&B has.

Every row is kept in a file of the launcher's own, so that a resumed run neither repeats one nor
loses one. It trains some steps again, whose rows W&B has already; and when a process is killed, the
last rows are lost that W&B's own process had not sent or written yet.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.utils import atomic_write

# The figures that make a row that of a step, or of an epoch, and where their number stands.
_KINDS = {"step": ("train/loss", "train/step"), "epoch": ("seconds", "epoch")}
ROW = "row"  # each row's own number, by which a resumed run sees what W&B has; tables have none
BLOCK, PART_HEADER = 32 * 1024, 7  # bytes
WHOLE, LAST = 1, 4  # kinds of parts that end a record

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
    numbers = {k: v for k, v in report.metrics().items() if isinstance(v, int | float)}
    scalars = {name.replace("train/", "train_epoch/"): value for name, value in numbers.items()}
    scalars["train/step"] = scalars.pop("step")
    if len(classes) <= MOST_CLASS_CURVES:
        pairs = zip(classes, report.evaluation.per_class, strict=True)
        prefix = f"{report.evaluated_on}/class_accuracy"
        scalars.update({f"{prefix}/{c}": a for c, a in pairs if a is not None})
    if best:
        name = f"best/{report.evaluated_on}_accuracy"  # by which it was chosen
        scalars |= {name: best.accuracy, "best/epoch": best.epoch}
    return scalars


class WandbHistory:
    """The scalars of all rows of a run, in their order, as lines of JSON in the run folder."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier attempts have logged; drop a line that a kill cut off."""
        self._path = folder / "wandb-rows.jsonl"
        self._lines: TextIO | None = None  # stays this run's, whatever becomes of the folder
        self.rows: list[Row] = []
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    if isinstance(row := json.loads(line), dict):
                        self.rows.append(row)
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
        """Keep a row, before W&B gets it; returns it with its number, counted from 1."""
        row = {**scalars, ROW: len(self.rows) + 1}
        if self._lines is None:
            self._lines = atomic_write.open_lines(self._path)
        self._lines.write(json.dumps(row) + "\n")
        self.rows.append(row)
        for kind, (figure, number) in _KINDS.items():
            if figure in row:
                self._last[kind] = row[number]
        return row

    def close(self) -> None:
        """No row is added any more."""
        if self._lines is not None:
            self._lines.close()


def log_records(log: bytes) -> Iterator[bytes]:
    """The whole records of one of W&B's own logs; what a kill has cut off at its end is left out.

    The format is LevelDB's: blocks of 32 KiB, in them parts of records, before each its checksum
    (4 bytes), size (2) and kind (1): a record is whole (1), or a first, middle or last part (4).
    The first block begins with W&B's own 7 bytes.
    """
    position, record = PART_HEADER, b""
    while position + PART_HEADER <= len(log):
        left = BLOCK - position % BLOCK
        if left < PART_HEADER:  # no room for another part in this block
            position += left
            continue
        size, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        begin, position = position + PART_HEADER, position + PART_HEADER + size
        if position > len(log):
            return
        record += log[begin:position]
        if kind in (WHOLE, LAST):
            yield record
            record = b""
