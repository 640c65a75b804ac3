"""`--smoke` tells a recipe that teaches its network from one that does not."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from launcher import Draws, Images, Recipe, Synthetic, cutmix, flip, jitter, random_resized_crop
from launcher.data import sources
from launcher.distributed.process_group import RankGroup
from launcher.distributed.world import ALONE, World
from launcher.errors import TrainingError
from launcher.training import smoke
from launcher.training.loop import fit
from launcher.training.smoke import LARGEST_BATCH, SMALLEST_BATCH, STEPS, SmokeTest, smoke_version
from launcher.training.state import TrainContext
from tests.support.helpers import HALF, Tiny, context_of, tiny_recipe


class Network(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(16 * 7 * 7, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Blind(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.rand_like(images))


class Slow(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.02 * len(images))
        return super().forward(images)


def exchanged(images: Tensor, draws: Draws) -> Tensor:
    return images.roll(1, 0)


def wrong_class(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets.roll(1))


def recipe_of(classes: int = 10, **changes: Any) -> Recipe:
    data = Images(partial(Synthetic, classes=classes), batch_size=128, mean=HALF, std=HALF)
    data = replace(data, augment=changes.pop("augment", ()))
    model = partial(Network, classes)
    recipe = Recipe(model=model, data=data, optimizer=partial(Adam, lr=1e-3), epochs=30)
    return replace(recipe, **changes)


def verdict(recipe: Recipe) -> str:
    recipe = smoke_version(recipe, RankGroup(ALONE))
    ctx = context_of(recipe, sources.load(recipe.data))
    smoke_test = SmokeTest(ctx)
    steps = [event.step for event in fit(ctx) if hasattr(event, "step")]
    assert steps[-1] == STEPS
    before = [parameter.clone() for parameter in ctx.state.network.parameters()]
    try:
        return smoke_test.verdict()
    finally:
        assert all(map(torch.equal, before, ctx.state.network.parameters()))


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("optimizer", [partial(Adam, lr=1e-3), partial(SGD, lr=1e-3)])
def test_a_recipe_that_teaches_passes_at_any_rate(classes: int, optimizer: Any) -> None:
    assert verdict(recipe_of(classes, optimizer=optimizer)) == ""


@pytest.mark.parametrize("mistake", [{"augment": (exchanged,)}, {"loss": wrong_class}])
def test_labels_of_other_images_fail(mistake: Any) -> None:
    with pytest.raises(TrainingError, match="nothing learnt, while plain"):
        verdict(recipe_of(**mistake))


def test_a_recipe_that_makes_it_hard_gets_more_steps() -> None:
    tiny_parts = partial(random_resized_crop, area=(0.05, 0.15))
    recipe = recipe_of(
        augment=(tiny_parts, flip, partial(jitter, brightness=0.6, contrast=0.9)),
        optimizer=partial(SGD, lr=1e-2),
        loss=partial(nn.functional.cross_entropy, label_smoothing=0.2),
        seed=8,
    )
    recipe = replace(recipe, data=replace(recipe.data, mix=cutmix))
    found = []
    measured = smoke.learning

    def learning(ctx: TrainContext, before: Tensor) -> float | None:
        found.append(measured(ctx, before) or 0.0)
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "learning", learning)
        assert verdict(recipe) == ""
    first, plain, longer = found
    assert first < smoke.LEARNS
    assert plain > smoke.SURE
    assert longer > smoke.LEARNS


def test_a_rate_of_zero_fails() -> None:
    with pytest.raises(TrainingError, match="no score has changed"):
        verdict(recipe_of(optimizer=partial(SGD, lr=0.0)))


def test_a_network_that_cannot_learn_so_fast_passes_with_a_word() -> None:
    assert "too few to tell" in verdict(recipe_of(model=Blind))


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [(Tiny, 512, LARGEST_BATCH), (Tiny, 24, 24), (Tiny, 4, 4), (Slow, 512, 25)],  # 25 x 0.02 s
)
def test_a_slow_network_gets_smaller_batches(model: Any, batch: int, expected: int) -> None:
    recipe = tiny_recipe(model=model, data={"batch_size": batch})
    made = smoke_version(recipe, RankGroup(ALONE))
    size = made.data.batch_size
    assert size == expected if model is Tiny else SMALLEST_BATCH <= size <= expected
    assert len(sources.load(made.data).train) == STEPS * size


def test_a_recipe_with_patience_is_tested_without() -> None:
    recipe = tiny_recipe(data={"batch_size": 4, "validation": 0.1}, patience=5)
    made = smoke_version(recipe, RankGroup(ALONE))
    assert (made.patience, made.data.validation) == (None, None)


class Imitated(Tiny):
    """As on a processor without instructions for bf16."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            time.sleep(0.2)
        return super().forward(images)


@pytest.mark.parametrize(
    ("model", "precision", "configured", "expected"),
    [
        (Imitated, "bf16", "", "fp32"),
        (Imitated, None, "bf16", "fp32"),
        (Imitated, None, "", None),
        (Tiny, "bf16", "", "bf16"),
        (Tiny, None, "bf16", None),
    ],
)
def test_a_precision_that_a_processor_only_imitates_is_left_out(
    model: Any, precision: Any, configured: str, expected: str | None
) -> None:
    recipe = tiny_recipe(model=model, precision=precision, data={"batch_size": 4})
    made = smoke_version(recipe, RankGroup(World(mixed_precision=configured)))
    assert made.precision == expected


def test_a_network_that_fails_backwards_is_left_to_the_checks_of_every_run() -> None:
    class Refusing(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                raise ValueError("not in training")
            return super().forward(images)

    made = smoke_version(tiny_recipe(model=Refusing, data={"batch_size": 64}), RankGroup(ALONE))
    assert made.data.batch_size == 64  # its own: it may be too few images that it refuses


class InGroups(Tiny):
    """Ghost BatchNorm, say: as many images as groups at least."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) % 16:
            raise ValueError("not in groups of 16")
        return super().forward(images)


def test_a_network_that_takes_no_small_batch_gets_its_own() -> None:
    """It was given 8 images, and told to type another data.batch_size."""
    recipe = tiny_recipe(model=InGroups, data={"batch_size": 32})
    made = smoke_version(recipe, RankGroup(ALONE))
    assert made.data.batch_size == 32
    context_of(made)
