"""An interrupted and resumed run is one curve in Weights & Biases: no row twice, none lost."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import alike
from tests.support.processes import Run
from tests.support.wandb_server import API_KEY, WandbServer

SHORT = ("epochs=6", "--name", "run", "--checkpoint-every", "7", "--log-every", "5", "--resume")
STEPS = sorted({1, *range(5, 151, 5), *range(7, 151, 7)})  # each report, and each save
EPOCHS = [1, 2, 3, 4, 5, 6]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


def run(folder: Path, mode: str, url: str = "") -> Run:
    account = {"WANDB_BASE_URL": url, "WANDB_API_KEY": API_KEY} if url else {}
    words = (*SHORT, "--wandb", mode)
    return Run(1, folder, *words, environment=account | {"HOME": str(folder)})


def interrupted_and_resumed(folder: Path, number: signal.Signals, mode: str, url: str = "") -> None:
    first = run(folder, mode, url)
    first.wait_for("epoch 3/6")
    first.process.send_signal(number)
    first.end()
    second = run(folder, mode, url)
    assert second.end() == 0, second.text()
    assert "resumed after step" in second.text()


def curves(rows: list[dict[str, Any]]) -> tuple[list[int], list[int], list[int]]:
    """The steps and epochs of which there are figures, in the order of the rows, and tables."""
    steps = [row["train/step"] for row in rows if "train/loss" in row]
    epochs = [row["epoch"] for row in rows if "test/accuracy" in row]
    return steps, epochs, [row["epoch"] for row in rows if "predictions" in row]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_online_the_curve_goes_on(
    number: signal.Signals, server: WandbServer, tmp_path: Path
) -> None:
    interrupted_and_resumed(tmp_path, number, "online", server.url)
    steps, epochs, tables = curves(server.received.history)
    assert without_stop(steps) == STEPS
    assert epochs == EPOCHS
    assert sorted(set(tables)) == sorted(tables)
    assert server.received.exit_code == 0
    assert len({server.received.run["name"]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [alike(signal.SIGTERM), signal.SIGKILL], ids=lambda n: n.name)
def test_offline_parts_of_one_id_have_each_row_once(number: signal.Signals, tmp_path: Path) -> None:
    interrupted_and_resumed(tmp_path, number, "offline")
    parts = sorted((tmp_path / "runs" / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1  # one id
    steps, epochs, _ = curves([row for part in parts for row in history(part)])
    assert without_stop(steps) == STEPS
    assert epochs == EPOCHS


def without_stop(steps: list[int]) -> list[int]:
    """A stop is reported as well, at whatever step it came."""
    assert steps == sorted(set(steps)), steps
    return [step for step in steps if step in STEPS]


def history(part: Path) -> list[dict[str, Any]]:
    """The rows of an offline part, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if "history" in record]
