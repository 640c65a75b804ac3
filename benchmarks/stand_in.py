"""Train on pictures that lie on disk to the accuracy of images in memory.

    python benchmarks/stand_in.py --root FOLDER_OF_CIFAR10 --folder FOLDER

CIFAR-10 is written into FOLDER as JPEGs of 64 to 256 pixels square, quality 90, and removed at the
end: what a folder of photographs is, with labels that can be learned. The same recipe, SimpleCNN
with crop and flip, then trains in processes of its own on

    original   CIFAR-10 as torchvision reads it, in memory
    device     the JPEGs, each decoded once and scaled to 32 pixels, in memory
    disk       the JPEGs, decoded for each step
    cut        the JPEGs, of which each step cuts out a part and stretches it to 32 pixels

The weights of `device` and `disk` have to be the same to the bit; of `cut` and the others only the
accuracy can be compared. This file is also the recipe. Writes stand_in.json beside this file.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from PIL import Image
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher import Folder, crop, flip, random_resized_crop
from recipes.simplecnn import recipe as simplecnn

SELF = Path(__file__).resolve()
SMALLEST, LARGEST, QUALITY = 64, 256, 90  # pixels of a side; of JPEG
WAY = os.environ.get("STAND_IN", "device")
WAYS = ("original", "device", "disk", "cut")

Figures = dict[str, Any]

_cut = partial(random_resized_crop, area=(0.5, 1.0))
recipe = replace(
    simplecnn,
    data=replace(
        simplecnn.data,
        source=CIFAR10 if WAY == "original" else partial(Folder, size=32),
        augment=(_cut, flip) if WAY == "cut" else (partial(crop, padding=2), flip),
        fallback=None,
        tier="disk" if WAY in ("disk", "cut") else "device",
    ),
    claims=(),
)


def write_pictures(root: Path, folder: Path) -> int:
    """All images of CIFAR-10 as JPEGs in class folders; their bytes."""
    random = numpy.random.default_rng(0)

    def write(work: tuple[Any, Path, int]) -> int:
        pixels, path, side = work
        larger = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        larger.save(path, quality=QUALITY)
        return path.stat().st_size

    total = 0
    for half in ("train", "test"):
        images = CIFAR10(str(root), train=half == "train")
        for name in images.classes:
            (folder / half / name).mkdir(parents=True)
        sides = random.integers(SMALLEST, LARGEST + 1, len(images.data)).tolist()
        paths = [
            folder / half / images.classes[label] / f"{number:05}.jpg"
            for number, label in enumerate(images.targets)
        ]
        with ThreadPoolExecutor() as pool:
            total += sum(pool.map(write, zip(images.data, paths, sides, strict=True)))
    return total


def train(way: str, root: Path, seed: int, epochs: int) -> Figures:
    """One training in a process of its own."""
    with TemporaryDirectory() as folder:
        words = [f"data.root={root}", f"seed={seed}", f"epochs={epochs}", "--name", "run"]
        environment = os.environ | {"PYTHONPATH": str(SELF.parent.parent), "STAND_IN": way}
        command = [sys.executable, "-m", "launcher", str(SELF), "--wandb", "off", "--no-report"]
        start = time.perf_counter()
        subprocess.run(
            [*command, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        run = Path(folder, "runs", "run")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        epochs_of_run = [row for row in rows if "test/accuracy" in row]
        rate = statistics.median(row["train/images_per_second"] for row in epochs_of_run)
        return {
            "accuracy": epochs_of_run[-1]["test/accuracy"],
            "seconds": round(seconds, 1),
            "images_per_second": round(rate),
            "weights": _digest(run / "final.safetensors"),
        }


def _digest(weights: Path) -> str:
    """Of the tensors alone: the file also holds the settings."""
    from hashlib import blake2b

    from safetensors.numpy import load_file

    whole = blake2b(digest_size=8)
    for name, values in sorted(load_file(weights).items()):
        whole.update(name.encode())
        whole.update(values.tobytes())
    return whole.hexdigest()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="of CIFAR-10")
    parser.add_argument("--folder", type=Path, required=True, help="on a disk with room for 1 GB")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    words = parser.parse_args()
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    pictures = (words.folder / "stand_in").resolve()
    try:
        total = write_pictures(words.root, pictures)
        runs: dict[str, list[Figures]] = {way: [] for way in WAYS}
        for seed in range(words.seeds):
            for way in WAYS:
                root = words.root.resolve() if way == "original" else pictures
                runs[way].append(train(way, root, seed, words.epochs))
                print(seed, way, runs[way][-1], flush=True)
    finally:
        shutil.rmtree(pictures, ignore_errors=True)
    same = [a["weights"] == b["weights"] for a, b in zip(runs["device"], runs["disk"], strict=True)]
    figures = {
        "command": "python benchmarks/stand_in.py --root FOLDER_OF_CIFAR10 --folder FOLDER "
        f"--epochs {words.epochs} --seeds {words.seeds}",
        "date": date.today().isoformat(),
        "machine": machine(Accelerator(cpu=True)),
        "megabytes_of_pictures": round(total / 1e6),
        "disk_has_the_weights_of_device": all(same),
        "accuracy": {
            way: {
                "mean": round(statistics.mean(r["accuracy"] for r in own), 4),
                "std": round(statistics.stdev(r["accuracy"] for r in own), 4),
            }
            for way, own in runs.items()
            if len(own) > 1
        },
        "runs": runs,
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
