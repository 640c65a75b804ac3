"""Which process of how many: what the environment says, and the guards on the number."""

from pathlib import Path

import pytest
from accelerate.commands.config import config_args

from launcher.distributed.world import (
    Launcher,
    Parent,
    World,
    check_world,
    processes_in,
    refuse_impossible,
    refuse_misplaced,
)
from tests.support.helpers import ROOT, refused

CONFIGS = ROOT / "accelerate_config"
LAUNCH = ["python", "accelerate", "launch"]
RECIPE = ["-m", "launcher", "recipes/simplecnn.py"]


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Accelerate configuration of whoever runs the tests plays no part."""
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))


# The environment

# The second process of the second of two nodes, as torchrun and `accelerate launch` announce it.
AGENT = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_MIXED_PRECISION": "BF16",
}


def test_an_agent_announces_the_whole_world() -> None:
    assert World.from_env(AGENT) == World(
        rank=3,
        size=4,
        local_rank=1,
        local_size=2,
        node=1,
        device=1,
        address="10.0.0.1",
        port=29500,
        attempt=2,
        launcher=Launcher.AGENT,
        agent_hosts_store=True,
        use_cpu=True,
        mixed_precision="bf16",
    )


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(rank=1, size=2, node=1)),
        (
            {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"},
            World(rank=5, size=8, local_rank=1, local_size=2, node=2, device=1),
        ),
        ({"SLURM_RESTART_COUNT": "3"}, World(attempt=3)),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, World(mixed_precision="no")),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, World(launcher=Launcher.AGENT)),
    ],
)
def test_without_an_agent_the_rest_follows(environ: dict[str, str], world: World) -> None:
    assert World.from_env(environ) == world


def test_rank_0_hosts_the_store_unless_an_agent_does() -> None:
    assert World().hosts_store
    assert not World(rank=1, size=2).hosts_store
    assert not World(agent_hosts_store=True).hosts_store


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_PORT"])
def test_what_is_no_number_is_refused(name: str) -> None:
    with refused(f"{name}=one in the environment", f"unset {name}"):
        World.from_env({name: "one"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RANK", ""),
        ("RANK", "-1"),
        ("RANK", "\u0663"),
        ("RANK", "1" * 5000),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", ""),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "99999"),
    ],
)
def test_what_is_out_of_range_or_empty_is_refused(name: str, text: str) -> None:
    with refused(f"{name}={text:.40} in the environment", f"unset {name}"):
        World.from_env({name: text})


SECOND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
REACHED = SECOND | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment without RANK"),
        (SECOND, "without MASTER_ADDR, MASTER_PORT"),
        (REACHED | {"MASTER_ADDR": ""}, "without MASTER_ADDR;"),
        ({"RANK": "1"}, "RANK=1 in the environment, of WORLD_SIZE=1; expected at most 0"),
        (REACHED | {"RANK": "2"}, "RANK=2 in the environment, of WORLD_SIZE=2; expected at most 1"),
        (REACHED | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment, of WORLD_SIZE=2"),
        (REACHED | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 in the environment, of LOCAL_WORLD"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 in the environment, of WORLD_SIZE=1"),
        (REACHED | {"GROUP_RANK": "7"}, "GROUP_RANK=7 in the environment, of WORLD_SIZE=2"),
    ],
)
def test_what_does_not_fit_together_is_refused(environ: dict[str, str], words: str) -> None:
    with refused(words, "unset RANK LOCAL_RANK WORLD_SIZE"):
        refuse_impossible(World.from_env(environ), environ)


@pytest.mark.parametrize("environ", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, REACHED, AGENT])
def test_what_fits_together_passes(environ: dict[str, str]) -> None:
    refuse_impossible(World.from_env(environ), environ)


def test_without_a_launcher_this_process_is_alone() -> None:
    assert World.of_this_process() == World()


ONE_THREAD = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("environ", "parent", "shares"),
    [
        (ONE_THREAD, Parent(("torchrun",), frozenset()), True),
        ({"TORCHELASTIC_RUN_ID": "none"}, Parent(("torchrun",), frozenset()), True),
        (ONE_THREAD, Parent(("torchrun",), frozenset({"OMP_NUM_THREADS"})), False),
        (ONE_THREAD, Parent(("a", "--num_cpu_threads_per_process=1"), frozenset()), False),
        (ONE_THREAD, Parent(("torchrun",), None), False),
        (ONE_THREAD, None, False),
        (ONE_THREAD | {"OMP_NUM_THREADS": "2"}, Parent(("torchrun",), frozenset()), False),
        ({"OMP_NUM_THREADS": "1"}, Parent(("bash",), frozenset()), False),
    ],
)
def test_cores_are_shared_where_a_launcher_and_not_its_user_set_one_thread(
    environ: dict[str, str], parent: Parent | None, shares: bool
) -> None:
    assert World.from_env(environ, parent).shares_cores == shares


# The number of processes


def launched(size: int, asked: int | None) -> World:
    """As many processes announced, and so many asked for on the command line."""
    command = [*LAUNCH, "--num_processes", f"{asked}", *RECIPE] if asked else ["bash"]
    return World(size=size, parent=Parent(tuple(command)))


@pytest.mark.parametrize(
    ("announced", "running", "asked"), [(1, 1, None), (4, 4, None), (1, 1, 1), (4, 4, 4), (8, 8, 4)]
)
def test_a_world_as_large_as_asked_for_passes(
    announced: int, running: int, asked: int | None
) -> None:
    check_world(launched(announced, asked), running)


def test_processes_that_each_train_alone_are_stopped() -> None:
    with refused("2 processes", "alone", "ACCELERATE_USE_CPU=true", "--num_processes 2"):
        check_world(World(size=2), 1)


def test_fewer_processes_than_asked_for_are_stopped() -> None:
    with refused("4 processes were asked for", "started 1", "--multi_gpu --num_processes 4"):
        check_world(launched(1, 4), 1)


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


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("--nproc_per_node=2", "torchrun --nproc_per_node=2 ..."),
        ("--nproc-per-node", "torchrun --nproc-per-node ..."),
        ("--gpus", "accelerate launch --num_processes 2 -m launcher RECIPE"),
    ],
)
def test_other_launchers_flags_behind_the_recipe_are_refused(word: str, instead: str) -> None:
    with refused(word, "before -m launcher", instead):
        refuse_misplaced(["epochs=3", word, "2"])


def test_settings_behind_the_recipe_are_not_taken_for_accelerates_flags() -> None:
    refuse_misplaced(["epochs=3", "--epochs=3", "--optimizer.lr=1", "num_processes=4"])
