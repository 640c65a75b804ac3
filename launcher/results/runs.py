"""`launcher runs`: a line for each run of a folder, with its state and its best accuracy."""

import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.checkpoint.run_files import RunFiles, all_runs
from launcher.errors import UserError
from launcher.utils.arguments import Parser
from launcher.utils.terminal import make_console
from launcher.utils.text import duration, printable, sizes

_USAGE = "launcher runs [DIR] [--sort COLUMN] [--filter COLUMN=VALUE] [--json]"
NAME = 16  # characters of a name that a narrow terminal shows on one line
LINE = 1000  # characters, more than any line has
_COLUMNS = ("name", "recipe", "state", "epoch", "best", "age", "size")


@dataclass(frozen=True)
class Row:
    """The values of a line; `age` in seconds since the last attempt began, `size` in bytes."""

    name: str
    recipe: str
    state: str
    epoch: int
    planned: int | None
    best: float | None
    chosen_on: str  # test or validation: the images by which the best epoch was chosen
    age: float | None
    size: int


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher runs`."""
    parser = Parser(prog="launcher runs", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    add("--sort", choices=_COLUMNS, default="age", help="default: the newest first")
    matches = "only such runs, as recipe=simplecnn or name=first-*; again for more"
    add("--filter", action="append", default=[], metavar="COLUMN=VALUE", help=matches)
    add("--json", action="store_true", help="print a JSON list")
    arguments = parser.parse_args(words)
    rows = [row_of(run) for run in all_runs(arguments.folder)]
    if not rows:
        raise UserError(
            f"{arguments.folder}, in which there is no run",
            expected="a folder of runs",
            instead="type launcher runs FOLDER, or train a recipe first",
        )
    rows = [row for row in rows if all(_matches(row, text) for text in arguments.filter)]
    rows.sort(key=_sort_key(arguments.sort))
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return 0
    console = make_console()
    console.print(_table(rows, console))
    return 0


def row_of(run: RunFiles) -> Row:
    """Read one run folder."""
    age = (datetime.now(UTC) - run.started).total_seconds() if run.started else None
    return Row(
        run.name,
        run.recipe,
        run.state,
        run.epoch,
        run.planned_epochs,
        run.best_accuracy,
        run.images,
        age,
        run.size,
    )


def _matches(row: Row, text: str) -> bool:
    column, equals, value = text.partition("=")
    if not equals or column not in ("name", "recipe", "state"):
        raise UserError(
            f"--filter {text}",
            expected="name=VALUE, recipe=VALUE or state=VALUE",
            instead="type --filter recipe=simplecnn, for example",
        )
    return fnmatch.fnmatchcase(str(getattr(row, column)), value)


def _sort_key(column: str) -> Callable[[Row], Any]:
    """Text ascending, numbers descending, the newest first; unknown values last."""

    def key(row: Row) -> Any:
        value = getattr(row, column)
        if column == "age":
            return (value is None, value or 0.0)
        return (value is None, -value if isinstance(value, int | float) else value or 0.0)

    return key


def _table(rows: list[Row], console: Console) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("name", overflow="fold")
    for column in _COLUMNS[1:]:
        is_number = column in ("epoch", "best", "age", "size")
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        planned = "?" if row.planned is None else row.planned
        best = "-" if row.best is None else f"{row.best:.2%} ({row.chosen_on})"
        about = (row.name, row.recipe, row.state, f"{row.epoch}/{planned}", best)
        age = "-" if row.age is None else " ".join(duration(row.age).split()[:2])  # `3 min`, `2 d`
        cells = (*about, age, sizes(row.size))
        table.add_row(*(Text(printable(cell)) for cell in cells))  # Text: brackets are no markup
    # By its name a run is told from others: in a narrow terminal it is whole, on several lines.
    if console.measure(table, options=console.options.update(width=LINE)).maximum > console.width:
        table.columns[0].width = min(NAME, max((len(row.name) for row in rows), default=NAME))
    return table
