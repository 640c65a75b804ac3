"""Measure the time from the command to the first step: the launcher against a bare script.

    python benchmarks/startup.py --root FOLDER

Every competitor is a fresh process, timed from its start until it says that its first step is done.
They take turns, and the order rotates from round to round:

    bare         import torch; the model of recipes/simplecnn.py, Adam, one step on random images
    bare, data   the same on CIFAR-10, opened by torchvision
    launcher     python -m launcher recipes/simplecnn.py --wandb off
    with W&B     the same with --wandb offline

FOLDER holds torchvision's cifar-10-batches-py. Beside the seconds that pass, the seconds of
computing are given: they mean something on a busy machine as well. Writes startup.json beside this
file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from benchmarks.turns import Figures, ratio, rotated

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP = "first step"
BARE = """
import torch
from torch import nn
{opening}
network = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(32 * 8 * 8, 10),
)
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
loss = nn.functional.cross_entropy(network(images), labels)
loss.backward()
optimizer.step()
print("first step: loss", loss.item(), flush=True)
"""
RANDOM = "images, labels = torch.rand(64, 3, 32, 32), torch.randint(10, (64,))"
OPENED = """
from torchvision.datasets import CIFAR10
train, test = (CIFAR10('{root}', train=half) for half in (True, False))
images = (torch.from_numpy(train.data[:64]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
labels = torch.tensor(train.targets[:64])
"""


def competitors(root: Path) -> dict[str, list[str]]:
    """The commands that take turns."""
    launcher = [sys.executable, "-m", "launcher", str(ROOT / "recipes" / "simplecnn.py")]
    launcher.append(f"data.root={root}")
    return {
        "bare": [sys.executable, "-c", BARE.format(opening=RANDOM)],
        "bare, data": [sys.executable, "-c", BARE.format(opening=OPENED.format(root=root))],
        "launcher": [*launcher, "--wandb", "off"],
        "with W&B": [*launcher, "--wandb", "offline"],
    }


def until_first_step(command: list[str]) -> tuple[float, float]:
    """Seconds and seconds of computing until the process says that its first step is done."""
    with TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if not any(line.startswith(FIRST_STEP) for line in process.stdout):
            raise SystemExit(f"no first step: {' '.join(command[:4])}")
        seconds = time.perf_counter() - started
        times = psutil.Process(process.pid).cpu_times() if process.poll() is None else None
        process.kill()
        process.wait()
    return seconds, times.user + times.system if times else float("nan")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    described = machine(Accelerator(cpu=True))  # before any load of our own
    commands = competitors(words.root.resolve())
    figures = {
        "command": f"python benchmarks/startup.py --root FOLDER --rounds {words.rounds}",
        "date": date.today().isoformat(),
        "machine": described,
        **take_turns(commands, words.rounds),
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(words.output)


def take_turns(commands: dict[str, list[str]], rounds: int) -> Figures:
    """The seconds of every competitor in every round, after a round that only fills the cache."""
    names = list(commands)
    for name in names:
        until_first_step(commands[name])
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in rotated(names, turn):
            measured[name].append(until_first_step(commands[name]))
    columns = {
        name: [list(column) for column in zip(*rows, strict=True)]
        for name, rows in measured.items()
    }
    figures: Figures = {}
    for place, kind in enumerate(("seconds", "seconds_of_computing")):
        values = {name: columns[name][place] for name in names}
        figures[kind] = {name: [round(v, 3) for v in values[name]] for name in names}
        figures[f"median_{kind}"] = {n: round(statistics.median(values[n]), 3) for n in names}
        for name in names[1:]:
            figures[f"{name}/bare, {kind}"] = ratio(values[name], values["bare"])
    print(json.dumps({k: v for k, v in figures.items() if not k.startswith("seconds")}, indent=1))
    return figures


if __name__ == "__main__":
    main()
