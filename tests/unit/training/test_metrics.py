"""Sums over the images, whatever the batches and ranks they came in."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from launcher.config.plan import START, Progress
from launcher.training.metrics import (
    SAMPLES,
    ConfusionAccumulator,
    EpochReport,
    Evaluation,
    LossTracker,
    OutcomeTable,
    sample_indices,
)

CPU = torch.device("cpu")


def test_the_tally_of_uneven_batches_equals_the_direct_count() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(103, 7), torch.randint(0, 7, (103,))
    accumulator = ConfusionAccumulator(7, CPU)
    for part in (slice(0, 50), slice(50, 51), slice(51, 103)):
        accumulator.add(logits[part], labels[part], cross_entropy(logits[part], labels[part]))
    evaluation = accumulator.evaluation(accumulator.counts)
    right = logits.argmax(1) == labels
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert evaluation.images == 103
    assert evaluation.accuracy == right.double().mean().item()
    assert evaluation.top5 == top5.double().mean().item()
    assert evaluation.loss == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-6)
    for label in range(7):
        chosen = labels == label
        assert evaluation.per_class[label] == pytest.approx(right[chosen].double().mean().item())
        assert sum(evaluation.confusion[label]) == int(chosen.sum())


@pytest.mark.parametrize("classes", [3, 10, 40])
def test_of_equal_scores_the_first_counts_in_every_figure(classes: int) -> None:
    """The one that argmax takes, of which the outcomes and an exported network tell."""
    torch.manual_seed(0)
    logits, labels = torch.randint(3, (500, classes)).float(), torch.randint(classes, (500,))
    logits[0] = 0.0
    accumulator, table = ConfusionAccumulator(classes, CPU), OutcomeTable(500, CPU)
    accumulator.add(logits, labels, torch.tensor(0.0))
    table.add(0, logits, labels)
    evaluation = accumulator.evaluation(accumulator.counts)
    ordered = [sorted(range(classes), key=lambda c: (-row[c], c))[:5] for row in logits.tolist()]
    right = [label == best[0] for best, label in zip(ordered, labels.tolist(), strict=True)]
    assert table.values[:, 0].tolist() == [best[0] for best in ordered] == logits.argmax(1).tolist()
    assert evaluation.accuracy == sum(right) / 500
    assert evaluation.in_top5 == sum(map(list.__contains__, ordered, labels.tolist()))


def test_a_class_is_told_by_scores_and_not_by_rounded_logarithms() -> None:
    table = OutcomeTable(1, CPU)
    table.add(0, torch.tensor([[1.0, 1.0 + 2**-23, -30.0]]), torch.tensor([0]))
    assert table.values[0, 0] == 1


def test_a_class_without_images_has_no_accuracy() -> None:
    evaluation = Evaluation(loss=1.0, confusion=((3, 1), (0, 0)), in_top5=4)
    assert evaluation.per_class == (0.75, None)
    assert evaluation.accuracy == 0.75


def test_two_classes_have_a_top_five_of_two() -> None:
    accumulator = ConfusionAccumulator(2, CPU)
    accumulator.add(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor(1.0))
    assert accumulator.evaluation(accumulator.counts).top5 == 1.0


def test_the_loss_tracker_weighs_losses_by_images_and_adds_over_ranks() -> None:
    tracker = LossTracker(
        1, CPU, lambda values: values.repeat(2, 1)
    )  # another rank with equal sums
    tracker.add(1, torch.tensor(1.0), 10)
    tracker.add(1, torch.tensor(4.0), 5)
    tracker.end_step(30, torch.tensor(0.5))
    report = tracker.report(1, learning_rate=0.1)
    assert report.loss == pytest.approx(2.0)
    assert report.gradient_norm == 0.5
    tracker.add(2, torch.tensor(6.0), 5)
    tracker.end_step(10, None)
    assert tracker.report(2, learning_rate=0.1).loss == pytest.approx(6.0)
    assert tracker.epoch()[0] == pytest.approx(3.0)


def test_the_loss_of_an_epoch_is_the_same_whenever_it_is_read() -> None:
    """In a run that is stopped and resumed it is read at the stop as well."""
    torch.manual_seed(0)
    found = set()
    losses = torch.rand(300, dtype=torch.float64)
    for stops in ((300,), (70, 300), (1, 12, 130, 300)):
        done = START
        for first, stop in pairwise((0, *stops)):
            tracker = LossTracker(1, CPU, lambda v: torch.cat([v, v / 3, v * 0.7]), done)
            for step in range(first, stop):
                tracker.add(step, losses[step], 5)
                tracker.end_step(15, None)
            tracker.report(stop, learning_rate=0.1)
            done = Progress(stop, epoch_loss_sum=tracker.loss_sum, epoch_images=tracker.images)
        found.add(tracker.epoch()[0])
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(losses.mean()) * (1 + 1 / 3 + 0.7) / 3)


def test_the_loss_tracker_leaves_out_a_skipped_step_and_names_it() -> None:
    tracker = LossTracker(1, CPU, lambda values: values)
    tracker.add(1, torch.tensor(1.0), 10)
    tracker.end_step(10, None)
    tracker.add(2, torch.tensor(math.nan), 4)
    tracker.add(2, torch.tensor(2.0), 6)
    tracker.skip_step(2)
    report = tracker.report(2, learning_rate=0.1)
    assert (report.loss, report.skipped, tracker.first_nonfinite_step) == (1.0, (2,), None)
    tracker.add(3, torch.tensor(1.0), 10)
    tracker.skip_step(3)
    assert math.isnan(tracker.report(3, learning_rate=0.1).loss)
    assert tracker.epoch()[0] == 1.0
    assert tracker.images == 10


def test_the_loss_tracker_finds_the_first_infinite_step_of_any_rank() -> None:
    elsewhere = torch.tensor([[1.0, math.nan, 1.0]], dtype=torch.float64)
    tracker = LossTracker(1, CPU, lambda values: torch.cat([values, elsewhere]))
    for step, loss in enumerate((1.0, 1.0, math.inf), start=7):
        tracker.add(step, torch.tensor(loss), 10)
        tracker.end_step(10, None)
    tracker.report(9, learning_rate=0.1)
    assert tracker.first_nonfinite_step == 8


@pytest.mark.parametrize("count", [1, 35, 36, 37, 10_000])
def test_samples_are_spread_over_the_test_set(count: int) -> None:
    indices = sample_indices(count)
    assert len(indices) == len(set(indices)) == min(count, SAMPLES)
    assert min(indices) == 0
    assert max(indices) < count
    if count == 10_000:
        assert max(indices) > 9_500


def test_metrics_have_the_documented_names() -> None:
    evaluation = Evaluation(loss=0.5, confusion=((1, 1), (0, 2)), in_top5=4)
    probabilities = torch.zeros(4, 2).numpy()
    report = EpochReport(2, 20, 0.7, 0.1, 100.0, 3.0, evaluation, probabilities)
    metrics = report.metrics()
    assert metrics["epoch"] == 2
    assert metrics["train/loss"] == 0.7
    assert metrics["test/loss"] == 0.5
    assert metrics["test/accuracy"] == 0.75
    assert metrics["test/images"] == 4
