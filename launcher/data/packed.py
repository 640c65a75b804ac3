"""Images in one file, which is mapped: `launcher pack` writes it, `Packed` reads it.

A folder holds for each split `SPLIT.labels`, int64 `(n,)`, and its images. Images of one size are
in `SPLIT.images`, uint8 `(n, h, w, c)` without a header. Encoded pictures are in `SPLIT.pictures`,
one after the other; `SPLIT.offsets`, int64 `(n + 1,)`, says where each begins, and `SPLIT.names`
holds the names of their files, each followed by a zero byte. Numbers are little-endian.
`pack.json` is written last and lists all parts, so an interrupted pack is not taken for a complete
one.
"""

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from launcher.data.limits import refuse_smaller_scale
from launcher.data.storage import Encoded, Joined
from launcher.errors import UserError
from launcher.utils import json_text

MANIFEST = "pack.json"
VERSION = 1  # of what the files mean


@dataclass(frozen=True)
class PackedSplit:
    """What the manifest says of one split.

    `images` (of `SPLIT.images` or `SPLIT.pictures`), `labels`, `offsets` and `names` are the
    digests of its files, and `listed` is that of the source's images as `packing` computes it.
    `skipped` are the pictures that could not be read; `bytes` is the size of `SPLIT.pictures`.
    """

    count: int
    images: str
    labels: str
    listed: str
    skipped: tuple[str, ...] = ()
    bytes: int = 0
    offsets: str = ""
    names: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a pack holds, and of what it was made; encoded pictures have no `shape`."""

    source: str
    shape: tuple[int, int, int] | None
    classes: tuple[str, ...]
    splits: dict[str, PackedSplit]
    version: int = VERSION

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Packed:
    """What `launcher pack` made of another source, in the folder `root`; nothing is copied.

    Images of one size are `data`. Encoded pictures are `encoded`, and are decoded to `size` pixels
    square after scaling to `scaled_to`, as by `Folder`. Raises `FileNotFoundError` where there is
    no folder `root`, and `UserError` where it holds no complete pack.
    """

    data: Tensor
    path: str

    def __init__(
        self,
        root: str,
        split: str = "train",
        download: bool = False,
        *,
        size: int | None = None,
        scaled_to: int | None = None,
    ) -> None:
        """Map the images of one split: train, test, or another one that was packed."""
        if not Path(root).is_dir():
            raise FileNotFoundError(root)
        manifest = read_manifest(Path(root))
        about = manifest.splits.get(split)
        if about is None:
            raise UserError(
                f"{root}, a pack without the split {split!r}",
                expected=f"one of {', '.join(manifest.splits)}",
                instead="pack it from a source that has it, or type data.validation=0.1",
            )
        self.root = root
        self.classes = list(manifest.classes)
        self.targets = _numbers(file_of(Path(root), split, "labels"), about.count)
        self.encoded: Encoded | None = None
        if manifest.shape is None:
            size = 32 if size is None else size
            refuse_smaller_scale(size, scaled_to)
            self.encoded = _joined(Path(root), split, about, size, scaled_to or size)
        else:
            _refuse_other(root, manifest.shape, size, scaled_to)
            self.path = str(file_of(Path(root), split, "images"))
            self.data = map_file(self.path, (about.count, *manifest.shape))


def _refuse_other(
    root: str, shape: tuple[int, int, int], size: int | None, scaled_to: int | None
) -> None:
    """Refuse to scale what has a size, unless it is the one that is asked for."""
    is_packed = size is None or shape[:2] == (size, size)
    if not is_packed or scaled_to not in (None, size):
        given = f"scaled_to={scaled_to}" if is_packed else f"size={size}"
        raise UserError(
            f"data.source.{given} of {root}, whose images are packed as {shape[0]} x {shape[1]}",
            expected="the packed size, or a pack of encoded pictures",
            instead="leave it out, or pack again with --encoded",
        )


def _joined(root: Path, name: str, split: PackedSplit, size: int, scaled_to: int) -> Joined:
    """Raises `UserError` for offsets that do not fit the pictures, and for too few names."""
    path = file_of(root, name, "pictures")
    pictures = map_file(str(path), (split.bytes,))
    offsets = _numbers(file_of(root, name, "offsets"), split.count + 1)
    ends = [int(offsets[0]), int(offsets[-1])]
    if ends != [0, split.bytes] or not bool((offsets[1:] > offsets[:-1]).all()):
        how = (
            "do not increase" if ends == [0, split.bytes] else f"go from {ends[0]:,} to {ends[1]:,}"
        )
        raise UserError(
            f"{file_of(root, name, 'offsets')}, whose numbers {how}",
            expected=f"where each picture begins in the {split.bytes:,} bytes of {path}",
            instead="pack it again into another folder",
        )
    names = _names(file_of(root, name, "names"), split.count)
    return Joined(torch.arange(split.count), str(path), names, size, scaled_to, pictures, offsets)


def file_of(root: Path, split: str, kind: str) -> Path:
    """Where the images, labels, pictures, offsets or names of a split are."""
    return root / f"{split}.{kind}"


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
    """From JSON; invalid content raises ValueError, KeyError, TypeError or AttributeError."""
    shape = None
    if content["shape"] is not None:
        height, width, channels = map(_number, content["shape"])
        shape = height, width, channels
    classes, splits = content["classes"], dict[str, PackedSplit]()
    for name, about in content["splits"].items():
        split = PackedSplit(**{**about, "skipped": tuple(about["skipped"])})
        texts = (
            split.images,
            split.labels,
            split.listed,
            split.offsets,
            split.names,
            *split.skipped,
        )
        if not name.isidentifier() or not all(isinstance(text, str) for text in texts):
            raise ValueError(name)  # as one with a path out of the folder
        _number(split.count)
        if shape is None:
            _number(split.bytes)
        splits[name] = split
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(classes)
    source = str(content["source"])
    return Manifest(source, shape, tuple(classes), splits)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**48:
        raise ValueError(value)
    return value


def map_file(path: str, shape: tuple[int, ...]) -> Tensor:
    """uint8, which must not be written to; raises `UserError` for a file of another size."""
    _refuse_size(Path(path), math.prod(shape))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            return torch.from_numpy(numpy.memmap(path, numpy.uint8, "r", shape=shape))
    except OSError as error:
        raise _unreadable(Path(path), error) from None


def _numbers(path: Path, count: int) -> Tensor:
    _refuse_size(path, 8 * count)
    try:
        return torch.from_numpy(numpy.fromfile(path, "<i8"))
    except OSError as error:
        raise _unreadable(path, error) from None


def _names(path: Path, count: int) -> tuple[str, ...]:
    try:
        whole = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise _unreadable(path, error) from None
    *names, rest = os.fsdecode(whole).split("\0")
    if len(names) != count or rest:
        raise UserError(
            f"{path}, which has {len(names):,} names" if whole else f"{path}, which is not there",
            expected=f"{count:,}, as {MANIFEST} says, each followed by a zero byte",
            instead="pack it again into another folder",
        )
    return tuple(names)


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
        instead="check its owner and permissions, or pack again into another folder",
    )
