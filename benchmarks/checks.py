"""What must hold on a GPU: half precision, compiling, equal runs, resume, two ranks, resizing.

`python benchmarks/checks.py` prints their figures, gpu.py puts them into its own, `pytest -m gpu`
wants them to pass. Without a GPU they run on the CPU: without fp16, and without BatchNorm in the
network of the two ranks, since torch synchronizes it on GPUs only.
"""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.competitors import Launched
from benchmarks.epoch import first_steps
from benchmarks.trainer import Trainer
from launcher import Images, Recipe, Synthetic
from launcher.config import loader
from launcher.config.overrides import override
from launcher.config.slots import CompileMode
from launcher.data import sources
from launcher.data.augment import resized
from launcher.data.images import Data
from launcher.distributed.accelerator import be_deterministic, create_accelerator
from launcher.distributed.world import World
from tests.support.processes import RESUMABLE, fingerprint

SELF = Path(__file__).resolve()
PATIENCE = 90  # seconds
RUNS = ("whole", "cut")

Figures = dict[str, Any]


def simplecnn(steps: int) -> tuple[Recipe, Data]:
    """recipes/simplecnn.py and embedded images for so many steps."""
    recipe = loader.load(SELF.parent.parent / "recipes" / "simplecnn.py").recipe
    source = partial(Synthetic, count=steps * recipe.data.batch_size)
    recipe = replace(recipe, data=replace(recipe.data, source=source, fallback=None))
    data = sources.load(recipe.data)
    return recipe, replace(data, train=first_steps(data.train, recipe, steps))


def learns(precision: str) -> Figures:
    """The loss is finite and falls in two epochs of 100 steps."""
    recipe, data = simplecnn(100)
    overrides = [f"precision={precision}"]
    if precision == "pure_fp16":
        # Without a scaler it needs the larger gradients of a sum, whose scale Adam ignores, and
        # an epsilon that fp16 can hold: 1e-8 becomes 0, and Adam then divides 0 by 0.
        overrides += ["sum_loss=true", "optimizer.eps=1e-4"]
    trainer = Trainer(override(recipe, overrides), data)
    losses = [report.loss for report in trainer.epochs(10, last=2)]
    passed = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    return {"passed": passed, "losses": [losses[0], losses[-1]]}


def compiling_changes_no_loss(mode: bool | CompileMode) -> Figures:
    """The losses of ten steps, plain and compiled, in full float32."""
    recipe, data = simplecnn(10)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain, compiled = (
            [report.loss for report in Trainer(each, data).epochs(1, last=1)]
            for each in (recipe, replace(recipe, compile=mode))
        )
    difference = max(abs(a - b) for a, b in zip(plain, compiled, strict=True))
    return {"passed": difference < 1e-3, "largest_difference": difference}


def equal_runs_are_equal() -> Figures:
    """Two runs with torch's deterministic algorithms end with the same bits."""
    recipe, data = simplecnn(100)
    be_deterministic()
    ends = []
    for _ in range(2):
        trainer = Trainer(recipe, data)
        list(trainer.epochs(last=1))
        ends.append([p.detach().clone() for p in trainer.ctx.state.network.parameters()])
    torch.use_deterministic_algorithms(False)
    return {"passed": all(map(torch.equal, *ends))}


class Normalized(nn.Module):
    """A convolution, BatchNorm where there is a GPU, a linear layer; in float64."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(8) if torch.cuda.is_available() else nn.Identity()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            norm,
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        ).double()

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 10)."""
        return self.layers(images)


def resume_is_exact() -> Figures:
    """A run that is cut and resumed ends with the bits of one that is not, in each precision."""
    precisions = ("fp32", "bf16", "fp16") if torch.cuda.is_available() else ("fp32", "bf16")
    with TemporaryDirectory() as folder:

        def train(precision: str, name: str, *words: str) -> "subprocess.Popen[bytes]":
            settings = ["epochs=3", "deterministic=true", f"precision={precision}", "--wandb=off"]
            named = [*settings, "--name", f"{name}-{precision}", *words]
            return _start(["-m", "launcher", str(RESUMABLE), *named], folder)

        begun = [train(precision, "whole") for precision in precisions]
        begun += [train(precision, "cut", "--max-steps", "30") for precision in precisions]
        if not _succeed(*begun):
            return {"passed": False, "failed": "training"}
        if not _succeed(*[train(precision, "cut", "--resume") for precision in precisions]):
            return {"passed": False, "failed": "resuming"}
        prints = {
            precision: [fingerprint(Path(folder, "runs", f"{n}-{precision}")) for n in RUNS]
            for precision in precisions
        }
    return {"passed": all(one == other for one, other in prints.values()), "sha256": prints}


def two_ranks_are_one() -> Figures:
    """Two ranks on one device over gloo, with SyncBatchNorm, end with one rank's parameters."""
    with TemporaryDirectory() as folder:
        one, two = Path(folder, "one.pt"), Path(folder, "two.pt")
        alone = _succeed(_start([str(SELF), "rank", str(one)], folder))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        # Both have the local rank 0, and so the same device.
        several = address | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        ranks = [
            _start([str(SELF), "rank", str(two)], folder, RANK=str(n), **several) for n in range(2)
        ]
        if not (_succeed(*ranks) and alone):
            return {"passed": False, "failed": "two ranks" if alone else "one rank"}
        first, second = torch.load(one), torch.load(two)
    gap = max(float((first[name] - second[name]).abs().max()) for name in first)
    moved = max(float((first[name] - first[f"initial {name}"]).abs().max()) for name in _names())
    passed = first.keys() == second.keys() and gap < 1e-10 < moved
    return {"passed": passed, "largest_difference": gap, "largest_change": moved}


def _names() -> list[str]:
    return [name for name, _ in Normalized().named_parameters()]


def _start(words: list[str], folder: str, **environment: str) -> "subprocess.Popen[bytes]":
    own = os.environ | {"PYTHONPATH": str(SELF.parent.parent)} | environment
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=own)


def _succeed(*processes: "subprocess.Popen[bytes]") -> bool:
    """Wait for all; none is left running."""
    try:
        return not any(process.wait(PATIENCE) for process in processes)
    except subprocess.TimeoutExpired:
        return False
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rank(output: Path) -> None:
    """Train as one of the ranks that the environment tells of; rank 0 saves what it learnt."""
    world = World.of_this_process()
    if world.size > 1:  # before Accelerate does, which would take NCCL: one rank per card
        torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    images = Images(partial(Synthetic, count=400), batch_size=32, mean=(0.5,) * 3, std=(0.3,) * 3)
    recipe = Recipe(
        model=Normalized,
        data=images,
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        epochs=1,
        sync_batch_norm=torch.cuda.is_available() and world.size > 1,
    )
    data = sources.load(images)
    accelerator = create_accelerator("fp32", world)
    launched = Launched(replace(recipe, seed=1), data, accelerator)
    network = launched.ctx.state.network
    before = {f"initial {n}": p.detach().clone().cpu() for n, p in network.named_parameters()}
    launched.epoch(data.train.to(accelerator.device))
    if world.is_main:
        torch.save({n: v.cpu() for n, v in network.state_dict().items()} | before, output)
    if world.size > 1:
        torch.distributed.destroy_process_group()


HALF = ("bf16", "fp16", "pure_bf16", "pure_fp16")


def smaller_images_are_alike() -> Figures:
    """An image is resized alike beside any others, and to a grey of what a CPU makes of it."""
    device = create_accelerator("fp32").device
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 48, 48, 3), dtype=torch.uint8, generator=random)
    together = resized(images.to(device), 32)
    alone = torch.cat([resized(image[None].to(device), 32) for image in images])
    apart = int((together.cpu().int() - resized(images, 32).int()).abs().max())
    equal = torch.equal(together, alone)
    return {"equal": equal, "greys_from_cpu": apart, "passed": equal and apart <= 1}


CHECKS: dict[str, Callable[[], Figures]] = {
    **{
        f"{precision} learns": partial(learns, precision)
        for precision in HALF
        if torch.cuda.is_available() or "fp16" not in precision
    },
    "compiling changes no loss": partial(compiling_changes_no_loss, True),
    "CUDA graphs change no loss": partial(compiling_changes_no_loss, "reduce-overhead"),
    "equal runs are equal": equal_runs_are_equal,
    "resume is exact": resume_is_exact,
    "two ranks with SyncBatchNorm are one": two_ranks_are_one,
    "smaller images are alike": smaller_images_are_alike,
}


def main() -> None:
    """A child's part, or all checks."""
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]))
    else:
        print(json.dumps({name: check() for name, check in CHECKS.items()}, indent=1))


if __name__ == "__main__":
    main()
