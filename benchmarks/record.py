"""The record's own script, airbench94_muon.py: given its images, run for a few seeds, and read."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.trainer import Figures, spread
from launcher.data.sources import Data


def save_for_peer(data: Data, folder: Path) -> None:
    """The images in the form in which the record's script keeps them."""
    folder.mkdir()
    for name, half in (("train", data.train), ("test", data.test)):
        saved = {"images": half.images, "labels": half.labels, "classes": list(half.classes)}
        torch.save(saved, folder / f"{name}.pt")


def run_peer(script: Path, data: Data, seconds: float, seeds: int) -> Figures:
    """Run the record's script for fewer seeds, in a folder of its own; read what it prints."""
    text, count = re.subn(r"range\(200\)", f"range({seeds})", script.read_text(encoding="utf-8"))
    if count != 1 or seconds < 60:
        return {"skipped": f"{count} place(s) to set the number of runs, {seconds:.0f} s left"}
    with TemporaryDirectory() as folder:
        save_for_peer(data, Path(folder, "cifar10"))
        Path(folder, script.name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-u", script.name]
        done = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed, _ = done.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            done.kill()
            printed, _ = done.communicate()
    return peer_figures(printed)


def peer_figures(printed: str) -> Figures:
    """The accuracies and seconds of the peer's table; its first run is its warm-up."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    rows = [row for row in rows if len(row) == 6]
    ends = [(float(r[4]), float(r[5])) for r in rows if r[1] == "eval"][1:]
    plain = [float(r[3]) for r, following in itertools.pairwise(rows) if following[1] == "eval"][1:]
    if not ends:
        return {"failed": printed[-2000:]}
    return {
        "accuracy": spread(plain),
        "accuracy_tta": spread([accuracy for accuracy, _ in ends]),
        "seconds": spread([seconds for _, seconds in ends]),
    }
