"""Learning-rate schedules: from a fraction of the training in [0, 1] to a multiplier of the rate.

The fraction is the part of the training that lies behind the middle of a step, so neither
the first nor the last step is spent at a rate of exactly zero. A recipe fills in the settings
with `functools.partial`, and any function of one float serves as well.
"""

import math


def constant(fraction: float) -> float:
    """Keep the optimizer's own rate throughout."""
    return 1.0


def linear(fraction: float, *, warmup: float = 0.0, end: float = 0.0, until: float = 1.0) -> float:
    """Rise from 0 to 1 over the fraction `warmup`, then fall in a straight line to `end`.

    It is reached at `until` and kept from there on.
    """
    if fraction < warmup:
        return fraction / warmup
    return end + (1 - end) * max(0.0, 1 - _after(fraction, warmup, until))


def cosine(fraction: float, *, warmup: float = 0.0, end: float = 0.0) -> float:
    """Rise from 0 to 1 over the fraction `warmup`, then fall along half a cosine to `end`.

    Source: Loshchilov & Hutter, SGDR (2017), without restarts.
    """
    if fraction < warmup:
        return fraction / warmup
    return end + (1 - end) * (1 + math.cos(math.pi * _after(fraction, warmup))) / 2


def steps(fraction: float, *, at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Multiply by `factor` at each point of `at`."""
    return factor ** sum(fraction >= point for point in at)


def _after(fraction: float, warmup: float, until: float = 1.0) -> float:
    return (fraction - warmup) / (until - warmup) if warmup < until else 0.0
