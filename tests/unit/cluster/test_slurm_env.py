"""Inside a Slurm job: what follows from its environment, and what is refused before it starts."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from launcher import cli
from launcher.cluster import slurm_env
from launcher.distributed import signals
from launcher.distributed.world import Launcher, World
from tests.support.helpers import refused

# One of four tasks on two nodes, as srun of Slurm 22.05 starts it.
TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_CPUS_ON_NODE": "8",
}
ALONE = TASK | {
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
PER_NODE = TASK | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
TWO_GPUS = {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}


def world_in(environ: dict[str, str]) -> World:
    """The world of a process with this environment, which nothing refuses."""
    world = slurm_env.world_of_task(environ, World.from_env(environ))
    slurm_env.check(environ, world)
    return world


def test_a_task_learns_its_rank_and_where_all_ranks_connect() -> None:
    world = world_in(TASK)
    assert world == World(
        rank=3,
        size=4,
        local_rank=1,
        local_size=2,
        node=1,
        device=1,
        address="gpu07",
        port=world.port,
        launcher=Launcher.SRUN,
        threads=4,
    )
    first, ports = slurm_env.FIRST_PORT, slurm_env.PORTS
    assert first <= world.port < first + ports < 32_768


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_JOB_ID": "18"},
        {"SLURM_JOB_ID": "5016"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ],
)
def test_other_jobs_steps_and_attempts_connect_elsewhere(other: dict[str, str]) -> None:
    assert world_in(TASK).port != world_in(TASK | other).port


def test_all_tasks_of_a_step_connect_to_one_place() -> None:
    worlds = [world_in(TASK | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({(world.address, world.port) for world in worlds}) == 1


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        (TASK | {"SLURM_CPUS_PER_TASK": "3"}, 3),
        (TASK | {"SLURM_CPUS_ON_NODE": "1"}, 1),
        (ALONE, 8),
    ],
)
def test_cores_are_shared_among_the_tasks_of_a_node(environ: dict[str, str], threads: int) -> None:
    assert world_in(environ).threads == threads


def test_what_the_users_script_has_set_stays() -> None:
    mine = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "RANK": "3", "OMP_NUM_THREADS": "7"}
    world = world_in(TASK | mine)
    assert (world.address, world.port, world.rank, world.threads) == ("10.0.0.1", 29500, 3, None)


def test_a_task_that_sees_only_its_own_gpu_uses_the_first_that_it_sees() -> None:
    """Under `srun --gpus-per-task=1`, every task calls its GPU number 0."""
    bound = {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}
    assert world_in(TASK | bound) == replace(world_in(TASK), device=0)
    assert world_in(TASK | TWO_GPUS).device == 1


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1"},
        BATCH,
        BATCH | TWO_GPUS | {"CUDA_VISIBLE_DEVICES": "1"},
        BATCH | TWO_GPUS | {"ACCELERATE_USE_CPU": "true"},
        BATCH | TWO_GPUS | {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"},
        ALONE | TWO_GPUS | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "WORLD_SIZE": "2"},
        PER_NODE | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"},
    ],
)
def test_elsewhere_and_under_another_launcher_slurm_plays_no_part(environ: dict[str, str]) -> None:
    assert world_in(environ) == World.from_env(environ)


def test_a_precision_of_the_users_own_is_no_launcher() -> None:
    users_own = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # of which Accelerate makes use, too
    assert world_in(TASK | users_own) == replace(world_in(TASK), mixed_precision="bf16")


@pytest.mark.parametrize(
    ("environ", "given", "instead"),
    [
        (
            TASK | {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"},
            "2 tasks on a node of which Slurm gave 1 GPU",
            "srun --ntasks-per-node=1",
        ),
        (
            ALONE | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            "1 task on a node of which Slurm gave 8 GPUs",
            "srun --ntasks-per-node=8 python -m launcher",
        ),
        (
            BATCH | {"SLURM_GPUS_ON_NODE": "8"},
            "1 task on a node of which Slurm gave 8 GPUs",
            "srun --ntasks-per-node=8 python -m launcher",
        ),
        (
            BATCH | {"SLURM_JOB_NUM_NODES": "2"},
            "a job of 2 nodes in which one process was started",
            "srun --ntasks-per-node=1 python -m launcher",
        ),
        (
            ALONE | {"SLURM_STEP_ID": "4294967290"},  # salloc with use_interactive_step
            "a job of 2 nodes in which one process was started",
            "srun --ntasks-per-node=1 python -m launcher",
        ),
        (
            BATCH | {"SLURM_JOB_NUM_NODES": "2", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"},
            "a training of 1 node in a job of 2",
            "--machine_rank $SLURM_NODEID",
        ),
        (
            PER_NODE | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"},
            "a training of 1 node in a step of 2",
            "--num_machines $SLURM_NNODES",
        ),
        (
            TASK | {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1"},
            "started 2 times on one node",
            "srun --ntasks-per-node=1",
        ),
        (TASK | {"RANK": "0"}, "RANK=0 in the environment, in task 3 of 4", "unset RANK"),
        (TASK | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8", "unset RANK"),
        (ALONE | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2", "unset RANK"),
        (TASK | {"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment", "unset RANK LOCAL_RANK"),
        (ALONE | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1", "unset RANK"),
        (TASK | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE=1", "unset RANK"),
    ],
)
def test_wrong_combinations_are_explained(
    environ: dict[str, str], given: str, instead: str
) -> None:
    with refused(given, instead):
        world_in(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[007-009,012],cpu1", "gpu007"),
        ("a,b", "a"),
        ("rack[2,4]n[10-11]-ib,x[1-2]", "rack2n10-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert slurm_env.first_host(nodes) == first


@pytest.mark.parametrize(
    ("counts", "each"), [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("4,3(x2)", [4, 3, 3])]
)
def test_counts_per_node(counts: str, each: list[int]) -> None:
    assert slurm_env.expand(counts) == each


def test_the_end_of_a_job_as_scontrol_prints_it() -> None:
    shown = "JobId=17\n   RunTime=00:01 TimeLimit=01:00:00\n   EndTime=2026-03-04T05:06:07 Dead=N/A"
    assert slurm_env.end_time(shown) == datetime(2026, 3, 4, 5, 6, 7).timestamp()
    assert slurm_env.end_time(shown.replace("01:00:00", "UNLIMITED")) is None
    assert slurm_env.end_time("EndTime=Unknown") is None
    assert slurm_env.end_time("") is None


def test_a_run_stops_before_the_end_but_never_in_the_first_half_of_its_time() -> None:
    assert slurm_env.stop_time(1000.0, 5000.0, timedelta(seconds=120)) == 4880.0
    assert slurm_env.stop_time(1000.0, 1100.0, timedelta(seconds=120)) == 1050.0


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Signals are handled afterwards as they were before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
def test_the_end_of_the_time_asks_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = ALONE | {"SLURM_JOB_END_TIME": "4000000000"}
    world = World.from_env(ALONE)
    with signals.listening():
        job = slurm_env.enter(environ, world, timedelta(seconds=60))
        signals.stop_at(job.stops_at, job.stop_reason)
        ends = f"{datetime.fromtimestamp(4_000_000_000):%Y-%m-%d %H:%M:%S}"
        assert job.facts["batch job"].startswith(f"Slurm 17, attempt 1, ends {ends}; saves")
        assert signals.stop_reason() == ""
        monkeypatch.setattr("time.time", lambda: 4_000_000_000 - 61.0)
        assert signals.stop_reason() == ""
        monkeypatch.setattr("time.time", lambda: 4_000_000_000 - 60.0)
        assert signals.stop_reason() == f"the time limit of the job at {ends}"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # Slurm's, which comes at that time
    with signals.listening():
        assert signals.stop_reason() == ""


def set_environment(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value", "wrong_in", "printed_by"),
    [
        ("RANK", "7", (0, 1, 2, 3), 0),
        ("WORLD_SIZE", "8", (0, 1, 2, 3), 0),
        ("RANK", "0", (1, 2, 3), 1),  # the other one waits for these
        ("LOCAL_RANK", "0", (1, 3), 1),
    ],
)
def test_one_task_alone_prints_what_is_wrong(
    name: str,
    value: str,
    wrong_in: tuple[int, ...],
    printed_by: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in wrong_in:
        place = {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{rank % 2}"}
        place |= {"SLURM_NODEID": f"{rank // 2}"}
        set_environment(monkeypatch, TASK | place | {name: value})
        assert cli.main(["none.py"]) == 2
        printed = capsys.readouterr().err
        line = f"launcher: {name}={value} in the environment, in task {rank} of 4"
        assert printed.count(line) == printed.count("launcher: ") == (rank == printed_by)


def test_nodes_with_a_launcher_of_their_own_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a rank 0; that of the first task prints."""
    set_environment(monkeypatch, PER_NODE | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"})
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert cli.main(["none.py"]) == 2
        printed = capsys.readouterr().err
        assert printed.count("a training of 1 node in a step of 2") == (task == "0")


def test_what_is_wrong_for_all_tasks_is_printed_by_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_env, "_address", lambda host: host)
    set_environment(monkeypatch, TASK | {"SLURM_JOB_END_TIME": "4000000000"})
    for task in ("3", "0"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert cli.main(["none.py", "--skip", "a"]) == 2
        assert capsys.readouterr().err.count("launcher: ") == (task == "0")


NUMBERS = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[(name, "x") for name in NUMBERS],
        *[(name, None) for name in NUMBERS if name not in ("SLURM_STEP_ID", "SLURM_PROCID")],
        ("SLURM_PROCID", "1"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "2"),
        ("SLURM_STEP_NODELIST", ""),
        ("SLURM_STEP_TASKS_PER_NODE", "x"),
        ("SLURM_CPUS_ON_NODE", "0"),
        ("SLURM_CPUS_PER_TASK", "two"),
        ("SLURM_GPUS_ON_NODE", ""),
        ("SLURM_RESTART_COUNT", "-1"),
        ("SLURM_JOB_END_TIME", "nan"),
        ("SLURM_JOB_END_TIME", "9" * 15),
    ],
)
def test_what_slurm_never_says_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | None,
) -> None:
    set_environment(monkeypatch, ALONE)
    if text is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, text)
    assert cli.main(["none.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
