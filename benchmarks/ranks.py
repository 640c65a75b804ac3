"""Measure two ranks of one core against one rank of two cores, with the same global batch.

    python benchmarks/ranks.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py. Both train at the same time by the launcher's
`train_epoch`, one alone and one under torchrun, but only one of them runs: the processes of the
other are stopped (SIGSTOP). They take turns of `--seconds`, so that the noise of the machine meets
both alike; a step that a turn cuts goes on in the next. Writes ranks.json beside this file.

    simplecnn   recipes/simplecnn.py, batch 64, in fp32 and in bf16
    speedrun94  recipes/speedrun94.py, batch 512, in bf16, not compiled
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.turns import rotated
from launcher.config import loader
from launcher.config.overrides import override
from launcher.data import sources

SELF = Path(__file__).resolve()
CASES = {
    "simplecnn fp32": ("simplecnn", "precision=fp32"),
    "simplecnn bf16": ("simplecnn", "precision=bf16"),
    "speedrun94 bf16": (
        "speedrun94",
        "precision=bf16",
        "compile=false",
        "data.batch_size=512",
    ),
}
RANKS = (1, 2)
STEPS, EPOCHS = 90, 10_000  # of the training, which never ends by itself
WARM_UP = 5_000  # images before the first turn

Figures = dict[str, Any]


def child(words: argparse.Namespace) -> None:
    """One rank: train until killed; rank 0 keeps writing how many images that were."""
    import torch

    from benchmarks.competitors import Launched
    from benchmarks.epoch import first_steps
    from launcher.distributed.accelerator import create_accelerator
    from launcher.distributed.world import World

    name, *overrides = CASES[words.child]
    recipe = loader.load(SELF.parent.parent / "recipes" / f"{name}.py").recipe
    recipe = override(recipe, [*overrides, f"data.root={words.root}"])
    recipe = replace(recipe, epochs=EPOCHS)
    size = recipe.data.batch_size
    data = sources.load(recipe.data)
    images = first_steps(data.train, recipe, STEPS)
    accelerator = create_accelerator(recipe.precision or "fp32", World.of_this_process())
    assert accelerator.num_processes * torch.get_num_threads() == 2, "two cores, shared or not"
    launched = Launched(recipe, data, accelerator)
    trained, often = 0, max(1, 640 // size)  # steps between two numbers
    told = os.open(words.output, os.O_WRONLY | os.O_CREAT)  # kept: a new one is empty for a moment
    for _ in range(EPOCHS):
        for _ in launched.parts(images, often):
            trained += often * size
            if accelerator.is_main_process:
                os.pwrite(told, f"{trained:12}".encode(), 0)  # always as long: never half a number


class Racer:
    """A training that runs only when it is told to."""

    def __init__(self, case: str, ranks: int, words: argparse.Namespace, folder: Path) -> None:
        """Start it, and stop it when it has trained for a while."""
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        self._trained = folder / f"{ranks}"
        options = [f"--root={words.root.resolve()}", f"--output={self._trained}"]
        command = [*(several if ranks > 1 else []), str(SELF), "--child", case, *options]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        environment.pop("OMP_NUM_THREADS", None)
        self._process = psutil.Popen([sys.executable, *command], env=environment)
        while self.images() < WARM_UP:
            if self._process.poll() is not None:
                raise SystemExit(f"failed: {case} with {ranks} ranks")
            time.sleep(0.1)
        self.tell(signal.SIGSTOP)

    def images(self) -> int:
        """How many it has trained on."""
        return int((self._trained.read_text() or 0) if self._trained.exists() else 0)

    def tell(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for process in [self._process, *self._process.children(recursive=True)]:
            process.send_signal(number)

    def turn(self, seconds: float) -> float:
        """Let it run so long; its images per second."""
        before, started = self.images(), time.perf_counter()
        self.tell(signal.SIGCONT)
        time.sleep(seconds)
        self.tell(signal.SIGSTOP)
        return (self.images() - before) / (time.perf_counter() - started)


def measure(case: str, words: argparse.Namespace) -> Figures:
    """Both, in turns."""
    with TemporaryDirectory() as folder:
        racers = {str(ranks): Racer(case, ranks, words, Path(folder)) for ranks in RANKS}
        rates: dict[str, list[float]] = {name: [] for name in racers}
        try:
            for turn in range(words.turns):
                for name in rotated(list(racers), turn):
                    rates[name].append(racers[name].turn(words.seconds))
        finally:
            for racer in racers.values():
                racer.tell(signal.SIGKILL)
    figures = {
        "images_per_second": {f"{n} ranks": [round(r) for r in rates[n]] for n in rates},
        "mean": {f"{n} ranks": round(statistics.mean(rates[n])) for n in rates},
        # Of the sums: a turn ends in the midst of a step, which only the next one counts.
        "two ranks/one": round(sum(rates["2"]) / sum(rates["1"]), 4),
    }
    print(case, json.dumps(figures, indent=1), flush=True)
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--turns", type=int, default=20, help="of each")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        child(words)
        return
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    described = machine(Accelerator(cpu=True))
    options = f"--turns {words.turns} --seconds {words.seconds:g}"
    figures: Figures = {
        "command": f"python benchmarks/ranks.py --root FOLDER {options}",
        "date": date.today().isoformat(),
        "machine": described,
        **{case: measure(case, words) for case in CASES},
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
