"""Start the launcher as its users do, wait for a line of its output, and compare what it left."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable,)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
_TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE_2 = (*ACCELERATE, "--multi_gpu", "--num_processes", "2")
TORCHRUN_1 = (*_TORCHRUN, "1")
TORCHRUN = (*_TORCHRUN, "2")
TORCHRUN_4 = (*_TORCHRUN, "4")
RESUMABLE = ROOT / "tests" / "support" / "resumable.py"
PATIENCE = 90.0  # seconds on a busy machine


class Run:
    """A running launcher; its output goes into a file, which may be read while it runs."""

    def __init__(
        self,
        launch: tuple[str, ...],
        folder: Path,
        *words: str,
        recipe: Path = RESUMABLE,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        fixed = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*launch, "-m", "launcher", str(recipe), "--wandb", "off", *words],
                cwd=folder,
                env={**os.environ, **fixed, "HF_HOME": str(folder), **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Until the output contains `text`."""
        until = time.monotonic() + PATIENCE
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(timeout=PATIENCE)


def ranks_of(run: Run) -> list[psutil.Process]:
    """The processes that train, below torchrun or `accelerate launch`."""
    children = psutil.Process(run.process.pid).children()
    return [child for child in children if "-m launcher" in " ".join(child.cmdline())]


def fingerprint(run: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((run / "final.safetensors").read_bytes()).hexdigest()


def write_double(path: Path, pause: float = 0.0) -> Path:
    """The resumable recipe in float64, without what is each rank's own: dropout and BatchNorm.

    On any number of ranks it computes the same to 1e-12. `pause` slows each forward pass, so that
    there is time to interrupt it.
    """
    source = RESUMABLE.read_text()
    source = source.replace("nn.BatchNorm2d(width)", "nn.Identity()").replace("(0.2)", "(0.0)")
    source = source.replace("        )\n\n    def forward", "        ).double()\n\n    def forward")
    source = source.replace(
        "        return self", f"        time.sleep({pause})\n        return self"
    )
    path.write_text(source.replace("\nfrom functools", "\nimport time\nfrom functools"))
    return path
