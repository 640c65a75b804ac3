"""Schedules: pure functions from progress to a multiplier of the learning rate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from launcher import constant, cosine, linear, steps
from launcher.config.plan import make_plan
from launcher.config.schedules import describe_odd_range
from tests.support.helpers import tiny_recipe

Schedule = Callable[[float], float]
GRID = [index / 200 for index in range(201)]
FALLING = [linear, cosine]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_constant_never_changes_the_rate(progress: float) -> None:
    assert constant(progress) == 1.0


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.6, 0.5), (1.0, 0.0)]
)
def test_after_a_warm_up_the_rate_falls_to_zero(
    schedule: Callable[..., float], progress: float, expected: float
) -> None:
    assert schedule(progress, warmup=0.2) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", FALLING)
def test_without_a_warm_up_the_rate_starts_at_its_full_value(
    schedule: Callable[..., float],
) -> None:
    assert schedule(0.0) == 1.0
    assert schedule(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", FALLING)
def test_the_end_is_a_fraction_of_the_full_rate(schedule: Callable[..., float]) -> None:
    assert schedule(1.0, end=0.1) == pytest.approx(0.1)
    assert schedule(0.0, end=0.1) == pytest.approx(1.0)
    assert schedule(0.5, end=0.1) == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", FALLING)
def test_a_training_that_is_all_warm_up_rises_to_its_end(schedule: Callable[..., float]) -> None:
    assert schedule(0.5, warmup=1.0) == 0.5
    assert schedule(1.0, warmup=1.0) == 1.0


@pytest.mark.parametrize(("progress", "expected"), [(0.25, 0.75), (0.75, 0.25)])
def test_linear_is_a_straight_line(progress: float, expected: float) -> None:
    assert linear(progress) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "expected"), [(0.25, 0.8535534), (0.75, 0.1464466)])
def test_cosine_is_flat_at_both_ends(progress: float, expected: float) -> None:
    assert cosine(progress) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.49, 1.0), (0.5, 0.1), (0.74, 0.1), (0.75, 0.01), (1.0, 0.01)],
)
def test_steps_multiply_at_each_point(progress: float, expected: float) -> None:
    assert steps(progress) == pytest.approx(expected)


def test_steps_take_their_points_and_factor_from_the_recipe() -> None:
    schedule = partial(steps, at=(0.2,), factor=0.5)
    assert [schedule(0.1), schedule(0.2), schedule(0.9)] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "schedule",
    [
        linear,
        cosine,
        steps,
        partial(linear, warmup=0.3, end=0.05),
        partial(cosine, warmup=0.3, end=0.05),
    ],
)
def test_multipliers_stay_between_zero_and_one(schedule: Schedule) -> None:
    assert all(-1e-12 <= schedule(progress) <= 1 for progress in GRID)


@pytest.mark.parametrize("schedule", FALLING)
def test_the_rate_does_not_jump_where_the_warm_up_ends(schedule: Callable[..., float]) -> None:
    before, after = schedule(0.3 - 1e-9, warmup=0.3), schedule(0.3, warmup=0.3)
    assert before == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("schedule", FALLING)
def test_no_step_of_a_training_is_spent_at_a_rate_of_zero(schedule: Callable[..., float]) -> None:
    plan = make_plan(tiny_recipe(), world_size=1, train_images=100, evaluated_images=20)
    rates = [schedule(plan.fraction(step), warmup=0.25) for step in range(1, plan.steps + 1)]
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (lambda step: min(1.0, (step + 1) / 500), "by 0.00202 to 0.00398 only"),
        (lambda epoch: 0.95**epoch, "by 0.95 to 0.999 only"),
        (lambda epoch: 0.1 ** (epoch // 30), "by 1 to 1 only"),
        (lambda fraction: 0.1 * (1 - fraction), "by 0.001 to 0.099 only"),
        *((usual, "") for usual in (constant, linear, cosine, steps, partial(cosine, end=0.8))),
        (lambda fraction: 0.0, ""),
        (lambda optimizer: optimizer.lr, ""),
    ],
)
def test_a_function_of_steps_or_of_rates_is_told(schedule: Any, found: str) -> None:
    line = describe_odd_range(schedule)
    assert found in line
    assert bool(line) == bool(found)
