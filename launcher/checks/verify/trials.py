"""The runs that `verify` compares: each is made once, in its own folder, and then read."""

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from launcher.checkpoint import checkpoint
from launcher.checkpoint.run_files import RunFiles
from launcher.checks.verdicts import TimeUpError
from launcher.checks.verify import ranks, slices, trial
from launcher.checks.verify.slices import EPOCHS, LEAST_EACH, MOST_EACH
from launcher.checks.verify.trial import Sighting, Subject, Trial, compile_mode
from launcher.config.loader import Load
from launcher.config.recipe import Recipe
from launcher.config.serialize import code_name
from launcher.config.slots import CompileMode, Precision
from launcher.data.images import Data
from launcher.distributed.accelerator import usable_cores
from launcher.distributed.environment import is_true
from launcher.errors import UserError
from launcher.training.model import build_network
from launcher.training.network import upcast
from launcher.training.trial_passes import SHAPE_ERRORS, two_images
from launcher.utils.user_code import is_users, user_location

PASSES = 4  # that are timed
# The approximate number of runs, with one more for BatchNorm and one for `compile`.
OWN_RUNS, DOUBLE_RUNS = 4.5, 5.5
MOST_STEPS, LEAST_STEPS = 20, 6  # without --steps
SLOW = 1.5  # times: float32 replaces half precision if it is so much faster
_HALVES = ("bf16", "pure_bf16")
_ON_A_CPU: dict[str, Precision] = {"fp16": "bf16", "pure_fp16": "pure_bf16"}
_OUTPUT = "output.txt"  # of all ranks


class TrialError(Exception):
    """A run that had to end well did not: says why."""


@dataclass(frozen=True)
class Settings:
    """The options of the command, and the temporary folder."""

    words: tuple[str, ...]
    load: Load
    ranks: int
    steps: int | None  # None: as many as the time allows
    folder: Path


class Trials:
    """Makes the runs, and keeps the records of each."""

    def __init__(
        self, settings: Settings, progress: Callable[[str], AbstractContextManager[Any]]
    ) -> None:
        """`progress` shows that a run is being made; `prepare` comes first."""
        self.settings, self._progress = settings, progress
        self._subject: Subject | None = None
        self._seen: dict[Trial, list[Sighting]] = {}
        self.unfinished = ""
        self.steps = 0
        self.fingerprint = 0

    @property
    def _ready(self) -> Subject:
        assert self._subject is not None
        return self._subject

    def prepare(self, recipe: Recipe, seconds: float) -> Data:
        """Write the images for all runs; fewer, if the network is slow for these `seconds`."""
        settings = self.settings
        gpus = 0 if is_true(os.environ.get("ACCELERATE_USE_CPU", "")) else torch.cuda.device_count()
        threads = max(1, usable_cores() // settings.ranks)
        torch.set_num_threads(threads)
        with self.doing("opening the images"):
            most = slices.choose_sizes(recipe, settings.ranks, settings.steps or MOST_STEPS)
            data = slices.own_images(recipe, most)
            effort = effort_in_time(recipe, data, settings, seconds, on_cpu=gpus < settings.ranks)
            sizes = slices.choose_sizes(recipe, settings.ranks, effort.steps, effort.each)
            data = slices.take(data, sizes)
            images = settings.folder / "images.pt"
            slices.save(data, images)
        steps_per_epoch = -(-len(data.train) // sizes.batch)
        self.steps = min(effort.steps, EPOCHS * steps_per_epoch)
        self.fingerprint = slices.fingerprint(data)
        self._subject = Subject(
            load=settings.load,
            words=settings.words,
            images=images,
            opened=most,
            sizes=sizes,
            steps=self.steps,
            runs=settings.folder / "runs",
            on_cpu=gpus < settings.ranks,
            threads=threads,
            precision=effort.precision,
        )
        self._ready.runs.mkdir()
        return data

    @property
    def place(self) -> str:
        """The ranks and the device of the runs, in words."""
        subject = self._ready
        device = "CPU" if subject.on_cpu else "GPUs, with deterministic=true"
        return f"batches of {subject.sizes.batch} on {device}"

    @property
    def precision(self) -> Precision | None:
        """The precision of the runs that are not in float64."""
        return self._ready.precision

    def compile_mode(self, mode: bool | CompileMode) -> bool | CompileMode:
        """The compile mode that replaces `mode` on this machine."""
        return compile_mode(mode, self._ready.on_cpu)

    def run(self, wanted: Trial) -> list[Sighting]:
        """The records of all ranks of a run; none of a killed one.

        Raises `UserError` for what the run refuses, and `TrialError` where it fails.
        """
        if wanted not in self._seen:
            with self.doing(wanted.kind):
                self._seen[wanted] = self._make(wanted)
        return self._seen[wanted]

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show what is being done; where the time ends in it, `unfinished` says so."""
        self.unfinished = what
        with self._progress(what):
            yield
        self.unfinished = ""

    def _make(self, wanted: Trial) -> list[Sighting]:
        subject = self._ready
        variables = ranks.without_place(os.environ)
        output = subject.runs / _OUTPUT
        surroundings = ranks.Surroundings(Path.cwd(), variables, output)
        arguments = (subject, wanted)
        running = ranks.start(wanted.ranks, surroundings, trial.work, arguments, wanted.is_new)
        try:
            codes = running.wait()
        except TimeUpError:
            self.unfinished = f"a run on {wanted.kind}{self._standstill(wanted)}"
            raise
        finally:
            running.kill()
        if wanted.kill and -signal.SIGKILL in codes:
            return []
        paths = [trial.result_path(subject, wanted, rank) for rank in range(wanted.ranks)]
        found = [pickle.loads(p.read_bytes()) if p.is_file() else None for p in paths]
        for sighting in filter(None, found):
            if sighting.refusal:
                given, expected, instead = sighting.refusal
                raise UserError(given, expected=expected, instead=instead)
        for sighting in filter(None, found):
            if sighting.failure:
                raise TrialError(sighting.failure)
        if any(codes) or None in found:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            ends = ", ".join(_describe_end(code) for code in codes)
            raise TrialError(": ".join([f"the ranks ended with {ends}", *last]))
        return [sighting for sighting in found if sighting]

    def _standstill(self, wanted: Trial) -> str:
        """The position of the rank that is furthest behind, for which the others wait."""
        paths = [trial.place_path(self._ready, wanted, rank) for rank in range(wanted.ranks)]
        begun = [path for path in paths if path.is_file()]
        if len(begun) < len(paths):
            return ", before its first step"
        stand = [(*json.loads(path.read_text()), path.stat().st_mtime) for path in begun]
        _, place, since = min(stand, key=lambda one: (one[0], one[2]))
        return f", {place} for {time.time() - since:.0f} s"

    def copy(self, one: Trial, two: Trial) -> int:
        """Copy the run folder of `one` to `two`, as it was at the oldest kept checkpoint.

        Returns that checkpoint's step.
        """
        source, target = self._folder(one), self._folder(two)
        shutil.copytree(source, target)
        oldest, *others = sorted((target / "checkpoints").glob("step-*"))
        for other in others:
            shutil.rmtree(other)
        return checkpoint.read_state(oldest).progress.step

    def weights(self, made: Trial) -> dict[str, Path]:
        """The files of weights at the end: what was trained, and what was evaluated."""
        newest = self._newest(made)
        files = {path.name: path for path in newest.glob("*.safetensors")}
        return {**files, "final": self._folder(made) / "final.safetensors"}

    def final_weights(self, made: Trial) -> Path:
        """The weights that were evaluated last."""
        return self.weights(made)["final"]

    def state(self, made: Trial) -> dict[str, Any]:
        """The complete state of a run at its end."""
        optimizer = torch.load(self._newest(made) / "optimizer.pt", weights_only=True)
        weights = {name: load_file(path) for name, path in self.weights(made).items()}
        return {"weights": weights, "optimizer": optimizer}

    def evaluations(self, made: Trial) -> list[dict[str, Any]]:
        """The metrics of the test images after each epoch."""
        rows = RunFiles(self._folder(made)).epochs
        return [{k: v for k, v in row.items() if k.startswith("test/")} for row in rows]

    def _folder(self, made: Trial) -> Path:
        return self._ready.runs / made.name

    def _newest(self, made: Trial) -> Path:
        found, _ = checkpoint.newest(self._folder(made) / "checkpoints")
        assert found is not None
        return found


@dataclass(frozen=True)
class Effort:
    """The work that fits into the time: images of a micro-batch, steps, and precision."""

    each: int
    steps: int
    precision: Precision | None


def effort_in_time(
    recipe: Recipe, data: Data, settings: Settings, seconds: float, *, on_cpu: bool
) -> Effort:
    """Estimate the work with which all runs end within `seconds`.

    A CPU may have units for bfloat16 and none for float64, or the reverse: each is measured. It
    has none for float16.
    """
    parts = settings.ranks * recipe.passes
    asked, precision = settings.steps or MOST_STEPS, recipe.precision
    if on_cpu and precision is not None:
        precision = _ON_A_CPU.get(precision, precision)
    in_double = _seconds_of_image(recipe, data, "double")

    def images_in_time(precision: str | None) -> float:
        own = _seconds_of_image(recipe, data, "half" if precision in _HALVES else "single")
        each = OWN_RUNS * own + DOUBLE_RUNS * in_double
        return seconds / (parts * each)

    fits = images_in_time(precision)
    if on_cpu and precision in _HALVES and fits < LEAST_EACH * min(asked, LEAST_STEPS):
        other = images_in_time("fp32")
        if other > SLOW * fits:
            precision, fits = "fp32", other
    least = asked if settings.steps else LEAST_STEPS
    each = max(LEAST_EACH, min(MOST_EACH, int(fits / asked)))
    steps = max(least, min(asked, int(fits / each)))
    return Effort(each, steps, precision)


def _seconds_of_image(
    recipe: Recipe, data: Data, numbers: Literal["half", "single", "double"]
) -> float:
    """The mean time of forward and backward; 0 where the network refuses float64."""
    network = build_network(recipe, data.train).train()
    images = two_images(network, recipe, data.train, "contiguous")
    if numbers == "double":
        network, images = network.double(), images.double()
    try:
        for done in range(PASSES):
            if done == 1:  # the first is slower than others
                begin = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numbers == "half"):
                scores = network(images)
            upcast(scores).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        if numbers == "double":
            return 0.0
        if not is_users(error, SHAPE_ERRORS):
            raise  # of the launcher's own
        raise UserError(
            f"{code_name(recipe.model)} fails in training mode on two images: {error}"
            f"{user_location(error)}",
            expected="a network that takes any number of images in a pass, as the trials have some "
            "that divide evenly neither by the ranks nor into an epoch",
            instead="train it on the ranks that you have: before it begins, it is tried on the "
            "images of its passes",
        ) from error
    return (time.perf_counter() - begin) / (len(images) * (PASSES - 1))


def _describe_end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
