"""Start the launcher as its users do, wait for a line of its output, and compare what it left."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import psutil

from tests.support import forked

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable,)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
_TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE_2 = (*ACCELERATE, "--multi_gpu", "--num_processes", "2")
TORCHRUN_1 = (*_TORCHRUN, "1")
TORCHRUN = (*_TORCHRUN, "2")
RESUMABLE = ROOT / "tests" / "support" / "resumable.py"
PATIENCE = 200.0  # seconds on a busy machine


class Run:
    """A running launcher; its output goes into a file, which may be read while it runs.

    `launch` is a number of ranks, each of which is told its place by its environment, as under
    srun; they are forked from a process that has imported torch. Or it is a command that starts
    them, which is a new process.
    """

    def __init__(
        self,
        launch: int | tuple[str, ...],
        folder: Path,
        *words: str,
        recipe: Path = RESUMABLE,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        self._is_agent = not isinstance(launch, int)
        command, places = (PYTHON, places_of(launch)) if isinstance(launch, int) else (launch, [{}])
        command = (*command, "-m", "launcher", str(recipe), "--wandb", "off", "--no-report", *words)
        fixed = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        fixed = {**os.environ, **fixed, "HF_HOME": str(folder), **environment}
        start = subprocess.Popen if self._is_agent else forked.Popen
        with self.output.open("w") as file:
            self.processes = [
                start(command, cwd=folder, env={**fixed, **place}, stdout=file, stderr=file)
                for place in places
            ]
        self.process = self.processes[0]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Until the output contains `text`."""
        until = time.monotonic() + PATIENCE
        while True:
            runs = any(process.poll() is None for process in self.processes)
            if text in (said := self.text()):
                return
            assert runs, said
            assert time.monotonic() < until, said
            time.sleep(0.02)

    def end(self) -> int:
        """The exit code; of several ranks, that of the first which failed."""
        codes = [process.wait(timeout=PATIENCE) for process in self.processes]
        return next((code for code in codes if code), 0)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: these, or those below torchrun or `accelerate launch`."""
        own = [psutil.Process(process.pid) for process in self.processes]
        if not self._is_agent:
            return own
        return [child for child in own[0].children() if "-m launcher" in " ".join(child.cmdline())]


def places_of(size: int) -> list[dict[str, str]]:
    """What srun tells each of so many ranks on this machine; nothing where there is one."""
    if size == 1:
        return [{}]
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(free_port())
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
