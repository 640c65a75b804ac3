"""Output to the terminal: a header, a progress bar, a line per epoch, a closing table.

On a terminal with rich; into a file or a batch job's log as plain lines without escapes. Only
rank 0 writes.
"""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

import numpy
from numpy.typing import NDArray
from PIL import Image
from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launcher.checkpoint.outcomes import Outcomes, as_picture
from launcher.checkpoint.run_files import RunFiles
from launcher.config.plan import Plan
from launcher.loggers.logger import Logger
from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.utils.redaction import redacted
from launcher.utils.terminal import half_blocks
from launcher.utils.text import count, drop, of_uncertain, printable

PICTURES, PIXELS = 6, 20  # of the worst mistakes, and their longer side
CAPTION = 24  # characters: three pictures beside each other in a terminal of 80
CONFUSIONS = 3


class Console(Logger):
    """Plain lines; also the base of `LiveConsole`."""

    def __init__(self, stream: TextIO | None) -> None:
        """Write to `stream`; with None, write nothing."""
        self._stream = stream

    def say(self, text: str) -> None:
        """Write one line, and flush; a training does not end with the reader of its output."""
        if self._stream is not None:
            try:
                self._stream.write(redacted(text) + "\n")
                self._stream.flush()
            except OSError as error:
                self._stream = None
                drop(sys.stdout)
                if not isinstance(error, BrokenPipeError):  # the disk is full, say
                    lost = f"the output cannot be written ({error.strerror}); training goes on"
                    with suppress(OSError):
                        sys.stderr.write(f"launcher: {lost}\n")

    def header(self, title: str, rows: Mapping[str, str], warning: str = "") -> None:
        """What is about to run; `warning` stands out."""
        self.say(title)
        self._rows(rows)
        if warning:
            self.say(f"!!! {warning} !!!")

    def step(self, report: StepReport, plan: Plan) -> None:
        """Steps whose update was skipped; plain lines show no other step."""
        if report.skipped:
            steps = ", ".join(map(str, report.skipped))
            self.say(f"no update in step {steps}: the gradient is not finite, or skipped")

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """An epoch is complete."""
        self.say(epoch_line(report, plan, best))

    def closing(self, rows: Mapping[str, str]) -> None:
        """The results, and where they are."""
        self.say("")
        self._rows(rows)

    def mistakes(self, files: RunFiles) -> None:
        """What was taken for what in the best epoch: plain lines show no pictures."""

    def _rows(self, rows: Mapping[str, str]) -> None:
        width = max(map(len, rows), default=0)
        for label, value in rows.items():
            self.say(f"  {label:<{width}}  {value}")


class LiveConsole(Console):
    """On a terminal: panels, colour and a progress bar of the epoch."""

    def __init__(self, rich: RichConsole) -> None:
        """Write to `rich`."""
        super().__init__(None)
        self._rich = rich
        self._bar = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("loss [bold]{task.fields[loss]}[/]"),
            TextColumn("{task.fields[rate]} img/s"),
            TimeRemainingColumn(),
            console=rich,
            refresh_per_second=4,  # drawing takes time from the training
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._epoch = 0

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._rich.print(Text(redacted(text)))

    def header(self, title: str, rows: Mapping[str, str], warning: str = "") -> None:
        """A panel with what is about to run."""
        self._rich.print(Panel(_grid(rows), title=f"[bold]{title}", border_style="blue"))
        if warning:
            text = Text(redacted(warning), style="bold")
            self._rich.print(Panel(text, border_style="bold yellow"))

    def step(self, report: StepReport, plan: Plan) -> None:
        """Move the bar, or start one for a new epoch."""
        super().step(report, plan)
        if self._task is None or report.epoch != self._epoch:
            self._new_bar(report.epoch, plan)
        assert self._task is not None
        done = report.step - plan.epoch_steps(report.epoch)[0] + 1
        rate = f"{report.images_per_second:,.0f}"
        self._bar.update(self._task, completed=done, loss=f"{report.loss:.4f}", rate=rate)

    def _new_bar(self, epoch: int, plan: Plan) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        total, self._epoch = len(plan.epoch_steps(epoch)), epoch
        name = f"{epoch}/{plan.epochs}"
        self._task = self._bar.add_task("", total=total, epoch=name, loss="-", rate="-")
        self._bar.start()

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """The epoch's line above the bar; the best so far in green."""
        line = epoch_line(report, plan, best)
        fitting = line if len(line) <= self._rich.width else shortened(line)
        self._rich.print(Text(fitting, style="green" if _is_best(report, best) else ""))

    def closing(self, rows: Mapping[str, str]) -> None:
        """A panel with the results."""
        self._bar.stop()
        self._rich.print(Panel(_grid(rows), title="[bold]done", border_style="green"))

    def mistakes(self, files: RunFiles) -> None:
        """The worst of them as pictures of coloured half blocks, the commonest in words."""
        found = files.best if self._rich.color_system == "truecolor" else None
        if found is None or not len(found.mistakes):
            return
        numbers = {place: number for number, place in enumerate(found.pictured.tolist())}
        worst = [place for place in found.mistakes.tolist() if place in numbers][:PICTURES]
        shown = [
            Group(
                half_blocks(_thumbnail(found.pictures[numbers[place]])),
                Text(_caption(files, found, place)),
            )
            for place in worst
        ]
        self._rich.print(Text(f"the worst mistakes of epoch {found.epoch}", style="bold"))
        self._rich.print(Columns(shown, width=CAPTION, padding=(0, 2)))
        wrong = sorted((-n, t, p) for t, p, n in found.confusion if t != p)
        lines = [
            f"{_name(files, truth)} taken for {_name(files, mistaken)}: {count(-n, 'image')}"
            for n, truth, mistaken in wrong[:CONFUSIONS]
        ]
        self._rich.print(Text("\n".join(lines)))

    def finish(self, exit_code: int) -> None:
        """Remove the bar, and leave the terminal as it was."""
        self._bar.stop()


def _caption(files: RunFiles, found: Outcomes, place: int) -> str:
    truth, mistaken = (_name(files, int(v[place])) for v in (found.truth, found.predicted))
    chances = found.probability[place], found.probability_of_truth[place]
    of_mistake, of_truth = (f"{p:.1%}" if p >= 0.0005 else "<0.1%" for p in chances)
    return f"{truth} taken for {mistaken}\n{mistaken} {of_mistake}, {truth} {of_truth}\n"


def _name(files: RunFiles, number: int) -> str:
    return printable(files.class_name(number))


def _thumbnail(picture: NDArray[Any]) -> NDArray[Any]:
    """uint8 `(h, w, 3)` with no side above `PIXELS`, and an even height."""
    height, width = picture.shape[:2]
    scale = min(1.0, PIXELS / max(height, width))
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    return numpy.asarray(as_picture(picture).convert("RGB").resize(size, Image.Resampling.BOX))


def make_console(is_main: bool) -> Console:
    """A `LiveConsole` on a terminal, plain lines into a file, nothing on ranks other than 0."""
    stream = sys.stdout
    if not is_main:
        return Console(None)
    if stream.isatty():
        return LiveConsole(RichConsole(file=stream, highlight=False))
    return Console(stream)


def epoch_line(report: EpochReport, plan: Plan, best: Best | None) -> str:
    """The figures of one epoch in one line of fixed columns."""
    width = len(str(plan.epochs))
    return (
        f"epoch {report.epoch:>{width}}/{plan.epochs}"
        f"  train loss {report.train_loss:7.4f}"
        f"  {report.evaluated_on} loss {report.evaluation.loss:7.4f}"
        f"  {report.evaluated_on} accuracy {report.evaluation.accuracy:7.2%}{_tta(report)}"
        f"  {report.images_per_second:>9,.0f} img/s"
        f"  {report.seconds:7.1f} s" + ("  best" if _is_best(report, best) else "")
    )


def _is_best(report: EpochReport, best: Best | None) -> bool:
    return best is not None and best.epoch == report.epoch


def shortened(line: str) -> str:
    """The line of an epoch in 80 columns: the same figures with fewer words and spaces."""
    line = re.sub("(train|test|val) loss", r"\1", line)
    line = re.sub("(test|val) accuracy", "accuracy", line)
    return re.sub(" +", " ", line)


def tta_note(accuracy: float | None, uncertain: float | None) -> str:
    """The accuracy with test-time augmentation, where there is one, beside the plain figure."""
    of_which = of_uncertain(uncertain)
    return f" ({accuracy:.2%} with TTA{of_which})" if accuracy is not None else ""


def _tta(report: EpochReport) -> str:
    accuracy = report.evaluation_tta.accuracy if report.evaluation_tta else None
    return tta_note(accuracy, report.uncertain)


def first_step_line(report: StepReport, classes: tuple[str, ...]) -> str:
    """The loss of the first step, and the classes predicted for the first images."""
    names = ", ".join(classes[index] for index in report.first_predictions)
    return f"first step: loss {report.loss:.4f}; the first five images look like: {names}"


def _grid(rows: Mapping[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        grid.add_row(label, Text(redacted(value)))
    return grid
