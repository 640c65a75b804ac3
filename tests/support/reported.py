"""Run folders for reports, as a training leaves them but made at once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy
from safetensors.numpy import save_file

from launcher.checkpoint.outcomes import MOST_PICTURES, Outcomes

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><!-- <img src=x onerror=alert(2)>",
    "<b>bold</b><br><a href='https://example.org'>%{x}</a>",
    "{{ 7 * 7 }} & \"quotes\" 'single' \\u003c",
)
IMAGES = 40
SAMPLES = [0, 10, 20, 30]


def outcomes_of(classes: int, epoch: int = 2, images: int = IMAGES, size: int = 8) -> Outcomes:
    """A quarter of the images is taken for the next class; image n is of class n % classes."""
    random = numpy.random.default_rng(0)
    places = numpy.arange(images, dtype=numpy.int32)
    truth = places % classes
    predicted = numpy.where(places % 4 == 0, (truth + 1) % classes, truth).astype(numpy.int32)
    probability = random.uniform(0.5, 1, images).astype(numpy.float32)
    of_truth = numpy.where(truth == predicted, probability, (1 - probability) / 2)
    return Outcomes(
        epoch=epoch,
        truth=truth,
        predicted=predicted,
        probability_of_truth=of_truth.astype(numpy.float32),
        probability=probability,
        loss=-numpy.log(of_truth).astype(numpy.float32),
        files=numpy.array([], dtype=numpy.str_),
        pictured=places[:MOST_PICTURES],
        pictures=random.integers(0, 256, (min(images, MOST_PICTURES), size, size, 3), numpy.uint8),
    )


def write_reported(
    runs: Path,
    name: str = "own",
    classes: Sequence[str] = ("cat", "dog", "frog"),
    epochs: int = 2,
    files: Sequence[str] = (),
    figures: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """A run with all that a report shows; `figures` are those of each epoch that are others."""
    path = runs / name
    path.mkdir(parents=True)
    about = {
        "recipe": f"{name}: <i>The first line</i> of its docstring.",
        "data": "Pictures, 100 training and 40 test images",
        "devices": "1 x CPU",
        "name": "simple",
        "classes": list(classes),
        "image_shape": [8, 8, 3],
        "started": "2026-01-02T03:04:05+00:00",
        "samples": SAMPLES,
        "versions": {"torch": "2.11"},
    }
    (path / "run.json").write_text(json.dumps(about))
    config = {"epochs": epochs, "optimizer": {"call": "torch.optim:<SGD>", "lr": 0.1}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "recipe.py").write_text('"""<i>The first line</i>."""\n')
    for number in range(1, epochs + 1):
        row = {
            "epoch": number,
            "train/loss": 1 / number,
            "test/loss": 1.5 / number,
            "test/accuracy": 0.25 * number,
            "test/top5": 0.9,
            "train/learning_rate": 0.1,
            "train/images_per_second": 1000.0,
            "seconds": 90.0,
            **figures,
        }
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        best = [[[0, 0.75], [1, 0.25 / number]] for _ in SAMPLES]
        details = {"epoch": number, "confusion": [[0, 0, 3], [0, 1, 2]], "samples": best}
        with (path / "details.jsonl").open("a") as file:
            file.write(json.dumps(details) + "\n")
    outcomes = outcomes_of(len(classes))
    if files:
        numbered = [files[place % len(files)] for place in range(IMAGES)]
        outcomes = Outcomes(**{**vars(outcomes), "files": numpy.array(numbered)})
    outcomes.write(path / "best.npz")
    outcomes.write(path / "last.npz")
    weights = numpy.linspace(-1, 1, 4 * 3 * 5 * 5, dtype=numpy.float32).reshape(4, 3, 5, 5)
    other = numpy.zeros((2, 3, 3, 3), numpy.float32)
    save_file({"layers.2.weight": weights, "layers.10.weight": other}, path / "best.safetensors")
    (path / "end.json").write_text('{"exit_code": 0, "time": "2026-01-02T03:14:05+00:00"}')
    return path
