"""The schedulers of `torch.optim.lr_scheduler`, replayed before training to a table of rates.

A scheduler of torch is changed by each of its steps, and would have to be saved. What it does to an
optimizer is known beforehand, since it sees no measurement: so it is stepped to the end of the
training once, on an optimizer that has the real one's groups and no network. After that a rate is a
function of the step's number, on any number of ranks and in a resumed run.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from launcher.config.plan import Plan
from launcher.config.schedules import counts_steps, schedulers_in
from launcher.config.serialize import short_name
from launcher.config.slots import Schedule, TorchSchedule
from launcher.errors import UserError
from launcher.utils.user_code import function_of

_CYCLED = ("lr", "momentum", "betas")  # what OneCycleLR and CyclicLR change


@dataclass(frozen=True)
class RateTable:
    """What each group's rate, and momentum where it is cycled, is in each step or each epoch."""

    rows: tuple[tuple[dict[str, Any], ...], ...]

    def at(self, fraction: float) -> tuple[dict[str, Any], ...]:
        """The options of each group after a fraction of the training, as `Plan.fraction` gives it.

        That is the middle of a step, so no rounding reaches the row before or after.
        """
        return self.rows[int(fraction * len(self.rows))]


def replay(
    schedule: Schedule | TorchSchedule,
    options: tuple[dict[str, Any], ...],
    defaults: Mapping[str, Any],
    plan: Plan,
) -> RateTable | None:
    """The table of torch's scheduler for an optimizer of these groups; None for other schedules.

    Raises `UserError` where it refuses its settings or ends before the training.
    """
    if not any(True for _ in schedulers_in(schedule)):
        return None
    rows = plan.steps if counts_steps(schedule) else plan.epochs
    groups = [{**group, "params": [torch.nn.Parameter(torch.zeros(()))]} for group in options]
    optimizer = Optimizer(groups, dict(defaults))
    cycled = [[name for name in _CYCLED if name in group] for group in options]
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not been stepped
        try:
            scheduler = _build(schedule, optimizer, rows, plan)
            for row in range(rows):
                if row:
                    scheduler.step()
                pairs = zip(optimizer.param_groups, cycled, strict=True)
                table.append(
                    tuple({name: _plain(group[name]) for name in own} for group, own in pairs)
                )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise _refusal(schedule, error, plan) from error
    return RateTable(tuple(table))


def describe_counting(schedule: Schedule | TorchSchedule) -> str:
    """A line that says what torch's scheduler counts; empty for other schedules."""
    if not any(True for _ in schedulers_in(schedule)):
        return ""
    unit = "step" if counts_steps(schedule) else "epoch"
    return f"the schedule {short_name(schedule)} is stepped after each {unit}"


def _plain(value: Any) -> Any:
    """A number as Python's own: a rate of numpy or torch would be another one in a checkpoint."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) else float(value)


def _build(schedule: Any, optimizer: Optimizer, length: int, plan: Plan) -> LRScheduler:
    """The scheduler, after those among its settings; `length` is how far it will be stepped."""
    function = function_of(schedule)
    given = dict(schedule.keywords) if isinstance(schedule, functools.partial) else {}
    positional = schedule.args if isinstance(schedule, functools.partial) else ()
    if positional:
        raise TypeError("its settings have to be given by their names, as in step_size=30")
    parts = given.get("schedulers")
    if isinstance(parts, list | tuple):
        lengths = _lengths(function, given, len(parts), length)
        pairs = zip(parts, lengths, strict=True)
        given["schedulers"] = [_build(part, optimizer, own, plan) for part, own in pairs]
    return function(optimizer=optimizer, **given | _missing(function, given, length, plan))


def _lengths(function: Any, given: Mapping[str, Any], parts: int, length: int) -> list[int]:
    """How far each part is stepped: in a SequentialLR from one milestone to the next."""
    milestones = list(given.get("milestones", ()))
    if not (inspect.isclass(function) and issubclass(function, SequentialLR)):
        return [length] * parts
    if len(milestones) != parts - 1:
        raise ValueError(f"{parts} schedulers need {parts - 1} milestones, and got {milestones}")
    bounds = [0, *milestones, max(length, *milestones, 0)]
    return [max(1, stop - start) for start, stop in pairwise(bounds)]


def _missing(function: Any, given: Mapping[str, Any], length: int, plan: Plan) -> dict[str, int]:
    """The length of the training, for a scheduler that needs it and was not given it."""
    if issubclass(function, CosineAnnealingLR) and "T_max" not in given:
        return {"T_max": length}
    if issubclass(function, OneCycleLR) and given.get("total_steps") is None:
        own = {"epochs": plan.epochs, "steps_per_epoch": plan.steps_per_epoch}
        missing = {name: number for name, number in own.items() if given.get(name) is None}
        return {"total_steps": length} if missing == own else missing
    return {}


def _refusal(schedule: Any, error: Exception, plan: Plan) -> UserError:
    name = short_name(schedule)
    if "Tried to step" in str(error):  # torch has no exception type for it
        return UserError(
            f"schedule={name}, which ends before the training: {plan.epochs} x "
            f"{plan.steps_per_epoch} = {plan.steps} steps ({error})",
            expected="a schedule for every step",
            instead=_to_type(schedule, "none", "total_steps", "epochs", "steps_per_epoch"),
        )
    if "cycle_momentum" in str(error):
        return UserError(
            f"schedule={name} refuses the optimizer: {error}",
            expected="an optimizer with momentum or betas",
            instead=_to_type(schedule, "False", "cycle_momentum"),
        )
    return UserError(
        f"schedule={name} refuses its settings: {type(error).__name__}: {error}",
        expected="settings that this scheduler takes, all but the optimizer",
        instead="see launcher RECIPE --help, and torch's page of this scheduler",
    )


def _to_type(schedule: Any, value: str, *names: str) -> str:
    """Words that change settings; of a scheduler within another one they are in the file only."""
    kind: Any = function_of(schedule)
    if not issubclass(kind, OneCycleLR | CyclicLR):
        return f"change {', '.join(names)} in the recipe file to {value}"
    given = getattr(schedule, "keywords", {})
    wanted = [name for name in names if name in given] or names[:1]
    return "type " + " ".join(f"schedule.{name}={value.lower()}" for name in wanted)
