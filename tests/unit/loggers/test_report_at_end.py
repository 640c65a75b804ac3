"""The report at the end of a run: in its own process, after the lock, and no fault of the run's."""

import os
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.errors import NotFiniteError, RankError
from launcher.loggers import report
from launcher.loggers.report import page_of, report_at_end, write
from tests.support.helpers import RECIPES
from tests.support.reported import write_reported

PYTHON = sys.executable
SHORT = ("data.fallback.count=60", "data.batch_size=20", "epochs=1", "--wandb", "off")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_program(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of Python, which writes down its words first."""
    program = folder / "program"
    program.write_text(f"#!{PYTHON}\nimport os, sys, time\n{lines}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_run_leaves_a_page_which_says_that_it_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "write", write)
    assert main([str(RECIPES / "pictures64.py"), *SHORT, "--name", "own"]) == 0
    output = capsys.readouterr().out
    assert "  report      runs/own/report/index.html" in output
    assert "no report" not in output
    page = page_of(Path("runs/own"))
    assert "done, exit code 0" in page.read_text()
    written = page.stat().st_mtime_ns
    words = ["epochs=2", "--resume-changed", "epochs"]  # and --resume goes on beside it
    assert main([str(RECIPES / "pictures64.py"), *SHORT, "--name", "own", *words]) == 0
    assert "2 of 2" in " ".join(page.read_text().split())
    assert page.stat().st_mtime_ns > written
    assert RunFiles(Path("runs/own")).state == "done"


@pytest.mark.parametrize("words", [["--no-report"], ["--smoke"], ["--profile"]])
def test_there_is_none_where_it_is_not_wanted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Path] = []
    monkeypatch.setattr(report, "write", called.append)
    more = ["epochs=30"] if words == ["--profile"] else []
    assert main([str(RECIPES / "pictures64.py"), *SHORT, *words, *more]) == 0
    assert called == []
    assert "report/index.html" not in capsys.readouterr().out


def test_its_process_has_its_own_session_and_none_of_our_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = """
said = [sys.argv[1:], os.getsid(0) == os.getpid(), os.path.realpath("/proc/self/fd/1")]
open("said", "w").write(repr(said))
"""
    as_program(lines, folder, monkeypatch)
    assert write(Path("runs/own")) == ""
    command = ["-m", "launcher", "report", str(folder / "runs/own")]
    assert Path("said").read_text() == repr([command, True, os.devnull])


def test_what_goes_wrong_with_it_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_program("sys.stderr.write('first\\nlast\\n'); sys.exit(3)", folder, monkeypatch)
    assert write(folder) == "last"
    as_program("sys.exit(3)", folder, monkeypatch)
    assert write(folder) == "exit code 3"
    monkeypatch.setattr(sys, "executable", str(folder / "absent"))
    assert "No such file" in write(folder)


def test_it_is_not_waited_for_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SECONDS", 0.5)
    as_program("open('id', 'w').write(str(os.getpid())); time.sleep(60)", folder, monkeypatch)
    begin = time.monotonic()
    assert write(folder) == "it took more than 0 s"
    assert time.monotonic() - begin < 20
    if Path("id").exists():
        assert not Path("/proc", Path("id").read_text(), "exe").exists()


def test_it_is_written_when_all_ranks_end_alike_and_the_lock_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_reported(Path("runs"))
    states: list[str] = []

    def look(folder: Path) -> str:
        states.append(RunFiles(folder).state)
        return "the disk is full"

    monkeypatch.setattr(report, "write", look)
    said: list[str] = []

    def run(error: Exception | None) -> None:
        with report_at_end(said.append) as reported, FileLock(path / ".lock"):
            reported.append(path)
            if error:
                raise error

    failures: list[Exception] = [NotFiniteError("x", 3), RankError("x"), ValueError("x")]
    for error in failures:
        with pytest.raises(type(error)):
            run(error)
    run(None)
    with report_at_end(said.append):  # another rank, or a smoke test
        pass
    assert states == ["done", "done"]
    assert said == ["!!! no report (the disk is full); type launcher report runs/own !!!"] * 2
