"""Test-time augmentation: which views, which weights, and what it is called."""

import torch
from torch import Tensor

from launcher import mirrored, mirrored_and_shifted
from launcher.training.metrics import EpochReport, Evaluation


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
