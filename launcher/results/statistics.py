"""Means with their spread, and Student's distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


def two_sided(t: float, freedom: float) -> float:
    """The probability that a value of Student's distribution is at least as far from zero as `t`.

    By Simpson's rule over the angle, in which the density is a power of the cosine.
    """
    limit, steps = math.atan(abs(t) / math.sqrt(freedom)), 2000
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    heights = [math.cos(limit * i / steps) ** (freedom - 1) for i in range(steps + 1)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    area = math.exp(scale) * limit / steps / 3 * (heights[0] + inner + heights[-1])
    return max(0.0, 1 - 2 * area)


@dataclass(frozen=True)
class Difference:
    """A t-test of a difference: Student's t, degrees of freedom, two-sided probability."""

    t: float
    freedom: float
    p: float


def difference(gap: float, means: Sequence[tuple[float, int]]) -> Difference:
    """Test a difference of means, whose variance is the sum of theirs, each of n values.

    By Welch and Satterthwaite; of a single mean that is Student's test, with n - 1 degrees.
    """
    total = sum(variance for variance, _ in means)
    squares = sum(variance**2 / (n - 1) for variance, n in means if variance)
    if not squares:  # all values of each group are equal
        freedom = means[0][1] - 1.0 if len(means) == 1 else 1.0
        return Difference(math.inf, freedom, 0.0) if gap else Difference(0.0, freedom, 1.0)
    t, freedom = gap / math.sqrt(total), total**2 / squares
    return Difference(t, freedom, two_sided(t, freedom))


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and 95 % confidence interval of the mean of n values.

    `std` and the interval are None for a single value.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def summary(values: Sequence[float]) -> Spread:
    """Summarize values, by Student's distribution with n - 1 degrees of freedom."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Spread(n, mean, None, None, None)
    std = stdev(values)
    half = quantile(0.95, n - 1) * std / math.sqrt(n)
    return Spread(n, mean, std, mean - half, mean + half)


def describe(found: Spread) -> str:
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
