"""The run folder: everything that is left of a run.

runs/NAME/
    config.json         the recipe, resolved: every setting, defaults included
    run.json            the options: command, versions, devices, data
    recipe.py           the source of the recipe
    metrics.jsonl       one JSON object per epoch
    details.jsonl       ... with its confusion matrix and the scores of some images
    best.npz, last.npz  what was said of each evaluated image in that epoch: see outcomes.py
    validation.json     which training images were held out, by their places in the source
    test.json           with validation images: the figures of the test images at the end
    end.json            how the last attempt ended, and why it failed
    report/             a page for a browser, which launcher report can write again
    checkpoints/        the last three, from which --resume continues: see checkpoint.py
    compiled.bin        what torch.compile has made, for the same: see compiled.py
    best.safetensors    the weights of the epoch with the highest accuracy
    final.safetensors   the weights at the end
    trace.json          with --profile: some steps, as torch's profiler recorded them
    wandb/              W&B's own files
    wandb-rows.jsonl    what W&B was given to draw: see wandb_history.py
    .lock               held by the process that trains the run
"""

import json
import os
import platform
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launcher.errors import UserError
from launcher.utils import atomic_write, json_text
from launcher.utils.redaction import cleaned, redacted

# What lies in a run folder before its first epoch or checkpoint.
_BEFORE_TRAINING = frozenset(
    (
        *("config.json", "run.json", "recipe.py", "checkpoints", "wandb", "wandb-rows.jsonl"),
        *("end.json", "report", "validation.json"),
    )
)
_LINES = ("metrics.jsonl", "details.jsonl")
_FILES = (
    *("config.json", "run.json", "recipe.py", "metrics.jsonl", ".lock", "wandb-rows.jsonl"),
    *("best.safetensors", "final.safetensors", "details.jsonl", "best.npz", "last.npz", "end.json"),
    *("validation.json", "test.json"),
)
_LOCK_SECONDS = 0.5  # `launcher runs` holds the lock for an instant, to see whether it is free
_PACKAGES = (
    *("launcher", "torch", "torchvision", "accelerate", "wandb", "safetensors", "numpy", "pillow"),
)


@dataclass(frozen=True)
class RunDir:
    """A folder of one run, which no other run shares.

    `identity` is how `describe` marked it: the id by which W&B knows the run in every attempt.
    """

    path: Path
    identity: str = ""

    def describe(
        self, config: Mapping[str, Any], run: Mapping[str, Any], source: str, wandb_id: str = ""
    ) -> "RunDir":
        """Write what is known before the first step; `wandb_id` is the checkpoint's, if it has one.

        Returns the folder as that run's. Raises `UserError` where nothing can be written.
        """
        identity = wandb_id or self._id_on_disk() or secrets.token_hex(4)
        versioned = {"wandb_id": identity, "versions": versions()}
        try:
            _write_json(self.path / "config.json", config)
            _write_json(self.path / "run.json", {**run, **versioned})
            atomic_write.replace(self.path / "recipe.py", redacted(source).encode())
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return replace(self, identity=identity)

    def drop(self, names: Sequence[str]) -> None:
        """Remove files of an earlier attempt; raises `UserError` where nothing can be written."""
        try:
            for name in names:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    @property
    def is_own(self) -> bool:
        """False where this run was removed and another one has taken its place."""
        return not self.identity or self._id_on_disk() in ("", self.identity)

    def config(self) -> dict[str, Any]:
        """The settings that the run began with; empty where they cannot be read."""
        return json_text.read_object(self.path / "config.json")

    @property
    def is_described(self) -> bool:
        """Whether what `describe` wrote is still there."""
        return (self.path / "run.json").is_file()

    def record(self, metrics: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, and one to `details.jsonl`.

        The run has gone on: what was the weights of its end are so no more.
        """
        self.final.unlink(missing_ok=True)
        for name, line in zip(_LINES, (metrics, details), strict=True):
            atomic_write.append(self.path / name, json.dumps(line, allow_nan=False))

    def end(self, exit_code: int, why: str = "") -> None:
        """Write how this attempt ended, when, and why it failed."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        _write_json(self.path / "end.json", {"exit_code": exit_code, "time": now, "why": why})

    def tested(self, figures: Mapping[str, Any]) -> None:
        """Write the figures of the test images at the end."""
        _write_json(self.path / "test.json", figures)

    def keep_held_out(self, places: Sequence[int]) -> None:
        """Write which images of the source's training split validate.

        Raises `UserError` where nothing can be written.
        """
        try:
            content = json.dumps({"of": "train", "images": places}) + "\n"
            atomic_write.replace(self.path / "validation.json", content.encode())
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def forget_after(self, epochs: int) -> int:
        """Drop the lines of epochs that a resumed run will write again.

        Returns how many were dropped since they are damaged, but for a last one that a crash cut.
        """
        return sum(self._forget(self.path / name, epochs) for name in _LINES)

    def _forget(self, path: Path, epochs: int) -> int:
        if not path.is_file():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        numbers = [_epoch_of(line) for line in lines]
        if any(number is not None and number > epochs for number in numbers):
            self.final.unlink(missing_ok=True)
        kept = [
            line for line, n in zip(lines, numbers, strict=True) if n is not None and n <= epochs
        ]
        atomic_write.replace(path, b"".join(kept))
        return numbers[:-1].count(None)

    def tidy(self, used: Path | None = None) -> None:
        """Remove what killed processes have left half written; hold the lock before.

        And what they were replacing, unless that is the checkpoint that is `used`.
        """
        names = (*_FILES, "compiled.bin")
        half_written = (path for name in names for path in self.path.glob(f".{name}.*"))
        replaced = (path for path in self.checkpoints.glob("step-*.old") if path != used)
        for path in (*half_written, *self.checkpoints.glob(".step-*"), *replaced):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink()

    def lock(self) -> FileLock:
        """Hold the folder for this process; the lock ends with the process.

        Raises `UserError` where another process trains this run.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"the run {self.path} is being trained by another process",
                expected="one process group per run",
                instead="wait for its end, or type another --name",
            ) from None
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return lock

    def _id_on_disk(self) -> str:
        """The mark of the run whose folder this is now; empty where there is none."""
        return str(json_text.read_object(self.path / "run.json").get("wandb_id", ""))

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the best weights lie."""
        return self.path / "best.safetensors"

    @property
    def final(self) -> Path:
        """Where the last weights lie."""
        return self.path / "final.safetensors"


def create(runs: Path, name: str | None, recipe_name: str) -> RunDir:
    """Make a new run folder; without a name, one of the recipe's name and the time.

    Raises `UserError` for a name that is taken, and where nothing can be written.
    """
    if name is not None:
        return _make(runs / name)
    stem = f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S}"
    taken = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return _make(next(runs / free for free in taken if not os.path.exists(runs / free)))


def find(runs: Path, name: str | None, recipe_name: str) -> RunDir | None:
    """The run of that name, or without one the newest run of the recipe; None if there is none.

    Raises `UserError` for a run folder that is a link, or whose parts are.
    """
    if not os.path.isdir(runs):  # false where Path.is_dir raises: the name is too long
        return None
    if name is not None:
        path = runs / name
        began = (path / "run.json").is_file() or (path / "checkpoints").is_dir()
        return _own(path) if began else None
    found = filter(Path.is_file, runs.glob("*/run.json"))
    described = sorted(found, key=lambda path: path.stat().st_mtime)
    for path in reversed(described):
        if json_text.read_object(path).get("name") == recipe_name:
            return _own(path.parent)
    return None


def _own(path: Path) -> RunDir:
    """Nothing is written through a link to another place, nor waits for what is no file."""
    folder = RunDir(path)
    for place in (path, folder.checkpoints, path / "wandb"):
        if place.is_symlink():
            raise UserError(
                f"{place} is a link to {place.readlink()}",
                expected="a folder of its own for each run",
                instead="type --runs FOLDER for runs that lie elsewhere",
            )
        _refuse_other_kind(place, place.is_dir(), "folder")
    for file in map(path.joinpath, _FILES):
        _refuse_other_kind(file, file.is_file(), "file")
    return folder


def _refuse_other_kind(path: Path, is_right: bool, kind: str) -> None:
    if path.exists() and not is_right:
        raise UserError(
            f"{path} is no {kind}",
            expected=f"a {kind}, as the launcher writes it",
            instead=f"type mv {path} {path}.old, and then the same command again",
        )


def _epoch_of(line: bytes) -> int | None:
    """The epoch of a line; None for one that is damaged, or that a crash cut off."""
    try:
        epoch = json_text.parse(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return None
    return epoch if isinstance(epoch, int) and line.endswith(b"\n") else None


def _make(path: Path) -> RunDir:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError as error:
        if not path.parent.is_dir():
            raise _unwritable(path, error) from None
        if _never_began(path):
            return RunDir(path)
        raise UserError(
            f"the run folder {path} exists already",
            expected="a name that no other run has",
            instead="type another --name, or remove that folder",
        ) from None
    except (OSError, ValueError) as error:  # the latter for a NUL
        raise _unwritable(path, error) from None
    return RunDir(path)


def _never_began(path: Path) -> bool:
    """Whether a run began here, but ended before it had anything to lose.

    That is a checkpoint, figures of an epoch, or files that are not the launcher's.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    parts = [part for part in path.iterdir() if not part.name.startswith(".")]
    own = all(part.name in _BEFORE_TRAINING and not part.is_symlink() for part in parts)
    return own and not any((path / "checkpoints").glob("[!.]*"))


def _unwritable(path: Path, error: OSError | ValueError) -> UserError:
    return UserError(
        f"the run folder {path} cannot be written ({getattr(error, 'strerror', error)})",
        expected="a folder that can be written, and room for it",
        instead="type --runs FOLDER",
    )


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
    atomic_write.replace(path, (json.dumps(cleaned(content), indent=2) + "\n").encode())
