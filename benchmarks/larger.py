"""Train on more images than the process may have memory for.

    python benchmarks/larger.py --folder FOLDER

A pack of 8 GB of random bytes, images of 224 x 224 pixels, is written into FOLDER, and removed at
the end. The launcher's own command trains on it for two epochs in a process whose memory the
kernel holds to 2 GB (RLIMIT_DATA: all that is its own; pages of a file that it maps are the
kernel's cache, which gives them up when others need memory). The network is small, so that the
time is that of the images. Noted after each hundredth step, in megabytes:

    own      memory of the process itself (RssAnon), at ten moments of each epoch; what the first
             evaluation takes, the launcher keeps for the next
    mapped   pages of files that it has mapped (RssFile), of the 8 GB what the cache happens to hold

This file is also the recipe that is trained. Writes larger.json beside this file.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from torch import Tensor, nn
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher import Images, Packed, Recipe, flip
from launcher.config.plan import Plan
from launcher.data.packed import MANIFEST, Manifest, PackedSplit, file_of
from launcher.loggers.console import Console
from launcher.training.metrics import Best, EpochReport, StepReport
from launcher.utils.text import spread

SELF = Path(__file__).resolve()
GIGABYTES, LIMIT, SIZE, CLASSES, TESTED = 8.0, 2.0, 224, 10, 1_000
EVERY, AT_ONCE = 100, 256  # steps between two readings; images that are written

Figures = dict[str, Any]


class Network(nn.Module):
    """Means of the picture, and a layer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(3 * 64, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures to scores."""
        return self.layers(images)


recipe = Recipe(
    model=Network,
    data=Images(Packed, 64, (0.5,) * 3, (0.3,) * 3, augment=(flip,)),
    optimizer=partial(SGD, lr=1e-4),
    epochs=2,
)


class Notebook(Console):
    """Writes down the memory of the process, and what it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.memory: list[tuple[int, float, float]] = []
        self.rates: list[float] = []

    def step(self, report: StepReport, plan: Plan) -> None:
        """Training has come to a log interval."""
        self.memory.append((report.step, *megabytes()))
        self.rates.append(report.images_per_second)

    def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
        """An epoch is complete."""


def megabytes() -> tuple[float, float]:
    """Of the process itself, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    own, mapped = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return own, mapped


def write_pack(folder: Path, gigabytes: float) -> int:
    """Random images in the format of a pack; how many there are to train on."""
    random, shape = numpy.random.default_rng(0), (SIZE, SIZE, 3)
    counts = {"train": int(gigabytes * 1e9 / (SIZE * SIZE * 3)), "test": TESTED}
    folder.mkdir(parents=True)
    for half, count in counts.items():
        with file_of(folder, half, "images").open("wb") as file:
            for start in range(0, count, AT_ONCE):
                file.write(random.bytes(min(AT_ONCE, count - start) * SIZE * SIZE * 3))
        labels = random.integers(0, CLASSES, count, "<i8").tobytes()
        file_of(folder, half, "labels").write_bytes(labels)
    names = tuple(map(str, range(CLASSES)))
    halves = {half: PackedSplit(count, "", "", "") for half, count in counts.items()}
    text = Manifest("random bytes", shape, names, halves).text()
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return counts["train"]


def child(output: Path, limit: float, words: list[str]) -> None:
    """The launcher's command with a notebook for a console; leaves its notes in a file."""
    most = int(limit * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        numpy.ones(most, dtype=numpy.uint8)
    except MemoryError:
        pass
    else:
        raise SystemExit("the limit holds nobody")
    from launcher import cli
    from launcher.run import train as training

    notebook = Notebook()
    vars(training)["make_console"] = lambda is_main: notebook
    code = cli.main([str(SELF), "--wandb", "off", f"--log-every={EVERY}", *words])
    output.write_text(json.dumps({"memory": notebook.memory, "rates": notebook.rates}))
    sys.exit(code)


def train(pack: Path, limit: float, steps_of_an_epoch: int) -> Figures:
    """Two epochs in a process of their own."""
    with TemporaryDirectory() as folder:
        output = Path(folder, "notes.json")
        command = [sys.executable, str(SELF), "--child", str(output), str(limit)]
        environment = os.environ | {"PYTHONPATH": str(SELF.parent.parent)}
        words = [f"data.root={pack}"]
        subprocess.run([*command, *words], cwd=folder, env=environment, check=True)
        notes = json.loads(output.read_text())
    epochs = [
        [own for step, own, _ in notes["memory"] if (step > steps_of_an_epoch) == is_second]
        for is_second in (False, True)
    ]
    return {
        "own_megabytes_of_epoch_1": [round(own, 1) for own in spread(epochs[0], 10)],
        "own_megabytes_of_epoch_2": [round(own, 1) for own in spread(epochs[1], 10)],
        "last_over_first_of_epoch_2": round(epochs[1][-1] / epochs[1][0], 4),
        "mapped_megabytes": round(max(mapped for *_, mapped in notes["memory"]), 1),
        "images_per_second": round(statistics.median(notes["rates"])),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with room for it")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of the pack")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the process, in gigabytes")
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    words = parser.parse_args()
    if shutil.disk_usage(words.folder).free < 1.1e9 * words.gigabytes:
        parser.error(f"--folder {words.folder}: no room for {words.gigabytes} GB")
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    pack = (words.folder / "larger").resolve()
    try:
        count = write_pack(pack, words.gigabytes)
        steps = -(-count // recipe.data.batch_size)
        size = f" --gigabytes {words.gigabytes:g} --limit {words.limit:g}"
        figures: Figures = {
            "command": f"python benchmarks/larger.py --folder FOLDER{size}",
            "date": date.today().isoformat(),
            "machine": machine(Accelerator(cpu=True)),
            "images": count,
            "gigabytes": round(file_of(pack, "train", "images").stat().st_size / 1e9, 3),
            "limit_gigabytes": words.limit,
            **train(pack, words.limit, steps),
        }
    finally:
        shutil.rmtree(pack, ignore_errors=True)
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
