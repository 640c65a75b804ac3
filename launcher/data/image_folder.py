"""Pictures in class folders.

Two layouts are understood: `ROOT/train/CLASS/*.png` with `ROOT/test/CLASS/*.png` (or `val`), and
plain `ROOT/CLASS/*.png`, of which every fifth picture of a class, by name, is kept for testing.
With `ROOT/val` beside `ROOT/test`, data.validation=val validates on those.
"""

import os
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from launcher.config.slots import Source
from launcher.data.decoding import margin_of, not_a_picture
from launcher.data.limits import refuse_smaller_scale, refuse_too_large
from launcher.data.storage import Encoded, read
from launcher.distributed import signals
from launcher.errors import UserError
from launcher.utils.terminal import progress
from launcher.utils.text import count

TEST_EVERY = 5
# Usual names of splits. All folders must have one: a single `train` may be a class of trains.
_HALVES = {
    "train",
    "training",
    "trainset",
    "test",
    "testing",
    "testset",
    "val",
    "valid",
    "validation",
}


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
        """Find the pictures of one split: train, test or val."""
        if not Path(root).is_dir():
            raise FileNotFoundError(root)
        refuse_smaller_scale(size, scaled_to)
        folder = _folder_of(Path(root), split)
        names = _pictures_of_classes(folder)
        if folder == Path(root):
            _refuse_few(folder, names)
            names = {of_class: _chosen(files, split) for of_class, files in names.items()}
        if not names:
            raise _empty(folder)
        inside = "" if folder == Path(root) else folder.name
        self.classes = list(names)
        counts = [len(files) for files in names.values()]
        self.targets = numpy.repeat(numpy.arange(len(names)), counts)
        self.files = [
            os.path.join(inside, of_class, file)
            for of_class, files in names.items()
            for file in files
        ]
        self.encoded = Encoded(
            torch.arange(len(self.files)), root, tuple(self.files), size, scaled_to or size
        )
        self.root = str(folder)

    @cached_property
    def data(self) -> Any:
        """All pictures, decoded; raises `UserError` for a broken one, or for too many."""
        refuse_too_large(self.root, len(self.files), self.encoded.size)
        return read(self.encoded, self.encoded.places).numpy()


def margin_of_source(source: Source, size: int) -> float:
    """The fraction of a picture that its source crops off on each side: see `scaled_to`."""
    scaled_to = source.keywords.get("scaled_to") if isinstance(source, partial) else None
    return margin_of(size, scaled_to or size)


def _folder_of(root: Path, split: str) -> Path:
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
        _refuse_other_splits(root)
        return root
    others = {entry.name for entry in _visible(root) if entry.is_dir()}
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


def _refuse_other_splits(root: Path) -> None:
    """Refuse splits under other names, which would be taken for classes."""
    names = sorted(entry.name for entry in _visible(root) if entry.is_dir())
    of_training = [name for name in names if name.lower().startswith("train")]
    if of_training and {name.lower() for name in names} <= _HALVES:
        raise UserError(
            f"{root} holds the folders {', '.join(names)}",
            expected="train and test (or val), called so, with the classes in each",
            instead=f"rename them: mv {root / of_training[0]} {root / 'train'}, for example",
        )


def _pictures_of_classes(folder: Path) -> dict[str, list[str]]:
    """The names of the pictures in each folder, both in order."""
    folders = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    names = {}
    with progress(f"scanning {folder}", len(folders), "class folder") as advance:
        for name in folders:
            names[name] = _names_in(folder / name)
            advance(1)
            signals.end_if_stopped(f"the scan of {folder}")
    return names


def _names_in(folder: Path) -> list[str]:
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    if inner := next((entry for entry in entries if entry.is_dir()), None):
        raise UserError(
            f"{inner.path} is a folder inside of a class",
            expected="pictures only, such as CLASS/picture.png",
            instead=f"move its pictures into {folder}, or the folder away",
        )
    if not entries:
        raise _empty(folder)
    for entry in entries:
        if os.path.splitext(entry.name)[1].lower() not in IMG_EXTENSIONS:
            raise not_a_picture(Path(entry.path), "its name does not end like a picture's")
        if not entry.is_file() and os.path.exists(entry.path):  # reading a pipe may wait for ever
            raise not_a_picture(Path(entry.path), "it is a pipe or a device")
    return [entry.name for entry in entries]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries without `.DS_Store`, `Thumbs.db` and hidden folders, which desktops leave.

    An entry knows its kind without reading the file, which is slow on a file server;
    a broken link counts as a file: reading it reports that.
    """
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and e.name != "Thumbs.db"]


def _refuse_few(folder: Path, names: dict[str, list[str]]) -> None:
    """Refuse a class that would have no picture for testing."""
    for of_class, files in names.items():
        if len(files) < TEST_EVERY:
            raise UserError(
                f"{folder / of_class} holds {count(len(files), 'picture')}",
                expected=f"at least {TEST_EVERY}, as every fifth is kept for testing",
                instead=f"add pictures of {of_class!r}, or use folders train/CLASS and test/CLASS",
            )


def _chosen(names: list[str], split: str) -> list[str]:
    """The pictures of a class that belong to one split."""
    every = TEST_EVERY
    return [n for i, n in enumerate(names) if (i % every == every - 1) == (split == "test")]


def _empty(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds no pictures",
        expected="pictures in class folders, such as CLASS/picture.png",
        instead="put the pictures there or name another folder with data.root=FOLDER",
        setting=("data.root", "FOLDER"),
    )
