"""Where the images are changes nothing that is trained: on the device, on the host, on disk."""

import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from launcher import (
    Draws,
    Folder,
    Images,
    Recipe,
    Synthetic,
    crop,
    cutmix,
    flip,
    growing,
    jitter,
    random_resized_crop,
)
from launcher.config.plan import make_plan
from launcher.config.slots import Augmentation
from launcher.data import sources, storage, tiers
from launcher.data.augment import resized
from launcher.data.batches import Batches, MicroBatch, Normalize, epoch_order
from launcher.data.decoding import Cut, cut_out
from launcher.data.images import Data
from launcher.data.rng import FRESH, make_rng
from launcher.data.storage import Encoded, Mapped, Reading
from launcher.distributed.signals import listening
from launcher.errors import StoppedBeforeTrainingError
from launcher.utils import terminal
from tests.support.helpers import HALF, complaint, refused, tiny_recipe

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 training pictures and 5 test pictures, as PNG, of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    random = numpy.random.default_rng(0)
    for half, count in (("train", 20), ("test", 5)):
        for kind in ("ant", "bee", "cat"):
            (root / half / kind).mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(12, 40, 2)
                pixels = random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(root / half / kind / f"{number:02}.png")
    return root


def images_of(folder: Path, **changes: Any) -> Images:
    images = Images(partial(Folder, size=SIZE), batch_size=7, mean=HALF, std=HALF, root=str(folder))
    return replace(images, **changes)


def batches_of(recipe: Recipe, data: Data, world_size: int = 1, rank: int = 0) -> Batches:
    plan = make_plan(
        recipe, world_size=world_size, train_images=len(data.train), evaluated_images=1
    )
    normalize = Normalize(recipe.data, data.train.shape, torch.zeros(()), True)
    return Batches(data.train, recipe, plan, normalize, rank)


def trained_on(recipe: Recipe, epochs: tuple[int, ...] = (1, 2), **world: int) -> list[MicroBatch]:
    """All micro-batches of one rank, in their order."""
    batches = batches_of(recipe, sources.load(recipe.data), **world)
    return [batch for epoch in epochs for _, step in batches.epoch(epoch) for batch in step]


def equal(some: list[MicroBatch], others: list[MicroBatch]) -> bool:
    return all(
        one.images.equal(other.images)
        and one.targets.equal(other.targets)
        and one.weight == other.weight
        for one, other in zip(some, others, strict=True)
    )


# What is trained


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(
    "changes", [{}, {"augment": (flip, partial(crop, padding=2)), "mix": cutmix}]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_are_the_same_to_the_bit(
    folder: Path, tier: str, changes: dict[str, Any], accumulate: int
) -> None:
    made = []
    for where in ("device", tier):
        images = images_of(folder, tier=where, **changes)
        recipe = replace(tiny_recipe(accumulate=accumulate), data=images)
        made += [trained_on(recipe, world_size=2, rank=rank) for rank in (0, 1)]
    assert equal(made[0], made[2])
    assert equal(made[1], made[3])


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_images_that_are_held_out_are_the_same(folder: Path, tier: str) -> None:
    one, other = (
        sources.load(images_of(folder, tier=where, validation=0.3), seed=3)
        for where in ("device", tier)
    )
    for half, images in one.splits.items():
        assert images.tensor.equal(other.splits[half].tensor)
        assert images.labels.equal(other.splits[half].labels)
    assert one.train.files == other.train.files


def test_an_epoch_that_is_entered_in_its_middle_goes_on_alike(folder: Path) -> None:
    recipe = replace(tiny_recipe(), data=images_of(folder, tier="disk", augment=(crop,)))
    whole = trained_on(recipe, (2,))
    batches = batches_of(recipe, sources.load(recipe.data))
    last = 9 + 4  # of 9 steps of the first epoch, and 4 of this one
    rest = [batch for _, step in batches.epoch(2, after=last) for batch in step]
    assert equal(whole[4:], rest)


# Parts of pictures


def test_a_part_that_is_cut_out_is_the_same_on_any_rank(folder: Path) -> None:
    images = images_of(folder, augment=(random_resized_crop, flip))
    recipe = replace(tiny_recipe(), data=images)
    (one, *_) = trained_on(recipe)
    two = [trained_on(recipe, world_size=2, rank=rank)[0].images for rank in (0, 1)]
    assert one.images.equal(torch.cat(two))


def test_a_part_is_cut_out_of_the_picture_as_it_is_stored(tmp_path: Path) -> None:
    """A picture of 8 x 80 pixels, of which only the middle would be left otherwise."""
    for half in ("train", "test"):
        (tmp_path / half / "a").mkdir(parents=True)
        pixels = numpy.zeros((8, 80, 3), dtype=numpy.uint8)
        pixels[:, :16], pixels[:, 64:] = 255, 255
        Image.fromarray(pixels).save(tmp_path / half / "a" / "wide.png")
    smallest = partial(random_resized_crop, area=(0.05, 0.1), ratio=(1.0, 1.0))
    images = images_of(tmp_path, augment=(smallest,), batch_size=1)
    seen = [
        float(trained_on(replace(tiny_recipe(seed=seed), data=images))[0].images.max())
        for seed in range(20)
    ]
    assert max(seen) == 1.0, "a white part was seen"
    assert min(seen) == -1.0, "and a black one"


def test_cutting_a_tensor_is_cutting_each_picture() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 24, 24, 3), dtype=torch.uint8, generator=random)
    fresh = torch.rand(50, 4, generator=random)
    draws = Draws(fresh, fresh, epoch=1)
    together = random_resized_crop(images.permute(0, 3, 1, 2), draws, area=(0.02, 1.0))
    for image, share, cut in zip(
        images, Cut((0.02, 1.0), (0.75, 1.333)).shares(fresh), together, strict=True
    ):
        alone = cut_out(Image.fromarray(image.numpy()), share, 24).permute(2, 0, 1)
        assert (alone.int() - cut.int()).abs().max() <= 1, "one of them rounds in fixed point"


def test_a_part_is_cut_out_of_a_picture_that_is_turned_upright() -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=numpy.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    turned = Image.fromarray(numpy.rot90(pixels).copy())
    turned.info["exif"] = exif.tobytes()
    share = torch.tensor([0.5, 0.4, 0.2, 0.7])
    assert torch.equal(cut_out(turned, share, 16), cut_out(Image.fromarray(pixels), share, 16))


@pytest.mark.parametrize(
    "settings", [{"area": (0.0, 1.0)}, {"area": (0.5, 0.2)}, {"ratio": (-1.0, 1.0)}]
)
def test_parts_that_no_picture_has_are_refused(settings: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    draws = Draws(torch.rand(1, 4), torch.rand(1, 4), epoch=1)
    with pytest.raises(ValueError, match="the smaller one first"):
        random_resized_crop(images, draws, **settings)


def test_wrong_parts_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.py"
    path.write_text(RECIPE.format(root=str(folder)))
    words = (str(path), "--runs", str(tmp_path / "runs"), "--wandb", "off")
    said = complaint(capsys, *words, "data.augment.random_resized_crop.area=0,1")
    assert "area=(0.0, 1.0)" in said
    assert not (tmp_path / "runs").exists()


RECIPE = """
from functools import partial
from torch import nn
from torch.optim import SGD
from launcher import Folder, Images, Recipe, random_resized_crop

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))

recipe = Recipe(
    model=network,
    data=Images(
        partial(Folder, size=16), 8, (0.5,) * 3, (0.5,) * 3, root={root!r},
        augment=(random_resized_crop,),
    ),
    optimizer=partial(SGD, lr=0.01),
    epochs=1,
)
"""


# Training images that grow

GROWING = {"train_resolution": partial(growing, first=8, last=16, multiple=4)}  # 8, 12, 16


def sides(batches: list[MicroBatch]) -> list[int]:
    assert all(batch.images.shape[2] == batch.images.shape[3] for batch in batches)
    return sorted({batch.images.shape[2] for batch in batches})


@pytest.mark.parametrize("augment", [(flip, partial(crop, padding=2)), (), (jitter,)])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_small_images_are_the_same_to_the_bit_on_any_tier_and_rank(
    folder: Path, tier: str, augment: tuple[Augmentation, ...]
) -> None:
    changes = {"augment": augment, "mix": cutmix, **GROWING}
    made = []
    for where in ("device", tier):
        images = images_of(folder, tier=where, **changes)
        recipe = replace(tiny_recipe(epochs=3), data=images)
        for epoch, side in ((1, 8), (2, 12), (3, 16)):
            made.append(trained_on(recipe, (epoch,)))
            assert sides(made[-1]) == [side]
    assert all(map(equal, made[:3], made[3:]))
    one = trained_on(recipe, (2,))
    ranks = [trained_on(recipe, (2,), world_size=3, rank=rank) for rank in range(3)]
    for step, whole in enumerate(one[:-1]):  # the last batch has an image that counts nothing
        parts = [rank[step] for rank in ranks]
        assert whole.images.equal(torch.cat([part.images for part in parts]))
        assert whole.targets.equal(torch.cat([part.targets for part in parts]))


def test_images_at_their_full_size_are_those_of_a_training_without(folder: Path) -> None:
    grown = replace(tiny_recipe(epochs=3), data=images_of(folder, augment=(flip,), **GROWING))
    plain = replace(tiny_recipe(epochs=3), data=images_of(folder, augment=(flip,)))
    assert equal(trained_on(grown, (3,)), trained_on(plain, (3,)))
    for epoch in (1, 2):  # the same order and draws as well, but for the size
        smaller, whole = trained_on(grown, (epoch,)), trained_on(plain, (epoch,))
        assert all(s.targets.equal(w.targets) for s, w in zip(smaller, whole, strict=True))


def test_a_part_is_cut_out_at_once_at_the_size_of_the_epoch(folder: Path) -> None:
    """Of the picture as it is stored, and not of what was cut out at the full size."""
    cut = partial(random_resized_crop, area=(0.1, 0.3))
    images = images_of(folder, augment=(cut,), batch_size=60, **GROWING)
    recipe = replace(tiny_recipe(epochs=3), data=images)
    data = sources.load(images)
    encoded = data.train.images
    assert isinstance(encoded, Encoded)
    for epoch, side in ((1, 8), (2, 12), (3, 16)):
        (made,) = trained_on(recipe, (epoch,))
        order = epoch_order(recipe.seed, epoch, 60)
        random = make_rng(FRESH, recipe.seed, epoch).random((1, 60, 4), dtype=numpy.float32)
        shares = Cut((0.1, 0.3), (0.75, 1.333)).shares(torch.from_numpy(random)[0])
        for place, picture in zip(order.tolist(), made.images, strict=True):
            with Image.open(Path(encoded.root, encoded.files[place])) as stored:
                wanted = cut_out(stored, shares[place], side)
            assert picture.permute(1, 2, 0).equal(wanted.float() * (1 / 127.5) - 1)


@pytest.mark.parametrize("first", [(random_resized_crop,), (crop,)])
def test_an_epoch_of_small_images_goes_on_in_its_middle(
    folder: Path, first: tuple[Augmentation, ...]
) -> None:
    """Of a run that had read ahead into an epoch of another size, and of one that begins there."""
    images = images_of(folder, tier="disk", augment=(*first, flip), **GROWING)
    recipe = replace(tiny_recipe(epochs=3), data=images)
    batches = batches_of(recipe, sources.load(recipe.data))
    whole = [batch for epoch in (1, 2) for _, step in batches.epoch(epoch) for batch in step]
    assert sides(whole[:9]) == [8]
    assert sides(whole[9:]) == [12]
    assert equal(whole[9:], trained_on(recipe, (2,)))
    begun = batches_of(recipe, sources.load(recipe.data))
    rest = [batch for _, step in begun.epoch(2, after=9 + 4) for batch in step]
    assert equal(whole[9 + 4 :], rest)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_is_resized_alike_beside_any_others(channels: int) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 20, 20, channels), dtype=torch.uint8, generator=random)
    for size in (7, 12, 20, 33):
        together = resized(images, size)
        assert together.shape == (9, size, size, channels)
        assert together.dtype == torch.uint8
        for number in range(9):
            assert resized(images[number : number + 1], size)[0].equal(together[number])
        # As augmentations leave them: the channels before the pixels.
        planes = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert resized(planes, size).equal(together)
        exact = interpolate(
            images.permute(0, 3, 1, 2).double(), (size, size), mode="bilinear", antialias=True
        )
        assert (together.permute(0, 3, 1, 2) - exact).abs().max() <= 1, "fixed point"
    assert resized(images, 20) is images
    assert resized(images, None) is images


# Reading


def test_not_more_is_read_ahead_than_was_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Counted(Reading):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            begun.append(len(arguments[1]))
            super().__init__(*arguments, **options)

    monkeypatch.setattr("launcher.data.batches.Reading", Counted)
    recipe = replace(tiny_recipe(), data=images_of(folder, tier="disk", prefetch=3))
    batches = batches_of(recipe, sources.load(recipe.data))
    for number, _ in enumerate(batches.epoch(1), start=1):
        assert len(begun) == min(number + 3, 18)
    for number, _ in enumerate(batches.epoch(2), start=10):
        assert len(begun) == min(number + 3, 18)


def test_the_threads_that_read_leave_the_others_their_own(folder: Path) -> None:
    before = torch.get_num_threads()
    storage.reading_threads.cache_clear()
    torch.set_num_threads(2)
    try:
        pool = storage.reading_threads()
        both = threading.Barrier(2)

        def names() -> str:
            both.wait(10)
            return threading.current_thread().name

        assert len(set(pool.map(lambda _: names(), range(2)))) == 2
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        pool.shutdown()
    finally:
        torch.set_num_threads(before)
        storage.reading_threads.cache_clear()


def test_a_picture_that_breaks_during_the_training_is_named(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    for path in folder.rglob("*.png"):
        target = root / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    recipe = replace(tiny_recipe(), data=images_of(root, tier="disk"))
    data = sources.load(recipe.data)
    (root / "train" / "bee" / "07.png").write_bytes(b"no picture any more")
    with refused("train/bee/07.png cannot be read as a picture", "repair"):
        list(batches_of(recipe, data).epoch(1))


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_broken_pictures_are_left_out_if_asked(
    folder: Path, tmp_path: Path, tier: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folder.rglob("*.png"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    odd = tmp_path / "train" / "ant" / "03.png"
    odd.write_bytes(odd.read_bytes()[:50])
    with refused("train/ant/03.png"):
        list(batches_of(tiny_recipe(), sources.load(images_of(tmp_path, tier=tier))).epoch(1))
    data = sources.load(images_of(tmp_path, tier=tier, on_broken="skip"))
    assert len(data.train) == 59
    assert data.train.left_out == ("train/ant/03.png",)
    assert "train/ant/03.png" not in data.train.files
    assert data.train.labels.bincount().tolist() == [19, 20, 20]
    whole = sources.load(images_of(folder))
    kept = [place for place in range(60) if place != 3]
    assert data.train.tensor.equal(whole.train.tensor[kept])
    assert "1 broken picture left out" in tiers.describe(data)
    held_out = sources.load(images_of(tmp_path, tier=tier, on_broken="skip", validation=0.2))
    assert "1 broken picture left out" in tiers.describe(held_out)
    assert "1 broken picture left out: " in caplog.text


def test_where_all_are_broken_there_is_nothing_to_train_on(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"text")
    with refused("holds 60 broken training pictures and no other", "no known format", "data.root="):
        sources.load(images_of(tmp_path, on_broken="skip"))


# Progress and signals, before the first step


def test_what_is_done_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_OF_A_LINE", 0.0)
    sources.load(images_of(folder, on_broken="skip"))
    said = capsys.readouterr().err
    assert f"scanning {folder / 'train'}: 3 of 3 class folders\n" in said
    assert "trying training pictures: 60 of 60 pictures\n" in said
    assert "decoding test pictures: 15 of 15 pictures\n" in said


def test_a_signal_ends_the_decoding(folder: Path) -> None:
    wanted = images_of(folder)
    with listening(ends_process=False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedBeforeTrainingError, match="SIGTERM"):
            sources.load(wanted)


# Which tier


def test_what_does_not_fit_into_memory_stays_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(sources.load(images_of(folder)).train.images, Tensor)
    monkeypatch.setattr(tiers, "fits_in_memory", lambda count, size: count < 60)
    data = sources.load(images_of(folder))
    assert isinstance(data.train.images, Encoded)
    assert isinstance(data.test.images, Tensor)
    assert "decoded from disk" in tiers.describe(data)


def test_other_sources_have_nothing_on_disk() -> None:
    images = tiny_recipe().data
    with refused("data.tier=disk of Synthetic", "data.tier=host"):
        sources.load(replace(images, tier="disk"))
    with refused("data.on_broken=skip of Synthetic", "data.on_broken=stop"):
        sources.load(replace(images, on_broken="skip"))
    assert isinstance(sources.load(replace(images, tier="host")).train.images, Mapped)


def test_what_stands_in_for_pictures_on_disk_is_in_memory(tmp_path: Path) -> None:
    images = images_of(
        tmp_path / "nowhere", tier="disk", on_broken="skip", fallback=partial(Synthetic, size=8)
    )
    assert isinstance(sources.load(images).train.images, Tensor)
    assert isinstance(sources.load(sources.stand_in(images, 20)).train.images, Tensor)


# Which images


def labels_of(sampling: Literal["uniform", "balanced"], epoch: int = 1) -> Tensor:
    images = Images(Imbalanced, batch_size=8, mean=HALF, std=HALF, sampling=sampling)
    recipe = replace(tiny_recipe(), data=images)
    return torch.cat([batch.targets for batch in trained_on(recipe, (epoch,))])


class Imbalanced:
    """40 images of the first class, 8 of the second, none of the third, 2 of the last."""

    classes = ("a", "b", "c", "d")

    def __init__(self, train: bool = True) -> None:
        self.targets = [0] * 40 + [1] * 8 + [3] * 2
        self.data = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 4, 4, 3)


def test_balanced_sampling_visits_all_classes_equally_often() -> None:
    assert labels_of("uniform").bincount().tolist() == [40, 8, 0, 2]
    counts = labels_of("balanced").bincount()
    assert counts.sum() == 50
    assert counts[2] == 0
    assert sorted(counts.tolist()) == [0, 16, 17, 17]
    assert not labels_of("balanced").equal(labels_of("balanced", epoch=2))


def test_an_image_that_comes_again_is_augmented_anew() -> None:
    images = Images(
        Imbalanced, 8, (0.0,) * 3, (1 / 255,) * 3, sampling="balanced", augment=(brightened,)
    )
    recipe = replace(tiny_recipe(), data=images)
    batches = trained_on(recipe, (1,))
    labels = torch.cat([batch.targets for batch in batches])
    seen = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])[labels == 3]
    assert len(seen) >= 16
    assert len(set(seen.tolist())) > 8, "of two images"


def brightened(images: Tensor, draws: Draws) -> Tensor:
    return images + (draws.fresh[:, :1, None, None] * 100).byte()


@pytest.mark.parametrize("mix", [None, cutmix])
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_balanced_sampling_is_the_same_on_two_ranks(folder: Path, tier: str, mix: Any) -> None:
    augment = (random_resized_crop, flip) if tier == "disk" else (crop,)
    images = images_of(folder, tier=tier, sampling="balanced", augment=augment, mix=mix)
    recipe = replace(tiny_recipe(), data=images)
    one = trained_on(recipe)
    two = [trained_on(recipe, world_size=2, rank=rank) for rank in (0, 1)]
    for whole, *parts in zip(one, *two, strict=True):
        assert whole.images.equal(torch.cat([part.images for part in parts if part.weight]))
        assert whole.targets.equal(torch.cat([part.targets for part in parts if part.weight]))
