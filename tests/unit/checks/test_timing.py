"""What `check --world-size N` measures and prints."""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from launcher import Synthetic, cutmix
from launcher.checks.timing import measure, scaling_lines
from launcher.config.plan import make_plan
from launcher.config.recipe import Recipe
from launcher.data import sources
from launcher.training.model import build_network
from tests.support.helpers import Tiny, context_of, tiny_recipe


def planned(recipe: Recipe, world_size: int) -> tuple[list[str], int]:
    data = sources.load(recipe.data)
    plan = make_plan(
        recipe, world_size=world_size, train_images=len(data.train), evaluated_images=1
    )
    network = build_network(recipe, data.train)
    lines = scaling_lines(recipe, plan, network, data)
    return lines, sum(p.numel() for p in network.parameters())


def worlds(lines: list[str]) -> list[str]:
    rows = [line.split() for line in lines if line.split()[-1].endswith("%")]
    return [row[0] for row in rows]


def test_every_number_of_ranks_that_the_batch_feeds_is_predicted_for_every_cluster() -> None:
    lines, _ = planned(tiny_recipe(), world_size=5)
    assert worlds(lines) == 2 * ["1", "5", "8"]  # the batch has 10 images
    assert lines[-1] == "  1,024 ranks need a batch of at least 1,024 images"


def test_the_device_and_the_assumptions_are_named() -> None:
    lines, parameters = planned(tiny_recipe(), world_size=1)
    assert "assumed links" in lines[0]
    assert f"{parameters * 4 / 1e6:.2f} MB of gradients" in lines[1]
    assert "CPU, " in lines[1]
    assert "in fp32," in lines[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16 itself")
def test_half_precision_of_a_gpu_is_measured_in_that_of_the_cpu_and_says_so() -> None:
    lines, _ = planned(tiny_recipe(precision="pure_fp16"), world_size=1)
    assert "in pure_bf16 (for pure_fp16)" in lines[1]


def test_mixing_accumulation_and_several_optimizer_groups_are_measured_as_well() -> None:
    def loss(logits: Tensor, probabilities: Tensor) -> Tensor:
        return -(logits.log_softmax(dim=1) * probabilities).sum(dim=1).mean()

    recipe = tiny_recipe(accumulate=2, loss=loss, data={"mix": cutmix, "batch_size": 20})
    lines, _ = planned(recipe, world_size=1)
    assert worlds(lines) == 2 * ["1", "8"]  # 2 passes x 8 ranks is the most that 20 images feed


class Counting(Tiny):
    """Remembers the number of images of each forward pass."""

    sizes: ClassVar[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return super().forward(images)


def test_a_rank_is_measured_with_its_own_images_and_all_its_passes() -> None:
    ctx = context_of(tiny_recipe(model=Counting, accumulate=2))
    Counting.sizes.clear()
    compute = measure(ctx)
    assert set(Counting.sizes) == {5}
    assert compute.total > 2 * compute.backward > 0


def test_a_batch_of_more_images_than_stand_in_for_them_is_measured_whole() -> None:
    ctx = context_of(tiny_recipe(model=Counting, data={"source": partial(Synthetic, count=8)}))
    Counting.sizes.clear()
    measure(replace(ctx, plan=replace(ctx.plan, batch_size=20)))
    assert set(Counting.sizes) == {20}


def test_the_measured_network_is_in_training_mode() -> None:
    seen = []

    class Watched(nn.Flatten):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(self.training)
            return super().forward(images)

    def build() -> nn.Module:
        return nn.Sequential(Watched(), nn.Linear(3 * 32 * 32, 10))

    recipe = tiny_recipe(model=build)
    data = sources.load(recipe.data)
    network = build_network(recipe, data.train)
    seen.clear()
    plan = make_plan(recipe, world_size=2, train_images=60, evaluated_images=1)
    scaling_lines(recipe, plan, network, data)
    assert set(seen) == {True}
