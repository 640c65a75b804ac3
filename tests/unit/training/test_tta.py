"""Test-time augmentation: which views, which weights, and what it is called."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from launcher import mirrored, mirrored_and_shifted, train
from launcher.checkpoint.run_files import RunFiles
from launcher.results.page import Page
from launcher.results.quoted import quoted
from launcher.training import evaluation
from launcher.training.evaluation import evaluate, margin
from launcher.training.metrics import EpochReport, Evaluation
from launcher.training.state import TrainContext
from tests.support.helpers import context_of, refused, tiny_recipe


def pixel(row: int, column: int) -> Tensor:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, row, column] = 1
    return image


def score(images: Tensor) -> Tensor:
    return images.flatten(1)  # a linear "network": its mean over views shows where a pixel went


def test_mirrored_averages_both_sides() -> None:
    logits = mirrored(score, pixel(3, 1)).view(8, 8)
    assert logits.nonzero().tolist() == [[3, 1], [3, 6]]
    assert logits[3, 1] == logits[3, 6] == 0.5


def test_mirrored_and_shifted_weighs_six_views() -> None:
    logits = mirrored_and_shifted(score, pixel(3, 2)).view(8, 8)
    expected = torch.zeros(8, 8)
    for row, column, weight in ((3, 2, 0.25), (4, 3, 0.125), (2, 1, 0.125)):
        expected[row, column] += weight
        expected[row, 7 - column] += weight
    torch.testing.assert_close(logits, expected)


def test_shifts_mirror_the_edge_and_keep_the_layout() -> None:
    seen = []

    def watching(images: Tensor) -> Tensor:
        seen.append(images)
        return score(images)

    images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    mirrored_and_shifted(watching, images)
    down_right = seen[2]
    torch.testing.assert_close(down_right[..., 1:, 1:], images[..., :-1, :-1])
    torch.testing.assert_close(down_right[..., 0, 1:], images[..., 1, :-1])
    assert {view.stride() for view in seen} == {images.stride()}


def test_metrics_keep_the_plain_figure_apart() -> None:
    plain = Evaluation(1.0, ((3, 1), (2, 2)), 8)
    augmented = Evaluation(0.9, ((4, 0), (2, 2)), 8)
    report = EpochReport(1, 1, 1.0, 0.1, 1.0, 1.0, plain, torch.zeros(1, 2).numpy(), augmented)
    assert report.metrics()["test/accuracy"] == 5 / 8
    assert report.metrics()["test/accuracy_tta"] == 6 / 8
    without = EpochReport(1, 1, 1.0, 0.1, 1.0, 1.0, plain, torch.zeros(1, 2).numpy())
    assert "test/accuracy_tta" not in without.metrics()


# Only of the uncertain images


class Columns(nn.Module):
    """Not the same for an image and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 3, 10)
        self.shapes: list[torch.Size] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(images.shape)
        return self.head(images.mean(2)[:, :, ::4].flatten(1)) * 5


RECIPE = tiny_recipe(model=Columns, views=mirrored, uncertain=0.3)


def by_hand(part: float) -> tuple[tuple[int, ...], ...]:
    """The confusions with the views of the `part` with the smallest margins."""
    ctx = context_of(RECIPE)
    network, test = ctx.state.network.eval(), ctx.data.test
    with torch.no_grad():
        images = ctx.normalize(test.tensor)
        logits = network(images)
        first, second = logits.softmax(1).topk(2).values.T
        chosen = (first - second).argsort(stable=True)[: round(part * len(test))]
        logits[chosen] = mirrored(network, images[chosen])
    table = torch.zeros(10, 10, dtype=torch.int64)
    for truth, predicted in zip(test.labels.tolist(), logits.argmax(1).tolist(), strict=True):
        table[truth, predicted] += 1
    return tuple(map(tuple, table.tolist()))


@pytest.mark.parametrize("size", [3, 7, 20, 250])
def test_the_views_are_scored_of_the_least_certain_images(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH_ON_CPU", size)
    found = {part: evaluate(of_part(part), of_part(part).data.test, mirrored) for part in PARTS}
    for part, one in found.items():
        assert one.confusion == by_hand(part), part
        assert one.images == 20
    assert len({one.confusion for one in found.values()}) > 1
    every = evaluate(of_part(None), of_part(None).data.test, mirrored)
    assert every.confusion == by_hand(1.0)


PARTS = (0.01, 0.3, 0.95)


def of_part(part: float | None) -> TrainContext:
    return context_of(replace(RECIPE, uncertain=part))


def test_no_pass_has_a_shape_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH_ON_CPU", 5)
    ctx = context_of(RECIPE)
    network = ctx.state.network
    assert isinstance(network, Columns)
    network.shapes.clear()
    evaluate(ctx, ctx.data.test, mirrored)
    assert [shape[0] for shape in network.shapes] == [5] * (4 + 2 * 2)  # 6 images, two views


def test_the_margin_is_that_of_the_two_largest_probabilities() -> None:
    logits = torch.tensor([[0.6, 0.1, 0.3], [0.0, 0.5, 0.5]]).log()
    torch.testing.assert_close(margin(logits), torch.tensor([0.3, 0.0]))
    assert margin(torch.ones(2, 1)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("part", [0.0, 1.0, -0.1, float("nan")])
def test_no_part_of_the_images_is_refused(part: float) -> None:
    with refused(f"uncertain={part}", "above 0 and below 1"):
        replace(RECIPE, uncertain=part)


def test_a_part_without_views_is_refused() -> None:
    with refused("uncertain=0.3 without views", "uncertain=none"):
        replace(RECIPE, views=None)


def test_every_place_says_of_which_images_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(RECIPE, name="run", wandb="off")
    said = capsys.readouterr().out
    assert "  views       mirrored, only of the uncertain 30%\n" in said
    lines = [line for line in said.splitlines() if "with TTA" in line]
    assert len(lines) >= 2
    assert all("with TTA of the uncertain 30%)" in line for line in lines)
    run = RunFiles(Path("runs/run"))
    assert "test accuracy, last epoch, with TTA of the uncertain 30%" in quoted(run)
    assert Page(run).data["tta"] == "with TTA of the uncertain 30%"
    assert "test/accuracy_tta" in run.epochs[-1]
