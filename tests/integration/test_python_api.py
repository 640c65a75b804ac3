"""The Python API as people use it: in a plain script, and in a notebook's kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import forked
from tests.support.helpers import ROOT
from tests.support.processes import PATIENCE, TORCHRUN

TRAIN = f"""
from launcher import train

result = train(
    "{ROOT}/recipes/simplecnn.py",
    "data.root=nowhere", "data.fallback.count=640", "epochs=2", name="first", wandb="off",
)
"""
USE = """
from PIL import Image
from launcher import load_run

run = load_run("runs/first")
logits = run.model(run.prepare(Image.new("RGB", (48, 32), "red")))
print(result.last.epoch, tuple(logits.shape), run.classes[0])
"""
EXPECTED = "2 (1, 10) disk"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user works: the launcher is installed, or its checkout on the path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    command = [sys.executable, str(folder / "script.py")]
    return forked.run(command, cwd=folder, env=os.environ)


def test_in_a_script(folder: Path) -> None:
    done = run_script(folder, TRAIN + USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == EXPECTED


STOPPED = """
import os, signal, threading, time
from pathlib import Path

def interrupt():
    while not Path("runs/long/run.json").is_file():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

before = signal.getsignal(signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
words = "data.root=nowhere", "data.fallback.count=6400", "epochs=500"
result = train(RECIPE, *words, name="long", wandb="off")
print(result.stopped, signal.getsignal(signal.SIGINT) is before)
step = max(int(p.name.removeprefix("step-")) for p in Path("runs/long/checkpoints").iterdir())
train(RECIPE, *words, name="long", wandb="off", resume=True, max_steps=step + 1)
"""


def test_an_interrupt_saves_and_leaves_the_handlers_as_they_were(folder: Path) -> None:
    recipe = f"RECIPE = {str(ROOT / 'recipes' / 'simplecnn.py')!r}\n"
    done = run_script(folder, "from launcher import train\n" + recipe + STOPPED)
    assert done.returncode == 0, done.stderr
    assert "\nTrue True\n" in done.stdout
    assert "resumed after step" in done.stdout


@pytest.mark.slow
# Of the notebook's own libraries, on some versions of Python.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_notebook_and_again_in_another_precision(folder: Path) -> None:
    again = TRAIN.replace('"epochs=2", name="first"', '"epochs=1", "precision=bf16", name="second"')
    cells = [cell(code) for code in (TRAIN, USE, again)]
    notebook = nbformat.reads(json.dumps(NOTEBOOK | {"cells": cells}), as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute()
    first, used, second = ("".join(o.get("text", "") for o in c.outputs) for c in notebook.cells)
    assert "epoch 2/2" in first
    assert used.strip() == EXPECTED
    assert "bf16 (recipe)" in second


NOTEBOOK = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}}


def cell(code: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"metadata": {}, "outputs": [], "execution_count": None}
    return {"cell_type": "code", "source": code} | empty


TWICE = """
from launcher import train
from tests.support.helpers import tiny_recipe

for rate in ("0.05", "0.1"):
    train(tiny_recipe(epochs=1), f"optimizer.lr={rate}", name=rate, wandb="off")
"""


@pytest.mark.slow
def test_twice_on_the_same_two_ranks(folder: Path) -> None:
    """Whose common store, that of torchrun, outlives the first training."""
    (folder / "script.py").write_text(TWICE)
    command = (*TORCHRUN, str(folder / "script.py"))
    done = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in folder.glob("runs/*/final.safetensors")} == {"0.05", "0.1"}
