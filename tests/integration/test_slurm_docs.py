"""Every command of docs/slurm.md is run on a real Slurm, in its order, in one folder."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_readme import INSTALLS, offline
from tests.support.slurm_cluster import PATIENCE, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
BLOCKS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]
SMALLER = {  # than on a cluster with GPUs
    "--gpus 8": "--gpus 1 --cpus 1",
    "gpus-per-node=8": "gpus-per-node=1",
    "ntasks-per-node=8": "ntasks-per-node=1",
    "cpus-per-task=16": "cpus-per-task=1",
    "epochs=20": "epochs=16 data.batch_size=16",  # long enough to be interrupted
    "epochs=5": "epochs=2 --cpus 1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout, with the recipe on drawn images."""
    (tmp_path / "recipes").mkdir()
    text = (ROOT / "recipes" / "simplecnn.py").read_text(encoding="utf-8")
    (tmp_path / "recipes" / "simplecnn.py").write_text(offline(text))
    for name in ("accelerate_config", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    lines = {"launcher": "launcher", "accelerate": "accelerate.commands.accelerate_cli"}
    for name, module in lines.items():  # as an installation makes them
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def smaller(block: str) -> str:
    for text, instead in SMALLER.items():
        block = block.replace(text, instead)
    return block


def wait_for(pattern: str, folder: Path, logs: str) -> None:
    """Until a log says so."""
    until = time.monotonic() + PATIENCE
    while not any(re.search(pattern, path.read_text()) for path in folder.glob(logs)):
        texts = [path.read_text() for path in folder.glob(logs)]
        assert time.monotonic() < until, (pattern, texts)
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_the_page_from_top_to_bottom(slurm: Slurm, folder: Path) -> None:
    path = f"{folder / 'bin'}:{slurm.environment['PATH']}"
    environment = slurm.environment | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(block: str) -> str:
        done = subprocess.run(
            ("bash", "-e", "-c", smaller(block)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    install, job, tail, again, sweep, seeds, table, by_hand, accelerate = BLOCKS
    assert install in INSTALLS  # run by .ci/run
    shown = run(job)
    assert shown.startswith("#!/bin/bash\n")
    assert re.search(r"\nfirst +\d+ +(PENDING|CONFIGURING|RUNNING)", shown)
    wait_for(r"epoch +1/16", folder, "runs/jobs/first-*-1.log")
    assert "=== attempt 1 of job" in run(tail) or "epoch" in run(tail)
    run(again)
    wait_for("saved; waiting for attempt 2", folder, "runs/jobs/first-*-1.log")
    wait_for("resumed after step", folder, "runs/jobs/first-*-2.log")
    assert "swept" not in run(sweep)
    assert run(seeds).count("run runs/drawn-seed") == 2
    assert "= 2 ranks x" in run(by_hand)
    number = run(accelerate).split()[-1]
    assert slurm.wait_for_end(number) == "COMPLETED", (folder / f"slurm-{number}.out").read_text()
    assert "= 2 ranks x" in (folder / f"slurm-{number}.out").read_text()
    wait_for("last epoch +16", folder, "runs/jobs/first-*-2.log")
    for index in range(3):
        wait_for("last epoch +2", folder, f"runs/jobs/rates-{index}-*-1.log")
    for seed in range(2):
        wait_for("last epoch +2", folder, f"runs/jobs/drawn-seed{seed}-*-1.log")
    assert run("launcher submit --status").count(" COMPLETED ") == 6
    assert "n=2" in run(table)


def test_the_page_names_files_that_exist() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert os.path.exists(ROOT / "docs" / name.partition("#")[0]), name
