"""speedrun94_cpu, seed after seed, and a record's script beside it.

    python benchmarks/speedrun.py --root FOLDER --seeds 5 --peer cifar10_speedrun.py
    python benchmarks/speedrun.py --recipe speedrun94 --set precision=bf16 compile=false
        --root FOLDER --peer airbench94_muon.py

The clock is the record's: it runs over the data-dependent initialization, all training steps and
one evaluation with test-time augmentation. The record's script is written for a GPU: it is changed
to bfloat16 on a CPU, without compiling. Between two seeds one run of it takes its turn: the whole
training, or, of a script that prints a time after each epoch, `--peer-epochs` of them, whose
seconds are then given for all epochs.

With `--go-on`, the runs that lie in `--output` already are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from benchmarks.gpu import RECIPES, once
from benchmarks.record import epochs_in, epochs_of, on_cpu, runs_in, save_for_peer
from benchmarks.trainer import Figures, Trainer, spread
from launcher.config import loader, overrides
from launcher.data.images import Data
from launcher.data.sources import load as load_data


def run_peer(script: Path, data: Data, epochs: int) -> Figures:
    """A whole run; or the seconds of each of so many epochs, and of the evaluation."""
    text = script.read_text(encoding="utf-8")
    if "cifar10_speedrun" in script.stem:  # it prints its time at its end only
        return runs_in(printed_by(script, data, ceil(epochs_of(text))))[-1]
    times = epochs_in(printed_by(script, data, epochs))
    ends = [after - before for before, after in pairwise([0.0, *times])]
    return {
        "epochs": epochs_of(text),
        "seconds_per_epoch": ends[:epochs],
        "tta_seconds": ends[epochs:],
    }


def printed_by(script: Path, data: Data, epochs: int) -> str:
    """What a record's script prints on a CPU, in one run of at most so many epochs."""
    with TemporaryDirectory() as folder:
        save_for_peer(data, Path(folder, "cifar10"))
        text = on_cpu(script.read_text(encoding="utf-8"), epochs, "bfloat16")
        text = text.replace("range(200)", "range(1)")
        Path(folder, script.name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-u", script.name]
        return subprocess.check_output(command, cwd=folder, text=True)


def main() -> None:
    """Take turns, print each run, write the figures after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--recipe", default="speedrun94_cpu", help="one of recipes/")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    add("--root", default="data", help="where CIFAR-10 lies")
    add("--seeds", type=int, default=3)
    add("--peer", type=Path, help="airbench94_muon.py or cifar10_speedrun.py")
    add("--peer-epochs", type=int, default=2)
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    add("--go-on", action="store_true", help="after the runs of the output")
    words = parser.parse_args()
    loaded = loader.load(RECIPES / f"{words.recipe}.py").recipe
    recipe = overrides.override(loaded, [*words.set, f"data.root={words.root}"])
    data = load_data(recipe.data)
    trainer = Trainer(recipe, data)
    figures: Figures = {
        "command": command(words),
        "recipe": words.recipe,
        "machine": machine(Accelerator(cpu=True)),
        "settings": words.set,
        "runs": [],
        "peer": [],
    }
    if words.go_on:
        figures |= json.loads(words.output.read_text(encoding="utf-8"))
    for seed in range(len(figures["runs"]), words.seeds):
        started = time.perf_counter()
        figures["runs"].append(once(trainer, seed) | {"seed": seed})
        print(figures["runs"][-1], f"{time.perf_counter() - started:.0f} s in all", flush=True)
        if words.peer and len(figures["peer"]) < max(1, words.seeds - 1):
            figures["peer"].append(run_peer(words.peer, data, words.peer_epochs))
            print(figures["peer"][-1], flush=True)
        summarise(figures)
        words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def command(words: argparse.Namespace) -> str:
    """What to type for these figures; FOLDER is where CIFAR-10 lies."""
    settings = f" --set {' '.join(words.set)}" if words.set else ""
    beside = f" --peer {words.peer.name}" if words.peer else ""
    return (
        f"python benchmarks/speedrun.py --recipe {words.recipe}{settings} --root FOLDER "
        f"--seeds {words.seeds}{beside}"
    )


def summarise(figures: Figures) -> None:
    """Means over the seeds, and the ratio to the record's script over all epochs of its own."""
    for name in ("seconds", "accuracy", "accuracy_tta"):
        figures[name] = spread([run[name] for run in figures["runs"]])
    if figures["peer"]:
        whole = figures["peer_seconds"] = seconds_of_peer(figures["peer"])
        figures["ours / peer"] = statistics.median(r["seconds"] for r in figures["runs"]) / whole


def seconds_of_peer(runs: list[Figures]) -> float:
    """The median of its whole runs; or of its epochs, times their number, and of its evaluation."""
    if "seconds" in runs[0]:
        return statistics.median(run["seconds"] for run in runs)
    per_epoch = [s for run in runs for s in run["seconds_per_epoch"]]
    tta = [s for run in runs for s in run["tta_seconds"]]
    return float(runs[0]["epochs"] * statistics.median(per_epoch) + statistics.median(tta))


if __name__ == "__main__":
    main()
