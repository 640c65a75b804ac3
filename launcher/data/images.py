"""The images of a training, of whatever source: pixels, labels and classes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from launcher.data import storage
from launcher.data.storage import Stored

EvaluatedOn = Literal["test", "val"]


@dataclass(frozen=True)
class ImageSet:
    """Images as uint8 `(n, height, width, channels)`, labels as int64 `(n,)`, on one device.

    `Stored` images are read only when they are needed. `files` says where each comes
    from, if from a file of its own; `left_out` are broken ones, which are not among them.
    """

    images: Tensor | Stored
    labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def tensor(self) -> Tensor:
        """All of them: `(n, height, width, channels)`; stored ones are read."""
        return self.pixels(slice(None))

    def pixels(self, places: Tensor | Sequence[int] | slice) -> Tensor:
        """The images at the places `(k,)`, on the device: uint8 `(k, height, width, channels)`."""
        if isinstance(self.images, Tensor):
            return self.images[places]
        chosen = torch.arange(len(self))[places.cpu() if isinstance(places, Tensor) else places]
        return storage.read(self.images, chosen).to(self.labels.device)

    def in_parts(self, parts: Iterable[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Each part of the images as `pixels` gives it; stored ones are read one part ahead."""
        if isinstance(self.images, Tensor):
            yield from ((part, self.images[part]) for part in parts)
        else:
            for part, pixels in storage.read_in_parts(self.images, parts):
                yield part, pixels.to(self.labels.device)

    def take(self, places: Tensor) -> "ImageSet":
        """The images at the places `(n,)`, in that order."""
        files = tuple(self.files[place] for place in places.tolist()) if self.files else ()
        images, labels = self.images, self.labels[places]
        selected = images[places] if isinstance(images, Tensor) else images.at(places)
        return replace(self, images=selected, labels=labels, files=files)

    def to(self, device: torch.device) -> "ImageSet":
        """The same images on another device; stored ones are not moved."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return replace(self, images=images, labels=self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """Training and test images, and those for validation where the recipe has some.

    `held_out` are the places of the validation images in the source's training split, where they
    are from there. `fallback` says why the images are not those that were asked for. `digest` tells
    the source's images from others, wherever they are kept now; empty where nobody has looked.
    """

    train: ImageSet
    test: ImageSet
    name: str
    fallback: str | None = None
    validation: ImageSet | None = None
    held_out: Tensor | None = None
    digest: str = ""

    @property
    def evaluated(self) -> ImageSet:
        """The images that are evaluated after each epoch, and by which the best epoch is chosen."""
        return self.test if self.validation is None else self.validation

    @property
    def evaluated_on(self) -> EvaluatedOn:
        """Which images those are: the prefix of the metrics' names."""
        return "test" if self.validation is None else "val"

    @property
    def splits(self) -> dict[str, ImageSet]:
        """The images by name: training, validation, test."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"training": self.train, **validation, "test": self.test}

    def to(self, device: torch.device) -> "Data":
        """The same images on another device."""
        return self.each(lambda split, name: split.to(device))

    def each(self, change: Callable[[ImageSet, str], ImageSet]) -> "Data":
        """Apply `change` to each split; it is also given the name in `splits`."""
        changed = {name: change(split, name) for name, split in self.splits.items()}
        train, test = changed["training"], changed["test"]
        return replace(self, train=train, test=test, validation=changed.get("validation"))


def digest_of(data: Data, left_out: Iterable[tuple[str, ...]]) -> str:
    """A digest of all labels, of every n-th image, and of the broken pictures left out.

    Of images as their source offers them: those that are decoded here have other bytes than the
    same ones that stay on another machine's disk.
    """
    whole = blake2b(repr(list(left_out)).encode(), digest_size=8)
    for split in data.splits.values():
        whole.update(repr((tuple(split.images.shape), split.classes)).encode())
        whole.update(split.labels.cpu().numpy().tobytes())
        whole.update(_sample(split))
    return whole.hexdigest()


def are_same_images(one: ImageSet, other: ImageSet) -> bool:
    """Whether two splits hold the same images in the same order, by their labels and a sample."""
    return (
        one.images.shape == other.images.shape
        and torch.equal(one.labels, other.labels)
        and _sample(one) == _sample(other)
    )


def _sample(split: ImageSet) -> bytes:
    """The bytes of less than a thousand images, since each may be a file on a file server."""
    some = range(0, len(split), max(1, len(split) // 500))
    if isinstance(split.images, Tensor):
        return split.images[:: some.step].cpu().numpy().tobytes()
    return split.images.contents(list(some))
