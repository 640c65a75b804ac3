"""Open what `data.source` names: images and labels, or a `UserError` that says why not.

A source is a class or a function, called for each split with those of torchvision's arguments that
it takes (`root`, `train` or `split`, `download`). What it returns has `targets` (or `labels`), if
possible `classes`, and its images in one of two forms:

- `data`: all of them, uint8 `(n, h, w)`, `(n, h, w, c)` or `(n, c, h, w)`, as torchvision's sets;
- `encoded`: a `storage.Encoded`, pictures that can be decoded one by one, as `Folder` has them.

torchvision opens and verifies its files. Where the images then are, `tiers` decides.
"""

import difflib
import http.client
import inspect
import logging
import os
import socket
import traceback
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.config.recipe import Images, parse_fold
from launcher.config.serialize import short_name
from launcher.config.slots import Source
from launcher.data import tiers
from launcher.data.data_sets import as_image_set, is_users_source
from launcher.data.file_lock import held
from launcher.data.images import Data, ImageSet, digest_of
from launcher.data.synthetic import Synthetic
from launcher.data.validation import held_out
from launcher.errors import LauncherError, UserError
from launcher.utils.text import count
from launcher.utils.user_code import function_of, seeded_draws, user_line, user_location

_LOG = logging.getLogger(__name__)
LOCK = ".download.lock"
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
# What torchvision raises for files that are absent, damaged or still being unpacked.
_UNREADABLE = (RuntimeError, OSError, ValueError, EOFError, AssertionError, IndexError, KeyError)


@dataclass(frozen=True)
class _Published:
    """What is known of a set of torchvision without its files."""

    size: int  # pixels
    channels: int
    classes: int
    train: int
    test: int


_KNOWN = {
    "CIFAR10": _Published(32, 3, 10, 50_000, 10_000),
    "CIFAR100": _Published(32, 3, 100, 50_000, 10_000),
    "SVHN": _Published(32, 3, 10, 73_257, 26_032),
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), _Published(28, 1, 10, 60_000, 10_000)),
}


class _UnavailableError(Exception):
    """The images are neither on disk nor reachable."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))  # one line


def load(data: Images, *, seed: int = 0, downloads: bool = True) -> Data:
    """Open or download the images of a recipe, or its declared fallback.

    `seed` decides which training images are held out where the recipe validates on some. Raises
    `UserError` for damaged files, for labels out of range, and where the images are out of reach
    and there is no fallback. Out of reach is what is not on disk, unless it `downloads`.
    """
    loaded = open_or_download(data, downloads=downloads)
    check(loaded, data)
    return hold_out(loaded, data.validation, seed)


def open_or_download(data: Images, *, downloads: bool = True) -> Data:
    """The splits of a source as they are, or of its declared fallback; `check` compares them."""
    data = replace(data, root=os.path.expanduser(data.root))  # no shell expands data.root=~/x
    if os.path.exists(data.root) and not os.path.isdir(data.root):
        raise _no_folder(Path(data.root), "not a folder")
    try:
        loaded = _open_splits(data, downloads)
    except _UnavailableError as reason:
        if data.fallback is None:
            raise UserError(
                f"{short_name(data.source)} is not in {data.root!r} and {reason}",
                expected="the images on disk or a network to fetch them",
                instead="type data.root=FOLDER, or declare data.fallback in the recipe",
                setting=("data.root", "FOLDER"),
            ) from None
        why = f"{short_name(data.source)} is not in {data.root!r} and {reason}"
        try:
            loaded = _open_splits(of_source(data, data.fallback), downloads)
        except _UnavailableError as second:
            raise UserError(
                f"{why}; nor is its fallback {short_name(data.fallback)}: {second}",
                expected="the images on disk or a network to fetch them",
                instead="type data.root=FOLDER, or declare fallback=Synthetic in the recipe",
            ) from None
        loaded = replace(loaded, fallback=why)
    return loaded


def open_on_disk(data: Images, seed: int = 0) -> Data | None:
    """The images of a recipe if this disk holds them: nothing is fetched, nothing stands in.

    Raises `UserError` as `load` does, where they are there but not as they should be.
    """
    data = replace(data, root=os.path.expanduser(data.root))
    try:
        loaded = _open_splits(data, downloads=False)
    except _UnavailableError:
        return None
    check(loaded, data)
    return hold_out(loaded, data.validation, seed)


def hold_out(data: Data, validation: float | str | None, seed: int) -> Data:
    """Take the validation images out of the training split, unless the source has its own.

    Raises `UserError` where there are too few.
    """
    if validation is None or data.validation is not None:
        return data
    chosen = held_out(data.train.labels, validation, seed)
    rest = torch.ones(len(data.train), dtype=torch.bool)
    rest[chosen] = False
    train, held = data.train.take(rest.nonzero()[:, 0]), data.train.take(chosen)
    held = replace(held, left_out=())  # of the training split, which tells them
    return replace(data, train=train, validation=held, held_out=chosen)


def check(loaded: Data, data: Images) -> None:
    """Raise `UserError` where the splits or the recipe's numbers do not fit together."""
    check_splits(loaded, data.root)
    channels = loaded.train.images.shape[-1]
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != channels:
            raise UserError(
                f"data.{name}={values}",
                expected=f"{count(channels, 'number')}, one per channel of {loaded.name}",
                instead=f"type data.{name}={'0.5,' * channels}",
            )


def check_splits(loaded: Data, root: str) -> None:
    """Raise `UserError` where the splits differ in classes, or in the shape of an image."""
    train = loaded.train
    for name, split in loaded.splits.items():
        if train.classes != split.classes:
            odd = sorted(set(train.classes) ^ set(split.classes))
            given = f"classes that only one split of {root!r} has: {', '.join(odd)}"
            if not odd:
                given = f"classes in another order for {name}: {', '.join(split.classes)}"
            raise UserError(
                given,
                expected=f"the same classes for training and for {name}",
                instead="add the missing folders or remove the others",
            )
        sizes = [tuple(images.images.shape[1:]) for images in (train, split)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"training images of {sizes[0]} and {name} images of {sizes[1]} in {loaded.name}",
                expected="images of the same height, width and channels",
                instead="scale one split to the size of the other",
            )


def stand_in(data: Images, count: int) -> Images:
    """So many embedded training images of the same shape and classes, without the files.

    Raises `UserError` where shape and classes are not known without them.
    """
    source = data.fallback if data.fallback else data.source
    keywords = dict(source.keywords) if isinstance(source, partial) else {}
    function = source.func if isinstance(source, partial) else source
    if function is not Synthetic:
        keywords = _known_shape(data)
    source = partial(Synthetic, **{**keywords, "count": count})
    return replace(of_source(data, source), fallback=None, validation=None)


def known_counts(data: Images) -> tuple[int, int] | None:
    """How many training and test images a published set has; None for others."""
    known = _known(data.source)
    return (known.train, known.test) if known else None


def of_source(data: Images, source: Source) -> Images:
    """Take another source, without the settings that concern the files of the first."""
    return replace(data, source=source, tier="auto", on_broken="stop", local_copy=False)


def _known(source: Source) -> _Published | None:
    """What is known of torchvision's class; a class of the user's may have the same name."""
    is_torchvisions = function_of(source).__module__.partition(".")[0] == "torchvision"
    return _KNOWN.get(short_name(source)) if is_torchvisions else None


def _known_shape(data: Images) -> dict[str, int]:
    name = short_name(data.source)
    if known := _known(data.source):
        return {"size": known.size, "channels": known.channels, "classes": known.classes}
    raise UserError(
        f"--smoke with data.source={name}, whose shape is not known without its files",
        expected="a recipe that declares what stands in for it",
        instead="add fallback=partial(Synthetic, size=..., classes=...) to Images",
    )


def _open_splits(data: Images, downloads: bool) -> Data:
    """Open all splits, in parallel where that is safe: most of it is reading and hashing files.

    A source of the user's may seed a generator that all threads share, and draw from it.
    """
    splits = ["train", "test"]
    if isinstance(data.validation, str) and not parse_fold(data.validation):
        splits.append(data.validation)
    with ThreadPoolExecutor(max_workers=1 if is_users_source(data.source) else len(splits)) as pool:
        found = list(pool.map(partial(_open, data), splits))
    if None in found and not downloads:
        raise _UnavailableError("is not downloaded here")
    train, test, *validation = (
        _fetch(data, name) if split is None else split
        for name, split in zip(splits, found, strict=True)
    )
    opened = Data(train, test, short_name(data.source), validation=next(iter(validation), None))
    ready = tiers.prepared(opened, data)
    left_out = [split.left_out for split in ready.splits.values()]
    return replace(ready, digest=digest_of(opened, left_out))


def _open(data: Images, split: str) -> ImageSet | None:
    """Open one split; None where its files are absent or damaged."""
    source = data.source
    try:
        dataset = _call(source, data.root, split, download=False)
    except FileNotFoundError as error:
        if error.errno is not None:  # of the system: a file is absent
            return None
        raise _UnavailableError(f"there is no folder {error}{_near(data.root)}") from None
    except ModuleNotFoundError as error:
        raise _needs_module(source, error) from None
    except LauncherError:
        raise
    except Exception as error:
        _refuse_failing(source, error)
        return None
    return as_image_set(dataset, data)


def _near(root: str) -> str:
    """Of a folder that is not there, the one beside it with nearly its name."""
    path = Path(root)
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
        if close := difflib.get_close_matches(path.name, names, 1):
            return f" (there is {path.parent / close[0]})"
    return ""


def _fetch(data: Images, split: str) -> ImageSet:
    """Look again under the lock, for another process may be unpacking; then download.

    One process per node does so.
    """
    source, root = data.source, data.root
    with _downloading(root):
        try:
            dataset = _call(source, root, split, download=False)
        except _UNREADABLE as error:
            _refuse_damaged(source, root)
            is_absent = isinstance(error, FileNotFoundError) or "not found" in str(error)
            if not is_absent:  # those are torchvision's words
                raise _damaged(f"{short_name(source)} in {root!r} ({error})", root) from None
            dataset = _call(source, root, split, download=True)
    return as_image_set(dataset, data)


@contextmanager
def _downloading(root: str) -> Iterator[None]:
    """Lock `root` on this node; raises `_UnavailableError` where the network fails or is silent."""
    before, is_new = socket.getdefaulttimeout(), not os.path.exists(root)
    try:
        os.makedirs(root, exist_ok=True)
        with _lock_of(root):
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
            yield
    except (urllib.error.URLError, http.client.HTTPException, OSError, RuntimeError) as error:
        if is_new:
            _remove_empty(Path(root))
        raise _UnavailableError(f"cannot be downloaded ({error})") from None
    finally:
        socket.setdefaulttimeout(before)


def _lock_of(root: str) -> AbstractContextManager[None]:
    """The lock of the folder; none where it cannot be written, so that nothing is downloaded."""
    path = Path(root, LOCK)
    if not os.access(root, os.W_OK):
        return nullcontext()
    try:
        path.touch()
    except OSError as error:
        raise _no_folder(path.parent, f"{error.strerror}") from None
    return held(path)


def _remove_empty(root: Path) -> None:
    """Remove a folder that is still empty: a source of pictures would refuse it later."""
    with suppress(OSError):
        if [path.name for path in root.iterdir()] == [LOCK]:
            (root / LOCK).unlink()
        root.rmdir()


def _no_folder(root: Path, why: str) -> UserError:
    return UserError(
        f"data.root={str(root)!r} ({why})",
        expected="a folder in which the images are, or in which they can be written",
        instead="type data.root=data, for example",
        setting=("data.root", "FOLDER"),
    )


def _call(source: Source, root: str, split: str, download: bool) -> Any:
    """Call a source with those of torchvision's arguments that it takes.

    `split` is train, test, or the name of another one that the source has.
    """
    accepted = inspect.signature(source).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())  # EMNIST passes `train` on
    arguments: dict[str, Any] = {"root": root, "train": split == "train", "download": download}
    has_train = "train" in accepted or takes_any
    if split not in ("train", "test") and (has_train or "split" not in accepted):
        raise UserError(
            f"data.validation={split}, of {short_name(source)}, which has no split of that name",
            expected="a number of images, a fraction of the training images, or a fold",
            instead="type data.validation=0.1, for example",
        )
    if not has_train:
        if "split" not in accepted:
            raise UserError(
                f"data.source={short_name(source)}, which takes neither `train` nor `split`",
                expected="a source of training images and of other images for testing",
                instead="write a function with an argument `train`, for training or test images",
            )
        arguments["split"] = split
    keywords = source.keywords if isinstance(source, partial) else {}
    chooser = "train" if has_train else "split"
    if chooser in keywords:
        raise UserError(
            f"data.source={short_name(source)} with {chooser}={keywords[chooser]!r}",
            expected="a source that is asked for its training images, and for those for testing",
            instead=f"leave {chooser} out of partial(...) in the recipe file",
        )
    own = keywords.get("root", root)
    if own != root:
        raise UserError(
            f"data.source={short_name(source)} with root={own!r}, while data.root={root!r}",
            expected="one folder, which is a setting of Images",
            instead=f"type data.root={own}, or write root={own!r} in Images(...)",
            setting=("data.root", own),
        )
    no_default = [
        parameter.name
        for parameter in accepted.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in arguments
    ]
    if no_default:
        name = short_name(source)
        raise UserError(
            f"data.source={name}, which needs {', '.join(no_default)} as well",
            expected="values for all that it has no default for",
            instead=f"write partial({name}, {no_default[0]}=...) in the recipe file",
        )
    # So a source that draws its test images at random draws the same ones for both splits.
    with seeded_draws() if is_users_source(source) else nullcontext():
        return source(**{n: value for n, value in arguments.items() if takes_any or n in accepted})


def _refuse_failing(source: Source, error: Exception) -> None:
    """Raise `UserError` for what is no sign of files that are absent, damaged or half unpacked."""
    name = short_name(source)
    if str(error).startswith("Unknown value"):  # torchvision's words, followed by those it knows
        raise UserError(
            f"data.source={name}: {error}",
            expected="one of those values",
            instead=f"write it as partial({name}, ...) in the recipe file, or write a function "
            "with an argument `train`, for training or test images",
        ) from None
    frames = traceback.extract_tb(error.__traceback__)
    line = user_line(error)
    is_own = line is not None and line == frames[-1] and "not found" not in str(error)
    if is_own or not isinstance(error, _UNREADABLE):
        raise UserError(
            f"data.source={name} fails: {type(error).__name__}: {error}{user_location(error)}",
            expected="code that makes one split of the images, as `train` or `split` says",
            instead="correct that line" if line else "compare it with CIFAR10 of torchvision",
        ) from error


def _refuse_damaged(source: Source, root: str) -> None:
    """Name files of a torchvision data set that are there with other contents than published."""
    from torchvision.datasets.utils import check_integrity

    function = source.func if isinstance(source, partial) else source
    folder = Path(root, getattr(function, "base_folder", ""))
    entries = [*getattr(function, "train_list", ()), *getattr(function, "test_list", ())]
    if meta := getattr(function, "meta", None):  # CIFAR's list of class names
        entries.append((meta["filename"], meta["md5"]))
    for name, md5 in entries:
        if (folder / name).is_file() and not check_integrity(str(folder / name), md5):
            raise _damaged(str(folder / name), root)


def _damaged(what: str, root: str) -> UserError:
    return UserError(
        f"{what} is damaged",
        expected="the file as it was published",
        instead=f"delete it, and the launcher fetches it again into {root!r}",
    )


def _needs_module(source: Source, error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"{short_name(source)} needs the module {error.name!r}, which is not installed",
        expected="what torchvision needs to read its files",
        instead=f"type pip install {error.name}",
    )
