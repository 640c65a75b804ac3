"""Measure what compiling costs at the first start of a run, and at a requeue on another node.

    python benchmarks/compiling.py recipes/simplecnn.py compile=force --root FOLDER

Each start is a fresh process that trains a few steps and evaluates, timed from the command to its
end. Another node is an empty TORCHINDUCTOR_CACHE_DIR; all starts share a cache folder of the user,
where the key of compiled.bin lies (launcher/checkpoint/compiled.py).

    first       the run begins: all is compiled
    second      it goes on, with what the first has left in its folder
    without     it goes on without that, where `--without` asks for it
    same node   it goes on with the cache of the first node
    eager       the run with compile=false

Beside the seconds that pass, the seconds of computing are given, the compilers' among them: they
mean something on a busy machine as well. FOLDER holds torchvision's cifar-10-batches-py. Writes the
rows to `--output`, which keeps those of other calls.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from benchmarks.trainer import Figures, fresh_accelerator
from launcher.checkpoint.compiled import NAME

ROOT = Path(__file__).resolve().parent.parent


def start(words: list[str], folder: Path, name: str, node: str) -> tuple[float, float]:
    """Seconds, and seconds of computing, from the command to the end of its run."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / node),
        "XDG_CACHE_HOME": str(folder / "user"),
    }
    command = [sys.executable, "-m", "launcher", *words, "--name", name, "--wandb", "off"]
    started, before = time.perf_counter(), computing()
    done = subprocess.run(
        [*command, "--no-report"], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds, computed = time.perf_counter() - started, computing() - before
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    taken = f", taken from {NAME}" if f"is taken from {NAME}" in done.stdout else ""
    print(f"{name}, {node}: {seconds:.1f} s, {computed:.1f} s of computing{taken}", flush=True)
    return round(seconds, 2), round(computed, 2)


def computing() -> float:
    """Seconds of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(words: list[str], steps: int, without: bool) -> Figures:
    """The seconds of each start."""
    first = ["--max-steps", str(steps)]
    more = ["--max-steps", str(2 * steps), "--resume"]
    with TemporaryDirectory() as name:
        folder, runs = Path(name), Path(name, "runs")
        measured = {"first": start([*words, *first], folder, "run", "one")}
        size = (runs / "run" / NAME).stat().st_size
        for copy in ("bare", "same"):
            shutil.copytree(runs / "run", runs / copy)
            (runs / copy / NAME).unlink()
        measured["second"] = start([*words, *more], folder, "run", "two")
        if without:
            measured["without"] = start([*words, *more], folder, "bare", "three")
        measured["same node"] = start([*words, *more], folder, "same", "one")
        eager = [word for word in words if not word.startswith("compile=")]
        measured["eager"] = start([*eager, "compile=false", *first], folder, "eager", "four")
    return {
        "seconds": {name: seconds for name, (seconds, _) in measured.items()},
        "seconds_of_computing": {name: computed for name, (_, computed) in measured.items()},
        "bytes": size,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("words", nargs="+", help="a recipe and its settings")
    add("--root", default="", help="folder of CIFAR-10; embedded images by default")
    add("--steps", type=int, default=30)
    add("--without", action="store_true", help="also without what the first start has left")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    recipe, *settings = words.words
    where = f"data.root={Path(words.root).resolve() if words.root else 'nowhere'}"
    described = machine(fresh_accelerator("fp32"))
    seconds = measure([str(Path(recipe).resolve()), *settings, where], words.steps, words.without)
    named = " ".join(["python benchmarks/compiling.py", *words.words, "--root FOLDER"])
    named += f" --steps {words.steps}" + " --without" * words.without
    rows = json.loads(words.output.read_text()) if words.output.is_file() else []
    rows = [row for row in rows if row["command"] != named]
    rows.append({"command": named, "machine": described, **seconds})
    words.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
