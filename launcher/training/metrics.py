"""What a run measures: sums that stay on the device, and the frozen reports made of them.

Reading a sum waits for the device, so it is read once per report. Over ranks the sums are added,
never the means averaged, so every image counts once, on whichever rank it was.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.config.plan import START, Progress
from launcher.data.images import EvaluatedOn

Gather = Callable[[Tensor], Tensor]  # `(1, n)` of this rank to `(ranks, n)`
SAMPLES = 36  # evaluated images that every epoch report shows
IMAGES_OF = {"test": "test", "val": "validation"}  # in words


@dataclass(frozen=True)
class StepReport:
    """Training since the last report. `step` and `epoch` count from 1."""

    epoch: int
    step: int
    loss: float  # mean over the images since the last report
    learning_rate: float
    images_per_second: float  # over all ranks
    gradient_norm: float | None = None  # of this very step, before clipping
    skipped: tuple[int, ...] = ()  # steps since the last report whose update was skipped
    first_predictions: tuple[int, ...] = ()  # classes of the first five images; step 1 only


@dataclass(frozen=True)
class Evaluation:
    """Test or validation images, each counted once. `confusion[truth][prediction]` counts images.

    `outcomes` are those of each image in their order, as `OutcomeTable` makes them.
    """

    loss: float
    confusion: tuple[tuple[int, ...], ...]
    in_top5: int
    outcomes: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def images(self) -> int:
        """The number of images evaluated."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """The fraction of images whose best class is right."""
        return sum(row[i] for i, row in enumerate(self.confusion)) / self.images

    @property
    def top5(self) -> float:
        """The fraction of images whose class is among the five best."""
        return self.in_top5 / self.images

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Accuracy of each class; None for a class without images."""
        rows = enumerate(self.confusion)
        return tuple(row[i] / sum(row) if sum(row) else None for i, row in rows)

    def metrics(self, images: str) -> dict[str, Any]:
        """The flat names under which people find the figures again: `images` is test or val.

        None is a loss that is not finite.
        """
        return {
            f"{images}/loss": finite(self.loss),
            f"{images}/accuracy": self.accuracy,
            f"{images}/top5": self.top5,
            f"{images}/images": self.images,
            f"{images}/per_class_accuracy": list(self.per_class),
        }


@dataclass(frozen=True)
class EpochReport:
    """One epoch: `probabilities` are the scores `(36, classes)` of the fixed samples.

    `evaluated_on` says whether the test or the validation images were evaluated, `ends_training`
    that no epoch follows, be it by the plan or by patience.

    The scores are a numpy array because the thread that logs images uses them: once a second thread
    runs an operation of torch, OpenMP lets its threads sleep between two operations of the first,
    and training on a CPU takes a fifth longer (benchmarks/observers.py).
    """

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    images_per_second: float  # training only, over all ranks
    seconds: float  # training and evaluation
    evaluation: Evaluation
    probabilities: NDArray[Any]
    evaluation_tta: Evaluation | None = None  # the same images with test-time augmentation
    evaluated_on: EvaluatedOn = "test"
    ends_training: bool = False
    uncertain: float | None = None  # the part of the images that have several views

    @property
    def images(self) -> str:
        """Which images were evaluated, in words."""
        return IMAGES_OF[self.evaluated_on]

    def metrics(self) -> dict[str, Any]:
        """The flat names under which people find the figures again.

        A name without `tta` is always of the plain images. None is a loss that is not finite.
        """
        tta, images = self.evaluation_tta, self.evaluated_on
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train/loss": finite(self.train_loss),
            "train/learning_rate": self.learning_rate,
            "train/images_per_second": self.images_per_second,
            **self.evaluation.metrics(images),
            **({f"{images}/accuracy_tta": tta.accuracy} if tta else {}),
            "seconds": self.seconds,
        }


def finite(value: float) -> float | None:
    """A finite number as it is; None, JSON's null, for what JSON has no number for."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Best:
    """The epoch of the highest accuracy so far, of the images that are evaluated each epoch.

    With test-time augmentation beside it.
    """

    epoch: int
    accuracy: float
    accuracy_tta: float | None = None

    @classmethod
    def of(cls, report: EpochReport) -> "Best":
        """The figures of one epoch."""
        tta = report.evaluation_tta.accuracy if report.evaluation_tta else None
        return cls(report.epoch, report.evaluation.accuracy, tta)


@dataclass(frozen=True)
class FinalReport:
    """The test images at the end of a run that has chosen by others: once, by each weights."""

    last: Evaluation
    last_tta: Evaluation | None
    best: Evaluation | None  # None where no epoch's weights are kept

    def metrics(self) -> dict[str, dict[str, Any]]:
        """The same names as of an epoch, for the last and for the best weights."""
        tta = {"test/accuracy_tta": self.last_tta.accuracy} if self.last_tta else {}
        best = {"best": self.best.metrics("test")} if self.best else {}
        return {"last": {**self.last.metrics("test"), **tta}, **best}


def sample_indices(count: int) -> list[int]:
    """The fixed test images that reports show: up to 36, spread evenly over the set."""
    shown = min(SAMPLES, count)
    return [index * count // shown for index in range(shown)]


class LossTracker:
    """The training loss and the speed of one epoch.

    The loop hands it the losses as they are, on the device; all computing waits for a report. The
    losses of an epoch are then added one by one, so that it makes no difference to the last bit
    when they are read: a run that is stopped reads them once more.
    """

    def __init__(
        self, epoch: int, device: torch.device, gather: Gather, done: Progress = START
    ) -> None:
        """Start the clock; `done` is what a resumed epoch has behind it."""
        self._epoch, self._gather = epoch, gather
        self._dtype = _widest(device)
        self._clear()
        self._images_before = self.images = done.epoch_images
        self.loss_sum = done.epoch_loss_sum
        self.first_nonfinite_step: int | None = None  # whose loss is not finite on some rank
        self._started = self._interval_started = time.perf_counter()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._weights: list[float] = []
        self._steps: list[int] = []
        self._skipped: list[int] = []
        self._interval_images = 0
        self._norm: Tensor | None = None

    def add(self, step: int, mean_loss: Tensor, images: float) -> None:
        """Add the mean loss of a micro-batch, to be weighted by its images on this rank."""
        self._losses.append(mean_loss.detach())
        self._weights.append(images)
        self._steps.append(step)

    def end_step(self, images: int, gradient_norm: Tensor | None) -> None:
        """The step is done: its images over all ranks, and its gradient norm if measured."""
        self._interval_images += images
        self._norm = gradient_norm

    def skip_step(self, step: int) -> None:
        """The step's update was skipped: its losses do not count."""
        while self._steps and self._steps[-1] == step:
            for values in (self._losses, self._weights, self._steps):
                values.pop()
        self._skipped.append(step)

    def report(self, step: int, learning_rate: float) -> StepReport:
        """The means over all ranks since the last report. Waits for the device."""
        loss, rate, norm = math.nan, 0.0, None
        if self._losses:  # else all steps were skipped
            losses = torch.stack(self._losses).to(self._dtype)
            ranks = self._gather((losses * losses.new_tensor(self._weights))[None]).tolist()
            in_order = [loss for micro_batch in zip(*ranks, strict=True) for loss in micro_batch]
            rate = self._interval_images / (time.perf_counter() - self._interval_started)
            for loss in in_order:  # Python's own sum() corrects its rounding from 3.12 on
                self.loss_sum += loss
            self.images += self._interval_images
            norm = None if self._norm is None else float(self._norm)
            bad = next((n for n, loss in enumerate(in_order) if not math.isfinite(loss)), None)
            if bad is not None:  # each rank has as many micro-batches
                self.first_nonfinite_step = self._steps[bad // len(ranks)]
            loss = sum(in_order) / self._interval_images
        report = StepReport(
            self._epoch, step, loss, learning_rate, rate, norm, tuple(self._skipped)
        )
        self._clear()
        self._interval_started = time.perf_counter()
        return report

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self._started

    def epoch(self) -> tuple[float, float]:
        """Mean loss and images/s of the epoch up to the last report."""
        seconds = self._interval_started - self._started
        loss = self.loss_sum / self.images if self.images else math.nan
        return loss, (self.images - self._images_before) / seconds if seconds else 0.0


class ConfusionAccumulator:
    """Running counts of an evaluation on one rank."""

    def __init__(
        self, classes: int, device: torch.device, class_weights: Tensor | None = None
    ) -> None:
        """With `class_weights` `(classes,)`, a mean loss is one over so weighted images."""
        self._classes, dtype = classes, _widest(device)
        self._weights = None if class_weights is None else class_weights.to(device, dtype)
        self._places = torch.arange(classes, device=device)
        # The sums of this rank, in one tensor, so that one collective adds them over the ranks:
        # the confusion matrix row by row, images with their class in the top five, loss sum.
        self.counts = torch.zeros(classes * classes + 2, dtype=dtype, device=device)

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        """Count a batch: logits `(n, classes)`, labels `(n,)`. Does not wait for the device."""
        cells = self._classes * self._classes
        # Of equal scores the first is ahead, as in argmax, by which everything else decides; topk
        # takes any of them.
        cell = labels * self._classes + logits.argmax(dim=1)
        self.counts.index_add_(0, cell, torch.ones_like(cell, dtype=self.counts.dtype))
        own = labels[:, None]
        score = logits.gather(1, own)
        not_ahead = (logits < score) | ((logits == score) & (self._places >= own))
        self.counts[cells] += (not_ahead.sum(dim=1) > self._classes - 5).sum()
        if self._weights is None:
            self.counts[cells + 1] += mean_loss * len(labels)
        else:
            weight = self._weights[labels].sum()
            # The mean over images of weight 0 is 0/0.
            self.counts[cells + 1] += torch.where(weight > 0, mean_loss * weight, 0.0)

    def evaluation(self, total: Tensor) -> Evaluation:
        """Read the sums over all ranks."""
        *cells, in_top5, loss = total.tolist()
        rows = [cells[i : i + self._classes] for i in range(0, len(cells), self._classes)]
        confusion = tuple(tuple(int(cell) for cell in row) for row in rows)
        images = [float(sum(row)) for row in rows]  # of each class
        weights = [1.0] * self._classes if self._weights is None else self._weights.tolist()
        weight = sum(map(mul, images, weights))
        return Evaluation(loss / weight if weight else math.nan, confusion, int(in_top5))


class OutcomeTable:
    """What the model says of each test image, of which one rank fills in its own.

    float32 `(images, 4)`: the predicted class, the probabilities of the true and of the predicted
    class, and the loss, which is minus the logarithm of the former whatever the recipe's loss is.
    The rows of other ranks are zero, so that their sum over the ranks is exact.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        """For all images of the test set, on whichever rank."""
        self.values = torch.zeros(images, 4, device=device)

    def add(self, first: int, logits: Tensor, labels: Tensor) -> None:
        """Images from `first` on: logits `(n, classes)`, labels `(n,)`. Does not wait."""
        logs = logits.log_softmax(dim=1)
        predicted = logits.argmax(dim=1)  # not of the logarithms, which rounding may make equal
        best, of_truth = (logs.gather(1, c[:, None])[:, 0] for c in (predicted, labels))
        columns = (predicted, of_truth.exp(), best.exp(), -of_truth)
        self.values[first : first + len(labels)] = torch.stack([c.float() for c in columns], 1)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
