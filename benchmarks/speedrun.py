"""speedrun94 on a CPU, seed after seed, and the record's script beside it for some epochs.

    python benchmarks/speedrun.py --root FOLDER --seeds 3 --peer airbench94_muon.py

The clock is the record's: it runs over the data-dependent initialization, all training steps and
one evaluation with test-time augmentation. The record's script is written for a GPU: it is changed
to bfloat16 on a CPU, without compiling, and stopped after `--peer-epochs` epochs; its seconds are
given per epoch. Between two seeds one run of it takes its turn.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from benchmarks.gpu import once
from benchmarks.record import save_for_peer
from benchmarks.trainer import Figures, Trainer, spread
from launcher.config import loader, overrides
from launcher.data.sources import Data
from launcher.data.sources import load as load_data

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "speedrun94.py"
ON_CPU = ("precision=bf16", "compile=false")
# What of the record's script belongs to a GPU, and what stands in for it. Each occurs as written.
CLOCK = """
import time as _time
class _Clock:
    def record(self): self.at = _time.perf_counter()
    def elapsed_time(self, other): return 1e3 * (other.at - self.at)
"""
CHANGES = (
    (r"^@torch\.compile\n", ""),
    (r"^ *model\.compile\(.*\)\n", ""),
    (r'torch\.device\("cuda"\)', 'torch.device("cpu")'),
    (r"\.cuda\(\)", ""),
    (r"\.half\(\)", ".bfloat16()"),
    (r"torch\.cuda\.Event\(enable_timing=True\)", "_Clock()"),
    (r"torch\.cuda\.synchronize\(\)", "None"),
    (r'^ *main\("warmup", model\)\n', ""),
    (r"range\(200\)", "range(1)"),
)
STOP = r"(for epoch in range\().*(\):\n)"


def on_cpu(text: str, epochs: int) -> str:
    """The record's script for a CPU, stopped after so many epochs of the same schedule."""
    for pattern, instead in CHANGES:
        text, count = re.subn(pattern, instead, text, flags=re.MULTILINE)
        if not count:
            raise SystemExit(f"the peer has no {pattern}: another version of it?")
    text, count = re.subn(STOP, rf"\g<1>{epochs}\g<2>", text)
    if count != 1:
        raise SystemExit(f"the peer has {count} loops over epochs: another version of it?")
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("import torch"))
    return "".join([*lines[:first], CLOCK, *lines[first:]])


def run_peer(script: Path, data: Data, epochs: int) -> Figures:
    """Seconds of each epoch, and of the evaluation with test-time augmentation."""
    with TemporaryDirectory() as folder:
        save_for_peer(data, Path(folder, "cifar10"))
        text = on_cpu(script.read_text(encoding="utf-8"), epochs)
        Path(folder, script.name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-u", script.name]
        printed = subprocess.check_output(command, cwd=folder, text=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    times = [float(row[5]) for row in rows if len(row) == 6 and re.fullmatch(r"[\d.]+", row[5])]
    accuracies = [row[3] for row in rows if len(row) == 6 and re.fullmatch(r"[\d.]+", row[3])]
    ends = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    return {
        "seconds_per_epoch": ends[:epochs],
        "tta_seconds": ends[epochs:],
        "accuracy": [float(accuracy) for accuracy in accuracies],
    }


def main() -> None:
    """Take turns, print each run, write the figures after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--root", default="data", help="where CIFAR-10 lies")
    add("--seeds", type=int, default=3)
    add("--peer", type=Path, help="the record's script, airbench94_muon.py")
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
        summarise(figures, recipe.epochs)
        words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def command(seeds: int, peer: Path | None) -> str:
    """What to type for these figures; FOLDER is where CIFAR-10 lies."""
    beside = f" --peer {peer.name}" if peer else ""
    return f"python benchmarks/speedrun.py --root FOLDER --seeds {seeds}{beside}"


def summarise(figures: Figures, epochs: int) -> None:
    """Means over the seeds, and the ratio to the record's script over as many epochs."""
    for name in ("seconds", "accuracy", "accuracy_tta"):
        figures[name] = spread([run[name] for run in figures["runs"]])
    if figures["peer"]:
        per_epoch = [s for run in figures["peer"] for s in run["seconds_per_epoch"]]
        tta = [s for run in figures["peer"] for s in run["tta_seconds"]]
        whole = epochs * statistics.median(per_epoch) + statistics.median(tta)
        figures["peer_seconds_for_all_epochs"] = whole
        figures["ours / peer"] = statistics.median(r["seconds"] for r in figures["runs"]) / whole


if __name__ == "__main__":
    main()
