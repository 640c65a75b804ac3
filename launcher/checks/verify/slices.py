"""A few of a recipe's images, in a file that every process of `verify` opens as its source."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy
import torch

from launcher.config.recipe import Images, Recipe
from launcher.data import sources
from launcher.data.images import Data, ImageSet
from launcher.errors import UserError

EPOCHS = 3
MOST_EACH, LEAST_EACH = 8, 3  # images of one micro-batch, about


@dataclass(frozen=True)
class Sizes:
    """Numbers of images, in batches that divide evenly neither by ranks nor into epochs."""

    train: int
    test: int
    batch: int


def choose_sizes(recipe: Recipe, ranks: int, steps: int, each: int = MOST_EACH) -> Sizes:
    """For three epochs of `steps` steps together, the last of each with a smaller batch.

    Ranks and passes get unequal parts of every batch and of the test images; two images at least,
    which BatchNorm needs. `each` is how many images a micro-batch has where the recipe allows it,
    and how many a rank evaluates.
    """
    parts = ranks * recipe.passes
    batch = min(recipe.data.batch_size, each * parts + 1)
    smaller = 2 * parts + 1
    last = smaller if smaller < batch else batch
    steps_per_epoch = -(-steps // EPOCHS)
    return Sizes((steps_per_epoch - 1) * batch + last, each * ranks + 1, batch)


def own_images(recipe: Recipe, sizes: Sizes) -> Data:
    """The recipe's images where they are on disk, else embedded ones of their shape.

    Raises `UserError` where their shape is not known.
    """
    images = replace(recipe.data, validation=None)
    with suppress(UserError):  # of images whose shape is not known: the declared fallback stays
        count = max(sizes.train, 5 * sizes.test)
        images = replace(images, fallback=sources.stand_in(images, count).source)
    return sources.load(images, downloads=False)


def take(data: Data, sizes: Sizes) -> Data:
    """Some images of each split, in order but not the first ones, which may be of one class."""
    return replace(data, train=_take(data.train, sizes.train), test=_take(data.test, sizes.test))


def _take(images: ImageSet, count: int) -> ImageSet:
    count = min(count, len(images))
    random = numpy.random.default_rng(0)
    chosen = torch.from_numpy(random.permutation(len(images))[:count]).sort().values
    return ImageSet(images.pixels(chosen), images.labels[chosen], images.classes)


def fingerprint(data: Data) -> int:
    """A checksum of images, labels and classes, in their order."""
    total = crc32(repr(data.train.classes).encode())
    for split in (data.train, data.test):
        for tensor in (split.tensor, split.labels):
            total = crc32(tensor.contiguous().numpy().tobytes(), total)
    return total


def save(data: Data, path: Path) -> None:
    """Write the images where `Slice` finds them."""
    splits = {
        name: (split.tensor, split.labels)
        for name, split in (("train", data.train), ("test", data.test))
    }
    torch.save({**splits, "classes": data.train.classes}, path)


class Slice:
    """The images of a file that `save` has written, as a data set of torchvision has them."""

    def __init__(self, root: str = "", train: bool = True, *, path: str) -> None:
        """Read one split; `root` is not used."""
        content: dict[str, Any] = torch.load(path, weights_only=True)
        self.data, self.targets = content["train" if train else "test"]
        self.classes = list(content["classes"])


def sliced(images: Images, path: Path, batch: int) -> Images:
    """A recipe's `Images` with the file as their source."""
    images = sources.of_source(images, partial(Slice, path=str(path)))
    return replace(images, fallback=None, batch_size=batch, validation=None)
