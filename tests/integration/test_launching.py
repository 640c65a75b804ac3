"""Ways to start the launcher that the README does not show, and those that are stopped."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.helpers import alike
from tests.support.processes import ACCELERATE, PATIENCE, TORCHRUN_1, Run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_config"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """SimpleCNN on a few embedded images."""
    text = (ROOT / "recipes" / "simplecnn.py").read_text()
    path = tmp_path / "tiny.py"
    path.write_text(text.replace("        CIFAR10,", "        Synthetic,"))
    return str(path)


def words(recipe: str, tmp_path: Path) -> list[str]:
    settings = ["data.source.count=200", "data.batch_size=20", "epochs=1"]
    return ["-m", "launcher", recipe, *settings, "--wandb", "off", "--runs", str(tmp_path / "runs")]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    home = {"HF_HOME": "/nonexistent"}  # no default config of this machine's user
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **home, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ranks(done: subprocess.CompletedProcess[str]) -> int:
    """The number of ranks that the header tells; one header only."""
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = re.findall(r"= (\d+) ranks?", done.stdout)
    return int(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "wanted"),
    [
        ((*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")), 1),
        alike((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), 2),
    ],
    ids=["cpu.yaml", "multi_gpu"],
)
def test_as_many_processes_train_together_as_were_asked_for(
    launch: tuple[str, ...], wanted: int, recipe: str, tmp_path: Path
) -> None:
    done = run([*launch, *words(recipe, tmp_path)], ACCELERATE_USE_CPU="true")
    assert ranks(done) == wanted
    (folder,) = (tmp_path / "runs").iterdir()
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row["test/images"] == 40


@pytest.mark.slow
def test_processes_that_were_asked_for_but_do_not_start_stop_the_run(
    recipe: str, tmp_path: Path
) -> None:
    command = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    done = run([*command, *words(recipe, tmp_path)])
    assert done.returncode != 0
    assert "2 processes were asked for, but accelerate launch started 1" in done.stderr
    assert "--multi_gpu --num_processes 2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_error_of_the_user_is_said_once_by_all_ranks_together(tmp_path: Path) -> None:
    refused = Run(2, tmp_path, "epochs=0")
    assert refused.end() == 2
    assert refused.text().count("launcher: epochs=0") == 1
    assert 'File "' not in refused.text()


def begun(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks below; a child that is about to be another program still has its parent's words."""
    found = []
    for child in launcher.children():
        with suppress(psutil.Error):
            words = child.cmdline()
            if "launcher" in words and words != launcher.cmdline():
                found.append(child)
    return found


@pytest.mark.slow
@pytest.mark.skipif("python" in psutil.Process(1).name(), reason="may be a launcher itself")
@pytest.mark.parametrize("launch", [ACCELERATE, alike(TORCHRUN_1)], ids=["accelerate", "torchrun"])
def test_a_process_whose_launcher_is_gone_when_it_begins_does_not_train(
    launch: tuple[str, ...], tmp_path: Path
) -> None:
    orphaned = Run(launch, tmp_path, "--name", "orphan", "epochs=100000")
    until = time.monotonic() + PATIENCE
    launcher = psutil.Process(orphaned.process.pid)
    while not (found := begun(launcher)):
        assert time.monotonic() < until, orphaned.text()
    (orphan,) = found
    orphan.suspend()
    orphaned.process.kill()
    orphaned.process.wait()
    orphan.resume()
    try:
        orphan.wait(PATIENCE)
    finally:
        if orphan.is_running():
            orphan.kill()
    assert "stopped by the end of its launcher" in orphaned.text()


STOP_REASON = """
from launcher.distributed import signals
with signals.listening():
    signals.watch_launcher()
    print([signals.stop_reason()])
"""


@pytest.mark.parametrize("shell", [False, True])
def test_a_process_that_was_started_by_hand_is_no_orphan(shell: bool, tmp_path: Path) -> None:
    """Nor one with a shell between it and the launcher."""
    marks = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    python = [sys.executable, "-c", STOP_REASON]
    command = ["sh", "-c", f"{shlex.join(python)}; true"] if shell else python
    assert run(command, **marks).stdout == "['']\n"
