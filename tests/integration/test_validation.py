"""With validation images, the test images decide nothing; and patience ends a run exactly."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
from safetensors.torch import load_file

from launcher import load_run, train
from launcher.data import sources
from tests.support.helpers import alike, tiny_recipe
from tests.support.processes import Run, fingerprint, write_double
from tests.unit.data.test_validation import LABELS

CHANCE = numpy.random.default_rng(0)
PIXELS = CHANCE.integers(0, 256, (200, 8, 8, 3), dtype=numpy.uint8)


class Original:
    classes = tuple("abcdefghij")

    def __init__(self, root: str, train: bool) -> None:
        half = slice(0, 150) if train else slice(150, 200)
        self.data, self.targets = PIXELS[half], LABELS[half]


class OtherTest(Original):
    """The same for training; for testing, other pictures with other labels, and more of them."""

    def __init__(self, root: str, train: bool) -> None:
        super().__init__(root, train)
        if not train:
            self.data, self.targets = 255 - PIXELS[:60], (LABELS[:60] + 1) % 10


def files_of(folder: Path) -> dict[str, Any]:
    """What a run left that follows from its images, by file."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = {"seconds", "train/images_per_second", "data"}
    best, last = (dict(numpy.load(folder / f"{name}.npz")) for name in ("best", "last"))
    return {
        "metrics": [{k: v for k, v in row.items() if k not in clock} for row in rows],
        "details": (folder / "details.jsonl").read_text(),
        "outcomes": [{k: v.tolist() for k, v in half.items()} for half in (best, last)],
        "weights": [(folder / f"{n}.safetensors").read_bytes() for n in ("best", "final")],
        "held out": (folder / "validation.json").read_text(),
        "samples": json.loads((folder / "run.json").read_text())["samples"],
    }


def test_the_test_images_decide_nothing_and_are_evaluated_once(tmp_path: Path) -> None:
    folders = []
    for source in (Original, OtherTest):
        data = {"source": source, "validation": 0.2}
        recipe = tiny_recipe(data=data, epochs=12, patience=9)
        result = train(recipe, name=source.__name__, runs=tmp_path, wandb="off")
        assert result.folder is not None
        assert result.tested is not None
        folders.append(result.folder)
    assert files_of(folders[0]) == files_of(folders[1])
    rows = files_of(folders[0])["metrics"]
    assert not [name for row in rows for name in row if name.startswith("test/")]
    assert {row["val/images"] for row in rows} == {30}
    tested = [json.loads((folder / "test.json").read_text()) for folder in folders]
    for which in ("best", "last"):
        assert [figures[which]["test/images"] for figures in tested] == [50, 60]
    assert tested[0] != tested[1]


def test_best_and_last_weights_are_told_apart_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of each are those that its file of weights gives."""
    recipe = tiny_recipe(data={"source": Original, "validation": 0.2}, epochs=12)
    result = train(recipe, "optimizer.lr=0.1", name="own", runs=tmp_path, wandb="off")
    assert result.best
    assert result.last
    assert result.best.epoch != result.last.epoch, "or the test says nothing"
    said = capsys.readouterr().out
    tested, test = result.tested, sources.load(recipe.data).test
    assert tested
    assert tested.best
    assert tested.best != tested.last
    chosen = f"{result.best.epoch}, validation accuracy {result.best.accuracy:.2%}, test accuracy"
    assert f"best epoch  {chosen} {tested.best.accuracy:.2%}" in said
    assert "chosen on the test images" not in said
    which: dict[Literal["best", "final"], float] = {
        "best": tested.best.accuracy,
        "final": tested.last.accuracy,
    }
    for weights, expected in which.items():
        run = load_run(tmp_path / "own", weights=weights, recipe=recipe)
        right = run.model(run.normalize(test.tensor)).argmax(1) == test.labels
        assert float(right.double().mean()) == expected


SETTINGS = ("data.validation=0.2", "patience=2", "min_delta=0.05", "epochs=30", "optimizer.lr=1e-4")


def settled(folder: Path) -> dict[str, Any]:
    """What must be the same on any number of ranks."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tested = json.loads((folder / "test.json").read_text())
    return {
        "accuracies": [row["val/accuracy"] for row in rows],
        "tested": {which: row["test/accuracy"] for which, row in tested.items()},
        "held out": json.loads((folder / "validation.json").read_text())["images"],
    }


@pytest.mark.slow
def test_other_numbers_of_ranks_end_with_the_same_epoch(tmp_path: Path) -> None:
    recipe = write_double(tmp_path / "double.py")
    found = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        run = Run(ranks, folder, "--name", "own", *SETTINGS, recipe=recipe)
        assert run.end() == 0, run.text()
        assert "2 epochs without a better validation accuracy (by more than 0.05)" in run.text()
        found[ranks] = settled(folder / "runs" / "own")
    assert 3 <= len(found[1]["accuracies"]) < 30
    assert found[1] == found[2] == found[4]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [alike(1), 2])
def test_killed_and_resumed_it_ends_with_the_same_epoch(ranks: int, tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    often = ("--checkpoint-every", "7", "--name", "own", *SETTINGS)
    whole = Run(ranks, tmp_path / "whole", *often)
    assert whole.end() == 0, whole.text()
    ends = len(settled(tmp_path / "whole" / "runs" / "own")["accuracies"])
    for epoch in range(1, ends + 1):  # after each epoch, somewhere within the next one
        run = Run(ranks, tmp_path / "cut", *often, "--resume")
        run.wait_for(f"epoch {epoch:>2}/30")
        run.processes[-1].kill()
        run.end()
    run = Run(ranks, tmp_path / "cut", *often, "--resume")
    assert run.end() == 0, run.text()
    folders = [tmp_path / name / "runs" / "own" for name in ("whole", "cut")]
    assert settled(folders[0]) == settled(folders[1])
    assert fingerprint(folders[0]) == fingerprint(folders[1])
    assert load_file(folders[0] / "best.safetensors").keys()
    best = [(folder / "best.safetensors").read_bytes() for folder in folders]
    assert best[0] == best[1]
