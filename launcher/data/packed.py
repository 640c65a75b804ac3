"""Images of one size in one file, which is mapped: `launcher pack` writes it, `Packed` reads it.

A folder holds for each half `HALF.images`, uint8 `(n, h, w, c)` without a header, and
`HALF.labels`, int64 `(n,)`, both little-endian; and `pack.json`, which is written last and says
what belongs to it: so a pack that was interrupted is none.
"""

import json
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


@dataclass(frozen=True)
class PackedHalf:
    """What the manifest says of one half; the digests are BLAKE2b of its two files."""

    count: int
    images: str
    labels: str


@dataclass(frozen=True)
class Manifest:
    """What a pack holds, and of what it was made."""

    source: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    halves: dict[str, PackedHalf]

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
        self.path = str(Path(root, f"{split}.images"))
        self.data = map_images(self.path, (half.count, *manifest.shape))
        self.targets = _labels(Path(root, f"{split}.labels"), half.count)


def read_manifest(root: Path) -> Manifest:
    """Raises `UserError` where there is none, or one that is damaged."""
    path = root / MANIFEST
    try:
        content: dict[str, Any] = json_text.read(path)
        halves = {name: PackedHalf(**half) for name, half in content["halves"].items()}
        height, width, channels = map(int, content["shape"])
        classes = tuple(map(str, content["classes"]))
        return Manifest(str(content["source"]), (height, width, channels), classes, halves)
    except FileNotFoundError:
        found = f"{root}, in which there is no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = f"{path}, which is damaged"
    raise UserError(
        found,
        expected="a folder that launcher pack has finished",
        instead=f"type launcher pack SOURCE {root}, which goes on where it stopped",
    )


def map_images(path: str, shape: tuple[int, int, int, int]) -> Tensor:
    """uint8 `(n, h, w, c)`, which must not be written to; raises `UserError` for another size."""
    size = int(numpy.prod(shape))
    _refuse_size(Path(path), size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(numpy.memmap(path, numpy.uint8, "r", shape=shape))


def _labels(path: Path, count: int) -> Tensor:
    _refuse_size(path, 8 * count)
    return torch.from_numpy(numpy.fromfile(path, "<i8"))


def _refuse_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is not there" if found is None else f"has {found:,} bytes"
        raise UserError(
            f"{path}, which {what}",
            expected=f"{size:,} bytes, as {MANIFEST} says",
            instead="pack it again into another folder",
        )
