"""What it is worth on a CPU to keep freed memory instead of giving it back to the kernel.

    python benchmarks/memory.py --rounds 5

One forward and backward pass of speedrun94's network, in processes of their own that alternate:
as glibc does it, and as `cluster.keep_freed_memory` has it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from launcher.distributed.accelerator import keep_freed_memory
from recipes.speedrun94 import BATCH, SpeedVGG


def seconds(images: int, kept: bool) -> float:
    """The fastest of four passes in bfloat16 autocast."""
    if kept:
        keep_freed_memory()
    network = SpeedVGG().to(memory_format=torch.channels_last)
    pixels = torch.randn(images, 3, 32, 32).to(memory_format=torch.channels_last)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = network(pixels)
        scores.float().square().mean().backward()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Alternate, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=BATCH)
    parser.add_argument("--one", choices=("as_it_is", "kept"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    if words.one:
        print(seconds(words.images, words.one == "kept"))
        return
    found: dict[str, list[float]] = {"as_it_is": [], "kept": []}
    for _ in range(words.rounds):
        for name, times in found.items():
            command = [sys.executable, __file__, "--images", str(words.images), "--one", name]
            times.append(float(subprocess.check_output(command, text=True)))
    medians = {name: statistics.median(times) for name, times in found.items()}
    result = {
        "command": f"python benchmarks/memory.py --rounds {words.rounds} --images {words.images}",
        "machine": machine(Accelerator(cpu=True)),
        "seconds_per_pass": medians,
        "kept / as it is": medians["kept"] / medians["as_it_is"],
    }
    words.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
