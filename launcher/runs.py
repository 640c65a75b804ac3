"""The run folder: everything that is left of a run.

runs/NAME/
    config.json         the recipe, resolved: every setting, defaults included
    run.json            the occasion: command, versions, devices, data
    recipe.py           the source of the recipe
    metrics.jsonl       one JSON object per epoch
    best.safetensors    the weights of the epoch with the highest test accuracy
    final.safetensors   the weights at the end
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launcher.errors import UserError

_PACKAGES = ("launcher", "torch", "torchvision", "accelerate", "wandb", "safetensors", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run, which no other run shares."""

    path: Path

    def describe(self, config: Mapping[str, Any], run: Mapping[str, Any], source: str) -> None:
        """Write what is known before the first step."""
        _write_json(self.path / "config.json", config)
        _write_json(self.path / "run.json", {**run, "versions": versions()})
        (self.path / "recipe.py").write_text(source, encoding="utf-8")

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    @property
    def best(self) -> Path:
        """Where the best weights lie."""
        return self.path / "best.safetensors"

    @property
    def final(self) -> Path:
        """Where the last weights lie."""
        return self.path / "final.safetensors"


def create(runs: Path, name: str | None, recipe_name: str) -> RunFolder:
    """Make a new run folder; without a name, one of the recipe's name and the time.

    Raises `UserError` for a name that is taken or no file name, and where nothing can be written.
    """
    if name is not None and (name != Path(name).name or name.startswith(".") or not name.strip()):
        raise UserError(
            f"--name {name!r}",
            expected="a plain name, without slashes or a leading dot",
            instead="type --name my-run --runs FOLDER",
        )
    if name is not None:
        return _make(runs / name)
    stem = f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return _make(next(runs / free for free in taken if not (runs / free).exists()))


def _make(path: Path) -> RunFolder:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        raise UserError(
            f"the run folder {path} exists already",
            expected="a name that no other run has",
            instead="type another --name, or remove that folder",
        ) from None
    except OSError as error:
        raise UserError(
            f"the run folder {path} cannot be made ({error.strerror})",
            expected="a folder that can be written",
            instead="type --runs FOLDER",
        ) from None
    return RunFolder(path)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout, or without W&B
            continue
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
