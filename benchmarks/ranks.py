"""Measure two ranks of one core against one rank of two cores, with the same global batch.

    python benchmarks/ranks.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py. Each measurement is a fresh start, alone or under
torchrun; the two take turns. In it the launcher's `train_epoch` trains an epoch of `--steps` steps
to warm up, then `--epochs` more, each of which is timed. Writes ranks.json beside this file.

    simplecnn   recipes/simplecnn.py, batch 64, in fp32 and in bf16
    speedrun94  recipes/speedrun94.py, batch 512, in bf16, not compiled
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher import datasets, loading, settings

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

Figures = dict[str, Any]


def child(words: argparse.Namespace) -> None:
    """One rank: train, and on rank 0 write images per second of every epoch."""
    import torch

    from benchmarks.competitors import Launched
    from benchmarks.epoch import first_steps
    from benchmarks.turns import seconds_of
    from launcher.cluster import join

    name, *overrides = CASES[words.child]
    recipe = loading.load(SELF.parent.parent / "recipes" / f"{name}.py").recipe
    recipe = settings.override(recipe, [*overrides, f"data.root={words.root}"])
    steps = max(3, words.steps * 64 // recipe.data.batch_size)
    recipe = replace(recipe, epochs=words.epochs + 1)
    images = first_steps(datasets.load(recipe.data).train, recipe, steps)
    accelerator = join(recipe.precision or "fp32")
    launched = Launched(recipe, images, accelerator)
    launched.epoch(images)
    rates = []
    for _ in range(words.epochs):
        accelerator.wait_for_everyone()
        rates.append(len(images) / seconds_of(lambda: launched.epoch(images)))
    if accelerator.is_main_process:
        found = {"rates": rates, "ranks": accelerator.num_processes}
        words.output.write_text(json.dumps({**found, "threads": torch.get_num_threads()}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(case: str, ranks: int, words: argparse.Namespace) -> float:
    """The median images per second of one start."""
    launch = [sys.executable]
    if ranks > 1:
        several = ["--standalone", "--nproc-per-node", str(ranks)]
        launch += ["-m", "torch.distributed.run", *several]
    with TemporaryDirectory() as folder:
        output = Path(folder, "rates.json")
        options = [f"--root={words.root.resolve()}", f"--steps={words.steps}"]
        options += [f"--epochs={words.epochs}", f"--output={output}"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        environment.pop("OMP_NUM_THREADS", None)
        command = [*launch, str(SELF), "--child", case, *options]
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"failed: {case} with {ranks} rank(s)")
        found = json.loads(output.read_text())
    assert found["ranks"] == ranks
    print(f"{case}, {ranks} x {found['threads']} thread(s):", found["rates"], flush=True)
    return statistics.median(found["rates"])


def measure(case: str, words: argparse.Namespace) -> Figures:
    """Both, in turns."""
    rates: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for turn in range(words.rounds):
        for ranks in RANKS if turn % 2 == 0 else RANKS[::-1]:
            rates[ranks].append(run(case, ranks, words))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "images_per_second": {f"{n} rank(s)": [round(r) for r in rates[n]] for n in RANKS},
        "median": {f"{n} rank(s)": round(statistics.median(rates[n])) for n in RANKS},
        "two ranks/one": round(statistics.median(ratios), 4),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of an epoch, at 64 images")
    parser.add_argument("--epochs", type=int, default=3, help="timed in each start")
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        child(words)
        return
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    described = machine(Accelerator(cpu=True))
    options = f"--rounds {words.rounds} --steps {words.steps} --epochs {words.epochs}"
    figures: Figures = {
        "command": f"python benchmarks/ranks.py --root FOLDER {options}",
        "date": date.today().isoformat(),
        "machine": described,
        **{case: measure(case, words) for case in CASES},
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({case: figures[case] for case in CASES}, indent=1))


if __name__ == "__main__":
    main()
