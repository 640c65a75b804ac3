"""The order of the images and the micro_batches of the ranks, as pure functions."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic, crop, cutmix, flip
from launcher.config.plan import make_plan
from launcher.data.batches import (
    Batches,
    MicroBatch,
    Normalize,
    epoch_order,
    layer_seeds,
    mix_partners,
    shard_bounds,
)
from launcher.data.images import ImageSet
from tests.support.world_worker import Small

COUNT = 45


def image_set() -> ImageSet:
    """Images of one colour each: image i has the value i everywhere."""
    values = torch.arange(COUNT, dtype=torch.uint8)
    images = values[:, None, None, None].expand(-1, 4, 4, 3).contiguous()
    return ImageSet(images, torch.arange(COUNT) % 10, tuple("abcdefghij"))


def recipe(**changes: Any) -> Recipe:
    # Mean 0 and a standard deviation of 1/255 leave a pixel its own value.
    data = Images(Synthetic, 16, mean=(0.0,) * 3, std=(1 / 255,) * 3, **changes)
    return Recipe(model=Small, data=data, optimizer=partial(SGD, lr=0.1), epochs=3)


def micro_batches(recipe: Recipe, world_size: int, rank: int, epoch: int) -> list[list[MicroBatch]]:
    plan = make_plan(recipe, world_size=world_size, train_images=COUNT, evaluated_images=10)
    normalize = Normalize(recipe.data, torch.Size((4, 4, 3)), torch.zeros(()), contiguous=False)
    batches = Batches(image_set(), recipe, plan, normalize, rank)
    return [step for _, step in batches.epoch(epoch)]


def test_each_epoch_visits_every_image_once_in_its_own_order() -> None:
    orders = [epoch_order(7, epoch, COUNT) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(COUNT))
    assert not torch.equal(*orders)
    assert torch.equal(orders[0], epoch_order(7, 1, COUNT))
    assert not torch.equal(orders[0], epoch_order(8, 1, COUNT))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_ranks_together_see_exactly_the_global_batch(world_size: int, accumulate: int) -> None:
    wanted = torch.split(epoch_order(0, 2, COUNT), 16)
    ranks = [
        micro_batches(replace(recipe(), accumulate=accumulate), world_size, rank, epoch=2)
        for rank in range(world_size)
    ]
    for step, order in enumerate(wanted):
        parts = [micro_batch for rank in ranks for micro_batch in rank[step]]
        seen = [
            micro_batch.images[:, 0, 0, 0].round().int()
            for micro_batch in parts
            if micro_batch.weight
        ]
        assert sorted(torch.cat(seen).tolist()) == sorted(order.tolist())
        assert sum(micro_batch.weight for micro_batch in parts) == pytest.approx(1)
        for micro_batch in parts:
            if micro_batch.weight:
                assert micro_batch.weight == len(micro_batch.images) / len(order)


def test_a_rank_without_an_image_gets_one_that_counts_nothing() -> None:
    ranks = [micro_batches(replace(recipe(), accumulate=4), 4, rank, epoch=1) for rank in range(4)]
    last = [micro_batch for rank in ranks for micro_batch in rank[-1]]
    assert [len(micro_batch.images) for micro_batch in last] == [1] * 16  # for 13 images
    assert sum(micro_batch.weight == 0 for micro_batch in last) == 3


def test_augmentation_belongs_to_the_image_and_not_to_the_rank() -> None:
    augmented = recipe(augment=(flip, partial(crop, padding=1)), mix=cutmix)
    alone = micro_batches(augmented, 1, 0, epoch=1)
    ranks = [micro_batches(augmented, 3, rank, epoch=1) for rank in range(3)]
    for step, (whole,) in enumerate(alone):
        parts = [rank[step][0] for rank in ranks]
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))


def test_partners_are_the_next_images_of_the_same_batch() -> None:
    order = torch.tensor([5, 3, 9, 1, 7])
    assert mix_partners(order, 2).tolist() == [3, 5, 1, 9, 7]
    assert mix_partners(order, 5).tolist() == [3, 9, 1, 7, 5]


def test_piece_bounds_divide_without_gap_or_overlap() -> None:
    for count in range(40):
        for parts in range(1, 12):
            bounds = [shard_bounds(count, parts, index) for index in range(parts)]
            assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
            sizes = {stop - start for start, stop in bounds}
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalize_does_what_its_formula_says(contiguous: bool, dtype: torch.dtype) -> None:
    data = Images(Synthetic, 4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.randint(0, 256, (6, 5, 7, 3), dtype=torch.uint8)
    like = torch.zeros((), dtype=dtype)
    result = Normalize(data, images.shape[1:], like, contiguous)(images)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    wanted = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    assert result.dtype == dtype
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5  # bfloat16 has 8 bits of precision
    torch.testing.assert_close(result.float(), wanted, rtol=tolerance, atol=tolerance)
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    assert result.is_contiguous(memory_format=memory_format)


def test_random_layers_have_another_seed_in_each_step_epoch_and_rank() -> None:
    seeds = [
        seed
        for recipe_seed in (0, 1)
        for epoch in (1, 2)
        for rank in (0, 1)
        for seed in layer_seeds(recipe_seed, epoch, rank, steps=5)
    ]
    assert len(set(seeds)) == len(seeds) == 40
    assert layer_seeds(0, 1, 0, steps=5) == layer_seeds(0, 1, 0, steps=9)[:5]
