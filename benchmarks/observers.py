"""Measure what those who watch a training take of its time: console, W&B, files, checkpoints.

    python benchmarks/observers.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py. Each measurement is the launcher's own command for
recipes/simplecnn.py in a fresh process. `watched` draws on a terminal, tracks into an offline run
of W&B and saves a checkpoint after every epoch; `alone` does none of it. They take turns.

    share    seconds inside the calls on the training thread, over those of the whole training
    ratio    seconds of the training, watched over alone: also what other threads take from it

Writes observers.json beside this file.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SELF = Path(__file__).resolve()
MODES = {
    "watched": ("--wandb", "offline", "--checkpoint-every", "1e"),
    "alone": ("--wandb", "off", "--checkpoint-every", "never"),
}

Figures = dict[str, Any]


class Timer:
    """Adds up the time inside functions, as far as the training thread calls them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def around(self, owner: Any, kind: str, *names: str) -> None:
        """Time these functions of a module or a class from now on, under the name `kind`."""
        for name in names:
            original = getattr(owner, name)
            setattr(owner, name, self._timed(original, kind))

    def _timed(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def timed(*words: Any, **named: Any) -> Any:
            if self._depth or threading.current_thread() is not threading.main_thread():
                return function(*words, **named)
            self._depth += 1
            started = time.perf_counter()
            try:
                return function(*words, **named)
            finally:
                self._depth -= 1
                spent = time.perf_counter() - started
                self.seconds[kind] = self.seconds.get(kind, 0.0) + spent

        return timed


def child(output: Path, mode: str, words: list[str]) -> None:
    """The launcher's command, with a timer around those who watch."""
    from rich.console import Console as RichConsole

    from launcher import cli
    from launcher.checkpoint import saver
    from launcher.checkpoint.run_dir import RunDir
    from launcher.checkpoint.saver import Saver
    from launcher.loggers.console import Console, LiveConsole
    from launcher.loggers.wandb import WandbLogger
    from launcher.run import train as training

    timer, whole = Timer(), Timer()
    screen = RichConsole(file=io.StringIO(), force_terminal=True, width=112)
    console = LiveConsole(screen) if mode == "watched" else Console(None)
    vars(training)["make_console"] = lambda is_main: console
    timer.around(type(console), "console", "say", "step", "epoch")
    timer.around(WandbLogger, "W&B steps", "step")
    timer.around(WandbLogger, "W&B epochs", "epoch")
    timer.around(RunDir, "files", "record")
    timer.around(saver, "files", "save_weights")
    timer.around(Saver, "checkpoints", "checkpoint")
    whole.around(training, "training", "run_loop")
    code = cli.main([str(SELF.parent.parent / "recipes" / "simplecnn.py"), *words, *MODES[mode]])
    output.write_text(json.dumps({**timer.seconds, **whole.seconds}))
    sys.exit(code)


def run(mode: str, words: argparse.Namespace) -> dict[str, float]:
    """The seconds of one run, by kind."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "seconds.json")
        settings = [f"data.root={words.root.resolve()}", f"epochs={words.epochs}"]
        command = [sys.executable, str(SELF), "--child", str(output), mode, *settings]
        environment = os.environ | {"PYTHONPATH": str(SELF.parent.parent)}
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"failed: {mode}")
        found: dict[str, float] = json.loads(output.read_text())
    print(mode, {name: round(seconds, 4) for name, seconds in found.items()}, flush=True)
    return found


def measure(words: argparse.Namespace) -> Figures:
    """Both modes, in turns."""
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for turn in range(words.rounds):
        for mode in list(MODES)[:: 1 if turn % 2 == 0 else -1]:
            runs[mode].append(run(mode, words))
    kinds = [kind for kind in runs["watched"][0] if kind != "training"]
    pairs = zip(runs["watched"], runs["alone"], strict=True)
    return {
        "training_seconds": {m: [round(r["training"], 3) for r in runs[m]] for m in MODES},
        "share": {
            kind: round(statistics.median(r[kind] / r["training"] for r in runs["watched"]), 6)
            for kind in kinds
        },
        "ratio": round(statistics.median(w["training"] / a["training"] for w, a in pairs), 4),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    words = parser.parse_args()
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    described = machine(Accelerator(cpu=True))
    options = f"--rounds {words.rounds} --epochs {words.epochs}"
    figures: Figures = {
        "command": f"python benchmarks/observers.py --root FOLDER {options}",
        "date": date.today().isoformat(),
        "machine": described,
        "epochs": words.epochs,
        **measure(words),
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"share": figures["share"], "ratio": figures["ratio"]}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
