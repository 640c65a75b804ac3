"""Competitors that take turns, so that whatever else the machine does meets them alike.

The order of the turns rotates. What counts is the ratio within a round: on a shared machine, images
per second of different minutes say little.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

Epoch = Callable[[], None]
Parted = Callable[[], Iterator[object]]  # an epoch that pauses after each part of itself
Figures = dict[str, Any]


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock time of the work, with what it left to do on a GPU."""
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in the order of this turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def whole_epochs(competitors: Mapping[str, Epoch], images: int, rounds: int) -> Figures:
    """Images per second of every competitor in every round; a turn is an epoch."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds):
        for name in rotated(list(competitors), turn):
            gc.collect()
            seconds[name].append(seconds_of(competitors[name]))
    return figures_of(seconds, images)


def parted_epochs(competitors: Mapping[str, Parted], images: int, rounds: int) -> Figures:
    """The same where a turn is a part of an epoch: a fraction of a second, which noise outlasts.

    The epochs of a round begin together; the seconds of one are those of its parts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        gc.collect()
        for name, spent in one_round({n: start() for n, start in competitors.items()}).items():
            seconds[name].append(spent)
    return figures_of(seconds, images)


def one_round(epochs: dict[str, Iterator[object]]) -> dict[str, float]:
    """Go through all epochs, part by part in turns; the seconds of each."""
    spent, running, turn = dict.fromkeys(epochs, 0.0), set(epochs), 0

    def go_on(name: str) -> None:
        try:
            next(epochs[name])
        except StopIteration:
            running.discard(name)

    while running:
        for name in rotated(list(epochs), turn):
            if name in running:
                spent[name] += seconds_of(partial(go_on, name))
        turn += 1
    return spent


def figures_of(seconds: dict[str, list[float]], images: int) -> Figures:
    """What is written of the rounds, whose epochs have so many images."""
    speeds = {name: [images / spent for spent in rounds] for name, rounds in seconds.items()}
    ours = speeds["launcher"]
    others = [name for name in speeds if name != "launcher"]
    return {
        "images_per_second": {name: [round(v) for v in speeds[name]] for name in speeds},
        "median": {name: round(statistics.median(speeds[name])) for name in speeds},
        **{f"launcher/{name}": ratio(ours, speeds[name]) for name in others},
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the rounds."""
    pairs = zip(ours, theirs, strict=True)
    return round(statistics.median(mine / other for mine, other in pairs), 4)
