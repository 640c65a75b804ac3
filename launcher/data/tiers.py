"""Where the images are during a training: on the device, in the host's memory, or on disk.

What a recipe leaves to `auto` is decided by what fits. It changes no pixel, so no rank need know
what another one has decided.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from launcher.config.recipe import Images
from launcher.data import local_copy
from launcher.data.sources import Data, ImageSet
from launcher.data.storage import Encoded, Mapped, Stored
from launcher.utils.text import count, sizes


def on_device(data: Data, images: Images, device: torch.device) -> Data:
    """The images on the device, but for those that stay elsewhere."""
    if images.tier == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if bytes_of(data) > free / 2:  # the other half is for the training
            own = None if data.validation is None else _in_host(data.validation)
            train, test = _in_host(data.train), _in_host(data.test)
            data = replace(data, train=train, test=test, validation=own)
    return data.to(device)


def describe(data: Data) -> str:
    """Where the images are, and which are missing; empty where all are simply on the device."""
    left_out = sum(len(half.left_out) for half in data.halves.values())
    missing = f"{count(left_out, 'broken picture')} left out" if left_out else ""
    copied = f"from the copy of the pack in {local_copy.folder()}" if _is_copied(data) else ""
    return "; ".join(filter(None, (_where(data), copied, missing)))


def _is_copied(data: Data) -> bool:
    """Whether the images are in a file of which this node has a copy of its own."""
    images = data.train.images
    path = images.path if isinstance(images, Mapped) else getattr(images, "root", None)
    return bool(path) and local_copy.folder() in Path(str(path)).parents


def _where(data: Data) -> str:
    kinds = {type(half.images) for half in data.halves.values() if isinstance(half.images, Stored)}
    if any(issubclass(kind, Encoded) for kind in kinds):
        return "decoded from disk for each step"
    return f"{sizes(bytes_of(data))} in the memory of the host" if Mapped in kinds else ""


def bytes_of(data: Data) -> int:
    """Of all images that are not encoded."""
    kept = (half.images for half in data.halves.values() if not isinstance(half.images, Encoded))
    return sum(math.prod(images.shape) for images in kept)


def _in_host(images: ImageSet) -> ImageSet:
    if not isinstance(images.images, Tensor):
        return images
    return replace(images, images=Mapped(torch.arange(len(images)), images.images))
