"""Who am I: ranks, precision, and the guards on the number of processes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from accelerate.commands.config import config_args

from launcher.distributed.accelerator import (
    choose_precision,
    create_accelerator,
    device_name,
    run_on_main,
    usable_cores,
)
from launcher.distributed.world import World, check_world, processes_in, refuse_misplaced
from launcher.errors import UserError
from tests.support.helpers import ROOT, refused

CONFIGS = ROOT / "accelerate_config"
LAUNCH = ["python", "accelerate", "launch"]
RECIPE = ["-m", "launcher", "recipes/simplecnn.py"]


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Accelerate configuration of whoever runs the tests plays no part."""
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))


# Ranks


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World(rank=0, local_rank=0, size=1)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, World(5, 1, 8)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, World(0, 0, 2)),
        ({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, World(0, 0, 1)),
    ],
)
def test_the_environment_announces_rank_and_world_size(
    environ: dict[str, str], world: World
) -> None:
    assert World.from_env(environ) == world
    assert World.from_env(environ).is_main == (world.rank == 0)


def test_without_a_launcher_this_process_is_alone() -> None:
    assert World.from_env() == World(0, 0, 1)


# Precision


@pytest.mark.parametrize(
    ("recipe", "configured", "expected"),
    [
        (None, None, ("fp32", "default")),
        (None, "no", ("fp32", "accelerate config")),
        (None, "bf16", ("bf16", "accelerate config")),
        (None, "FP16", ("fp16", "accelerate config")),
        ("fp32", "bf16", ("fp32", "recipe")),
        ("bf16", "no", ("bf16", "recipe")),
        ("fp16", None, ("fp16", "recipe")),
        ("bf16", "fp8", ("bf16", "recipe")),
    ],
)
def test_the_recipes_precision_wins_over_accelerates_and_that_over_fp32(
    recipe: str | None, configured: str | None, expected: tuple[str, str]
) -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": configured} if configured else {}
    assert choose_precision(recipe, True, environ) == expected


@pytest.mark.parametrize("recipe", [None, "fp32", "bf16"])
def test_fp32_and_bf16_need_no_gpu(recipe: str | None) -> None:
    assert choose_precision(recipe, False, {})[0] == (recipe or "fp32")


@pytest.mark.parametrize(
    ("recipe", "environ", "origin"),
    [
        ("fp16", {}, "recipe"),
        (None, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "accelerate config"),
    ],
)
def test_fp16_without_a_gpu_is_refused_with_where_it_came_from(
    recipe: str | None, environ: Mapping[str, str], origin: str
) -> None:
    with refused(f"fp16 ({origin})", "bf16 or fp32", "type precision=bf16"):
        choose_precision(recipe, False, environ)


@pytest.mark.parametrize("configured", ["fp8", "int8"])
def test_a_precision_that_the_launcher_does_not_have_is_refused(configured: str) -> None:
    with refused(repr(configured), "no, bf16 or fp16", "--mixed_precision bf16"):
        choose_precision(None, True, {"ACCELERATE_MIXED_PRECISION": configured})


# The number of processes


@pytest.mark.parametrize(
    ("announced", "running", "asked"), [(1, 1, None), (4, 4, None), (1, 1, 1), (4, 4, 4), (8, 8, 4)]
)
def test_a_world_as_large_as_asked_for_passes(
    announced: int, running: int, asked: int | None
) -> None:
    check_world(announced, running, asked)


def test_processes_that_each_believe_to_be_alone_are_stopped() -> None:
    with refused("2 processes", "alone", "ACCELERATE_USE_CPU=true", "--num_processes 2"):
        check_world(2, 1, None)


def test_fewer_processes_than_asked_for_are_stopped() -> None:
    with refused("4 processes were asked for", "started 1", "--multi_gpu --num_processes 4"):
        check_world(1, 1, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*LAUNCH, "--num_processes", "4", *RECIPE], 4),
        ([*LAUNCH, "--num_processes=4", *RECIPE], 4),
        ([*LAUNCH, "--num-processes", "4", *RECIPE], 4),
        ([*LAUNCH, "--num-processes=4", *RECIPE], 4),
        ([*LAUNCH, "--cpu", "--num_processes", "2", "train.py"], 2),
        ([*LAUNCH, *RECIPE], None),
        ([*LAUNCH, *RECIPE, "--num_processes", "4"], None),
        ([*LAUNCH, "--num_processes", "2", *RECIPE, "--num_processes", "4"], 2),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "4", *RECIPE], 4),
        (["python", "/usr/bin/accelerate-launch", "--num_processes", "4", *RECIPE], 4),
        (["python", "/usr/bin/torchrun", "--nproc-per-node", "4", *RECIPE], None),
        (["bash"], None),
        ([], None),
    ],
)
def test_the_number_asked_for_is_read_from_the_command_line(
    words: list[str], expected: int | None
) -> None:
    assert processes_in(words) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("cpu", 1), ("cpu_many", 2), ("gpu", 1), ("gpu_many", 8), ("nodes", 16)]
)
@pytest.mark.parametrize("flag", ["--config_file", "--config-file"])
def test_the_number_asked_for_is_read_from_the_config_file(
    flag: str, name: str, expected: int
) -> None:
    path = str(CONFIGS / f"{name}.yaml")
    assert processes_in([*LAUNCH, flag, path, *RECIPE]) == expected
    assert processes_in([*LAUNCH, f"{flag}={path}", *RECIPE]) == expected


def test_the_command_line_wins_over_the_config_file() -> None:
    words = ["--config_file", str(CONFIGS / "gpu_many.yaml"), "--num_processes", "3"]
    assert processes_in([*LAUNCH, *words, *RECIPE]) == 3


def test_the_default_config_file_counts_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_args, "default_config_file", str(CONFIGS / "gpu_many.yaml"))
    assert processes_in([*LAUNCH, *RECIPE]) == 8


def test_every_shipped_config_file_is_read() -> None:
    names = {path.name for path in CONFIGS.iterdir()}
    assert names == {f"{name}.yaml" for name in ("cpu", "cpu_many", "gpu", "gpu_many", "nodes")}


@pytest.mark.parametrize(
    "word",
    [
        "--num_processes",
        "--num_processes=4",
        "--num-processes=4",
        "--num_machines",
        "--mixed_precision=bf16",
        "--mixed-precision",
        "--config_file=a.yaml",
        "--multi_gpu",
        "--cpu",
        "--machine_rank=1",
        "--main_process_ip=10.0.0.1",
        "--main_process_port",
        "--gpu_ids=0",
    ],
)
def test_accelerates_flags_behind_the_recipe_are_refused(word: str) -> None:
    with refused(word, "before -m launcher", f"accelerate launch {word}"):
        refuse_misplaced(["epochs=3", word, "4"])


def test_settings_behind_the_recipe_are_not_taken_for_accelerates_flags() -> None:
    refuse_misplaced(["epochs=3", "--epochs=3", "--optimizer.lr=1", "num_processes=4"])


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


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
THREADS = """
import torch
from launcher.distributed.accelerator import set_threads
print("given", torch.get_num_threads())
set_threads()
print("threads", torch.get_num_threads())
"""
# Stands where `accelerate launch` stands: passes on what its user chose, or gives one thread.
PARENT = "import os, subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], env={env}))"


def test_under_accelerate_launch_one_process_uses_all_cores(tmp_path: Path) -> None:
    command = [*ACCELERATE, "--num_processes", "1", script(tmp_path, THREADS)]
    done = run(command, ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path))
    assert done.stdout == f"given 1\nthreads {usable_cores()}\n", done.stderr


@pytest.mark.parametrize("chosen", [1, 2])
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


def test_two_processes_asked_for_and_one_started_is_refused_by_name(tmp_path: Path) -> None:
    text = (
        "from launcher.distributed.accelerator import create_accelerator\n"
        "create_accelerator('fp32')\n"
    )
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", script(tmp_path, text)]
    done = run(command, HF_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "2 processes were asked for, but accelerate launch started 1" in done.stderr


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
    done = run([sys.executable, script(tmp_path, DETERMINISTIC)], ACCELERATE_USE_CPU="true")
    assert done.stdout == "False True\nTrue False\n:4096:8 False\n", done.stderr
