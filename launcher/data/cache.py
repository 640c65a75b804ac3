"""One process of a node reads the images; the others map its copy.

The first process to take the lock reads the files, or downloads them, and writes what it read, or
why it was refused, into one file below the node's temporary folder (TMPDIR, else /tmp). Every
process of the node maps that file, so the images are in its memory once, and a shared file server
is asked by one process per node. The file appears by a rename: a process that is killed halfway
leaves none, its lock goes with it, and the next process reads. The last process removes the file;
what a killed run left is removed by the next run.
"""

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from launcher.cluster import slurm_env
from launcher.config.recipe import Images
from launcher.config.serialize import resolve
from launcher.data import sources
from launcher.data.sources import Data, ImageSet
from launcher.distributed import signals
from launcher.errors import UserError

_LOG = logging.getLogger(__name__)
_COPY = "images.safetensors"


def load(data: Images, environ: Mapping[str, str] = os.environ) -> Data:
    """The images of a recipe, read once for all processes of this node.

    Raises what `sources.load` raises, on every process of the node.
    """
    processes = _processes_here(environ)
    if processes == 1:
        return sources.load(data)
    try:
        folder = _launch_folder(data, environ)
        outcome = _take(folder, data, processes)
    except (OSError, SafetensorError, psutil.Error) as error:
        if environ.get("LOCAL_RANK") == "0":
            _LOG.warning("no copy of the images for this node, so each process reads: %s", error)
        return sources.load(data)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _take(folder: Path, data: Images, processes: int) -> Data | UserError:
    """Map the copy, making it if there is none; the last of the processes removes it."""
    with FileLock(folder / "lock"):
        if not (folder / _COPY).exists():
            _write(_read(data), folder / _COPY)
        outcome = _map(folder / _COPY)
        (folder / f"taken-{os.getpid()}").touch()
        if len(list(folder.glob("taken-*"))) == processes:
            shutil.rmtree(folder)  # what is mapped stays until its last process ends
    return outcome


def _read(data: Images) -> Data | UserError:
    try:
        return sources.load(data)
    except UserError as refusal:
        return refusal


def _write(outcome: Data | UserError, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    if isinstance(outcome, UserError):
        about = {"refusal": [outcome.given, outcome.expected, outcome.instead]}
        save_file({}, temporary, {"about": json.dumps(about)})
    else:
        halves = {"train": outcome.train, "test": outcome.test}
        tensors = {f"{name}.images": half.images for name, half in halves.items()}
        tensors |= {f"{name}.labels": half.labels for name, half in halves.items()}
        facts = {
            "name": outcome.name,
            "fallback": outcome.fallback,
            "classes": outcome.train.classes,  # both halves have the same: `sources.check`
        }
        save_file(tensors, temporary, {"about": json.dumps(facts)})
    temporary.replace(path)


def _map(path: Path) -> Data | UserError:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    if "refusal" in about:
        given, expected, instead = about["refusal"]
        return UserError(given, expected=expected, instead=instead)
    tensors, classes = load_file(path), tuple(about["classes"])
    train, test = (
        ImageSet(tensors[f"{name}.images"], tensors[f"{name}.labels"], classes)
        for name in ("train", "test")
    )
    return Data(train, test, about["name"], about["fallback"])


def _launch_folder(data: Images, environ: Mapping[str, str]) -> Path:
    """A folder that the processes of one launch on one node share, and nobody else.

    They have the launching process above them, whose number and age no other one has.
    """
    parent, attempt = _starter(environ), environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    mine = _private(Path(tempfile.gettempdir(), f"launcher-{os.getuid()}"))
    _sweep(mine)
    source = resolve(replace(data, root=str(Path(data.root).resolve())))
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    folder = mine / f"{parent.pid}-{parent.create_time()}-{attempt}-{digest}"
    folder.mkdir(exist_ok=True)
    return folder


def _processes_here(environ: Mapping[str, str]) -> int:
    """The processes of this node; srun may show each of them its own GPU and nothing else."""
    step = None if signals.is_launched(environ) else slurm_env.step_of(environ)
    return step.tasks_here if step else int(environ.get("LOCAL_WORLD_SIZE", 1))


def _starter(environ: Mapping[str, str]) -> psutil.Process:
    """The launching process: the parent, or that of srun, below which a script may stand."""
    above = psutil.Process().parents()
    if not signals.is_launched(environ):
        return next((process for process in above if process.name() == "slurmstepd"), above[0])
    return above[0]


def _private(folder: Path) -> Path:
    """Make the folder; a `PermissionError` where another user could have put things into it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


def _sweep(mine: Path) -> None:
    """Remove what launches left that were killed."""
    for folder in mine.iterdir():
        pid, born = folder.name.split("-")[:2]
        try:
            lives = psutil.Process(int(pid)).create_time() == float(born)
        except psutil.NoSuchProcess:
            lives = False
        if not lives:
            shutil.rmtree(folder, ignore_errors=True)
