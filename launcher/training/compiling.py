"""`compile=true` on a CPU: compiled or eager, whichever makes a step faster on this machine.

torch's compiler can make a small network slower on a CPU, which only a measurement shows.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch._dynamo.exc import TorchDynamoException

from launcher.distributed.accelerator import count_over_ranks
from launcher.training.loop import make_batches
from launcher.training.network import upcast
from launcher.training.state import TrainContext, compile_state, put_back

WARM_UP = 3  # steps of each: the compiler may look at the second one again
MOST_STEPS, SECONDS = 10, 2.0  # timed at most, of each
_STANCES: tuple[Literal["force_eager", "default"], ...] = ("force_eager", "default")


def is_to_be_tried(ctx: TrainContext) -> bool:
    """Whether to measure what is faster: only for `compile=true`, and only on a CPU."""
    return ctx.recipe.compile is True and ctx.accelerator.device.type == "cpu"


def choose_compiling(ctx: TrainContext) -> tuple[TrainContext, str]:
    """Time compiled and eager steps in turns; all ranks choose alike, and the state is restored.

    Returns the training to continue with and a line about the choice. Its `recipe.compile` is then
    false or force, so that a resumed run keeps the choice.
    """
    step = _step(ctx)
    failure = ""
    seconds = torch.zeros(2, dtype=torch.float64)  # of an eager step and of a compiled one
    with put_back(ctx):
        ctx.state.network.train()
        try:
            for _ in range(WARM_UP):
                step()
        except TorchDynamoException as error:
            failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        failures = count_over_ranks(ctx.accelerator, bool(failure))
        if not failures:
            seconds = _seconds(step)
    if failures:
        return _eager(ctx, f"torch.compile fails here: {failure or 'on another rank'}")
    eager, compiled = (ctx.sum_over_ranks(seconds) / ctx.plan.world_size * 1e3).tolist()
    if compiled < eager:
        ctx = replace(ctx, recipe=replace(ctx.recipe, compile="force"))
        return ctx, f"compiled: {compiled:.2f} ms a step, {eager:.2f} ms eager"
    figures = f"{eager:.2f} ms a step, {compiled:.2f} ms compiled"
    return _eager(ctx, f"{figures}; compile=force compiles all the same")


def _eager(ctx: TrainContext, why: str) -> tuple[TrainContext, str]:
    compile_state(ctx.state.network, ctx.state.optimizer, False)
    ctx = replace(ctx, recipe=replace(ctx.recipe, compile=False))
    return ctx, f"eager: {why}"


def _step(ctx: TrainContext) -> Callable[[], None]:
    """The first step of the training, without communication: see `pass_fits`."""
    state = ctx.state
    _, micro_batches = next(iter(make_batches(ctx).epoch(1)))

    def step() -> None:
        with ctx.accelerator.no_sync(state.ddp_model):
            for batch in micro_batches:
                logits = upcast(state.ddp_model(batch.images))
                loss = ctx.loss(logits, batch.targets, batch.images)
                loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.optimizer.zero_grad()

    return step


def _seconds(step: Callable[[], None]) -> torch.Tensor:
    """The least time of an eager and of a compiled step: what else the machine does only adds."""
    least = torch.full((2,), torch.inf, dtype=torch.float64)
    until = time.perf_counter() + 2 * SECONDS
    for number in range(MOST_STEPS + 1):
        for place, stance in enumerate(_STANCES):
            with torch.compiler.set_stance(stance):
                started = time.perf_counter()
                step()
                seconds = time.perf_counter() - started
            if number:  # the first eager step allocates
                least[place] = min(float(least[place]), seconds)
        if number and time.perf_counter() > until:
            break
    return least
