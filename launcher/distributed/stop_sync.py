"""All ranks stop and save at the same step, although a signal reaches them at different times.

A rank that left the loop alone would leave the others waiting in a collective. So the ranks add up
their requests, about once a second: often enough for any grace period, and too seldom to cost
speed. The number of steps between two exchanges follows from the mean time of a step over all
ranks, which all ranks know alike. An evaluation has larger batches: it asks before each of them.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SECONDS_BETWEEN = 1.0
MOST_STEPS_BETWEEN = 1000


class Requests(NamedTuple):
    """What a rank wants, or what all ranks do, after a step."""

    stop: bool = False
    save: bool = False


PollRequests = Callable[[], Requests]


def no_requests() -> Requests:
    """Of a caller who neither stops nor saves out of turn."""
    return Requests()


class StoppedError(Exception):
    """The ranks agreed to stop in the middle of something that has no result yet."""


class StopSync:
    """What all ranks do after a step, or within an evaluation."""

    def __init__(
        self,
        sum_over_ranks: Callable[[Tensor], Tensor],
        world_size: int,
        device: torch.device,
        poll_requests: PollRequests,
    ) -> None:
        """`poll_requests` says what this rank wants."""
        self._sum_over_ranks, self._world_size = sum_over_ranks, world_size
        self._device, self._poll_requests = device, poll_requests
        self._steps, self._every = 0, 1
        self._exchanged = time.perf_counter()

    def stops(self) -> bool:
        """Whether to stop, asked at once and outside the steps. Every rank must ask as often."""
        mine = self._poll_requests().stop
        if self._world_size == 1:
            return mine
        return float(self._sum_over_ranks(torch.tensor(float(mine), device=self._device))) > 0

    def after_step(self) -> Requests:
        """Whether to stop and whether to save now: the same on every rank. Call it every step."""
        if self._world_size == 1:
            return self._poll_requests()
        self._steps += 1
        if self._steps < self._every:
            return Requests()
        now = time.perf_counter()
        mine = [*map(float, self._poll_requests()), (now - self._exchanged) / self._steps]
        values = torch.tensor(mine, device=self._device)
        stop, save, seconds = self._sum_over_ranks(values).tolist()
        mean = max(seconds / self._world_size, SECONDS_BETWEEN / MOST_STEPS_BETWEEN)
        self._every = max(1, int(SECONDS_BETWEEN / mean))
        self._steps, self._exchanged = 0, now
        return Requests(stop > 0, save > 0)
