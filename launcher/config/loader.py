"""From the path of a recipe file to its `recipe` and its source text.

A recipe is Python code and is run: load only files that you trust.
"""

import difflib
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from launcher.config.imports import neighbours_of
from launcher.config.recipe import Recipe
from launcher.config.serialize import resolve
from launcher.distributed.accelerator import has_accelerator, reset_accelerator
from launcher.errors import UserError
from launcher.utils.redaction import cleaned
from launcher.utils.user_code import seeded_draws

_MISSING = re.compile(
    r"(\w+)(?:\.__init__)?\(\) missing \d+ required positional argument.*?: '(\w+)'"
)
_GIVEN = ("params", "root", "optimizer", "fraction", "images", "input", "score")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from; `neighbours` are the digests of files that it imports."""

    recipe: Recipe
    name: str
    source: str
    note: str  # the docstring of the file
    folder: str = ""  # of the file, in which its neighbours are
    neighbours: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe in its JSON form, without secrets."""
        return cleaned(resolve(self.recipe))

    @property
    def digest(self) -> str:
        """SHA-256 of the file's text."""
        return sha256(self.source.encode(errors="replace")).hexdigest()


Load = Callable[[str, list[str]], LoadedRecipe]  # a path and overrides to the recipe
_neighbours: dict[str, Path] = {}  # modules that came with a recipe, and the recipe's folder


def load(path: Path, folder: Path | None = None) -> LoadedRecipe:
    """Run a recipe file and return its `recipe`. Raises `UserError` where there is none.

    `folder` is where its neighbours are, by default its own.
    """
    source = _read(path)
    folder = path.resolve().parent if folder is None else folder.resolve()
    module = _run(path, source, folder)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        found = "no name `recipe`" if recipe is None else f"`recipe` is a {type(recipe).__name__}"
        raise UserError(
            f"{path}: {found}",
            expected="recipe = Recipe(...)",
            instead="see recipes/simplecnn.py for an example",
        )
    resolve(recipe)  # refuses what has no name
    note, neighbours = module.__doc__ or "", neighbours_of(source, folder)
    return LoadedRecipe(recipe, path.stem, source, note, str(folder), neighbours)


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # to read a pipe would be to wait
            found = "a directory" if path.is_dir() else "a pipe or a device"
            raise UserError(f"{path}: {found}", expected="a recipe file", instead=_nearby(path))
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        found, instead = "no such file", _nearby(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        found, instead = str(error), "check the path"
    raise UserError(f"{path}: {found}", expected="a recipe file", instead=instead)


def _nearby(path: Path) -> str:
    """Name the recipes that stand where this one was looked for, or in recipes/."""
    for folder in (path, path.parent, Path("recipes")):
        names = sorted(found.name for found in folder.glob("*.py") if found.name != "__init__.py")
        if names and folder.resolve().name == "recipes":
            close = difflib.get_close_matches(f"{path.stem}.py", names, 1)
            if close:
                return f"did you mean {folder / close[0]}?"
            return f"choose one of {', '.join(str(folder / name) for name in names)}"
    return "check the path"


def _run(path: Path, source: str, folder: Path) -> types.ModuleType:
    name = f"recipes.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(str(path), expected="a Python file", instead="name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    _forget_other_neighbours(folder)
    sys.modules[name] = module  # so that typing and pickle can find the recipe's own classes
    # Its neighbours come first, as for a script: import blocks.
    sys.path[:] = [str(folder), *(place for place in sys.path if place != str(folder))]
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))  # and as those of a package: recipes.simplecnn
    before = {name.partition(".")[0] for name in sys.modules}  # recipes is one of them
    had_accelerator, device = has_accelerator(), torch.get_default_device()
    try:
        with seeded_draws():  # of the weights of a teacher, say
            exec(compile(source, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(
            f"{path}, line {error.lineno}: {error.msg}",
            expected="valid Python",
            instead="correct that line",
        ) from None
    except UserError as error:
        raise UserError(
            f"{path}: {error.given}", expected=error.expected, instead=error.instead
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{path}, line {_line(error, path)}: {type(error).__name__}: {error}",
            expected="a file that runs",
            instead=_called_too_early(str(error)) or "correct that line",
        ) from error
    finally:
        new = (name for name in [*sys.modules] if name not in before and "." not in name)
        _neighbours.update((name, folder) for name in new if _is_in(name, folder))
    if has_accelerator() and not had_accelerator:
        _refuse_accelerator(path)
    _refuse_settings_of_torch(path, device)
    return module


def _called_too_early(words: str) -> str:
    """What to write for `SGD(lr=0.1)` in a slot, of which Python says that `params` is missing."""
    found = _MISSING.match(words)
    if found is None or found[2] not in _GIVEN:
        return ""
    return f"write partial({found[1]}, ...) with the settings alone: the launcher gives {found[2]}"


def _refuse_settings_of_torch(path: Path, device: torch.device) -> None:
    """What a file sets for the whole process; `device` was the default before it."""
    now, dtype = torch.get_default_device(), torch.get_default_dtype()
    setting = ""
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        setting, instead = "torch.set_grad_enabled(False)", "write `with torch.no_grad():` around"
        instead += " what needs no gradient"
    elif now != device:
        torch.set_default_device(device)
        setting, instead = f"torch.set_default_device({str(now)!r})", "leave it out: Accelerate "
        instead += "or torchrun says where it trains"
    elif dtype not in (torch.float32, torch.float64):
        torch.set_default_dtype(torch.float32)
        setting, instead = f"torch.set_default_dtype({dtype})", "write precision='pure_bf16' in "
        instead += "Recipe, which keeps the statistics in float32"
    if setting:
        raise UserError(
            f"{path} calls {setting}",
            expected="a file that says what to train, not how all of the process computes",
            instead=instead,
        )


def _refuse_accelerator(path: Path) -> None:
    """The launcher makes its own, in the recipe's precision: two of them do not agree."""
    reset_accelerator()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    raise UserError(
        f"{path} starts an Accelerator or a process group of its own",
        expected="a file that says what to train: the launcher starts them",
        instead="leave out Accelerator() and init_process_group(), and write precision= in Recipe",
    )


def _forget_other_neighbours(folder: Path) -> None:
    """So that `import blocks` is not answered with the blocks of a recipe of another folder."""
    gone = {name for name, place in _neighbours.items() if place != folder}
    for name in gone:
        del _neighbours[name]
    for name in [*sys.modules]:
        if name.partition(".")[0] in gone:
            del sys.modules[name]


def _is_in(name: str, folder: Path) -> bool:
    """Whether a module lies directly in a folder: what is below may be of an environment in it."""
    module = sys.modules[name]
    places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None)]
    return any(Path(place).parent == folder for place in places if isinstance(place, str))


def _line(error: BaseException, path: Path) -> int | None:
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
