"""Measure how fast images that do not fit into memory come to a training.

    python benchmarks/data.py --folder FOLDER --root FOLDER

    disk    JPEGs of 500 x 375 pixels, quality 90, random resized crop to 224, flip, normalize: the
            launcher's `Batches` against torchvision (Pillow's decoder, and its own), webdataset,
            litdata and mosaicml-streaming (`benchmarks/loaders.py`), two processes or threads each
    host    an epoch of SimpleCNN on CIFAR-10 that `launcher pack` has written, mapped, against the
            same images in memory as a tensor

Every reading is a process of its own that goes through all images once, without a network; the
file system has them in its cache. They take turns, and the order rotates from round to round.
`images_per_second_of_a_core` divides by the seconds that cores computed, workers included: on a
machine that others use as well it says more than the clock. `megabytes` is the largest proportional
share of memory of all processes, twice a second. FOLDER keeps what is written: about 2.5 GB, with
an environment for each library that needs one, which shares torch with this one. `--root` holds
torchvision's cifar-10-batches-py; without it, the pictures are drawn by code.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.competitors import Launched
from benchmarks.epoch import machine, opened
from benchmarks.loaders import BATCH, LOADERS, WORKERS
from benchmarks.turns import Figures, parted_epochs, ratio, rotated
from launcher import Packed
from launcher.cli import main as launcher
from launcher.data import sources
from launcher.distributed.accelerator import create_accelerator
from launcher.distributed.world import World

SELF = Path(__file__).resolve()
IMAGES, SHARDS, WIDTH, HEIGHT, QUALITY, GRAIN = 4_096, 16, 500, 375, 90, 9.0
TURN = 39  # steps


def write_jpegs(folder: Path, root: str, count: int) -> None:
    """CIFAR-10's pictures, enlarged and with grain, so that their files are as large as photos'."""
    if (folder / "whole").exists():
        return
    _, data = opened("simplecnn", root)
    random = numpy.random.default_rng(0)
    for half, images, number in (("train", data.train, count), ("test", data.test, 50)):
        for name in images.classes:
            (folder / half / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            pixels = Image.fromarray(images.pixels([index])[0].numpy())
            smooth = numpy.asarray(pixels.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            grain = random.normal(0, GRAIN, smooth.shape[:2])[..., None]
            picture = Image.fromarray((smooth + grain).clip(0, 255).astype(numpy.uint8))
            place = folder / half / images.classes[int(images.labels[index])]
            picture.save(place / f"{index:06}.jpg", quality=QUALITY)
    (folder / "whole").touch()


def labelled(folder: Path) -> list[tuple[str, int]]:
    """All training JPEGs in one drawn order, as who writes shards is told to do."""
    classes = sorted(path.name for path in (folder / "jpegs" / "train").iterdir())
    found = [
        (str(file), number)
        for number, name in enumerate(classes)
        for file in sorted((folder / "jpegs" / "train" / name).iterdir())
    ]
    order = numpy.random.default_rng(1).permutation(len(found))
    return [found[place] for place in order]


def write_webdataset(folder: Path) -> None:
    """Tar files of the JPEGs as they are."""
    files, out = labelled(folder), folder / "webdataset"
    out.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(out / f"{shard:04}.tar", "w") as tar:
            for number, (file, label) in enumerate(files[shard::SHARDS]):
                content = Path(file).read_bytes()
                for suffix, part in (("jpg", content), ("cls", str(label).encode())):
                    about = tarfile.TarInfo(f"{shard:04}-{number:06}.{suffix}")
                    about.size = len(part)
                    tar.addfile(about, BytesIO(part))


def as_litdata(pair: tuple[str, int]) -> dict[str, Any]:
    """A sample as `litdata.optimize` stores it: the JPEG's own bytes."""
    import litdata

    return {"image": litdata.Jpeg(path=pair[0]), "class": pair[1]}


def write_litdata(folder: Path) -> None:
    """Chunks of 64 MB."""
    import litdata

    out = str(folder / "litdata")
    litdata.optimize(as_litdata, labelled(folder), out, num_workers=1, chunk_bytes="64MB")


def write_streaming(folder: Path) -> None:
    """Shards of 64 MB, which are its default, of the JPEGs as they are."""
    from streaming import MDSWriter

    columns = {"image": "jpeg", "class": "int"}
    with MDSWriter(out=str(folder / "streaming"), columns=columns) as writer:
        for file, label in labelled(folder):
            with Image.open(file) as picture:
                writer.write({"image": picture, "class": label})


WRITERS: dict[str, Callable[[Path], None]] = {
    "webdataset": write_webdataset,
    "litdata": write_litdata,
    "mosaicml-streaming": write_streaming,
}


def python_of(package: str, folder: Path) -> str:
    """The Python of an environment with the package, which is made if need be."""
    if not package:
        return sys.executable
    place = folder / "environments" / package
    python = place / "bin" / "python"
    if not (place / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        (inner,) = place.glob("lib/python*/site-packages")
        (inner / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
        (place / "whole").touch()
    return str(python)


def version_of(package: str, folder: Path) -> str:
    """Of the package in its environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([python_of(package, folder), "-c", code], text=True).strip()


def environment(threads: int) -> dict[str, str]:
    """What a reading is told."""
    fixed = {"PYTHONPATH": str(SELF.parent.parent), "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **fixed, "PYTHONWARNINGS": "ignore"}


def reading(name: str, folder: Path, threads: int) -> Figures:
    """The figures of one process that reads all images once, and its largest share of memory."""
    python = python_of(LOADERS[name][1], folder)
    command = [python, str(SELF.parent / "loaders.py"), name, str(folder), str(time.time())]
    with subprocess.Popen(
        command, env=environment(threads), stdout=subprocess.PIPE, text=True
    ) as process:
        megabytes = 0.0
        while process.poll() is None:
            megabytes = max(megabytes, share_of(process.pid) / 1e6)
            time.sleep(0.5)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{name} failed")
    return {**json.loads(printed.splitlines()[-1]), "megabytes": megabytes}


def share_of(pid: int) -> int:
    """Bytes of a process and all below it, where shared ones are divided among those that share."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                total += member.memory_full_info().pss
    return total


def over_disk(folder: Path, words: argparse.Namespace) -> Figures:
    """All ways of reading the JPEGs, in turns."""
    names = [name for name in LOADERS if not words.only or name in words.only]
    for name in names:
        package = LOADERS[name][1]
        target = {"mosaicml-streaming": "streaming"}.get(package, package)
        if package and not (folder / target).exists():
            write = [python_of(package, folder), str(SELF), "--folder", str(folder)]
            subprocess.run([*write, "--write", package], check=True, env=environment(1))
        reading(name, folder, words.threads)  # the files are in the cache afterwards
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for turn in range(words.rounds):
        for name in rotated(names, turn):
            found[name].append(reading(name, folder, words.threads))
            print(turn, name, found[name][-1], os.getloadavg()[0], flush=True)
    files = list((folder / "jpegs" / "train").rglob("*.jpg"))
    speed = "images_per_second_of_a_core"
    mine = [note[speed] for note in found["launcher"]]
    return {
        "images": len(files),
        "mean_kilobytes": round(statistics.mean(f.stat().st_size for f in files) / 1e3, 1),
        "batch": BATCH,
        "workers_of_the_others": WORKERS,
        "versions": {p: version_of(p, folder) for n in names if (p := LOADERS[n][1])},
        **{
            name: {
                key: [round(note[key], 2) for note in notes]
                for key in (speed, "images_per_second", "start_seconds", "megabytes", "images")
            }
            for name, notes in found.items()
        },
        "launcher_of_a_core": {
            name: ratio(mine, [note[speed] for note in notes])
            for name, notes in found.items()
            if name != "launcher"
        },
        "launcher_by_the_clock": {
            name: ratio(
                [note["images_per_second"] for note in found["launcher"]],
                [note["images_per_second"] for note in notes],
            )
            for name, notes in found.items()
            if name != "launcher"
        },
    }


def over_host(folder: Path, root: str, rounds: int, steps: int | None) -> Figures:
    """An epoch on mapped images over one on a tensor."""
    recipe, data = opened("simplecnn", root)
    if not (folder / "packed" / "pack.json").exists() and root:
        launcher(["pack", "CIFAR10", str(folder / "packed"), "--root", root])
    accelerator = create_accelerator("fp32", World.of_this_process())
    recipe = replace(recipe, precision="fp32", epochs=2 * rounds + 4)
    mapped = replace(recipe.data, source=Packed, root=str(folder / "packed"))
    packed = sources.load(mapped)
    halves = {"in memory": data, "launcher": packed}
    racers = {name: Launched(recipe, half, accelerator) for name, half in halves.items()}
    for racer, half in zip(racers.values(), halves.values(), strict=True):
        racer.epoch(half.train.take(torch.arange(50 * recipe.data.batch_size)))
    count = len(data.train) if steps is None else steps * recipe.data.batch_size
    trained = {n: half.train.take(torch.arange(count)) for n, half in halves.items()}
    epochs = {n: partial(racers[n].parts, trained[n], TURN) for n in halves}
    return parted_epochs(epochs, count, rounds)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for what is written")
    parser.add_argument("--root", default="", help="folder of CIFAR-10; else drawn pictures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--threads", type=int, default=2, help="that read, of the launcher")
    parser.add_argument("--only", action="append", choices=LOADERS, help="again for more")
    parser.add_argument("--part", choices=("disk", "host"), help="default: both")
    parser.add_argument("--steps", type=int, help="of an epoch in memory; all images by default")
    parser.add_argument("--write", choices=WRITERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    words = parser.parse_args()
    folder = words.folder.resolve()
    if words.write:
        WRITERS[words.write](folder)
        return
    from accelerate import Accelerator

    figures: Figures = {
        "command": f"python benchmarks/data.py --folder FOLDER --root FOLDER "
        f"--rounds {words.rounds}",
        "date": date.today().isoformat(),
        "machine": machine(Accelerator(cpu=True)),
    }
    if words.part != "host":
        write_jpegs(folder / "jpegs", words.root, words.images)
        figures["disk"] = over_disk(folder, words)
    if words.part != "disk":
        figures["host"] = over_host(folder, words.root, words.rounds, words.steps)
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
