"""Weights and checkpoints on disk: whole or not at all, and verified before they are believed.

    runs/NAME/checkpoints/step-000001564/
        weights.safetensors      parameters and buffers
        average.safetensors      the weight average, if the recipe keeps one
        buffers.safetensors      running statistics of every rank, if there are several
        optimizer.pt             the optimizer's state (tensors and numbers only)
        state.json               progress, best so far, resolved recipe, its source, scaler
        manifest.json            size and SHA-256 of each of the above

A checkpoint is written into a hidden folder, flushed to the disk, and renamed. The order of the
images, every random draw and the learning rate follow from the progress, so they are not saved.
Nothing in it runs code when it is loaded.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_type_hints

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from launcher.checkpoint.held_folder import HeldFolder
from launcher.checkpoint.weights import (
    UNREADABLE,
    Tensors,
    copy_to_host,
    digest_of_file,
    load_weights,
    on_host,
)
from launcher.config import annotations
from launcher.config.plan import Progress
from launcher.distributed.accelerator import count_over_ranks, run_on_main
from launcher.errors import UserError
from launcher.training.metrics import Best
from launcher.training.optimizer_setup import bring_steps, load_state, try_step
from launcher.training.state import TrainContext, TrainState, as_bytes, from_bytes
from launcher.utils import atomic_write, json_text
from launcher.utils.redaction import redacted

KEPT = 3  # checkpoints; the best weights are kept apart
Kind = TypeVar("Kind")
_NEEDED = frozenset(("weights.safetensors", "optimizer.pt", "state.json"))
_FILES = _NEEDED | {"average.safetensors", "buffers.safetensors"}
_NAME = re.compile(r"step-\d{9,}(\.old)?")


@dataclass(frozen=True)
class Snapshot:
    """The state of a training between two steps, in memory of the host."""

    tensors: Mapping[str, Tensors]  # by the name of their file
    optimizer: dict[str, Any]
    details: dict[str, Any]  # state.json: see `checkpoint_details` in run/events.py


@dataclass(frozen=True)
class SavedState:
    """What `state.json` says; `config` is the resolved recipe, `source` its file."""

    progress: Progress
    best: Best | None
    steps_per_epoch: int
    wandb_id: str
    data: str
    data_digest: str
    config: dict[str, Any]
    source: str
    scaler: dict[str, Any] | None

    @property
    def is_within_epoch(self) -> bool:
        """Whether some images of an epoch have been seen, and others not."""
        return self.progress.step > self.progress.epochs * self.steps_per_epoch


class CheckpointError(Exception):
    """A checkpoint is damaged: says which file and how."""


def gather_buffers(ctx: TrainContext) -> Tensors:
    """Each running statistic of all ranks, `(ranks, ...)`; empty on 1 rank. Every rank calls it."""
    if ctx.accelerator.num_processes == 1:
        return {}
    return {
        name: from_bytes(copy_to_host(ctx.accelerator.gather(as_bytes(buffer)[None])), buffer)
        for name, buffer in _buffers(ctx.state).items()
    }


def capture(ctx: TrainContext, details: dict[str, Any], buffers: Tensors | None = None) -> Snapshot:
    """Copy the state to the host, with `details` for `state.json` and what was gathered."""
    state, accelerator = ctx.state, ctx.accelerator
    tensors = {"weights": on_host(state.network.state_dict())}
    if state.ema_model is not None:
        tensors["average"] = on_host(state.ema_model.state_dict())
    if buffers:
        tensors["buffers"] = buffers
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    optimizer = _copied(
        state.optimizer.state_dict() | {"initial_options": list(state.group_options)}
    )
    return Snapshot(tensors, optimizer, {**details, "scaler": scaler})


def restore(folder: Path, ctx: TrainContext) -> None:
    """Put a checkpoint that rank 0 has verified into a training, on every rank.

    Settings of the optimizer that the recipe has changed since are the recipe's; what the optimizer
    itself changed in its groups is the checkpoint's. Raises `UserError` where the network or the
    optimizer is another one.
    """
    state, scaler = ctx.state, ctx.accelerator.scaler
    with _seen_by_all(folder, ctx.accelerator) as seen:
        is_alike = load_weights(state.network, seen / "weights.safetensors")
        average = seen / "average.safetensors"
        if state.ema_model is not None and average.is_file():  # a new one begins with these weights
            load_weights(state.ema_model, average)
        saved = _read_optimizer(seen)
        initial = saved.pop("initial_options")
        # In another precision than the checkpoint's, numbers take the type of the new weights.
        load = partial(load_state, state.optimizer) if is_alike else state.optimizer.load_state_dict
        try:
            load(saved)
        except ValueError as error:
            raise UserError(
                f"an optimizer with other parameter groups than the checkpoint's ({error})",
                expected="the optimizer that the run began with",
                instead="type another --name; --init-from RUN begins with the weights of this one",
            ) from None
        except Exception as error:  # of torch's code or the optimizer's, on what it has not written
            raise _unfit_state(folder, error) from None
        # After a rollback a group may be frozen whose own schedule is at zero. It is in the
        # checkpoint like the others, and the next step freezes it anew where its schedule says so.
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        try:
            try_step(ctx.recipe, state.network, state.optimizer.state_dict())
        except Exception as error:
            raise _unfit_state(folder, error) from None
        for number, group in enumerate(state.optimizer.param_groups):
            group.update(_changed(state.group_options[number], initial[number]))
        bring_steps(state.optimizer)
        saved_scaler = json_text.read(seen / "state.json")["scaler"]
        if scaler is not None and saved_scaler:
            scaler.load_state_dict(saved_scaler)
        if (seen / "buffers.safetensors").is_file():
            _take_buffers(load_file(seen / "buffers.safetensors"), ctx)


@contextmanager
def _seen_by_all(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """The folder; a copy on all ranks where some see none there, or that of another run."""
    own = _bytes_of(folder / "manifest.json")
    is_other = own != run_on_main(accelerator, lambda: own)
    if not count_over_ranks(accelerator, is_other):
        yield folder
        return
    files = run_on_main(
        accelerator, lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
    )
    with TemporaryDirectory() as copy:
        for name, content in files.items():
            Path(copy, name).write_bytes(content)
        yield Path(copy)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _unfit_state(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder / 'optimizer.pt'}, with which no step can be made: "
        f"{type(error).__name__}: {error}",
        expected="the state that this optimizer keeps of these parameters",
        instead=f"remove {folder}: --resume then takes the checkpoint before it",
    )


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not what they were; compared in words, since some are tensors."""
    return {
        name: value
        for name, value in now.items()
        if name not in before or repr(before[name]) != repr(value)
    }


def read_state(folder: Path) -> SavedState:
    """What `state.json` says; raises `CheckpointError` where no run has written that."""
    try:
        said = json_text.read(folder / "state.json")
        progress = _typed(Progress, said["progress"])
        best = said["best"] and _typed(Best, said["best"])
        state = _typed(SavedState, {**said, "progress": progress, "best": best})
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError("state.json says something else than a run writes") from None
    length = state.steps_per_epoch
    begin = progress.epochs * length
    if length < 1 or not 0 <= begin <= progress.step <= begin + length:
        raise CheckpointError(f"step {progress.step} is not in epoch {progress.epochs + 1}")
    return state


def _typed(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A dataclass of these values; raises TypeError where one is not of its annotated type."""
    typed = {}
    for name, annotation in get_type_hints(kind).items():
        fits, typed[name] = annotations.convert(values[name], annotation)
        if not fits:
            raise TypeError(name)
    return kind(**typed)


def _read_optimizer(folder: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The optimizer's state, with `initial_options`; `mapped`: its tensors stay on the disk.

    Raises `CheckpointError` for a file with more than tensors and numbers, whose code never runs.
    """
    try:
        with warnings.catch_warnings():  # that to look at sparse tensors takes time
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            saved = torch.load(
                folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=mapped
            )
        groups, initial, state = (saved[k] for k in ("param_groups", "initial_options", "state"))
        is_whole = len(groups) == len(initial) and all("params" in group for group in groups)
        is_whole &= all(isinstance(part, dict) for part in (*groups, *initial, *state.values()))
        numbers = [number for group in groups for number in group["params"]]
        is_whole &= {number for number in state if isinstance(number, int)} <= set(numbers)
        is_whole &= all(isinstance(number, int) for number in numbers)
    except (*UNREADABLE, pickle.UnpicklingError, TypeError, AttributeError):
        is_whole = False  # torch's own message tells the reader to switch the check off
    if not is_whole:
        raise CheckpointError("optimizer.pt is no state of an optimizer, or holds more than that")
    return saved


def write(snapshot: Snapshot, root: Path) -> Path:
    """Write a checkpoint below `root` and drop the oldest; an `OSError` leaves all as it was."""
    name = f"step-{snapshot.details['progress']['step']:09d}"
    temporary, final = root / f".{name}.{os.getpid()}", root / name
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        manifest = {}
        for file, content in _contents(snapshot):
            atomic_write.write_new(temporary / file, content)
            digest = hashlib.sha256(content).hexdigest()
            manifest[file] = {"bytes": len(content), "sha256": digest}
        atomic_write.write_new(temporary / "manifest.json", _json(manifest))
        atomic_write.flush_folder(temporary)
        aside = root / f"{name}.old"
        if final.exists():  # the same step again, after a resume or at the end of an epoch
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        temporary.rename(final)
        atomic_write.flush_folder(root)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _drop(root, final)
    return final


def _drop(root: Path, written: Path) -> None:
    """Remove the oldest, and those of later steps: damaged, or of a way that was given up.

    And one that was being replaced when its process was killed.
    """
    found = _all(root)
    replaced = [path for path in found if path.suffix == ".old"]
    everything = [path for path in found if path not in replaced]
    place = everything.index(written)
    for other in (*replaced, *everything[: max(0, place + 1 - KEPT)], *everything[place + 1 :]):
        shutil.rmtree(other, ignore_errors=True)


def _contents(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint: made in memory, so that only Python writes to the disk."""
    for kind, tensors in snapshot.tensors.items():
        yield f"{kind}.safetensors", save(tensors)
    optimizer = io.BytesIO()
    torch.save(snapshot.optimizer, optimizer)
    yield "optimizer.pt", optimizer.getvalue()
    yield "state.json", _json(snapshot.details)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    complaints = []
    for folder in reversed(_all(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            complaints.append(f"checkpoint {folder.name} is damaged ({error}); trying an older one")
        else:
            return folder, complaints
    return None, complaints


def verify(folder: Path) -> None:
    """Raise `CheckpointError` unless it can be restored.

    That is: every file is there with its recorded size and SHA-256, none of them as a link, and
    each says what a run writes: a checksum does not tell who has written it.
    """
    try:
        manifest = json_text.read(folder / "manifest.json")
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError("no readable manifest.json") from None
    if not _NEEDED <= entries.keys() <= _FILES:
        raise CheckpointError("manifest.json lacks a file, or names one of another place")
    for name, (size, digest) in entries.items():
        path = folder / name
        if path.is_symlink():
            raise CheckpointError(f"{name} is a link")
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != size or digest_of_file(path) != digest:
            raise CheckpointError(f"{name} is not what was written")
        if path.suffix == ".safetensors":
            _refuse_unreadable(path)
    _read_optimizer(folder, mapped=True)
    read_state(folder)


def _refuse_unreadable(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path.name}: {error}") from None


class Writer:
    """Writes checkpoints in the background, one at a time, so that training does not wait."""

    def __init__(self, folder: HeldFolder) -> None:
        """Write below the `checkpoints` of this folder."""
        self._folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(self, snapshot: Snapshot) -> str:
        """Begin to write; returns what went wrong with the one before, or an empty text."""
        complaint = self.wait()
        self._pending = self._pool.submit(self._write, snapshot)
        return complaint

    def _write(self, snapshot: Snapshot) -> Path:
        with self._folder.writing() as folder:
            return write(snapshot, folder.checkpoints)

    def wait(self) -> str:
        """Wait until all is written; returns what went wrong, or an empty text."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            return f"a checkpoint could not be written ({error}); the one before it stays"
        return ""


def _all(root: Path) -> list[Path]:
    """By their steps; one that is being replaced, `.old`, before the one in its place."""
    found = root.glob("step-*") if os.path.isdir(root) else ()  # isdir takes any name
    named = [path for path in found if _NAME.fullmatch(path.name)]
    real = (path for path in named if path.is_dir() and not path.is_symlink())
    return sorted(real, key=lambda path: (int(path.stem[5:]), path.suffix != ".old"))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _copied(value: Any) -> Any:
    """A nested state without secrets, its tensors copied to the host in their own memory layout."""
    if isinstance(value, Tensor):
        return copy_to_host(value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return redacted(value) if isinstance(value, str) else value


def _buffers(state: TrainState) -> dict[str, Tensor]:
    """The running statistics and counts, which differ between the ranks, under their own names."""
    modules = {"network": state.network, "average": state.ema_model}
    return {
        f"{owner}.{name}": buffer
        for owner, module in modules.items()
        if module is not None
        for name, buffer in module.named_buffers()
        if buffer.numel()
    }


def _take_buffers(saved: Tensors, ctx: TrainContext) -> None:
    """This rank's own statistics; on another number of ranks, the mean of all, or rank 0's."""
    for name, buffer in _buffers(ctx.state).items():
        ranks = saved.get(name, torch.empty(0))
        if ranks.shape[1:] != buffer.shape or not len(ranks):  # of an average that begins now
            continue
        if len(ranks) == ctx.accelerator.num_processes:
            buffer.copy_(ranks[ctx.accelerator.process_index])
        else:  # whole numbers have no mean
            buffer.copy_(ranks.mean(dim=0) if buffer.is_floating_point() else ranks[0])
