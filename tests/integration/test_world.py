"""N processes compute what one process computes: real processes, real gradients over gloo."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import forked
from tests.support.helpers import ROOT
from tests.support.processes import places_of
from tests.support.world_worker import IMAGES, SCENARIOS

WORKER = ROOT / "tests" / "support" / "world_worker.py"
FOUR = pytest.param(4, marks=pytest.mark.slow)


class Results(dict[int, dict[str, Any]]):
    """What so many processes computed in every scenario, from the first time it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, size: int) -> dict[str, Any]:
        folder = self._folder / f"{size}"
        folder.mkdir()
        self[size] = train(size, folder)
        return self[size]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("ranks"))


def train(size: int, folder: Path) -> dict[str, Any]:
    fixed = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), str(folder)]
    with (folder / "output").open("w+") as file:
        ranks = [
            forked.Popen(command, cwd=folder, env={**fixed, **place}, stdout=file, stderr=file)
            for place in places_of(size)
        ]
        assert [rank.wait(200) for rank in ranks] == [0] * size, (folder / "output").read_text()
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in SCENARIOS}


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("name", SCENARIOS)
def test_parameters_equal_those_of_one_process(results: Results, name: str, size: int) -> None:
    one, many = results[1][name]["parameters"], results[size][name]["parameters"]
    tolerance = 1e-6 if name.startswith("float32") else 1e-12
    assert one.keys() == many.keys()
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, rtol=0, atol=tolerance, msg=f"{name} {key}")


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("name", SCENARIOS)
def test_reported_losses_equal_those_of_one_process(results: Results, name: str, size: int) -> None:
    one, many = results[1][name], results[size][name]
    tolerance = 1e-5 if name.startswith("float32") else 1e-11
    for key in ("losses", "train_losses", "test_losses"):
        assert many[key] == pytest.approx(one[key], abs=tolerance, rel=0), key


@pytest.mark.parametrize("size", [1, 2, FOUR])
@pytest.mark.parametrize("name", SCENARIOS)
def test_evaluation_counts_each_image_once(results: Results, name: str, size: int) -> None:
    one, many = results[1][name], results[size][name]
    assert many["confusions"] == one["confusions"]
    assert many["in_top5"] == one["in_top5"]
    assert many["with_views"] == one["with_views"]
    assert [sum(map(sum, table)) for table in many["confusions"]] == [IMAGES // 5] * 2


@pytest.mark.parametrize("size", [2, FOUR])
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_image_has_the_outcome_that_one_process_gives_it(
    results: Results, name: str, size: int
) -> None:
    one, many = results[1][name], results[size][name]
    for first, second in zip(one["outcomes"], many["outcomes"], strict=True):
        assert torch.equal(first[:, 0], second[:, 0])
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    if not name.startswith("float32"):  # in which two losses may change places
        assert many["worst"] == one["worst"]


def test_the_outcomes_are_those_of_the_matrix_and_of_the_loss(results: Results) -> None:
    found = results[1]["float64"]
    rows = zip(found["outcomes"], found["confusions"], found["test_losses"], strict=True)
    for outcomes, confusion, loss in rows:
        predicted = torch.bincount(outcomes[:, 0].long(), minlength=len(confusion))
        assert predicted.tolist() == torch.tensor(confusion).sum(0).tolist()
        assert float(outcomes[:, 3].mean()) == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(outcomes[:, 3].neg().exp(), outcomes[:, 1])
        assert (outcomes[:, 2] >= outcomes[:, 1]).all()


def test_training_moved_the_parameters(results: Results) -> None:
    for name in SCENARIOS:
        losses = results[1][name]["train_losses"]
        assert losses[1] < losses[0], name
