"""The least time that a training step could take on this machine, and the time that it takes.

    python benchmarks/floor.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py; `--root ""` takes the embedded synthetic set. For
each recipe two numbers come first, the arithmetic of a step and the bytes that it must move:

    arithmetic   multiplications and additions of both passes, as torch counts them
    bytes        what the forward pass keeps for the backward pass, written once and read once; the
                 weights, read twice; the gradients, written and read; the update of both weights
                 and the optimizer's state, read and written

The floor is the longer of the two at the machine's own rates, which are those of a large matrix
product in the same precision and of a large copy. The gap is the measured time over the floor;
caches, which spare some of the memory's time, are left out. Writes floor.json beside this file.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import first_steps, machine, opened
from benchmarks.trainer import Figures, Trainer, fresh_accelerator, matmul_rate, timed, work_of_step
from launcher.training.loop import make_batches, train_epoch

FOLDER = Path(__file__).resolve().parent
CASES = {
    "simplecnn fp32": ("simplecnn", "precision=fp32"),
    "simplecnn bf16": ("simplecnn", "precision=bf16"),
    "speedrun94 bf16": ("speedrun94", "precision=bf16", "compile=false"),
}
STEPS = {"simplecnn": 300, "speedrun94": 5}  # of an epoch
EPOCHS = 5  # measured, after one to warm up


def bytes_of_step(trainer: Trainer, kept: int) -> int:
    """See the top of the file; `kept` are the bytes kept for the backward pass."""
    weights = sum(p.nbytes for p in trainer.ctx.state.network.parameters())
    states = trainer.ctx.state.optimizer.state_dict()["state"].values()
    state = sum(v.nbytes for each in states for v in each.values() if isinstance(v, torch.Tensor))
    return 2 * (kept + 3 * weights + state)


def seconds_of_step(trainer: Trainer) -> float:
    """The median over epochs; the first one warms up."""
    ctx = trainer.reporting()
    batches = make_batches(ctx)

    def train(epoch: int) -> list[object]:
        return list(train_epoch(ctx, batches, epoch))

    epochs = [timed(partial(train, epoch))[0] for epoch in range(1, EPOCHS + 2)]
    return statistics.median(epochs[1:]) / ctx.plan.steps_per_epoch


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = source.clone()
    rounds = [timed(partial(target.copy_, source))[0] for _ in range(5)]
    return 2 * source.nbytes / min(rounds)


def measure(case: str, root: str) -> Figures:
    """The figures of one recipe."""
    name, *overrides = CASES[case]
    recipe, data = opened(name, root, *overrides)
    recipe = replace(recipe, epochs=EPOCHS + 1)
    trainer = Trainer(recipe, replace(data, train=first_steps(data.train, recipe, STEPS[name])))
    seconds = seconds_of_step(trainer)
    flops, kept = work_of_step(trainer)
    moved = bytes_of_step(trainer, kept)
    device = trainer.accelerator.device
    number = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    arithmetic, memory = flops / matmul_rate(device, number), moved / copy_rate(device)
    floor = max(arithmetic, memory)
    return {
        "gigaflop_per_step": round(flops / 1e9, 3),
        "megabytes_per_step": round(moved / 1e6, 2),
        "arithmetic_milliseconds": round(arithmetic * 1e3, 3),
        "memory_milliseconds": round(memory * 1e3, 3),
        "milliseconds_per_step": round(seconds * 1e3, 3),
        "gap": round(seconds / floor, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", required=True, help="folder of CIFAR-10; empty for Synthetic")
    parser.add_argument("--output", type=Path, default=FOLDER / "floor.json")
    words = parser.parse_args()
    figures: Figures = {
        "command": "python benchmarks/floor.py --root FOLDER",
        "date": date.today().isoformat(),
        "machine": machine(fresh_accelerator("fp32")),
    }
    for case in CASES:
        figures[case] = measure(case, words.root)
        print(case, json.dumps(figures[case], indent=1), flush=True)
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(words.output)


if __name__ == "__main__":
    main()
