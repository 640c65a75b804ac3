"""A recipe's own functions are tried before training."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import RandAugment, RandomErasing

from launcher import (
    Folder,
    Synthetic,
    alternating_flip,
    crop,
    cutmix,
    cutout,
    ema,
    flip,
    growing,
    jitter,
    mirrored,
    mixup,
    random_resized_crop,
)
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.recipe import Recipe
from launcher.config.slots import Draws, Score
from launcher.data import sources
from launcher.run.train import train_loaded
from launcher.training.model import build_network
from launcher.training.preflight import preflight
from tests.support.helpers import Tiny, context_of, refused, tiny_recipe


def preflighted(recipe: Recipe) -> nn.Module:
    ctx = context_of(recipe)
    preflight(ctx)
    return ctx.state.network


def of_three(logits: Tensor, targets: Tensor, extra: Tensor) -> Tensor:
    return cross_entropy(logits, targets)


def in_a_row(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets).reshape(1)


WEIGHTS = torch.arange(10.0)


def weighted(logits: Tensor, targets: Tensor) -> Tensor:
    return (cross_entropy(logits, targets, reduction="none") * WEIGHTS[targets]).mean()


def divided(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, weight=WEIGHTS + 1)


def test_weights_that_nobody_knows_are_refused_where_micro_batches_would_not_add_up() -> None:
    with refused("divided, which is not the mean over 2 micro-batches", "'none'"):
        preflighted(tiny_recipe(loss=divided, accumulate=2))
    by_torch = partial(cross_entropy, weight=WEIGHTS)
    with refused("class weights of 0 over 2 micro-batches", "positive"):
        preflighted(tiny_recipe(loss=by_torch, accumulate=2))
    preflighted(tiny_recipe(loss=by_torch))
    preflighted(tiny_recipe(loss=weighted, accumulate=2))
    preflighted(tiny_recipe(loss=partial(cross_entropy, label_smoothing=0.1), accumulate=2))


class Across(nn.Module):
    """Normalizes by its batch, or attends to its images as if they were one text."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.norm = nn.BatchNorm2d(8, track_running_stats=kind != "norm")
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=kind != "attention")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        return self.fc(self.encoder(x).mean(1))


@pytest.mark.parametrize(("kind", "notes"), [("norm", 1), ("attention", 1), ("none", 0)])
def test_scores_that_depend_on_the_other_images_are_told(kind: str, notes: int) -> None:
    """Nothing said so but `verify`, and what is measured on 2 ranks is something else."""
    found = preflight(context_of(tiny_recipe(model=partial(Across, kind)))).notes
    assert len(found) == notes
    if notes:
        assert found[0].startswith("Across gives an image other scores beside others than alone")


def unscored(score: Score, images: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (of_three, "of_three fails"),
        (in_a_row, "one number"),
        (partial(cross_entropy, reduction="none"), "one number"),
        (partial(cross_entropy, reduction="sum"), "the mean over the images, not the sum"),
    ],
)
def test_a_loss_that_no_evaluation_can_use_is_refused(loss: Any, message: str) -> None:
    with refused(message):
        preflighted(tiny_recipe(loss=loss, data={"mix": mixup}))


def in_half(images: Tensor, draws: Draws) -> Tensor:
    return images / 2


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (partial(crop, padding=40), "crop fails: ValueError: padding=40 of images of 32"),
        (partial(crop, padding=-1), "crop fails: ValueError: padding=-1"),
        (partial(cutout, fill=300), "cutout fails"),
        (mirrored, "mirrored fails"),
        (in_half, "in_half returns torch.float32 (2, 3, 32, 32) for two images"),
    ],
)
def test_an_augmentation_that_fits_no_images_is_refused(augmentation: Any, message: str) -> None:
    with refused(message):
        preflighted(tiny_recipe(data={"augment": (augmentation,)}))


@pytest.mark.parametrize("mix", [partial(mixup, alpha=0.0), flip])
def test_a_mixing_that_fails_is_refused(mix: Any) -> None:
    with refused(" fails: "):
        preflighted(tiny_recipe(data={"mix": mix}))


def in_place(images: Tensor, draws: Draws) -> Tensor:
    return images.bitwise_not_()


def test_an_augmentation_may_write_where_it_reads() -> None:
    preflighted(tiny_recipe(data={"augment": (in_place,)}))


@pytest.mark.parametrize(("views", "message"), [(flip, "flip fails"), (unscored, "a score")])
def test_views_that_are_no_scores_are_refused(views: Any, message: str) -> None:
    with refused(message):
        preflighted(tiny_recipe(views=views))


class Normed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(3, nn.BatchNorm1d(4))


@pytest.mark.parametrize(("count", "accumulate"), [(101, 1), (103, 2)])
def test_a_last_batch_that_batch_norm_refuses_is_refused_before(
    count: int, accumulate: int
) -> None:
    """It would be met at the end of the first epoch."""
    images = {"source": partial(Synthetic, count=count)}
    last = "1 image over 1 micro-batch:" if accumulate == 1 else "3 images over 2 micro-batches:"
    with refused(f"a last batch of {last}"):
        preflighted(tiny_recipe(model=Normed, data=images, accumulate=accumulate))
    preflighted(tiny_recipe(data=images, accumulate=accumulate))
    preflighted(tiny_recipe(model=Normed, accumulate=accumulate))


def test_the_refusal_comes_before_anything_is_written(tmp_path: Path) -> None:
    loaded = LoadedRecipe(tiny_recipe(loss=in_a_row), "mine", "", "")
    with refused("one number"):
        train_loaded(loaded, RunOptions(runs=tmp_path / "runs", wandb="off"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "loss", [cross_entropy, partial(cross_entropy, weight=torch.arange(10.0), label_smoothing=0.1)]
)
def test_preflight_leaves_the_network_as_it_is(loss: Any) -> None:
    recipe = tiny_recipe(loss=loss, views=mirrored, average=ema)
    network = preflighted(recipe)
    fresh = build_network(recipe, sources.load(recipe.data).train).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in network.state_dict().items())


# At each resolution of the training images

GROWING = {"train_resolution": partial(growing, first=8, last=32, multiple=4)}


class Fewer(Tiny):
    """Makes less scores of smaller images, and nothing in it fails."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[: images.shape[2] // 16])


class Patches(Tiny):
    """As a transformer: takes images whose sides are multiples of 8."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.reshape(len(images), 3, -1, images.shape[2] // 8 * 64))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fewer, "training images of 16 x 16 pixels, at which "),
        (Fewer, "Fewer makes (1, 10) of two of them"),
        (Patches, "training images of 20 x 20 pixels"),  # between the first and the last
        (Patches, "Patches fails: shape '[2, 3, -1, 128]' is invalid"),
    ],
)
def test_a_network_that_takes_only_some_sizes_is_refused(model: Any, message: str) -> None:
    sizes = partial(growing, first=16, last=32, multiple=4)
    with refused(message, "(2, 10)", "data.train_resolution=none"):
        preflighted(tiny_recipe(model=model, epochs=9, data={"train_resolution": sizes}))
    sizes = partial(growing, first=16, last=32)
    preflighted(tiny_recipe(model=Patches, epochs=9, data={"train_resolution": sizes}))


def at_full_size(logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
    teacher = images.flatten(1)[:, : 3 * 32 * 32].reshape(len(images), 3 * 32 * 32)
    return cross_entropy(logits, targets) + 0 * teacher.sum()


def test_a_loss_is_tried_at_each_size() -> None:
    preflighted(tiny_recipe(loss=at_full_size))
    with refused("at_full_size fails"):
        preflighted(tiny_recipe(loss=at_full_size, data=GROWING))


def drawn(progress: float) -> int:
    return int(torch.randint(1, 32, ()))


def test_sizes_that_are_drawn_are_refused() -> None:
    with refused("drawn draws from the global generator of torch", "progress"):
        preflighted(tiny_recipe(data={"train_resolution": drawn}))


def test_what_follows_a_part_that_is_cut_when_it_is_read_gets_smaller_images(
    tmp_path: Path,
) -> None:
    for half in ("train", "test"):
        for label in "ab":
            (tmp_path / half / label).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / half / label / "0.png")
    shift = partial(crop, padding=10)
    images = {
        "source": partial(Folder, size=32),
        "root": str(tmp_path),
        "augment": (random_resized_crop, shift),
        "batch_size": 2,
    }
    model = partial(Tiny, classes=2)
    preflighted(tiny_recipe(model=model, data=images))
    with refused("crop fails: ValueError: padding=10 of images of 8 x 8 pixels"):
        preflighted(tiny_recipe(model=model, data=images | GROWING))
    preflighted(tiny_recipe(model=model, data=images | GROWING | {"augment": (shift,)}))


CALLS: list[int] = []
GENERATOR = numpy.random.default_rng(0)


def rolled_by_calls(images: Tensor, draws: Draws) -> Tensor:
    CALLS.append(1)
    return images.roll(len(CALLS), -1)


def with_mean_of_others(images: Tensor, draws: Draws) -> Tensor:
    return ((images.float() + images.float().mean(0)) / 2).to(torch.uint8)


def by_the_first_draw(images: Tensor, draws: Draws) -> Tensor:
    return images.flip(-1) if draws.fresh[0, 0] < 0.5 else images


class Counting(nn.Module):
    calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image.roll(self.calls, -1)


class Sometimes(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.roll(numpy.random.randint(9), -1) if torch.rand(()) < 0.5 else image


@pytest.mark.parametrize(
    ("augmentation", "said"),
    [
        *(
            (function, f"{function.__name__}, by which an image becomes another one alone")
            for function in (rolled_by_calls, with_mean_of_others, by_the_first_draw, Counting)
        ),
        (Sometimes, "Sometimes draws from the global generator of numpy"),
    ],
)
def test_an_augmentation_of_several_images_at_once_is_refused(augmentation: Any, said: str) -> None:
    """Ranks and resumed runs had other images than 1 rank that was never interrupted."""
    with refused(said, "any number of ranks"):
        preflight(context_of(tiny_recipe(data={"augment": (augmentation,)})))


def with_reversed(images: Tensor, partners: Tensor, random: Generator) -> tuple[Tensor, float]:
    return (images + images.flip(0)) / 2, 0.5


def of_its_own(images: Tensor, partners: Tensor, random: Generator) -> tuple[Tensor, float]:
    weight = float(GENERATOR.random())
    return images * weight + partners * (1 - weight), weight


@pytest.mark.parametrize("mix", [with_reversed, of_its_own])
def test_a_mixing_with_others_than_the_partners_is_refused(mix: Any) -> None:
    """The labels of the partners were mixed all the same."""
    with refused(f"{mix.__name__}, by which an image becomes another one alone"):
        preflight(context_of(tiny_recipe(data={"mix": mix})))


@pytest.mark.parametrize(
    "augment",
    [
        (flip, crop, cutout, jitter, random_resized_crop, alternating_flip),
        (RandAugment, partial(RandomErasing, p=1.0)),
    ],
)
@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_what_looks_at_each_image_is_not(augment: Any, mix: Any) -> None:
    preflight(context_of(tiny_recipe(data={"augment": augment, "mix": mix})))
