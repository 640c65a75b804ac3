"""One process of a node reads the images; the others map its copy.

The first process of the node reads the files, or downloads them, and writes what it read into a
temporary file below TMPDIR (else /tmp). Every process of the node maps that file, so that the
images are in its memory once, and one process per node asks a shared file server. The file has no
name, only an open descriptor that the others find in /proc: no other user can put a file in its
place, and nothing is left of it when the last process of the node has ended, however it ended.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from launcher.config.recipe import Images
from launcher.data import local_copy, sources
from launcher.data.images import Data, ImageSet
from launcher.data.packed import map_file
from launcher.data.storage import Encoded, Joined, Mapped, Stored
from launcher.distributed.process_group import RankGroup

_LOG = logging.getLogger(__name__)
_KEY = "images"
_KINDS: dict[str, type[Stored]] = {kind.__name__: kind for kind in (Encoded, Joined, Mapped)}
_NO_COPY = "no copy of the images for this node, so each process reads them: %s"


def load(data: Images, group: RankGroup, seed: int = 0) -> Data:
    """The images of a recipe, read once for all processes of this node.

    `seed` is the recipe's; it decides which validation images are held out. Called within
    `RankGroup.sync_errors`, by which a `UserError` of the one that reads reaches all.
    """
    if group.world.local_size == 1:
        return _read(data, seed)
    if group.world.local_rank == 0:
        loaded = _read(data, seed)
        with _written(loaded) as place:
            group.broadcast_on_node(_KEY, place)
            if place:
                loaded = _map(place) or loaded
                group.node_barrier(_KEY)
        return loaded
    place = group.broadcast_on_node(_KEY)
    if not place:
        return _read(data, seed)
    mapped = _map(place)
    group.node_barrier(_KEY)
    if mapped is None and group.world.local_rank == 1:
        _LOG.warning(_NO_COPY, "it belongs to a process that cannot be seen from here")
    return mapped or _read(data, seed)


def _read(data: Images, seed: int) -> Data:
    return sources.load(local_copy.on_this_node(data), seed=seed)


@contextmanager
def _written(loaded: Data) -> Iterator[str]:
    """Write the images into a file; yields where it is while it is open, empty if that failed."""
    content = {
        "splits": {
            name: (_as_content(split.images), split.labels, split.files, split.left_out)
            for name, split in loaded.splits.items()
        },
        "classes": loaded.train.classes,  # all splits have the same: `sources.check`
        "name": loaded.name,
        "fallback": loaded.fallback,
        "held_out": loaded.held_out,
        "digest": loaded.digest,
    }
    with ExitStack() as held:
        try:
            file = held.enter_context(tempfile.TemporaryFile())
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            torch.save(content, path)
            place = json.dumps([path, *_identity(path)])
        except (OSError, RuntimeError) as error:  # the latter is torch's, for a full disk
            _LOG.warning(_NO_COPY, error)
            place = ""
        yield place


def _map(place: str) -> Data | None:
    """Map the file; None where the process is in another container, so /proc does not show it."""
    path, *identity = json.loads(place)
    try:
        if _identity(path) != identity:
            return None
        content = torch.load(path, mmap=True, weights_only=True)
    except (OSError, RuntimeError):
        return None
    splits = {
        name: ImageSet(_from_content(images), labels, content["classes"], files, left_out)
        for name, (images, labels, files, left_out) in content["splits"].items()
    }
    return Data(
        splits["training"],
        splits["test"],
        content["name"],
        content["fallback"],
        splits.get("validation"),
        content["held_out"],
        content["digest"],
    )


def _as_content(images: Tensor | Stored) -> Any:
    """The images as the file holds them: the pixels, or where they are stored."""
    if isinstance(images, Tensor):
        return images
    about = {f.name: getattr(images, f.name) for f in fields(images)}
    path = None
    if isinstance(images, Mapped | Joined):
        path = images.path if isinstance(images, Mapped) else images.root
        about["array"] = images.array.shape if path else images.array
    return type(images).__name__, path, about


def _from_content(content: Any) -> Tensor | Stored:
    if isinstance(content, Tensor):
        return content
    kind, path, about = content
    if path:
        about["array"] = map_file(path, tuple(about["array"]))
    return _KINDS[kind](**about)


def _identity(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_dev, status.st_ino]
