"""The records' own scripts: given their images, run in turns with others, and read.

    airbench94_muon.py, airbench96_faster.py   github.com/KellerJordan/cifar10-airbench
    cifar10_speedrun.py                        github.com/hiverge/cifar10-speedrun

Each prints a table, in which a row of the epoch `eval` ends a run, and has a place that says how
many runs there are: instead, a run begins when its turn comes. On a CPU, what belongs to a GPU is
taken out of them, for a rehearsal.
"""

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.trainer import Figures
from launcher.data.images import Data

END = "the turn ends"
_TURNS = f'''
import sys as _sys
def _turns():
    number = 0
    while _sys.stdin.readline():
        yield number
        print("{END}", flush=True)
        number += 1
'''
# What of a script belongs to a GPU, and what stands in for it.
_ON_CPU = (
    (r"^ *@torch\.compile(\(.*\))?\n", ""),
    (r"^ *model\.compile\(.*\)\n", ""),
    (r"^ *(\w+) = torch\.compile\(\1, .*\)\n", ""),
    (r"\._orig_mod\b", ""),
    (r"""torch\.device\((["'])cuda\1\)""", 'torch.device("cpu")'),
    (r"""=(["'])cuda\1""", '="cpu"'),
    (r"\.cuda\(\)", ""),
    (r"\.pin_memory\(\)", ""),
    (r"\.half\(\)", ".{number}()"),
    (r"\btorch\.half\b", "torch.{number}"),
    (r"\bfused=True", "fused=False"),
    (r"torch\.cuda\.Event\(enable_timing=True\)", "_Clock()"),
    (r"torch\.cuda\.synchronize\(\)", "None"),
    (r"torch\.cuda\.empty_cache\(\)", "None"),
    (r"torch\.cuda\._sleep\(.*\)", "None"),
    (r'^ *main\("warmup", model\)\n', ""),
)
_CLOCK = """
import time as _time
class _Clock:
    def record(self): self.at = _time.perf_counter()
    def elapsed_time(self, other): return 1e3 * (other.at - self.at)
"""
# Where the number of epochs is said: in the loop over them, or in the steps of all.
_EPOCHS = (
    (r"(for epoch in range\().*(\):\n)", r"\g<1>{epochs}\g<2>"),
    (
        r"(total_train_steps = )ceil\(steps_per_epoch \* epochs\)",
        r"\g<1>steps_per_epoch * {epochs}",
    ),
)


def in_turns(text: str) -> str:
    """A script that begins a run when it is given a line."""
    text, count = re.subn(r"range\(200\)", "_turns()", text)
    if count != 1:
        raise SystemExit(f"a peer with {count} places that say how many runs: another version?")
    return _with_code(text, _TURNS)


def on_cpu(text: str, epochs: int, number: str) -> str:
    """A script for a CPU, in bfloat16 or float and not compiled, stopped after so many epochs."""
    for pattern, instead in _ON_CPU:
        text = re.sub(pattern, instead.format(number=number), text, flags=re.MULTILINE)
    if left := re.search(r".*\bcuda\b.*", text):
        raise SystemExit(f"a peer with {left[0].strip()!r}: another version?")
    changed = [re.subn(pattern, to.format(epochs=epochs), text) for pattern, to in _EPOCHS]
    changed = [(text, count) for text, count in changed if count]
    if len(changed) != 1:
        raise SystemExit("a peer whose number of epochs is not found: another version?")
    return _with_code(changed[0][0], _CLOCK)


def epochs_of(text: str) -> float:
    """How many epochs a script trains by itself."""
    found = re.search(r"total_train_steps = ceil\(([\d.]+) \* len\(train_loader\)\)", text)
    if found is None:
        raise SystemExit("a peer whose number of epochs is not found: another version?")
    return float(found[1])


def _with_code(text: str, code: str) -> str:
    """The script with `code` before its first import of torch."""
    before, torch_line, after = text.partition("\nimport torch\n")
    return before + code + torch_line + after


def save_for_peer(data: Data, folder: Path) -> None:
    """The images in the form in which the records' scripts keep them."""
    folder.mkdir()
    for name, half in (("train", data.train), ("test", data.test)):
        saved = {"images": half.images, "labels": half.labels, "classes": list(half.classes)}
        torch.save(saved, folder / f"{name}.pt")


class Peer:
    """A record's script as a process of its own, which waits for its turns."""

    def __init__(self, script: Path, data: Data, cpu_epochs: int | None = None) -> None:
        """Start it; it compiles and warms itself up. With `cpu_epochs`, a rehearsal on a CPU."""
        text = script.read_text(encoding="utf-8")
        text = in_turns(on_cpu(text, cpu_epochs, "float") if cpu_epochs else text)
        self.name = script.stem
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        save_for_peer(data, folder / "cifar10")
        (folder / script.name).write_text(text, encoding="utf-8")
        self._output = folder / "output"
        with self._output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-u", script.name],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def turn(self, seconds: float) -> Figures:
        """One run, or how it failed; not longer than that."""
        assert self._process.stdin is not None
        until, done = time.perf_counter() + seconds, self._text().count(END)
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self._text()[-2000:]}
        while self._text().count(END) == done:
            if self._process.poll() is not None or time.perf_counter() > until:
                return {"failed": self._text()[-2000:]}
            time.sleep(0.02)
        return runs_in(self._text())[-1]

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._folder.cleanup()

    def _text(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")


def runs_in(printed: str) -> list[Figures]:
    """The accuracies and the seconds of each run in a printed table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    names: list[str] = next((row for row in rows if "epoch" in row), [])
    tables = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
    return [
        {
            "accuracy": float(row["val_acc"]),
            "accuracy_tta": float(row["tta_val_acc"]),
            "seconds": float(row.get("time_seconds") or row["total_time_seconds"]),
        }
        for row in tables
        if row.get("epoch") == "eval"
    ]


def epochs_in(printed: str) -> list[float]:
    """The seconds after each epoch and after the evaluation, as far as a script prints them."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    return [float(row[-1]) for row in rows if row and re.fullmatch(r"\d+\.\d+", row[-1])]
