"""`launcher predict` on thousands of mixed files: memory, and speed against the usual loop.

    python benchmarks/predict.py RUN

RUN is a run folder. The files are made for it, of the kinds that people have: PNG, JPEG, WebP,
TIFF, GIF and BMP; RGB, grey, with transparency, CMYK, palettes, 16 bits; from 8 to 800 pixels; one
in a hundred broken.

    launcher  `launcher predict RUN FOLDER --csv FILE`, as the command line runs it
    loop      what one would write: a Dataset that opens a file by PIL, converts it to RGB and
              applies torchvision's Resize, CenterCrop, ToTensor and Normalize; a DataLoader of as
              many workers as there are cores, which leaves out what cannot be read; the network;
              a row of csv for each

Each measurement is a process of its own, and they take turns. Seconds are those from the list of
files to the last row, so without the imports; beside them the seconds of processors, which depend
less on who else uses the machine. Memory is the peak of the process's resident set, and of its
workers' proportional set, which counts a page that they share once. Of the launcher it is measured
on a quarter of the files as well: it must not grow with their number. Writes predict.json beside
this file.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SELF = Path(__file__).resolve()
BATCH = 128
SMALLEST, LARGEST = 8, 800  # pixels
BROKEN_EVERY = 100
KINDS = (
    *(("RGB", "jpg"), ("RGB", "png"), ("RGB", "webp"), ("RGB", "bmp"), ("L", "jpg"), ("L", "png")),
    *(("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg")),
    *(("CMYK", "tif"), ("I;16", "png"), ("I;16", "tif"), ("RGBA", "webp")),
)

Figures = dict[str, Any]


def make_files(folder: Path, count: int, classes: Sequence[str]) -> None:
    """Files in class folders: a quarter of them in `part`, the others in `rest`."""
    random = numpy.random.default_rng(0)
    for number in range(count):
        mode, ending = KINDS[number % len(KINDS)]
        half = "part" if number % 4 == 0 else "rest"
        own = folder / half / classes[number // len(KINDS) % len(classes)]
        own.mkdir(parents=True, exist_ok=True)
        path = own / f"{number:06d}.{ending}"
        low, high = numpy.log((SMALLEST, LARGEST))
        width, height = numpy.exp(random.uniform(low, high, 2)).astype(int).tolist()
        coarse = random.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        if mode == "I;16":
            grey = numpy.asarray(picture.convert("L")).astype(numpy.uint16) * 257
            picture = Image.fromarray(grey)
        else:
            picture = picture.convert(mode)
        picture.save(path)
        if number % BROKEN_EVERY == BROKEN_EVERY - 1:  # cut off, and damaged in its middle
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if number % 200 > 100 else b"no picture")


# The two


def launched(run: Path, folder: Path, output: Path) -> None:
    """The launcher's own command."""
    from launcher.results import predict

    code = predict.main([str(run), str(folder), "--csv", str(output)])
    if code:
        raise SystemExit(code)


class Pictures(Dataset[tuple[str, torch.Tensor] | None]):
    """The files below a folder; None for one that cannot be read."""

    def __init__(self, folder: Path, size: tuple[int, int], mean: Any, std: Any) -> None:
        endings = {f".{ending}" for _, ending in KINDS}
        self.files = sorted(str(path) for path in folder.rglob("*") if path.suffix in endings)
        self.transform = transforms.Compose(
            [
                transforms.Resize(min(size)),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor] | None:
        """The file and what the network takes."""
        try:
            with Image.open(self.files[number]) as picture:
                return self.files[number], self.transform(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            return None


def readable(batch: list[Any]) -> tuple[list[str], torch.Tensor]:
    """Without those that could not be read."""
    kept = [item for item in batch if item is not None]
    return [file for file, _ in kept], torch.stack([pixels for _, pixels in kept])


def looped(run: Path, folder: Path, output: Path, workers: int) -> None:
    """The usual loop."""
    from launcher import load_run

    trained = load_run(run)
    height, width, _ = trained.image_shape
    data = trained.recipe.data
    pictures = Pictures(folder, (height, width), data.mean, data.std)
    loader = DataLoader(pictures, BATCH, num_workers=workers, collate_fn=readable)
    network = trained.model
    with output.open("w", newline="") as file, torch.inference_mode():
        writer = csv.writer(file)
        for files, images in loader:
            best = network(images).softmax(1).topk(min(5, len(trained.classes)))
            for name, shares, places in zip(
                files, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                pairs = zip(places, shares, strict=True)
                cells = [c for place, share in pairs for c in (trained.classes[place], share)]
                writer.writerow([name, "", *cells])


# Measurements


@contextmanager
def watched(found: Figures) -> Iterator[None]:
    """Fills in seconds and the peak of memory, of this process and of those that it starts."""
    own, over = psutil.Process(), threading.Event()
    peaks = {"megabytes": 0.0}

    def look() -> None:
        while not over.wait(0.1):
            total = own.memory_info().rss
            with suppress(psutil.Error):
                total += sum(child.memory_full_info().pss for child in own.children())
            peaks["megabytes"] = max(peaks["megabytes"], total / 1e6)

    thread = threading.Thread(target=look)
    thread.start()
    began, computed = time.perf_counter(), sum(os.times()[:4])
    try:
        yield
        found["seconds"] = time.perf_counter() - began
        found["processor_seconds"] = sum(os.times()[:4]) - computed
    finally:
        over.set()
        thread.join()
    found |= peaks


def child(words: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    warnings.simplefilter("ignore")  # of PIL, about palettes with transparency
    found: Figures = {}
    import launcher.results.predict  # noqa: F401 -- not to be measured

    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(watched(found))
        if words.child == "launcher":
            launched(words.run, words.folder, words.rows)
        else:
            looped(words.run, words.folder, words.rows, words.workers)
    print(json.dumps(found))


def measure(name: str, run: Path, folder: Path, rows: Path, workers: int) -> Figures:
    """One competitor in a process of its own."""
    command = [sys.executable, str(SELF), str(run), "--child", name, "--folder", str(folder)]
    command += ["--rows", str(rows), "--workers", str(workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def files_of(rows: Path) -> set[str]:
    """The files that were answered."""
    with rows.open(newline="") as file:
        return {row[0] for row in csv.reader(file)} - {"file"}


def main() -> None:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=SELF.with_suffix(".json"))
    parser.add_argument("--child", choices=("launcher", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    words = parser.parse_args()
    if words.child:
        child(words)
        return
    from accelerate import Accelerator

    from benchmarks.epoch import machine

    about = json.loads((words.run / "run.json").read_text())
    notes: dict[str, list[Figures]] = {"launcher, a quarter": [], "launcher": [], "loop": []}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "files")
        make_files(folder, words.files, about["classes"])
        rows = {name: Path(temporary, f"{name}.csv") for name in notes}
        for turn in range(words.rounds):
            names = list(notes)
            for name in names[turn % 3 :] + names[: turn % 3]:
                own = folder / "part" if name.endswith("quarter") else folder
                kind = name.partition(",")[0]
                notes[name].append(measure(kind, words.run, own, rows[name], words.workers))
                print(name, notes[name][-1])
        read = {name: files_of(path) for name, path in rows.items()}
    medians = {
        name: {key: round(statistics.median(f[key] for f in found), 2) for key in found[0]}
        for name, found in notes.items()
    }
    figures: Figures = {
        "command": " ".join(["python benchmarks/predict.py RUN", *sys.argv[2:]]),
        "date": date.today().isoformat(),
        "machine": machine(Accelerator(cpu=True)),
        "model": about.get("model"),
        "workers_of_the_loop": words.workers,
        "medians": medians,
        "pictures_per_second": {
            name: round(words.files / found["seconds"])
            for name, found in medians.items()
            if not name.endswith("quarter")
        },
        **{
            f"launcher / loop, {key}": round(medians["launcher"][key] / medians["loop"][key], 3)
            for key in medians["loop"]
        },
        "memory, all files / a quarter": round(
            medians["launcher"]["megabytes"] / medians["launcher, a quarter"]["megabytes"], 3
        ),
        "read_by_both": len(read["launcher"] & read["loop"]),
        "read_by_one": len(read["launcher"] ^ read["loop"]),
        "all": notes,
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in figures.items() if k != "all"}, indent=1))


if __name__ == "__main__":
    main()
