"""What a run keeps of its test images: whole files, the right images, pictures of few bytes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from launcher.checkpoint import outcomes
from launcher.checkpoint.outcomes import LARGEST, MOST_PICTURES, Outcomes, details, of_epoch, read
from launcher.checkpoint.run_files import RunFiles
from launcher.data.images import ImageSet
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport, OutcomeTable, sample_indices
from tests.support.helpers import context_of, tiny_recipe


def made(predicted: list[int], truth: list[int], losses: list[float]) -> Outcomes:
    values = numpy.array(losses, numpy.float32)
    report = EpochReport(1, 1, 0.0, 0.1, 1.0, 1.0, None, None)  # type: ignore[arg-type]
    table = numpy.stack([numpy.array(predicted), numpy.exp(-values), 1 - values / 10, values], 1)
    report = replace(report, evaluation=_Test(table.astype(numpy.float32)))  # type: ignore[arg-type]
    pixels = torch.arange(len(truth), dtype=torch.uint8)[:, None, None, None]
    images = ImageSet(pixels.expand(-1, 4, 4, 3), torch.tensor(truth), ("a", "b", "c"))
    return of_epoch(report, images)


class _Test:
    def __init__(self, table: object) -> None:
        self.outcomes = table


def test_mistakes_come_by_their_loss_and_right_answers_by_their_probability() -> None:
    found = made([1, 0, 0, 2, 0], [0, 0, 1, 2, 2], [2.0, 0.5, 3.0, 0.1, 2.0])
    assert found.mistakes.tolist() == [2, 0, 4]  # of equal ones, the first
    assert found.surest.tolist() == [3, 1]
    assert found.pictures[:, 0, 0, 0].tolist() == found.pictured.tolist()
    assert sorted(found.pictured.tolist()) == [0, 1, 2, 3, 4]


def test_a_table_is_that_of_the_scores() -> None:
    logits = torch.randn(7, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    table = OutcomeTable(10, torch.device("cpu"))
    table.add(2, logits[:4], labels[:4])
    table.add(6, logits[4:], labels[4:])
    assert not table.values[[0, 1, 9]].any()
    shares = logits.softmax(1)
    expected = [
        logits.argmax(1).double(),
        shares[range(7), labels],
        shares.amax(1),
        torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    ]
    torch.testing.assert_close(table.values[2:9].double(), torch.stack(expected, 1))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    ctx = context_of(tiny_recipe())
    *_, report = (event for event in fit(ctx) if isinstance(event, EpochReport))
    files = tuple(f"x/{number}.png" for number in range(len(ctx.data.test)))
    found = of_epoch(report, replace(ctx.data.test, files=files))
    found.write(tmp_path / "best.npz")
    again = read(tmp_path / "best.npz")
    assert again is not None
    for name, value in vars(found).items():
        assert numpy.array_equal(getattr(again, name), value), name
    assert again.epoch == 2
    assert tuple(again.files) == files
    images = ctx.data.test.tensor.numpy()
    assert numpy.array_equal(again.pictures, images[again.pictured])
    assert set(sample_indices(len(images))) <= set(again.pictured.tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["best.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"text", None])
def test_what_is_no_such_file_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "best.npz"
    if content is not None:
        path.write_bytes(content)
    assert read(path) is None


@pytest.mark.timeout(20)
def test_neither_a_fifo_nor_what_has_no_end_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.npz")
    (tmp_path / "last.npz").symlink_to("/dev/zero")
    (tmp_path / "recipe.py").symlink_to("/dev/zero")
    files = RunFiles(tmp_path)
    assert (files.best, files.last, files.source) == (None, None, "")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "best.npz", epoch=numpy.array([object()], dtype=object))
    assert read(tmp_path / "best.npz") is None


def test_many_images_keep_few_pictures_of_each_cell() -> None:
    random = numpy.random.default_rng(0)
    truth, predicted = random.integers(0, 3, (2, 5000))
    found = made(predicted.tolist(), truth.tolist(), random.random(5000).tolist())
    cells = dict.fromkeys(zip(truth, predicted, strict=True), 0)
    for place in found.pictured:
        cells[truth[place], predicted[place]] += 1
    assert min(cells.values()) >= outcomes.OF_A_CELL
    assert len(found.pictured) == len(set(found.pictured.tolist())) <= MOST_PICTURES
    assert found.mistakes[0] in found.pictured
    assert found.surest[0] in found.pictured


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((200, 100, 3), (64, 32, 3)),
        ((65, 65, 1), (64, 64, 1)),
        ((65, 65, 2), (64, 64, 1)),
        ((65, 65, 4), (64, 64, 4)),
        ((65, 65, 5), (64, 64, 1)),
    ],
)
def test_large_pictures_are_kept_small(
    shape: tuple[int, ...], small: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.full((6, *shape), 7, dtype=torch.uint8)
    if shape[-1] in (2, 4):
        pixels[..., -1] = 0  # which is no transparency
    images = ImageSet(pixels, torch.zeros(6).long(), ("a", "b"))
    report = EpochReport(1, 1, 0.0, 0.1, 1.0, 1.0, None, None)  # type: ignore[arg-type]
    table = numpy.zeros((6, 4), numpy.float32)
    found = of_epoch(replace(report, evaluation=_Test(table)), images)  # type: ignore[arg-type]
    assert found.pictures.shape == (6, *small)
    assert (found.pictures[..., :3] == 7).all()
    assert max(small) <= LARGEST


def test_a_line_has_the_cells_and_the_best_classes() -> None:
    ctx = context_of(tiny_recipe())
    *_, report = (event for event in fit(ctx) if isinstance(event, EpochReport))
    line = details(report)
    assert line["epoch"] == 2
    for truth, predicted, images in line["confusion"]:
        assert report.evaluation.confusion[truth][predicted] == images > 0
    assert sum(images for _, _, images in line["confusion"]) == report.evaluation.images
    for row, scores in zip(line["samples"], report.probabilities, strict=True):
        assert [c for c, _ in row] == numpy.argsort(-scores, kind="stable")[:5].tolist()
        assert [p for _, p in row] == pytest.approx(sorted(scores)[::-1][:5], abs=1e-4)


def test_scores_that_are_not_finite_are_null() -> None:
    ctx = context_of(tiny_recipe())
    *_, report = (event for event in fit(ctx) if isinstance(event, EpochReport))
    scores = numpy.full_like(report.probabilities, numpy.nan)
    line = details(replace(report, probabilities=scores))
    assert json.dumps(line, allow_nan=False).count("null") == 5 * len(scores)


@pytest.mark.parametrize(
    "changes",
    [
        {"truth": numpy.zeros(9, numpy.int32)},
        {"truth": numpy.array(3, numpy.int32)},
        {"predicted": numpy.full(5, -1, numpy.int32)},
        {"predicted": numpy.full(5, 10**6, numpy.int32)},
        {"loss": numpy.array(["a"] * 5)},
        {"pictured": numpy.array([0, 7], numpy.int32), "pictures": numpy.zeros((2, 4, 4, 3))},
        {"pictured": numpy.array([7], numpy.int32), "pictures": numpy.zeros((1, 4, 4, 3), "u1")},
        {"pictures": numpy.zeros((1, 4, 4, 3), "u1")},
        {"epoch": numpy.zeros(3)},
    ],
)
def test_arrays_that_do_not_fit_are_no_outcomes(changes: dict[str, Any], tmp_path: Path) -> None:
    found = made([1, 0, 0, 2, 0], [0, 0, 1, 2, 2], [2.0, 0.5, 3.0, 0.1, 2.0])
    replace(found, pictured=found.pictured[:0], pictures=found.pictures[:0]).write(tmp_path / "a")
    assert read(tmp_path / "a") is not None
    replace(found, **changes).write(tmp_path / "b")
    assert read(tmp_path / "b") is None


def test_cells_of_the_confusion_matrix_are_counted() -> None:
    found = made([1, 1, 0, 2, 0], [0, 0, 1, 2, 2], [2.0, 0.5, 3.0, 0.1, 2.0])
    assert found.confusion == [(0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 2, 1)]
