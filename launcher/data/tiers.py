"""Where the images are during a training: on the device, in the host's memory, or on disk.

Decided twice, in this order:

1. `prepared`, when their files are known. Pictures are decoded now, or for each step: auto leaves
   them on disk where their pixels would take more than half of the host's free memory, or where
   `random_resized_crop` crops the stored pictures. With `data.tier=host`, and for a pack unless the
   tier is `device`, the pixels stay in the host's memory.
2. `on_device`, when the device is known. All other pixels go to its memory; auto leaves them in the
   host's where they would take more than half of the device's free memory.

The tier changes no pixel, so the ranks need not agree on it.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from launcher.config.recipe import Images
from launcher.data import local_copy, storage
from launcher.data.augment import is_cut
from launcher.data.images import Data, ImageSet
from launcher.data.limits import fits_in_memory, refuse_too_large
from launcher.data.storage import Encoded, Mapped, Stored
from launcher.distributed import signals
from launcher.errors import UserError
from launcher.utils.terminal import progress
from launcher.utils.text import count, sizes, some

_LOG = logging.getLogger(__name__)


def prepared(data: Data, wanted: Images) -> Data:
    """Leave out broken pictures, if asked to, and decode each split or leave it on disk.

    Raises `UserError` where pictures that are to be decoded do not fit into memory.
    """

    def ready(split: ImageSet, name: str) -> ImageSet:
        if isinstance(split.images, Encoded):
            if wanted.on_broken == "skip":
                split = _without_broken(split, split.images, name)
            split = split if _stays_on_disk(split, wanted) else _decoded(split, name)
        if wanted.tier == "host":
            split = _in_host(split)
        return _out_of_file(split) if wanted.tier == "device" else split

    return data.each(ready)


def on_device(data: Data, wanted: Images, device: torch.device) -> Data:
    """Move the images to the device, except those that stay in the host's memory or on disk."""
    if wanted.tier == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if bytes_of(data) > free / 2:  # the other half is for the training
            data = data.each(lambda split, name: _in_host(split))
    return data.to(device)


def describe(data: Data) -> str:
    """Where the images are and how many are left out; empty where all are on the device."""
    left_out = sum(len(split.left_out) for split in data.splits.values())
    missing = f"{count(left_out, 'broken picture')} left out" if left_out else ""
    copied = f"from the copy of the pack in {local_copy.folder()}" if _is_copied(data) else ""
    return "; ".join(filter(None, (_where(data), copied, missing)))


def bytes_of(data: Data) -> int:
    """The bytes of all images that are not encoded."""
    kept = (split.images for split in data.splits.values() if not isinstance(split.images, Encoded))
    return sum(math.prod(images.shape) for images in kept)


# The decisions


def _stays_on_disk(split: ImageSet, wanted: Images) -> bool:
    """Whether pictures are decoded for each step, and not once before the training."""
    if wanted.tier != "auto":
        return wanted.tier == "disk"
    cuts_originals = bool(wanted.augment) and is_cut(wanted.augment[0])
    return cuts_originals or not fits_in_memory(len(split), split.shape[0])


def _in_host(split: ImageSet) -> ImageSet:
    """Keep the pixels in the host's memory, from which each batch is copied."""
    return replace(split, images=storage.as_stored(split.images))


def _out_of_file(split: ImageSet) -> ImageSet:
    """Copy the pixels of a mapped pack into memory."""
    if not isinstance(split.images, Mapped):
        return split
    return replace(split, images=split.images.array[split.images.places])


# Decoding


def _without_broken(split: ImageSet, encoded: Encoded, name: str) -> ImageSet:
    """Leave out what cannot be decoded; every picture is tried."""
    with progress(f"trying {name} pictures", len(split), "picture") as advance:
        broken = {}
        for place, why in enumerate(storage.broken(encoded)):
            if why:
                broken[place] = why
            advance(1)
            signals.end_if_stopped(f"the trial of all {name} pictures")
    if not broken:
        return split
    if len(broken) == len(split):
        raise UserError(
            f"{encoded.root} holds {count(len(broken), f'broken {name} picture')} and no other: "
            f"{some(list(broken.values()), 1)}",
            expected="at least one picture that can be read",
            instead="name another folder with data.root=FOLDER",
            setting=("data.root", "FOLDER"),
        )
    listed = some(list(broken.values()))
    _LOG.warning("%s left out: %s", count(len(broken), "broken picture"), listed)
    whole = torch.tensor([place for place in range(len(split)) if place not in broken])
    return replace(split.take(whole), left_out=tuple(split.files[place] for place in broken))


def _decoded(split: ImageSet, name: str) -> ImageSet:
    """Decode all pictures: uint8 `(n, size, size, 3)`."""
    encoded = split.images
    assert isinstance(encoded, Encoded)
    refuse_too_large(encoded.root, len(encoded), encoded.size)
    pixels = torch.empty(encoded.shape, dtype=torch.uint8)
    with progress(f"decoding {name} pictures", len(encoded), "picture") as advance:
        for part, decoded in storage.read_in_parts(encoded, storage.parts_of(len(encoded))):
            pixels[part] = decoded
            advance(len(decoded))
            signals.end_if_stopped(f"the decoding of {name} pictures")
    return replace(split, images=pixels)


# In words


def _where(data: Data) -> str:
    kinds = {
        type(split.images) for split in data.splits.values() if isinstance(split.images, Stored)
    }
    if any(issubclass(kind, Encoded) for kind in kinds):
        return "decoded from disk for each step"
    return f"{sizes(bytes_of(data))} in the memory of the host" if Mapped in kinds else ""


def _is_copied(data: Data) -> bool:
    """Whether the images are in a file of which this node has a copy of its own."""
    images = data.train.images
    path = images.path if isinstance(images, Mapped) else getattr(images, "root", None)
    return bool(path) and local_copy.folder() in Path(str(path)).parents
