"""One rank of a run that `verify` starts: an ordinary training with a watcher in it.

The watcher records checksums and numbers, a few for each step: enough to say in which step, and in
which layer of it, two runs begin to differ.
"""

import json
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from launcher.checks.verify import slices
from launcher.checks.verify.slices import Sizes
from launcher.checks.verify.synchronized import synchronize_batch_norm
from launcher.config.loader import Load
from launcher.config.options import RunOptions
from launcher.config.plan import SaveInterval
from launcher.config.recipe import Recipe
from launcher.config.slots import CompileMode, Precision
from launcher.distributed.process_group import Timeouts
from launcher.distributed.world import World
from launcher.errors import LauncherError, OtherRankError, UserError
from launcher.run.train import train_loaded
from launcher.training.evaluation import evaluate
from launcher.training.metrics import Evaluation
from launcher.training.network import takes_hooks
from launcher.training.state import TrainContext
from launcher.utils import atomic_write
from launcher.utils.user_code import user_location

Phase = Literal["forward", "backward", "update"]
_TIMEOUTS = Timeouts(join=60, collective=120)
_WRITING = 60.0  # seconds for a checkpoint


@dataclass(frozen=True)
class Subject:
    """The recipe that is verified: its file, its settings, and the images in place of its own."""

    load: Load
    words: tuple[str, ...]
    images: Path
    opened: Sizes  # sizes for opening the recipe's own images
    sizes: Sizes
    steps: int
    runs: Path
    on_cpu: bool
    threads: int  # of each rank, the same in all runs
    precision: Precision | None  # of the runs that are not in float64


@dataclass(frozen=True)
class Kill:
    """Where a rank ends itself by SIGKILL."""

    step: int
    phase: Phase
    rank: int


@dataclass(frozen=True)
class Trial:
    """One run of the subject.

    `synchronized`: BatchNorm normalizes by the images of all ranks. `steady` are layers that run in
    evaluation mode during the training.
    """

    name: str
    ranks: int
    double: bool = False
    compiled: bool = False
    synchronized: bool = False
    steady: tuple[str, ...] = ()
    resumes: bool = False
    kill: Kill | None = None
    init_from: str | None = None
    max_steps: int | None = None
    is_new: bool = False  # new Python processes, which open the recipe's own images again

    @property
    def kind(self) -> str:
        """The kind of run in words, for the progress line."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}{' in float64' * self.double}{', compiled' * self.compiled}"


@dataclass
class StepTrace:
    """One step on one rank: checksums of each image, of each layer's output, of the weights."""

    images: list[int] = field(default_factory=list)
    layers: list[tuple[str, int]] = field(default_factory=list)
    loss: float = 0.0
    weights: int = 0


@dataclass
class Sighting:
    """The record of one rank. `each_image` are the layers' outputs in the first step, per image."""

    steps: dict[int, StepTrace] = field(default_factory=dict)
    each_image: list[tuple[str, dict[int, float]]] = field(default_factory=list)
    begins_with: int = 0  # checksum of the weights
    kinds: dict[str, str] = field(default_factory=dict)  # of the layers, by their names
    changed: tuple[str, ...] = ()  # Python attributes of layers that training has changed
    evaluated: Evaluation | None = None  # before the training
    own_images: int | None = None  # fingerprint of the images when opened again
    refusal: tuple[str, str, str] | None = None  # the parts of a UserError
    failure: str = ""


class Watcher:
    """Hooks into a training, and records what it observes."""

    def __init__(
        self,
        trial: Trial,
        rank: int,
        place: Path | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """`place` is the file for the rank's position, `checkpoints` the run's folder of those."""
        self._trial, self._rank, self._place, self._begun = trial, rank, place, 0
        self._checkpoints = checkpoints
        self.seen = Sighting()
        self._attributes: dict[str, Any] = {}
        self._ctx: TrainContext | None = None
        self._images: list[int] = []

    def watch(self, ctx: TrainContext) -> TrainContext:
        """Before the training: set the steady layers, evaluate if asked to, install hooks."""
        self._ctx = ctx
        network = ctx.state.network
        keep_steady(network, self._trial.steady)
        if self._trial.synchronized and ctx.plan.world_size > 1:
            synchronize_batch_norm()
        if self._trial.init_from:
            self.seen.evaluated = evaluate(ctx, ctx.data.evaluated)
        self.seen.begins_with = checksum(network.state_dict())
        self._attributes = _attributes(network)
        self.seen.kinds = {name: type(m).__name__ for name, m in network.named_modules()}
        if not self._trial.compiled:  # hooks would be compiled as well
            network.register_forward_pre_hook(self._before, prepend=True)
            for name, module in network.named_modules():
                if takes_hooks(module):
                    module.register_forward_hook(self._hook(name))
        return replace(ctx, phase=self._phase)

    def end(self, losses: tuple[float, ...]) -> None:
        """After the training, with the losses of its last steps."""
        assert self._ctx is not None
        first = self._ctx.plan.last_step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            self._trace(step).loss = loss
        before, after = self._attributes, _attributes(self._ctx.state.network)
        self.seen.changed = tuple(n for n in after if after[n] != before.get(n, after[n]))

    @property
    def _step(self) -> int | None:
        return self._ctx.state.current_step if self._ctx else None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        step, kill = self._step, self._trial.kill
        if self._place is not None and step is not None:
            self._begun += 1
            place = f"rank {self._rank} in step {step} ({name})"
            content = json.dumps([self._begun, place]).encode()
            atomic_write.replace(self._place, content, is_kept=False)
        if kill and (step, name, self._rank) == (kill.step, kill.phase, kill.rank):
            self._wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if step is not None and name == "update" and self._ctx is not None:
            self._trace(step).weights = checksum(dict(self._ctx.state.network.named_parameters()))

    def _wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint written in the background: otherwise nothing could be resumed."""
        until = time.monotonic() + _WRITING
        while self._checkpoints is not None and time.monotonic() < until:
            if any(self._checkpoints.glob("step-*")):
                return
            time.sleep(0.01)

    def _trace(self, step: int) -> StepTrace:
        return self.seen.steps.setdefault(step, StepTrace())

    def _before(self, network: nn.Module, given: tuple[Any, ...]) -> None:
        step = self._step
        if step is not None:
            self._images = [checksum(image) for image in given[0].detach()]
            self._trace(step).images += self._images

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, given: Any, made: Any) -> None:
            step = self._step
            if step is None or not isinstance(made, Tensor) or made.is_nested:
                return
            if not self._trial.double:
                self._trace(step).layers.append((name, checksum(made)))
            elif step == 1 and len(made) == len(self._images):
                sums = made.detach().flatten(1).double().square().sum(1).tolist()
                self.seen.each_image.append((name, dict(zip(self._images, sums, strict=True))))

        return after


def keep_steady(network: nn.Module, names: tuple[str, ...]) -> None:
    """Keep these layers, but not their children, in evaluation mode during the training."""
    for name, module in network.named_modules():
        if name in names:
            module.training = False
            module.train = partial(_train_children, module)


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    return module


def _attributes(network: nn.Module) -> dict[str, Any]:
    """The numbers and tensors of layers that are neither parameters nor buffers."""
    found = {}
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            is_own = not attribute.startswith("_") and attribute != "training"
            if is_own and isinstance(value, int | float | Tensor):
                kept = checksum(value) if isinstance(value, Tensor) else value
                found[f"{name}.{attribute}".lstrip(".")] = kept
    return found


def checksum(value: Tensor | Mapping[str, Tensor]) -> int:
    """A checksum of the bits of one tensor, or of several."""
    if not isinstance(value, Tensor):
        total = 0
        for tensor in value.values():
            total = crc32(checksum(tensor).to_bytes(4, "big"), total)
        return total
    flat = value.detach().cpu().contiguous().reshape(-1)
    return crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


# The work of a rank


def version_of(recipe: Recipe, subject: Subject, trial: Trial) -> Recipe:
    """The recipe with a few images and a few epochs, for one trial."""
    images = slices.sliced(recipe.data, subject.images, subject.sizes.batch)
    recipe = replace(recipe, data=images, epochs=slices.EPOCHS, patience=None)
    compiles = trial.compiled and compile_mode(recipe.compile, subject.on_cpu)
    recipe = replace(recipe, compile=compiles)
    # In float64 without autocast, whatever the type of the weights.
    recipe = replace(recipe, precision="fp32" if trial.double else subject.precision)
    return recipe if subject.on_cpu else replace(recipe, deterministic=True)


def compile_mode(mode: bool | CompileMode, on_cpu: bool) -> bool | CompileMode:
    """On a CPU `force`, so that the network is compiled even if that is slower.

    The others are about CUDA graphs, or try kernels for hours.
    """
    return mode if mode is False or not on_cpu else "force"


def options_of(subject: Subject, trial: Trial) -> RunOptions:
    """The options of a run that reads the loss in each step, and saves now and then."""
    return RunOptions(
        runs=subject.runs,
        name=trial.name,
        max_steps=trial.max_steps or subject.steps,
        wandb="off",
        log_every=1,
        resume=trial.resumes,
        checkpoint_every=SaveInterval(steps=save_interval(subject.steps)),
        timeouts=_TIMEOUTS,
        init_from=trial.init_from,
    )


def save_interval(steps: int) -> int:
    """Steps between two checkpoints."""
    return max(1, steps // 4)


def result_path(subject: Subject, trial: Trial, rank: int) -> Path:
    """The file for the record of a rank."""
    return subject.runs / f"{trial.name}{'-resumed' * trial.resumes}-{rank}.pickle"


def place_path(subject: Subject, trial: Trial, rank: int) -> Path:
    """The file in which a rank writes the number of phases begun, and its position in words."""
    return result_path(subject, trial, rank).with_suffix(".place")


def work(subject: Subject, trial: Trial) -> None:
    """Train as one rank, and write the record to a file."""
    if trial.double:
        torch.set_default_dtype(torch.float64)
    world = World.from_env(os.environ)
    world = replace(world, threads=subject.threads, use_cpu=world.use_cpu or subject.on_cpu)
    checkpoints = subject.runs / trial.name / "checkpoints"
    place = place_path(subject, trial, world.rank)
    watcher = Watcher(trial, world.rank, place, checkpoints)
    seen = watcher.seen
    try:
        loaded = subject.load(subject.words[0], list(subject.words[1:]))
        if trial.is_new and world.is_main:
            own = slices.own_images(loaded.recipe, subject.opened)
            seen.own_images = slices.fingerprint(slices.take(own, subject.sizes))
        loaded = replace(loaded, recipe=version_of(loaded.recipe, subject, trial))
        result = train_loaded(loaded, options_of(subject, trial), world, watcher.watch)
        watcher.end(result.losses)
    except UserError as error:
        seen.refusal = (error.given, error.expected, error.instead)
    except OtherRankError:
        pass  # the file says why
    except LauncherError as error:
        seen.failure = str(error)
    except Exception as error:
        traceback.print_exc()
        seen.failure = f"{type(error).__name__}: {error}{user_location(error)}"
    path = result_path(subject, trial, world.rank)
    path.with_suffix(".part").write_bytes(pickle.dumps(seen))
    path.with_suffix(".part").rename(path)
