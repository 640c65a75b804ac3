"""Learning-rate schedules: from a fraction of the training in [0, 1] to a multiplier of the rate.

The fraction is the part of the training that lies behind the middle of a step, so neither
the first nor the last step is spent at a rate of exactly zero. A recipe fills in the settings
with `functools.partial`, and any function of one float serves as well.

So do the schedulers of `torch.optim.lr_scheduler`. They count epochs, as in torch's examples, but
for those that torch says to step after each batch: OneCycleLR and CyclicLR count steps, and so does
what stands beside one of them in a SequentialLR or a ChainedScheduler.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from launcher.errors import UserError
from launcher.utils.user_code import function_of

# A multiplier that is never above the one, or never below this part of its highest, is odd.
_LEAST_RISE, _LEAST_FALL = 0.1, 0.9


def constant(fraction: float) -> float:
    """Keep the optimizer's own rate throughout."""
    return 1.0


def linear(fraction: float, *, warmup: float = 0.0, end: float = 0.0, until: float = 1.0) -> float:
    """Rise from 0 to 1 over the fraction `warmup`, then fall in a straight line to `end`.

    It is reached at `until` and kept from there on.
    """
    _refuse_outside(warmup=warmup, until=until, end=end)
    if fraction < warmup:
        return fraction / warmup
    return end + (1 - end) * max(0.0, 1 - _after(fraction, warmup, until))


def cosine(fraction: float, *, warmup: float = 0.0, end: float = 0.0) -> float:
    """Rise from 0 to 1 over the fraction `warmup`, then fall along half a cosine to `end`.

    Source: Loshchilov & Hutter, SGDR (2017), without restarts.
    """
    _refuse_outside(warmup=warmup, end=end)
    if fraction < warmup:
        return fraction / warmup
    return end + (1 - end) * (1 + math.cos(math.pi * _after(fraction, warmup))) / 2


def steps(fraction: float, *, at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Multiply by `factor` at each point of `at`."""
    return factor ** sum(fraction >= point for point in at)


def _refuse_outside(**fractions: float) -> None:
    for name, fraction in fractions.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name}={fraction}, which is no fraction in [0, 1]")


def _after(fraction: float, warmup: float, until: float = 1.0) -> float:
    return (fraction - warmup) / (until - warmup) if warmup < until else 0.0


def describe_odd_range(schedule: Any) -> str:
    """A line about a multiplier that hardly moves, as of a function of steps; else empty.

    What fails, and what gives no numbers, is for the preflight to say.
    """
    try:
        values = [float(schedule(point / 100)) for point in range(1, 100)]
    except Exception:
        return ""
    lowest, highest = min(values), max(values)
    is_ours = function_of(schedule).__module__ == __name__  # `constant` never moves
    if is_ours or not 0 < highest < math.inf:
        return ""
    if highest > _LEAST_RISE and lowest < _LEAST_FALL * highest:
        return ""
    return (
        f"the schedule multiplies the optimizer's rate by {lowest:.3g} to {highest:.3g} only: it "
        "is called with the fraction of the training, from 0 to 1, and not with a step or an epoch"
    )


def schedulers_in(value: Any) -> Iterator[type[LRScheduler]]:
    """The classes of torch's schedulers in a schedule, those in the settings of others included."""
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from schedulers_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from schedulers_in(part)
    elif isinstance(value, type) and issubclass(value, LRScheduler):
        yield value


def counts_steps(schedule: Any) -> bool:
    """Whether torch's scheduler counts steps; else it counts epochs."""
    return any(issubclass(kind, OneCycleLR | CyclicLR) for kind in schedulers_in(schedule))


def refuse_measuring(schedule: Any) -> None:
    """Raise `UserError` for a scheduler that follows a measurement and not the step."""
    if any(issubclass(kind, ReduceLROnPlateau) for kind in schedulers_in(schedule)):
        raise UserError(
            "schedule=ReduceLROnPlateau, which follows a measurement",
            expected="rates that follow from the step alone, so that a resumed run has them too",
            instead="write schedule=CosineAnnealingLR, or schedule=cosine of launcher, "
            "in the recipe file",
        )
