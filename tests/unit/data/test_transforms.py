"""torchvision's transforms in a recipe: the same images on any number of ranks."""

import random
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from launcher import Draws
from launcher.config.plan import make_plan
from launcher.config.serialize import resolve
from launcher.data import sources
from launcher.data.batches import Batches, Normalize
from launcher.training.preflight import preflight
from tests.support.helpers import context_of, refused, tiny_recipe

TRANSFORMS = (
    v2.TrivialAugmentWide,
    partial(v2.RandAugment, num_ops=3),
    partial(v2.AutoAugment, policy=v2.AutoAugmentPolicy.CIFAR10),
    partial(v2.ColorJitter, brightness=0.4),
    partial(v2.RandomErasing, p=0.5),
    partial(v2.RandomCrop, size=32, padding=4),
)


def images_of(rank: int, ranks: int, augment: tuple[Callable[..., object], ...]) -> Tensor:
    """What a rank sees in its first two epochs, from a generator that was left anywhere."""
    recipe = tiny_recipe(data={"augment": augment})
    data = sources.load(recipe.data)
    plan = make_plan(recipe, world_size=ranks, train_images=len(data.train), evaluated_images=10)
    normalize = Normalize(recipe.data, data.train.images.shape[1:], torch.zeros(()), False)
    batches = Batches(data.train, recipe, plan, normalize, rank)
    steps = [batch for epoch in (1, 2) for _, (batch,) in batches.epoch(epoch)]
    return torch.stack([batch.images for batch in steps])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_two_ranks_see_the_images_that_one_sees(transform: Callable[..., object]) -> None:
    whole = images_of(0, 1, (transform,))
    torch.rand(3)
    halves = [images_of(rank, 2, (transform,)) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves, dim=1))
    assert not torch.equal(whole, images_of(0, 1, ())), "it changes something"
    assert not torch.equal(whole[:10].sort(0).values, whole[10:].sort(0).values), "each epoch anew"


def test_the_generator_of_the_process_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    images_of(0, 1, (v2.TrivialAugmentWide,))
    assert torch.equal(torch.rand(2), expected)


def test_the_settings_of_a_transform_are_in_the_config_and_an_instance_is_answered() -> None:
    recipe = tiny_recipe(data={"augment": (partial(v2.RandAugment, num_ops=3),)})
    (its,) = resolve(recipe)["data"]["augment"]
    assert its["call"].endswith(":RandAugment")
    assert its["num_ops"] == 3
    with refused("a RandAugment that is built already", "partial(RandAugment, ...)"):
        resolve(tiny_recipe(data={"augment": (v2.RandAugment(),)}))


def by_torch(images: Tensor, draws: Draws) -> Tensor:
    return images.flip(-1) if torch.rand(()) < 0.5 else images


def by_numpy(images: Tensor, draws: Draws) -> Tensor:
    return images.flip(-1) if numpy.random.random() < 0.5 else images


def by_python(images: Tensor, draws: Draws) -> Tensor:
    return images.flip(-1) if random.random() < 0.5 else images


def within(images: Tensor, draws: Draws) -> Tensor:
    result: Tensor = v2.RandomHorizontalFlip()(images)
    return result


def mixed(images: Tensor, partners: Tensor, random: numpy.random.Generator) -> tuple[Tensor, float]:
    share = float(torch.rand(()))
    return images * share + partners * (1 - share), share


@pytest.mark.parametrize(
    ("function", "generator"),
    [(by_torch, "torch"), (by_numpy, "numpy"), (by_python, "Python"), (within, "torch")],
)
def test_a_function_that_draws_from_a_global_generator_is_answered(
    function: Callable[..., Tensor], generator: str
) -> None:
    ctx = context_of(tiny_recipe(data={"augment": (function,)}))
    said = f"{function.__name__} draws from the global generator of {generator}"
    with refused(said, "draws.fresh", "torchvision.transforms.v2"):
        preflight(ctx)


def test_a_mixing_that_draws_from_a_global_generator_is_answered() -> None:
    with refused(
        "mixed draws from the global generator of torch", "the generator that it is given"
    ):
        preflight(context_of(tiny_recipe(data={"mix": mixed})))


def beyond(
    images: Tensor, partners: Tensor, random: numpy.random.Generator
) -> tuple[Tensor, float]:
    return images, 1.5


def test_a_weight_of_mixing_outside_of_0_and_1_is_answered() -> None:
    with refused("beyond", "a weight in [0, 1]"):
        preflight(context_of(tiny_recipe(data={"mix": beyond})))


@pytest.mark.parametrize(
    "transform", [partial(v2.Resize, size=16), partial(v2.ToDtype, dtype=torch.float32)]
)
def test_another_shape_or_type_is_answered(
    transform: Callable[..., object],
) -> None:
    with refused("images of the same shape and type"):
        preflight(context_of(tiny_recipe(data={"augment": (transform,)})))
