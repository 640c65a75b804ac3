"""The plan: how many steps of how many images, and the last refusals before a device is taken."""

import random
from dataclasses import replace
from typing import Any

import pytest

from launcher.config import overrides
from launcher.config.plan import Plan, make_plan
from launcher.data.batches import shard_bounds
from launcher.errors import UserError
from tests.support.helpers import refused, tiny_recipe, words_to_type


def plan_of(
    train_images: int = 100,
    batch_size: int = 10,
    world_size: int = 1,
    max_steps: int | None = None,
    log_every: int | None = None,
    **changes: Any,
) -> Plan:
    return make_plan(
        tiny_recipe(data={"batch_size": batch_size}, **changes),
        world_size=world_size,
        train_images=train_images,
        evaluated_images=20,
        max_steps=max_steps,
        log_every=log_every,
    )


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(50000, 64, 782), (100, 10, 10), (101, 10, 11), (9, 3, 3)]
)
def test_an_epoch_has_a_step_for_every_batch_and_one_for_the_rest(
    images: int, batch: int, steps: int
) -> None:
    plan = plan_of(images, batch, epochs=3)
    assert plan.steps_per_epoch == steps
    assert plan.steps == 3 * steps
    assert plan.last_step == plan.steps
    assert plan.last_epoch == 3


@pytest.mark.parametrize(("images", "last"), [(100, 10), (101, 1), (109, 9)])
def test_the_last_batch_of_each_epoch_holds_the_rest(images: int, last: int) -> None:
    plan = plan_of(images)
    for epoch in (1, 2):
        sizes = [plan.step_images(step) for step in plan.epoch_steps(epoch)]
        assert sizes[:-1] == [10] * (len(sizes) - 1)
        assert sizes[-1] == last
        assert sum(sizes) == images


def test_a_batch_larger_than_the_data_is_the_data() -> None:
    plan = plan_of(train_images=30, batch_size=64)
    assert (plan.batch_size, plan.steps_per_epoch, plan.step_images(1)) == (30, 1, 30)


def test_progress_is_that_of_the_middle_of_a_step() -> None:
    plan = plan_of()
    assert [plan.fraction(step) for step in (1, 10, 20)] == pytest.approx([0.025, 0.475, 0.975])


def test_progress_depends_on_the_whole_training_even_if_it_is_cut_short() -> None:
    assert plan_of(max_steps=3).fraction(3) == plan_of().fraction(3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_numbers_of_steps_do_not_depend_on_the_ranks(world_size: int) -> None:
    assert replace(plan_of(world_size=world_size), world_size=1) == plan_of()


def test_the_steps_of_the_epochs_follow_each_other() -> None:
    plan = plan_of(epochs=3)
    assert [list(plan.epoch_steps(epoch))[::9] for epoch in (1, 2, 3)] == [
        [1, 10],
        [11, 20],
        [21, 30],
    ]


@pytest.mark.parametrize(
    ("max_steps", "last_epoch", "steps_in_it"), [(1, 1, 1), (10, 1, 10), (11, 2, 1), (99, 2, 10)]
)
def test_max_steps_ends_the_run_within_an_epoch(
    max_steps: int, last_epoch: int, steps_in_it: int
) -> None:
    plan = plan_of(max_steps=max_steps)
    assert plan.last_step == min(max_steps, 20)
    assert plan.last_epoch == last_epoch
    assert len(plan.epoch_steps(last_epoch)) == steps_in_it


def test_the_first_step_each_interval_and_each_end_of_an_epoch_are_reported() -> None:
    plan = plan_of(log_every=4)
    reported = [step for step in range(1, plan.steps + 1) if plan.is_reported(step)]
    assert reported == [1, 4, 8, 10, 12, 16, 20]


def test_the_last_step_of_a_run_cut_short_is_reported() -> None:
    assert plan_of(log_every=4, max_steps=7).is_reported(7)


@pytest.mark.parametrize(("images", "expected"), [(100, 1), (1000, 5), (50000, 50)])
def test_without_a_wish_the_loss_is_read_about_twenty_times_an_epoch(
    images: int, expected: int
) -> None:
    assert plan_of(images).log_every == expected


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 64, "world_size": 4}, "64 = 4 ranks x 16 images"),
        ({"batch_size": 10, "world_size": 4}, "10 = 4 ranks x 2-3 images"),
        ({"batch_size": 64, "accumulate": 2}, "64 = 1 rank x 32 images x 2 passes"),
    ],
)
def test_the_global_batch_is_described_as_ranks_times_images(
    changes: dict[str, int], text: str
) -> None:
    assert plan_of(**changes).describe_batch() == text


@pytest.mark.parametrize(("world_size", "accumulate"), [(16, 1), (4, 4), (1, 11)])
def test_a_batch_with_less_than_an_image_for_each_pass_is_refused(
    world_size: int, accumulate: int
) -> None:
    pieces = world_size * accumulate
    with refused("a global batch of 10 images", f"type data.batch_size={pieces}"):
        plan_of(world_size=world_size, accumulate=accumulate)
    assert plan_of(batch_size=pieces, world_size=world_size, accumulate=accumulate).steps


def test_a_batch_with_exactly_one_image_for_each_rank_is_accepted() -> None:
    assert plan_of(world_size=10).describe_batch() == "10 = 10 ranks x 1 image"


def test_more_ranks_than_training_images_are_refused_without_naming_a_batch_size() -> None:
    with pytest.raises(UserError) as caught:
        plan_of(train_images=8, batch_size=64, world_size=16)
    assert "8 " in caught.value.given
    for word in words_to_type(caught.value):
        size = overrides.override(tiny_recipe(), [word]).data.batch_size
        plan_of(train_images=8, batch_size=size, world_size=16)  # what is named has to work
    assert "processes" in caught.value.instead


@pytest.mark.parametrize(
    ("images", "batch", "world_size", "accumulate"),
    [(101, 10, 4, 1), (50001, 100, 8, 1), (103, 50, 2, 3), (23, 11, 4, 2), (9, 8, 8, 1)],
)
def test_sync_batch_norm_with_a_small_last_batch_names_sizes_that_work(
    images: int, batch: int, world_size: int, accumulate: int
) -> None:
    changes: dict[str, Any] = {"accumulate": accumulate, "sync_batch_norm": True}
    with pytest.raises(UserError) as caught:
        plan_of(images, batch, world_size, **changes)
    message = str(caught.value)
    assert f"a last batch of {images % batch} images" in message
    assert "sync_batch_norm" in message
    named = [int(word) for word in message.replace("=", " ").split() if word.isdigit()]
    sizes = named[named.index(images % batch) + 3 :]  # behind the numbers of ranks and passes
    assert 1 <= len(sizes) <= 2
    for size in sizes:
        plan_of(images, size, world_size, **changes)
    for size in range(min(sizes) + 1, max(sizes)):  # no nearer size works
        with pytest.raises(UserError):
            plan_of(images, size, world_size, **changes)


def test_without_sync_batch_norm_a_small_last_batch_is_accepted() -> None:
    assert plan_of(101, 10, 4).step_images(11) == 1


def test_sync_batch_norm_with_a_last_batch_for_all_is_accepted() -> None:
    assert plan_of(104, 10, 4, sync_batch_norm=True).step_images(11) == 4


@pytest.mark.parametrize("seed", range(40))
def test_the_pieces_over_ranks_and_passes_partition_every_global_batch(seed: int) -> None:
    draw = random.Random(seed)
    world_size, accumulate = draw.randint(1, 9), draw.randint(1, 4)
    batch = draw.randint(world_size * accumulate, 80)
    images = draw.randint(batch, 400)
    plan = plan_of(images, batch, world_size, accumulate=accumulate)
    for step in plan.epoch_steps(1):
        size = plan.step_images(step)
        taken: list[int] = []
        for rank in range(world_size):
            for number in range(accumulate):
                start, stop = shard_bounds(size, plan.num_micro_batches, number * world_size + rank)
                taken += range(start, stop)
                assert stop - start in (
                    size // plan.num_micro_batches,
                    -(-size // plan.num_micro_batches),
                )
        assert sorted(taken) == list(range(size))
    assert sum(map(plan.step_images, plan.epoch_steps(1))) == images
