"""The console: on a terminal, in a log file, on other ranks."""

import io
import os
import pty
import sys
from pathlib import Path

import numpy
from rich.console import Console as RichConsole

from launcher.config.plan import Plan
from launcher.loggers.console import Console, LiveConsole, epoch_line, first_step_line
from launcher.training.metrics import Best, EpochReport, Evaluation, StepReport
from tests.support import forked

ROOT = Path(__file__).parents[3]
PLAN = Plan(
    train_images=100,
    test_images=4,
    world_size=1,
    batch_size=10,
    accumulate=1,
    epochs=12,
    steps_per_epoch=10,
    last_step=120,
    log_every=2,
)
EPOCH = EpochReport(
    epoch=3,
    step=30,
    train_loss=0.51,
    learning_rate=0.1,
    images_per_second=12345.6,
    seconds=2.5,
    test=Evaluation(loss=0.4, confusion=((1, 1), (0, 2)), in_top5=4),
    probabilities=numpy.zeros((4, 2)),
)
STEP = StepReport(3, 22, 1.25, 0.1, 5000.0, first_predictions=(1, 0))


def test_an_epoch_is_one_line_of_fixed_columns() -> None:
    line = epoch_line(EPOCH, PLAN, Best.of(EPOCH))
    for part in ("epoch  3/12", "0.5100", "0.4000", "75.00%", "12,346 img/s", "2.5 s", "best"):
        assert part in line
    assert len(epoch_line(EPOCH, PLAN, None)) < 120


def test_the_first_step_names_the_predicted_classes() -> None:
    assert first_step_line(STEP, ("cat", "dog")).endswith("dog, cat")


def test_plain_lines_are_written_at_once_and_without_escapes() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.header("launcher: x", {"recipe": "x", "batch": "64"}, "NOT THE REAL DATA")
    console.step(STEP, PLAN)
    console.step(StepReport(3, 24, 1.0, 0.1, 5000.0, skipped=(23, 24)), PLAN)
    console.epoch(EPOCH, PLAN, None)
    console.closing({"best epoch": "3"})
    text = stream.getvalue()
    assert "!!! NOT THE REAL DATA !!!" in text
    assert "no update in step 23, 24: the gradient is not finite, or skipped" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_other_ranks_are_silent(capsys: object) -> None:
    console = Console(None)
    console.header("launcher: x", {"recipe": "x"}, "warning")
    console.epoch(EPOCH, PLAN, Best.of(EPOCH))
    console.closing({})


def test_the_live_console_shows_a_bar_with_loss_rate_and_epoch() -> None:
    stream = io.StringIO()
    rich = RichConsole(file=stream, force_terminal=True, width=110, highlight=False)
    console = LiveConsole(rich)
    console.header("launcher: x", {"recipe": "x"}, "NOT THE REAL DATA")
    console.step(STEP, PLAN)
    console._bar.refresh()
    console.epoch(EPOCH, PLAN, Best.of(EPOCH))
    console.step(StepReport(4, 31, 1.0, 0.1, 5000.0), PLAN)
    console.closing({"best epoch": "3"})
    text = stream.getvalue()
    for part in ("NOT THE REAL DATA", "3/12", "2/10 steps", "1.2500", "5,000 img/s", "4/12"):
        assert part in text, part


def test_on_80_columns_an_epoch_is_still_one_line_with_every_figure() -> None:
    stream = io.StringIO()
    console = LiveConsole(RichConsole(file=stream, width=80))
    console.epoch(EPOCH, PLAN, Best.of(EPOCH))
    line = "epoch 3/12 train 0.5100 test 0.4000 accuracy 75.00% 12,346 img/s 2.5 s best"
    assert stream.getvalue().split("\n") == [line, ""]


def test_a_terminal_gets_colour_and_a_log_file_gets_none(tmp_path: Path) -> None:
    """The real program on a real pseudo-terminal, and into a pipe with FORCE_COLOR set."""
    command = [sys.executable, "-m", "launcher", "recipes/simplecnn.py", "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    controller, number = pty.openpty()
    with open(number, "wb") as terminal:
        process = forked.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal)
    seen = _read_all(controller)
    assert process.wait(60) == 0, seen
    assert "\x1b[" in seen
    assert "╭" in seen
    piped = forked.run(command, cwd=ROOT, env={**environment, "FORCE_COLOR": "1"})
    assert piped.returncode == 0, piped.stderr
    assert "\x1b" not in piped.stdout
    assert "epoch 1/1" in piped.stdout


def _read_all(descriptor: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux's end of a pseudo-terminal
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode()
