"""Pictures in class folders.

Two layouts are understood: `ROOT/train/CLASS/*.png` with `ROOT/test/CLASS/*.png` (or `val`), and
plain `ROOT/CLASS/*.png`, of which every fifth picture of a class, by name, is kept for testing.
With `ROOT/val` beside `ROOT/test`, data.validation=val validates on those.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from launcher.config.slots import Source
from launcher.data.decoding import margin_of, not_a_picture
from launcher.data.limits import refuse_margin, refuse_too_large
from launcher.data.storage import Encoded, read
from launcher.errors import UserError
from launcher.utils.text import count

TEST_EVERY = 5


class Folder:
    """RGB pictures of `size` pixels square, as uint8 `(n, size, size, 3)`; `files` below `root`.

    Larger or oblong pictures are scaled to the shorter side and cropped around the middle; by
    `scaled_to` pixels, more than `size`, a margin is cropped off as well. Where they stay on disk
    (`Images.tier`) they are decoded step by step, else once, at the start. Raises
    `FileNotFoundError` where there is no folder `root`, and `UserError` where it is empty or holds
    something other than pictures.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        download: bool = False,
        *,
        size: int = 32,
        scaled_to: int | None = None,
    ) -> None:
        """Find the pictures of one half: train, test or val."""
        if not Path(root).is_dir():
            raise FileNotFoundError(root)
        refuse_margin(size, scaled_to)
        half = _half(Path(root), split)
        names = sorted(folder.name for folder in half.iterdir() if _is_visible(folder, "folder"))
        files = [(file, label) for label, name in enumerate(names) for file in _files(half / name)]
        if half == Path(root):
            _refuse_few(files, names)
            files = _split(files, split)
        if not files:
            raise _empty(half)
        self.classes = names
        self.targets = numpy.array([label for _, label in files])
        self.files = [str(file.relative_to(root)) for file, _ in files]
        self.encoded = Encoded(
            torch.arange(len(files)), root, tuple(self.files), size, scaled_to or size
        )
        self.root = str(half)

    @cached_property
    def data(self) -> Any:
        """All of them, decoded; raises `UserError` for a broken one, or for too many."""
        refuse_too_large(self.root, len(self.files), self.encoded.size)
        return read(self.encoded, self.encoded.places).numpy()


def margin_of_source(source: Source, size: int) -> float:
    """The part of a picture that its source crops off on each side: see `scaled_to`."""
    scaled_to = source.keywords.get("scaled_to") if isinstance(source, partial) else None
    return margin_of(size, scaled_to or size)


def _half(root: Path, split: str) -> Path:
    if split == "val" and not all((root / name).is_dir() for name in ("train", "val", "test")):
        raise UserError(
            f"data.validation=val, but {root} does not have the folders train, val and test",
            expected="each of them, with the classes in it",
            instead="type data.validation=0.1, for example, to take some training images",
        )
    if split not in ("train", "val", "test"):
        raise UserError(
            f"data.validation={split}, of a folder of pictures",
            expected="val, a number of images, a fraction of the training images, or a fold",
            instead="type data.validation=0.1, for example",
        )
    if not (root / "train").is_dir():
        return root
    others = {path.name for path in root.iterdir() if _is_visible(path, "folder")}
    if others := others - {"train", "test", "val"}:
        raise UserError(
            f"{root} holds the folder train and beside it {', '.join(sorted(others))}",
            expected="train and test (or val), with the classes in each",
            instead="move the other folders away, or their classes into train and test",
        )
    if split != "test":
        return root / split
    for name in ("test", "val"):
        if (root / name).is_dir():
            return root / name
    raise _empty(root / "test")


def _refuse_few(files: list[tuple[Path, int]], names: list[str]) -> None:
    """Refuse a class that would have no picture for testing."""
    for label, name in enumerate(names):
        own = [file for file, number in files if number == label]
        if len(own) < TEST_EVERY:
            raise UserError(
                f"{own[0].parent} holds {count(len(own), 'picture')}",
                expected=f"at least {TEST_EVERY}, as every fifth is kept for testing",
                instead=f"add pictures of {name!r}, or use folders train/CLASS and test/CLASS",
            )


def _is_visible(path: Path, kind: str) -> bool:
    """Skip what desktops leave behind: `.DS_Store`, `Thumbs.db`, hidden folders.

    A link to nothing counts as a file: reading it says so.
    """
    right_kind = path.is_dir() == (kind == "folder")
    return right_kind and not path.name.startswith(".") and path.name != "Thumbs.db"


def _files(folder: Path) -> list[Path]:
    if inner := next((path for path in folder.iterdir() if _is_visible(path, "folder")), None):
        raise UserError(
            f"{inner} is a folder inside of a class",
            expected="pictures only, such as CLASS/picture.png",
            instead=f"move its pictures into {folder}, or the folder away",
        )
    files = sorted(file for file in folder.iterdir() if _is_visible(file, "file"))
    if not files:
        raise _empty(folder)
    for file in files:
        if file.suffix.lower() not in IMG_EXTENSIONS:
            raise not_a_picture(file, "its name does not end like a picture's")
        if file.exists() and not file.is_file():  # to read it might be to wait for ever
            raise not_a_picture(file, "it is a pipe or a device")
    return files


def _split(files: list[tuple[Path, int]], split: str) -> list[tuple[Path, int]]:
    chosen, seen = [], dict.fromkeys({label for _, label in files}, 0)
    for file, label in files:
        is_test = seen[label] % TEST_EVERY == TEST_EVERY - 1
        seen[label] += 1
        if is_test == (split == "test"):
            chosen.append((file, label))
    return chosen


def _empty(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds no pictures",
        expected="pictures in class folders, such as CLASS/picture.png",
        instead="put the pictures there or name another folder with data.root=FOLDER",
    )
