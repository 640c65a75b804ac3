"""Images of one size in one file, which is mapped: `launcher pack` writes it, `Packed` reads it.

A folder holds for each half `HALF.images`, uint8 `(n, h, w, c)` without a header, and
`HALF.labels`, int64 `(n,)`, both little-endian; and `pack.json`, which is written last and says
what belongs to it: so a pack that was interrupted is none.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from launcher.errors import UserError
from launcher.utils import json_text

MANIFEST = "pack.json"
VERSION = 1  # of what the files mean


@dataclass(frozen=True)
class PackedHalf:
    """What the manifest says of one half.

    `images` and `labels` are the digests of its two files, and `listed` that of the source's list
    from which they were made (`packing`). `skipped` are the pictures that could not be read.
    """

    count: int
    images: str
    labels: str
    listed: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What a pack holds, and of what it was made."""

    source: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    halves: dict[str, PackedHalf]
    version: int = VERSION

    def text(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Packed:
    """What `launcher pack` made of another source, in the folder `root`; nothing is copied.

    Raises `FileNotFoundError` where there is no folder `root`, and `UserError` where it holds no
    whole pack.
    """

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        """Map the images of one half: train, test, or another one that was packed."""
        if not Path(root).is_dir():
            raise FileNotFoundError(root)
        manifest = read_manifest(Path(root))
        half = manifest.halves.get(split)
        if half is None:
            raise UserError(
                f"{root}, a pack without the half {split!r}",
                expected=f"one of {', '.join(manifest.halves)}",
                instead="pack it from a source that has it, or type data.validation=0.1",
            )
        self.classes = list(manifest.classes)
        self.path = str(images_file(Path(root), split))
        self.data = map_images(self.path, (half.count, *manifest.shape))
        self.targets = _labels(labels_file(Path(root), split), half.count)


def images_file(root: Path, half: str) -> Path:
    """Where the pixels of a half are."""
    return root / f"{half}.images"


def labels_file(root: Path, half: str) -> Path:
    """Where the labels of a half are."""
    return root / f"{half}.labels"


def read_manifest(root: Path) -> Manifest:
    """Raises `UserError` where there is none, or one that is damaged or not of this version."""
    path = root / MANIFEST
    try:
        content: dict[str, Any] = json_text.read(path)
        if content["version"] == VERSION:
            return _checked(content)
        found = f"{path}, of version {str(content['version'])[:20]} in place of {VERSION}"
        instead = "pack it again into another folder"
    except FileNotFoundError:
        found = f"{root}, in which there is no {MANIFEST}"
        instead = f"type launcher pack SOURCE {root}, which goes on where it stopped"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found, instead = f"{path}, which is damaged", "pack it again into another folder"
    raise UserError(found, expected="a folder that launcher pack has finished", instead=instead)


def _checked(content: dict[str, Any]) -> Manifest:
    """Raises what odd content raises."""
    height, width, channels = map(_number, content["shape"])
    classes, halves = content["classes"], dict[str, PackedHalf]()
    for name, about in content["halves"].items():
        half = PackedHalf(**{**about, "skipped": tuple(about["skipped"])})
        texts = (half.images, half.labels, half.listed, *half.skipped)
        if not name.isidentifier() or not all(isinstance(text, str) for text in texts):
            raise ValueError(name)  # as one with a path out of the folder
        _number(half.count)
        halves[name] = half
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(classes)
    source = str(content["source"])
    return Manifest(source, (height, width, channels), tuple(classes), halves)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**48:
        raise ValueError(value)
    return value


def map_images(path: str, shape: tuple[int, int, int, int]) -> Tensor:
    """uint8 `(n, h, w, c)`, which must not be written to; raises `UserError` for another size."""
    _refuse_size(Path(path), math.prod(shape))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            return torch.from_numpy(numpy.memmap(path, numpy.uint8, "r", shape=shape))
    except OSError as error:
        raise _unreadable(Path(path), error) from None


def _labels(path: Path, count: int) -> Tensor:
    _refuse_size(path, 8 * count)
    try:
        return torch.from_numpy(numpy.fromfile(path, "<i8"))
    except OSError as error:
        raise _unreadable(path, error) from None


def _refuse_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise _unreadable(path, error) from None
    if found != size:
        is_other = "is no file" if path.exists() else "is not there"
        what = is_other if found is None else f"has {found:,} bytes"
        raise UserError(
            f"{path}, which {what}",
            expected=f"{size:,} bytes, as {MANIFEST} says",
            instead="pack it again into another folder",
        )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}, which cannot be read ({error.strerror})",
        expected="a file of a pack",
        instead="see to whom it belongs, or pack again into another folder",
    )
