"""The console: on a terminal, in a log file, on other ranks."""

import io
import json
import os
import pty
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from rich.console import Console as RichConsole

from launcher.checkpoint.run_files import RunFiles
from launcher.config.plan import Plan
from launcher.loggers.console import Console, LiveConsole, epoch_line, first_step_line
from launcher.training.metrics import Best, EpochReport, Evaluation, StepReport
from tests.support import forked
from tests.support.reported import outcomes_of

ROOT = Path(__file__).parents[3]
PLAN = Plan(
    train_images=100,
    evaluated_images=4,
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
    evaluation=Evaluation(loss=0.4, confusion=((1, 1), (0, 2)), in_top5=4),
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


def test_the_worst_mistakes_are_pictures_where_the_terminal_has_colours(tmp_path: Path) -> None:
    found = outcomes_of(3)
    found.write(tmp_path / "best.npz")
    classes = ["cat", "dog\x1b[31m", "[red]frog"]
    (tmp_path / "run.json").write_text(json.dumps({"classes": classes}))
    shown = {}
    for system in ("truecolor", "256"):
        stream = io.StringIO()
        rich = RichConsole(file=stream, force_terminal=True, width=80, color_system=system)
        LiveConsole(rich).mistakes(RunFiles(tmp_path))
        shown[system] = stream.getvalue()
    assert shown["256"] == ""
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown["truecolor"])
    blocks = [line for line in text.splitlines() if "▀" in line]
    assert len(blocks) == 2 * 4  # two rows of three pictures, 8 pixels high
    assert all(line.count("▀") == 3 * 8 for line in blocks)
    assert max(map(len, text.splitlines())) <= 80
    first = found.pictures[found.pictured.tolist().index(found.mistakes[0])]
    red, green, blue = first[0, 0].tolist()
    assert f"38;2;{red};{green};{blue}" in shown["truecolor"].split("▀")[0]
    truth, mistaken, images = max(
        (cell for cell in found.confusion if cell[0] != cell[1]), key=lambda cell: cell[2]
    )
    names = ("cat", "dog?[31m", "[red]frog")
    assert f"{names[truth]} taken for {names[mistaken]}: {images} images" in text
    assert text.count(" images") == 3


def test_without_mistakes_or_their_file_nothing_is_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    rich = RichConsole(file=stream, force_terminal=True, width=80, color_system="truecolor")
    LiveConsole(rich).mistakes(RunFiles(tmp_path))
    found = outcomes_of(3)
    replace(found, predicted=found.truth).write(tmp_path / "best.npz")
    LiveConsole(rich).mistakes(RunFiles(tmp_path))
    plain = Console(stream)
    outcomes_of(3).write(tmp_path / "best.npz")
    plain.mistakes(RunFiles(tmp_path))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("pixel", "shown"), [((99,), "99;99;99"), ((9, 7, 5, 255), "9;7;5"), ((9, 7), "9;9;9")]
)
def test_a_wide_picture_of_any_number_of_channels_is_shown(
    pixel: tuple[int, ...], shown: str, tmp_path: Path
) -> None:
    found = outcomes_of(3)
    pictures = numpy.full((len(found.pictured), 10, 64, len(pixel)), pixel, numpy.uint8)
    replace(found, pictures=pictures).write(tmp_path / "best.npz")
    stream = io.StringIO()
    rich = RichConsole(file=stream, force_terminal=True, width=80, color_system="truecolor")
    LiveConsole(rich).mistakes(RunFiles(tmp_path))
    assert f"38;2;{shown};48;2;{shown}" in stream.getvalue()
    assert "class 2" in stream.getvalue()
