"""The schedulers of torch give the rates that a plain loop of torch gives, in any part of a run."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from launcher import NamedParameters, cosine
from launcher.checkpoint import checkpoint
from launcher.config.overrides import override
from launcher.config.plan import SaveInterval
from launcher.config.serialize import resolve
from launcher.errors import UserError
from launcher.training.loop import SavePoint, fit
from launcher.training.state import TrainContext
from tests.support.helpers import context_of, refused, tiny_recipe, words_to_type

part: Any = partial  # what torch annotates is a scheduler's list of schedulers, not of classes
EPOCHS, STEPS_PER_EPOCH = 6, 10
STEPS = EPOCHS * STEPS_PER_EPOCH


def halved(epoch: int) -> float:
    return 0.5**epoch


def warm_then_cosine(optimizer: Optimizer) -> LRScheduler:
    warm = LinearLR(optimizer, 0.1, total_iters=2)
    return SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, EPOCHS - 2)], [2])


WARM_THEN_COSINE = part(
    SequentialLR,
    schedulers=[part(LinearLR, start_factor=0.1, total_iters=2), CosineAnnealingLR],
    milestones=[2],
)
# The schedule of a recipe, what a plain loop of torch makes, and whether it counts steps.
SCHEDULES: dict[str, tuple[Any, Any, bool]] = {
    "cosine": (CosineAnnealingLR, lambda o: CosineAnnealingLR(o, EPOCHS), False),
    "restarts": (
        part(CosineAnnealingWarmRestarts, T_0=4),
        lambda o: CosineAnnealingWarmRestarts(o, 4),
        False,
    ),
    "step": (part(StepLR, step_size=2), lambda o: StepLR(o, 2), False),
    "multi": (part(MultiStepLR, milestones=[1, 4]), lambda o: MultiStepLR(o, [1, 4]), False),
    "lambda": (part(LambdaLR, lr_lambda=halved), lambda o: LambdaLR(o, halved), False),
    "exponential": (part(ExponentialLR, gamma=0.9), lambda o: ExponentialLR(o, 0.9), False),
    "linear": (LinearLR, LinearLR, False),
    "polynomial": (part(PolynomialLR, power=2.0), lambda o: PolynomialLR(o, power=2.0), False),
    "sequential": (WARM_THEN_COSINE, warm_then_cosine, False),
    "chained": (
        part(ChainedScheduler, schedulers=[ConstantLR, part(ExponentialLR, gamma=0.9)]),
        lambda o: ChainedScheduler([ConstantLR(o), ExponentialLR(o, 0.9)]),
        False,
    ),
    "one cycle": (part(OneCycleLR, max_lr=0.1), lambda o: OneCycleLR(o, 0.1, STEPS), True),
    "cyclic": (
        part(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=7),
        lambda o: CyclicLR(o, 0.01, 0.1, 7),
        True,
    ),
}


def two_groups(params: NamedParameters, kind: Any = SGD, lr: float = 0.2) -> Optimizer:
    first, *others = params
    settings = {"momentum": 0.9} if kind is SGD else {}
    return kind([{"params": [first], "lr": 0.05}, {"params": others}], lr=lr, **settings)


def context(schedule: Any, kind: Any = SGD, **plan: Any) -> TrainContext:
    optimizer = partial(two_groups, kind=kind)
    return context_of(tiny_recipe(schedule=schedule, optimizer=optimizer, epochs=EPOCHS), **plan)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_and_momenta_are_those_of_a_plain_loop(name: str, kind: Any) -> None:
    schedule, make, counts_steps = SCHEDULES[name]
    ctx = context(schedule, kind)
    parameters = [(str(number), nn.Parameter(torch.zeros(1))) for number in range(3)]
    optimizer = two_groups(parameters, kind)
    scheduler = make(optimizer)
    for step in range(1, STEPS + 1):
        ctx.state.set_learning_rates(ctx.plan.fraction(step), schedule)
        for own, theirs in zip(
            ctx.state.optimizer.param_groups, optimizer.param_groups, strict=True
        ):
            for option in ("lr", "momentum", "betas"):
                assert own.get(option) == theirs.get(option), (step, option)
        if step < STEPS and (counts_steps or step % STEPS_PER_EPOCH == 0):
            scheduler.step()
    unit = "step" if counts_steps else "epoch"
    assert ctx.notes[-1].endswith(f"is stepped after each {unit}")


@pytest.mark.parametrize("name", ["one cycle", "sequential"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Any) -> None:
    whole = context(SCHEDULES[name][0])
    list(fit(whole))
    first = context(SCHEDULES[name][0], save=SaveInterval(steps=25))
    progress = next(e.progress for e in fit(first) if isinstance(e, SavePoint))
    details = {"progress": vars(progress)}
    folder = checkpoint.write(checkpoint.capture(first, details), tmp_path)
    resumed = context(SCHEDULES[name][0])
    checkpoint.restore(folder, resumed)
    list(fit(resumed, progress))
    assert progress.step == 25
    pairs = zip(whole.state.network.parameters(), resumed.state.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        (ReduceLROnPlateau, ("ReduceLROnPlateau", "schedule=cosine")),
        (part(SequentialLR, schedulers=[ReduceLROnPlateau]), ("ReduceLROnPlateau",)),
        (
            part(OneCycleLR, max_lr=0.1, total_steps=20),
            ("before the training", "total_steps=none"),
        ),
        (part(OneCycleLR, 0.1), ("by their names",)),
        (StepLR, ("StepLR refuses its settings", "step_size")),
        (part(StepLR, stepsize=3), ("StepLR refuses its settings", "stepsize")),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(schedule: Any, parts: tuple[str, ...]) -> None:
    with refused(*parts):
        context(schedule)


@pytest.mark.parametrize("lengths", [{"total_steps": 20}, {"epochs": 2, "steps_per_epoch": 10}])
def test_a_length_that_is_typed_away_is_filled_in(lengths: dict[str, int]) -> None:
    schedule = part(OneCycleLR, max_lr=0.1, **lengths)
    with pytest.raises(UserError, match="ends before the training") as caught:
        context(schedule)
    recipe = override(tiny_recipe(schedule=schedule, epochs=EPOCHS), words_to_type(caught.value))
    assert context(recipe.schedule).state.rate_table


def one_rate(params: NamedParameters) -> Optimizer:
    return SGD([{"params": list(params), "schedule": CosineAnnealingLR}], lr=0.1)


def test_momentum_that_an_optimizer_lacks_is_refused_with_what_to_write() -> None:
    with refused("with momentum or betas", "type schedule.cycle_momentum=false"):
        context_of(
            tiny_recipe(
                optimizer=partial(Adagrad, lr=0.1),
                schedule=partial(OneCycleLR, max_lr=0.1),
            )
        )
    with refused("schedule of a group"):
        context_of(tiny_recipe(optimizer=one_rate, schedule=cosine))


def test_settings_of_schedulers_within_schedulers_are_the_recipes() -> None:
    recipe = override(
        tiny_recipe(schedule=WARM_THEN_COSINE), ["schedule.schedulers.LinearLR.total_iters=3"]
    )
    form = resolve(recipe)["schedule"]
    assert form["schedulers"][0]["total_iters"] == 3
    assert form["schedulers"][1]["call"] == "torch.optim.lr_scheduler:CosineAnnealingLR"


def test_what_a_refusal_says_to_type_is_accepted() -> None:
    recipe = tiny_recipe(schedule=partial(OneCycleLR, max_lr=0.1, epochs=1, steps_per_epoch=2))
    with pytest.raises(UserError) as caught:
        context_of(recipe)
    context_of(override(recipe, words_to_type(caught.value)))
    recipe = replace(
        recipe, schedule=partial(OneCycleLR, max_lr=0.1), optimizer=partial(Adagrad, lr=0.1)
    )
    with pytest.raises(UserError) as caught:
        context_of(recipe)
    context_of(override(recipe, words_to_type(caught.value)))
