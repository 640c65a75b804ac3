"""The figures of a run under the names by which they are quoted, which say how they were chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from launcher.checkpoint.run_files import RunFiles
from launcher.results.compare import two_sided

ON_TEST = "test accuracy, best epoch (chosen on the test images)"
BY_VALIDATION = "test accuracy, best epoch"
LAST = "test accuracy, last epoch"
LAST_TTA = "test accuracy, last epoch, with TTA"
VALIDATION = "validation accuracy, best epoch"


def quoted(run: RunFiles) -> dict[str, float]:
    """What it reached; absent is what it has not measured, such as test images before its end."""
    figures = {}
    if run.evaluated_on == "val":
        figures[VALIDATION] = run.best_accuracy
        figures[BY_VALIDATION] = run.test_accuracy("best")
        figures[LAST] = run.test_accuracy("last")
        figures[LAST_TTA] = _number(run.tested.get("last", {}).get("test/accuracy_tta"))
    elif run.epochs:
        figures[ON_TEST] = run.best_accuracy
        figures[LAST] = run.epochs[-1]["test/accuracy"]
        figures[LAST_TTA] = _number(run.epochs[-1].get("test/accuracy_tta"))
    return {name: value for name, value in figures.items() if value is not None}


def headline(run: RunFiles) -> str:
    """The figure that was not chosen by looking at the images that it is of."""
    return BY_VALIDATION if run.evaluated_on == "val" else LAST


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


@dataclass(frozen=True)
class Summary:
    """Of n values: their mean and standard deviation, and the 95 % interval of the mean.

    `std` and the interval are None for a single value.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def summary(values: Sequence[float]) -> Summary:
    """By Student's distribution with n - 1 degrees of freedom."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Summary(n, mean, None, None, None)
    std = stdev(values)
    half = quantile(0.95, n - 1) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def describe(found: Summary) -> str:
    """`64.52 % +- 0.61 (95 % interval 63.76 to 65.28, n=5)`."""
    mean = f"{found.mean:.2%}"
    if found.std is None or found.low is None or found.high is None:
        return f"{mean} (n=1: one run is no measurement of its spread)"
    return (
        f"{mean} +- {100 * found.std:.2f} "
        f"(95 % interval {100 * found.low:.2f} to {100 * found.high:.2f}, n={found.n})"
    )


def quantile(confidence: float, freedom: float) -> float:
    """The t beyond which, on both sides, Student's distribution has 1 - confidence; by bisection.

    0.95 with one degree of freedom has 12.7, with infinitely many 1.96.
    """
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if two_sided(middle, freedom) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high
