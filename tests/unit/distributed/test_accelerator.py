"""Precision, threads and device; what is told to torch; what runs on rank 0 for all ranks."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    run_on_main,
    usable_cores,
)
from launcher.errors import UserError
from tests.support import forked
from tests.support.helpers import ROOT, refused

# Precision


@pytest.mark.parametrize(
    ("recipe", "configured", "expected"),
    [
        (None, "", ("fp32", "default")),
        (None, "no", ("fp32", "accelerate config")),
        (None, "bf16", ("bf16", "accelerate config")),
        (None, "fp16", ("fp16", "accelerate config")),
        ("fp32", "bf16", ("fp32", "recipe")),
        ("bf16", "no", ("bf16", "recipe")),
        ("fp16", "", ("fp16", "recipe")),
        ("bf16", "fp8", ("bf16", "recipe")),
    ],
)
def test_the_recipes_precision_wins_over_accelerates_and_that_over_fp32(
    recipe: str | None, configured: str, expected: tuple[str, str]
) -> None:
    assert choose_precision(recipe, True, configured) == expected


@pytest.mark.parametrize("recipe", [None, "fp32", "bf16"])
def test_fp32_and_bf16_need_no_gpu(recipe: str | None) -> None:
    assert choose_precision(recipe, False)[0] == (recipe or "fp32")


@pytest.mark.parametrize(
    ("recipe", "configured", "origin"),
    [("fp16", "", "recipe"), (None, "fp16", "accelerate config")],
)
def test_fp16_without_a_gpu_is_refused_with_where_it_came_from(
    recipe: str | None, configured: str, origin: str
) -> None:
    with refused(f"fp16 ({origin})", "bf16 or fp32", "type precision=bf16"):
        choose_precision(recipe, False, configured)


@pytest.mark.parametrize("configured", ["fp8", "int8"])
def test_a_precision_that_the_launcher_does_not_have_is_refused(configured: str) -> None:
    with refused(repr(configured), "no, bf16 or fp16", "--mixed_precision bf16"):
        choose_precision(None, True, configured)


# Real processes


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment in which nobody has chosen a number of threads."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        command,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def run_forked(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """A script in which it does not matter who started it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return forked.run([sys.executable, script(folder, text)], cwd=folder, env=environment)


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
THREADS = """
import torch
from launcher.distributed.accelerator import set_threads
from launcher.distributed.world import World
print("given", torch.get_num_threads())
set_threads(World.of_this_process())
print("threads", torch.get_num_threads())
"""
# Stands where `accelerate launch` stands: passes on what its user chose, or gives one thread.
PARENT = "import os, subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], env={env}))"


@pytest.mark.slow
def test_under_accelerate_launch_one_process_uses_all_cores(tmp_path: Path) -> None:
    command = [*ACCELERATE, "--num_processes", "1", script(tmp_path, THREADS)]
    done = run(command, ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path))
    assert done.stdout == f"given 1\nthreads {usable_cores()}\n", done.stderr


READING = """
import threading
from functools import partial

import torch

from launcher import Folder
from tests.support.helpers import Tiny, tiny_recipe


class Counting(Tiny):
    def forward(self, images):
        reading = sum(thread.name.startswith("reading") for thread in threading.enumerate())
        print("computes with", torch.get_num_threads(), "reads with", reading, flush=True)
        return super().forward(images)


data = {"source": partial(Folder, size=8), "tier": "disk", "batch_size": 4}
recipe = tiny_recipe(model=partial(Counting, classes=2), data=data, epochs=1)
"""


@pytest.mark.slow
def test_under_accelerate_launch_as_many_threads_read_as_compute(tmp_path: Path) -> None:
    for half, label in product(("train", "test"), ("cat", "dog")):
        (tmp_path / "pictures" / half / label).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("RGB", (8, 8), (number, 0, 0))
            picture.save(tmp_path / "pictures" / half / label / f"{number}.png")
    words = ("-m", "launcher", script(tmp_path, READING), "--runs", str(tmp_path), "--no-report")
    command = [*ACCELERATE, "--num_processes", "1", *words]
    command += ("--wandb", "off", f"data.root={tmp_path / 'pictures'}")
    done = run(command, ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    *_, last = re.findall("computes with.*", done.stdout)
    assert last == f"computes with {usable_cores()} reads with {usable_cores()}"


@pytest.mark.parametrize("chosen", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_number_of_threads_chosen_by_the_user_is_respected(tmp_path: Path, chosen: int) -> None:
    parent = PARENT.format(env="os.environ")
    command = [sys.executable, "-c", parent, sys.executable, script(tmp_path, THREADS)]
    # Two threads chosen for two processes on two cores are not what would be shared out.
    sharing = str(chosen * usable_cores() if chosen > 1 else 1)
    environment = {"OMP_NUM_THREADS": str(chosen), "LOCAL_WORLD_SIZE": sharing}
    done = run(command, ACCELERATE_USE_CPU="true", **environment)
    given, threads = (line.split()[1] for line in done.stdout.splitlines())
    assert threads == given, done.stderr


def test_the_processes_of_one_machine_share_its_cores(tmp_path: Path) -> None:
    parent = PARENT.format(env="os.environ | {'OMP_NUM_THREADS': '1'}")
    command = [sys.executable, "-c", parent, sys.executable, script(tmp_path, THREADS)]
    done = run(command, ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE=str(usable_cores()))
    assert done.stdout == "given 1\nthreads 1\n", done.stderr


TOLD = """
import dataclasses, os, torch
from launcher.distributed.accelerator import _tell_torch, set_threads
from launcher.distributed.world import Launcher, World
task = World(3, 4, local_rank=1, local_size=2, node=1, device=0, address="gpu7", port=1234)
for world in (task, World(launcher=Launcher.SRUN, threads=3)):
    _tell_torch(world)
assert "RANK" not in os.environ, "a launcher tells torch itself, and one process nothing"
_tell_torch(dataclasses.replace(task, launcher=Launcher.SRUN))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(*[os.environ[name] for name in names])
set_threads(World(threads=3))
print(torch.get_num_threads())
"""


def test_torch_is_told_what_srun_does_not_tell_it(tmp_path: Path) -> None:
    """LOCAL_RANK is the number of the GPU, of which this task sees one."""
    done = run_forked(tmp_path, TOLD)
    assert done.stdout == "3 4 0 2 gpu7 1234\n3\n", done.stderr


# Alone


def test_on_main_returns_what_the_action_returned() -> None:
    assert run_on_main(create_accelerator("fp32"), lambda: {"folder": "runs/1"}) == {
        "folder": "runs/1"
    }


@pytest.mark.parametrize(
    "error", [UserError("a", expected="b", instead="c"), ZeroDivisionError("a fault")]
)
def test_on_main_raises_what_the_action_raised(error: Exception) -> None:
    def act() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_on_main(create_accelerator("fp32"), act)
    assert caught.value is error


def test_the_device_is_named_as_people_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_name(create_accelerator("fp32")).startswith("CPU, ")


DETERMINISTIC = """
import os, torch
from launcher.distributed.accelerator import create_accelerator
create_accelerator("fp32")
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
create_accelerator("fp32", deterministic=True)
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.utils.deterministic.fill_uninitialized_memory)
"""


def test_deterministic_algorithms_are_taken_on_demand(tmp_path: Path) -> None:
    done = run_forked(tmp_path, DETERMINISTIC)
    assert done.stdout == "False True\nTrue False\n:4096:8 False\n", done.stderr
