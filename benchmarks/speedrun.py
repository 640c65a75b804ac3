"""speedrun94 on a CPU, seed after seed, and a record's script beside it for some epochs.

    python benchmarks/speedrun.py --root FOLDER --seeds 3 --peer airbench94_muon.py
    python benchmarks/speedrun.py --root FOLDER --seeds 3 --peer cifar10_speedrun.py

The clock is the record's: it runs over the data-dependent initialization, all training steps and
one evaluation with test-time augmentation. The record's script is written for a GPU: it is changed
to bfloat16 on a CPU, without compiling, and stopped after `--peer-epochs` epochs; its seconds are
given per epoch. Between two seeds one run of it takes its turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from benchmarks.gpu import once
from benchmarks.record import epochs_in, epochs_of, on_cpu, save_for_peer
from benchmarks.trainer import Figures, Trainer, spread
from launcher.config import loader, overrides
from launcher.data.images import Data
from launcher.data.sources import load as load_data

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "speedrun94.py"
ON_CPU = ("precision=bf16", "compile=false")


def run_peer(script: Path, data: Data, epochs: int) -> Figures:
    """Seconds of each epoch, and of the evaluation with test-time augmentation.

    Of a script that prints its time at the end only, runs of one and of two epochs tell both.
    """
    epochs_in_all = epochs_of(script.read_text(encoding="utf-8"))
    if "cifar10_speedrun" in script.stem:
        one, two = (printed_by(script, data, count)[-1] for count in (1, 2))
        per_epoch, tta = [two - one], [2 * one - two]
    else:
        times = printed_by(script, data, epochs)
        ends = [after - before for before, after in pairwise([0.0, *times])]
        per_epoch, tta = ends[:epochs], ends[epochs:]
    return {"epochs": epochs_in_all, "seconds_per_epoch": per_epoch, "tta_seconds": tta}


def printed_by(script: Path, data: Data, epochs: int) -> list[float]:
    """The seconds that a record's script prints on a CPU, in one run of so many epochs."""
    with TemporaryDirectory() as folder:
        save_for_peer(data, Path(folder, "cifar10"))
        text = on_cpu(script.read_text(encoding="utf-8"), epochs, "bfloat16")
        text = text.replace("range(200)", "range(1)")
        Path(folder, script.name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-u", script.name]
        return epochs_in(subprocess.check_output(command, cwd=folder, text=True))


def main() -> None:
    """Take turns, print each run, write the figures after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--root", default="data", help="where CIFAR-10 lies")
    add("--seeds", type=int, default=3)
    add("--peer", type=Path, help="airbench94_muon.py or cifar10_speedrun.py")
    add("--peer-epochs", type=int, default=2)
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    recipe = overrides.override(loader.load(RECIPE).recipe, [*ON_CPU, f"data.root={words.root}"])
    data = load_data(recipe.data)
    trainer = Trainer(recipe, data)
    figures: Figures = {
        "command": command(words.seeds, words.peer),
        "machine": machine(Accelerator(cpu=True)),
        "settings": ON_CPU,
        "runs": [],
        "peer": [],
    }
    for seed in range(words.seeds):
        started = time.perf_counter()
        figures["runs"].append(once(trainer, seed) | {"seed": seed})
        print(figures["runs"][-1], f"{time.perf_counter() - started:.0f} s in all", flush=True)
        if words.peer and len(figures["peer"]) < max(1, words.seeds - 1):
            figures["peer"].append(run_peer(words.peer, data, words.peer_epochs))
            print(figures["peer"][-1], flush=True)
        summarise(figures)
        words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def command(seeds: int, peer: Path | None) -> str:
    """What to type for these figures; FOLDER is where CIFAR-10 lies."""
    beside = f" --peer {peer.name}" if peer else ""
    return f"python benchmarks/speedrun.py --root FOLDER --seeds {seeds}{beside}"


def summarise(figures: Figures) -> None:
    """Means over the seeds, and the ratio to the record's script over all epochs of its own."""
    for name in ("seconds", "accuracy", "accuracy_tta"):
        figures[name] = spread([run[name] for run in figures["runs"]])
    if figures["peer"]:
        per_epoch = [s for run in figures["peer"] for s in run["seconds_per_epoch"]]
        tta = [s for run in figures["peer"] for s in run["tta_seconds"]]
        whole = figures["peer"][0]["epochs"] * statistics.median(per_epoch) + statistics.median(tta)
        figures["peer_seconds_for_all_epochs"] = whole
        figures["ours / peer"] = statistics.median(r["seconds"] for r in figures["runs"]) / whole


if __name__ == "__main__":
    main()
