"""The memory that is predicted, against what torch counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from launcher import Recipe, Synthetic, growing
from launcher.checks.check.memory import predict_memory
from launcher.config import loader
from launcher.training.loop import make_batches
from launcher.training.metrics import LossTracker
from launcher.training.state import TrainContext
from launcher.training.step import train_step
from tests.support.helpers import RECIPES, context_of


def recipe_of(name: str, batch_size: int) -> Recipe:
    recipe = loader.load(RECIPES / f"{name}.py").recipe
    source = partial(Synthetic, count=4 * batch_size)
    data = replace(recipe.data, source=source, batch_size=batch_size)
    return replace(recipe, data=data, precision="fp32", compile=False)


@contextmanager
def stepping(ctx: TrainContext) -> Iterator[list[int]]:
    """The peak of a second step, as torch's own tracker of tensors sees it."""
    steps = make_batches(ctx).epoch(1)
    tracker = LossTracker(1, ctx.accelerator.device, ctx.gather)
    number, batches = next(steps)
    train_step(ctx, batches, number, tracker)
    peak: list[int] = []
    yield peak
    number, batches = next(steps)
    memory = MemTracker()
    memory.track_external(ctx.state.network, ctx.state.optimizer, batches[0].images)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if name == "forward":
            memory.reset_mod_stats()  # it takes one pass of each layer
        yield

    with memory:
        train_step(replace(ctx, phase=phase), batches, number, tracker)
    peak += [sum(kinds["Total"] for kinds in memory.get_tracker_snapshot("peak").values())]


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("simplecnn", 64), pytest.param("resnet18", 32, marks=pytest.mark.slow)],
)
def test_the_memory_is_what_torch_counts(name: str, batch_size: int) -> None:
    recipe = recipe_of(name, batch_size)
    ctx = context_of(recipe)
    with stepping(ctx) as peak:
        memory = predict_memory(ctx, recipe)
    assert memory.total - memory.images == pytest.approx(peak[0], rel=0.05)


def wide_first() -> nn.Module:
    """Its largest gradient is the last of a backward pass, when most activations are gone."""
    wide = nn.Linear(3 * 32 * 32, 256)
    layers = (nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        nn.Flatten(), wide, nn.Unflatten(1, (1, 16, 16)), *layers, nn.Linear(64, 10)
    )


def test_the_gradients_of_one_pass_stay_during_the_next() -> None:
    recipe = replace(recipe_of("simplecnn", 64), model=wide_first, accumulate=2)
    ctx = context_of(recipe)
    with stepping(ctx) as peak:
        memory = predict_memory(ctx, recipe)
    assert memory.total - memory.images == pytest.approx(peak[0], rel=0.05)
    one_pass = replace(ctx, plan=replace(ctx.plan, accumulate=1, batch_size=32))
    alone = predict_memory(one_pass, recipe)
    assert alone.passes < 0.8 * memory.passes
    ranks = replace(one_pass, plan=replace(ctx.plan, accumulate=1, world_size=2))
    assert predict_memory(ranks, recipe).passes == memory.passes  # in the buckets of DDP


def test_accumulation_and_ranks_divide_the_activations() -> None:
    recipe = recipe_of("simplecnn", 64)
    alone = predict_memory(context_of(recipe), recipe)
    ctx = context_of(replace(recipe, accumulate=4))
    split = predict_memory(ctx, recipe)
    # 0.05: the gradients of the weights, 0.1 of 14 MB, are not divided
    assert split.passes == pytest.approx(alone.passes / 4, rel=0.05)
    ctx = replace(ctx, plan=replace(ctx.plan, world_size=4))
    assert predict_memory(ctx, recipe).passes < 0.3 * split.passes


@pytest.mark.slow
def test_smaller_training_images_need_less() -> None:
    """As much as at the largest size that the training has."""
    recipe = recipe_of("resnet18", 64)
    passes = {}
    for last in (16, 24, 32):
        sizes = replace(recipe.data, train_resolution=partial(growing, first=16, last=last))
        ctx = context_of(replace(recipe, data=sizes))
        passes[last] = predict_memory(ctx, recipe).passes
    assert passes[16] < passes[24] < passes[32]
    assert passes[32] == predict_memory(context_of(recipe), recipe).passes


def test_half_precision_needs_less() -> None:
    recipe = recipe_of("simplecnn", 64)
    ctx = context_of(recipe)
    whole = predict_memory(ctx, recipe)
    half = predict_memory(ctx, replace(recipe, precision="bf16"))
    assert half.weights == whole.weights
    assert 0.4 < half.passes / whole.passes < 0.8  # the indices of pooling stay int64
    pure = predict_memory(ctx, replace(recipe, precision="pure_bf16"))
    assert pure.weights == whole.weights // 2
