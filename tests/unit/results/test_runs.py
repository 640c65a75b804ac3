"""`launcher runs`: a line for each run, with its state, however the folder looks."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from launcher.checkpoint.run_files import RunFiles, find
from launcher.cli import main
from launcher.results import runs
from tests.support.helpers import refused


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(
    name: str,
    accuracies: tuple[float, ...] = (0.5, 0.7, 0.6),
    exit_code: int | None = 0,
    *,
    recipe: str = "simplecnn",
    minutes: float = 1.0,
    **settings: Any,
) -> Path:
    """A run folder as a training leaves it, without weights."""
    path = Path("runs", name)
    path.mkdir(parents=True)
    started = datetime.now(UTC) - timedelta(minutes=minutes)
    about = {"name": recipe, "started": started.isoformat(), "versions": {"torch": "2"}}
    (path / "run.json").write_text(json.dumps(about))
    (path / "config.json").write_text(json.dumps({"epochs": 3, "seed": 0, **settings}))
    rows = [
        {"epoch": n, "test/accuracy": accuracy, "test/loss": 1.0 / n, "train/loss": None}
        for n, accuracy in enumerate(accuracies, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if exit_code is not None:
        (path / "end.json").write_text(json.dumps({"exit_code": exit_code}))
    return path


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["runs", "--json", *words]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_trained_run_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[3] / "recipes" / "pictures64.py")
    words = [recipe, "data.fallback.count=60", "data.batch_size=20", "--wandb", "off"]
    assert main([*words, "--name", "own", "epochs=2"]) == 0
    capsys.readouterr()
    assert main(["runs"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "recipe", "state", "epoch", "best", "age", "size"]
    assert line.split()[:4] == ["own", "pictures64", "done", "2/2"]
    (row,) = rows_of(capsys)
    assert row["size"] == sum(p.stat().st_size for p in Path("runs/own").rglob("*") if p.is_file())
    assert 0 <= row["age"] < 60


def test_states_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in (("done", 0), ("stopped", 75), ("failed", 1), ("killed", None)):
        write_run(name, exit_code=code)
    running = write_run("running", exit_code=None)
    with FileLock(running / ".lock"):
        states = {row["name"]: row["state"] for row in rows_of(capsys)}
    assert states == {
        **{name: name for name in ("done", "stopped", "failed", "running")},
        "killed": "failed",
    }


def test_looking_does_not_keep_a_run_from_beginning() -> None:
    path = write_run("first")
    (path / ".lock").touch()
    assert not RunFiles(path).is_locked
    with FileLock(path / ".lock", timeout=0):
        pass


@pytest.mark.parametrize(
    ("column", "order"),
    [("name", "a b c"), ("best", "b c a"), ("age", "c a b"), ("epoch", "a c b"), ("size", "a c b")],
)
def test_runs_are_sorted(column: str, order: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("a", (0.1, 0.2, 0.3), minutes=20)
    write_run("b", (0.9,), minutes=30)
    write_run("c", (0.5, 0.4), minutes=10)
    assert " ".join(r["name"] for r in rows_of(capsys, "--sort", column)) == order


def test_runs_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    write_run("a-1")
    write_run("a-2", recipe="resnet18")
    write_run("b-1", exit_code=75)
    for words, names in (
        (["recipe=simplecnn"], ["a-1", "b-1"]),
        (["name=a-*"], ["a-1", "a-2"]),
        (["name=a-*", "recipe=simplecnn"], ["a-1"]),
        (["state=stopped"], ["b-1"]),
    ):
        options = [part for word in words for part in ("--filter", word)]
        rows = rows_of(capsys, "--sort", "name", *options)
        assert [row["name"] for row in rows] == names


def test_damaged_folders_are_lines_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run("odd")
    (path / "run.json").write_text("{")
    (path / "config.json").write_text("[1]")
    (path / "metrics.jsonl").write_bytes(b'{"epoch": 1, "test/accuracy": 1e}\n\xff\n{"epoch": 2,')
    write_run("[red]\x1b[31m")
    assert main(["runs"]) == 0
    output = capsys.readouterr().out
    assert "odd" in output
    assert "[red]?[31m" in output
    assert "\x1b" not in output
    row = rows_of(capsys, "--filter", "name=odd")[0]
    assert (row["recipe"], row["epoch"], row["planned"], row["best"]) == ("?", 0, None, None)


def test_a_thousand_runs_are_read_in_time() -> None:
    for number in range(1000):
        write_run(f"run-{number}", tuple(0.001 * n for n in range(30)))
    begin = time.process_time()
    assert main(["runs"]) == 0
    assert time.process_time() - begin < 20  # hung or squared; 2 s are claimed in docs/results.md


def test_where_there_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("empty")
    write_run("one")
    for words, part in (
        (["empty"], "in which there is no run"),
        (["--filter", "lr=1"], "--filter lr=1"),
        (["--sort", "colour"], "invalid choice: 'colour'"),
    ):
        assert main(["runs", *words]) == 2
        assert part in capsys.readouterr().err


def test_a_run_is_found_by_its_path_or_its_name() -> None:
    path = write_run("first")
    assert find("first").path == path
    assert find("runs/first").path == path
    with refused("secnd, which is no run folder", "there is first", "launcher runs"):
        find("secnd")
    with refused("no run in elsewhere yet"):
        find("first", Path("elsewhere"))


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_shows_the_names(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(width=columns)
    monkeypatch.setattr(runs, "make_console", lambda: console)
    write_run("resnet18-seed3")
    assert main(["runs"]) == 0
    assert "resnet18-seed3" in capsys.readouterr().out
    assert main(["runs", "--filter", "name=nothing"]) == 0


def test_a_terminal_of_80_columns_cuts_no_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cut the unit of the size, and so `10.0 MB` were `10.0 M`."""
    console = Console(width=80)
    monkeypatch.setattr(runs, "make_console", lambda: console)
    path = write_run("simplecnn-20261130-182812", (1.0,), exit_code=1, minutes=23.5)
    os.truncate(path / "metrics.jsonl", 10_000_000)
    assert main(["runs"]) == 0
    _, line, rest = capsys.readouterr().out.splitlines()
    cells = ["simplecnn-202611", "simplecnn", "failed", "1/3", "100.00%", "(test)"]
    assert line.split() == [*cells, "23", "min", "10.0", "MB"]
    assert rest.split() == ["30-182812"]
