"""`launcher pack SOURCE OUT`: what the words mean, and whether it can be packed there."""

import difflib
import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from launcher.config import loader
from launcher.config.recipe import Images, parse_fold
from launcher.config.serialize import short_name
from launcher.config.slots import Source
from launcher.data import sources
from launcher.data.image_folder import Folder
from launcher.data.images import Data, ImageSet
from launcher.data.packed import MANIFEST
from launcher.data.packing import PARTIAL, Job, pack, unwritable, verify
from launcher.errors import UserError
from launcher.utils.arguments import Parser, positive
from launcher.utils.text import some
from launcher.utils.user_code import function_of

_USAGE = "launcher pack SOURCE OUT [--size N | --encoded] [--root DIR] [--on-broken stop|skip]"
_DESCRIPTION = """\
Decode all images of a source once, into files from which any number of trainings read them:
Images(Packed, root=OUT, ...) in a recipe. With --encoded they stay JPEG, PNG, ..., and
Images(partial(Packed, size=224), root=OUT, ...) decodes them as Folder does. Typed again, the
command continues an interrupted pack, and compares a complete one with its digests."""


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher pack`."""
    parser = Parser(prog="launcher pack", usage=_USAGE, description=_DESCRIPTION)
    add = parser.add_argument
    what = "a folder of class folders, a recipe file, or the name of a data set of torchvision"
    add("source", metavar="SOURCE", help=what)
    add("out", metavar="OUT", type=Path, help="the folder to make, which Packed reads")
    add("--size", type=positive, metavar="N", help="pixels along each side (a folder: 32)")
    encoded = "copy the pictures of a folder without decoding them, of any sizes"
    add("--encoded", action="store_true", help=encoded)
    add("--root", metavar="DIR", help="where the files of a recipe or a data set are")
    broken = "what to do with a picture that cannot be read: stop, or leave it out"
    add("--on-broken", choices=("stop", "skip"), default="stop", help=broken)
    arguments = parser.parse_args(words)
    _refuse_no_folder(arguments.out)
    chosen = _images_of(arguments.source, arguments.size, arguments.root)
    if arguments.encoded:
        _refuse_encoded(chosen.source, arguments.size)
    root = Path(os.path.expanduser(chosen.root))
    if _is_folder(chosen.source) and arguments.out.resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"OUT={arguments.out}, inside of {root}",
            expected="a folder that is not among the pictures",
            instead="name one beside it",
        )
    splits = _splits(_opened(chosen, arguments.source), chosen.validation)
    # Encoded pictures are the same whatever size a recipe has them decoded to.
    source = function_of(chosen.source) if arguments.encoded else chosen.source
    job = Job(_described(source, root), splits, arguments.out, arguments.encoded)
    if (job.out / MANIFEST).exists():
        verify(job)
    else:
        pack(job, skips=arguments.on_broken == "skip")
    return 0


def _images_of(word: str, size: int | None, root: str | None) -> Images:
    """The images that the word SOURCE names, with their files in `root`, if given."""
    path = Path(word)
    if path.is_dir():
        if root is not None:
            raise UserError(
                f"--root {root} with the folder {word}",
                expected="the pictures in the folder that is named first",
                instead="leave out --root",
            )
        has_own = all((path / split).is_dir() for split in ("train", "val", "test"))
        return _made_of(Folder, word, size, "val" if has_own else None)
    if path.suffix == ".py" or path.exists():
        data = loader.load(path).recipe.data
        named = data.validation if isinstance(data.validation, str) else ""
        split = None if not named or parse_fold(named) else named
        return _made_of(data.source, root or data.root, size, split)
    return _made_of(_of_torchvision(word), root or "data", size, None)


def _made_of(source: Source, root: str, size: int | None, validation: str | None) -> Images:
    if size is not None:
        source = _sized(source, size)
    # mean and std do not matter: pixels are packed as they are.
    images = Images(source, 1, mean=(0.5,), std=(0.5,), root=root, validation=validation)
    return replace(images, tier="disk" if _is_folder(source) else "auto")


def _refuse_encoded(source: Source, size: int | None) -> None:
    if size is not None:
        raise UserError(
            f"--size {size} with --encoded",
            expected="one of them: encoded pictures keep their sizes",
            instead=f"leave it out, and write partial(Packed, size={size}) in the recipe",
        )
    if not _is_folder(source):
        raise UserError(
            f"--encoded of {short_name(source)}, whose images are not files of their own",
            expected="pictures in class folders, as Folder reads them",
            instead="leave out --encoded",
        )


def _is_folder(source: Source) -> bool:
    return function_of(source) is Folder


def _sized(source: Source, size: int) -> Source:
    if "size" not in inspect.signature(source).parameters:
        raise UserError(
            f"--size {size} of {short_name(source)}, whose images have a size",
            expected="--size for pictures in folders, which have any",
            instead="leave out --size",
        )
    return partial(source, size=size)


def _of_torchvision(name: str) -> Source:
    from torchvision import datasets

    found = getattr(datasets, name, None) if name in datasets.__all__ else None
    if isinstance(found, type):
        return found
    near = difflib.get_close_matches(name, datasets.__all__, 1)
    raise UserError(
        f"SOURCE={name!r}, which does not exist",
        expected="a folder of class folders, a recipe file, or a data set of torchvision",
        instead=f"did you mean {near[0]}?" if near else "check the path",
    )


def _described(source: Source, root: Path) -> str:
    keywords = source.keywords if isinstance(source, partial) else {}
    settings = ", ".join(f"{name}={value}" for name, value in keywords.items())
    return f"{short_name(source)}({settings}) in {root.resolve()}"


def _opened(images: Images, word: str) -> Data:
    """The images that SOURCE names; a refusal that names a recipe's setting names the option."""
    try:
        return sources.open_or_download(images)
    except UserError as error:
        if error.setting is None or error.setting[0] != "data.root":
            raise
        instead = "put them there" if Path(word).is_dir() else f"type --root {error.setting[1]}"
        raise UserError(
            error.given, expected=error.expected, instead=f"{instead}, or name another SOURCE"
        ) from None


def _splits(data: Data, validation: float | str | None) -> dict[str, ImageSet]:
    sources.check_splits(data, data.name)
    splits = {"train": data.train, "test": data.test}
    return splits if data.validation is None else {**splits, str(validation): data.validation}


def _refuse_no_folder(out: Path) -> None:
    """Refuse a path that is no folder, and a folder that holds something other than a pack."""
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT={out}, a file", expected="a folder", instead="name another one")
    try:
        others = [] if _is_begun(out) or not out.exists() else _visible(out)
    except OSError as error:
        raise unwritable(out, error) from None
    if others:
        raise UserError(
            f"OUT={out}, a folder with {some(others)} in it",
            expected="an empty folder, or one that launcher pack has begun",
            instead="name another folder",
        )


def _is_begun(out: Path) -> bool:
    return any((out / name).exists() for name in (MANIFEST, PARTIAL))


def _visible(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
