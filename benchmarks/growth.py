"""Measure how time and memory grow with the images, the epochs and the steps.

    python benchmarks/growth.py

Each measurement is the launcher's own command in a fresh process, with a console that notes the
process's memory: SimpleCNN, batch 64, on noise of CIFAR-10's shape.

    images   12,500 x 1, 4 and 16: seconds of the second epoch, peak memory; both over the images
    epochs   memory after 1, 10 and 100 epochs of 20 steps, in one run
    steps    images per second over each 1,000 of 10,000 steps

The sizes of `images` take turns. This file is also the recipe that is trained. Writes growth.json
beside this file.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.config import loader
from launcher.config.plan import Plan
from launcher.loggers.console import Console
from launcher.training.metrics import Best, EpochReport, StepReport

IMAGES, TIMES = 12_500, (1, 4, 16)
EPOCHS = (1, 10, 100)
STEPS, PART = 10_000, 1_000
SELF = Path(__file__).resolve()

Figures = dict[str, Any]


class Noise:
    """As many random images for training as told, and fewer for testing."""

    def __init__(self, train: bool, count: int = IMAGES, test_count: int = 1000) -> None:
        random = numpy.random.default_rng(int(train))
        size = count if train else test_count
        self.data = random.integers(0, 256, (size, 32, 32, 3), dtype=numpy.uint8)
        self.targets = random.integers(0, 10, size)


_simplecnn = loader.load(SELF.parent.parent / "recipes" / "simplecnn.py").recipe
recipe = replace(_simplecnn, data=replace(_simplecnn.data, source=partial(Noise), fallback=None))


class Notebook(Console):
    """Writes down what it is told, and the memory of the process at that time."""

    def __init__(self) -> None:
        super().__init__(None)
        self.epochs: list[Figures] = []
        self.rates: list[tuple[int, float]] = []

    def step(self, report: StepReport, plan: Plan) -> None:
        """Training has come to a log interval."""
        self.rates.append((report.step, report.images_per_second))

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """An epoch is complete."""
        present = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.epochs.append({"seconds": report.seconds, "memory": present, "peak": peak})


def child(output: Path, words: list[str]) -> None:
    """The launcher's command with a notebook for a console; leaves its notes in a file."""
    from launcher import cli
    from launcher.run import train as training

    notebook = Notebook()
    vars(training)["make_console"] = lambda is_main: notebook
    code = cli.main([str(SELF), "--wandb", "off", *words])
    output.write_text(json.dumps({"epochs": notebook.epochs, "rates": notebook.rates}))
    sys.exit(code)


def run(*words: str) -> Figures:
    """The notes of one run in a process of its own."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "notes.json")
        command = [sys.executable, str(SELF), "--child", str(output), *words]
        environment = os.environ | {"PYTHONPATH": str(SELF.parent.parent)}
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"failed: {' '.join(words)}")
        return json.loads(output.read_text())


def over_images(rounds: int, shrink: int) -> Figures:
    """Seconds of an epoch and peak memory; both per image, whose constancy is linearity."""
    sizes = [IMAGES // shrink * times for times in TIMES]
    notes: dict[int, list[Figures]] = {size: [] for size in sizes}
    for turn in range(rounds):
        for size in (sizes[turn % 3 :] + sizes)[:3]:
            last = run(f"data.source.count={size}", "epochs=2")["epochs"][-1]
            notes[size].append(last)
    seconds = {n: statistics.median(note["seconds"] for note in notes[n]) for n in sizes}
    peaks = {n: statistics.median(note["peak"] for note in notes[n]) for n in sizes}
    small, middle, large = sizes
    return {
        "images": sizes,
        "epoch_seconds": [round(seconds[n], 3) for n in sizes],
        "microseconds_per_image": [round(seconds[n] / n * 1e6, 2) for n in sizes],
        "peak_megabytes": [round(peaks[n] / 1e6, 1) for n in sizes],
        "bytes_per_further_image": [
            round((peaks[middle] - peaks[small]) / (middle - small)),
            round((peaks[large] - peaks[middle]) / (large - middle)),
        ],
    }


def over_epochs(shrink: int) -> Figures:
    """Memory of one process after its first, tenth and hundredth epoch."""
    epochs = run("data.source.count=1280", f"epochs={EPOCHS[-1] // shrink}")["epochs"]
    memory = [note["memory"] for note in epochs]
    shown = [number for number in EPOCHS if number <= len(memory)]
    return {
        "epochs": shown,
        "megabytes": [round(memory[number - 1] / 1e6, 1) for number in shown],
        "last_over_tenth": round(memory[-1] / memory[min(9, len(memory) - 1)], 4),
    }


def over_steps(shrink: int) -> Figures:
    """Images per second over parts of a long run, each relative to the first."""
    steps, part = STEPS // shrink, PART // shrink
    words = (f"--max-steps={steps}", f"--log-every={max(1, part // 10)}", "epochs=100")
    rates = run("data.source.count=50000", *words)["rates"][1:]  # the first has the warm-up
    parts = [
        statistics.median(rate for step, rate in rates if first < step <= first + part)
        for first in range(0, steps, part)
    ]
    return {
        "steps_of_each_part": part,
        "images_per_second": [round(rate) for rate in parts],
        "of_the_first_part": [round(rate / parts[0], 4) for rate in parts],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of the images")
    parser.add_argument("--shrink", type=int, default=1, help="everything smaller: a rehearsal")
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    words = parser.parse_args()
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    figures: Figures = {
        "command": f"python benchmarks/growth.py --rounds {words.rounds}",
        "date": date.today().isoformat(),
        "machine": machine(Accelerator(cpu=True)),
        "over_images": over_images(words.rounds, words.shrink),
        "over_epochs": over_epochs(words.shrink),
        "over_steps": over_steps(words.shrink),
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in figures.items() if k.startswith("over")}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
