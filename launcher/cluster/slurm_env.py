"""Inside a Slurm job: ranks, first host and port from Slurm's environment, and the time left.

With `srun python -m launcher`, one task per GPU (or per process on CPUs), Slurm is the launcher,
and the `World` follows from its variables. With `srun accelerate launch`, one task per node, it is
the one that Accelerate announces. Combinations that would train something else than meant are
refused.
"""

import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial

from launcher.distributed.environment import is_true, number_in
from launcher.distributed.world import Launcher, World, refuse_impossible
from launcher.errors import OtherRankError, RankError, UserError
from launcher.utils.text import count

# Below the ephemeral ports (32768 and up), above those of most services.
FIRST_PORT, PORTS = 12_000, 20_000
_LAST_MOMENT = 253_370_764_800  # the year 9999, the last that datetime knows
_SHELL = str(0xFFFFFFFA)  # the step number of salloc's interactive shell


@dataclass(frozen=True)
class Step:
    """This task among all tasks that one srun started."""

    job: int
    step: int
    restarts: int
    rank: int
    tasks: int
    local_rank: int
    node: int
    tasks_here: int
    cpus_here: int
    cpus_per_task: int
    nodes: str

    @property
    def port(self) -> int:
        """A port for this attempt: other jobs, steps and attempts have other ports."""
        return FIRST_PORT + (self.job + 7919 * self.restarts + 3571 * self.step) % PORTS

    @property
    def threads(self) -> int:
        """This task's share of the cores."""
        return self.cpus_per_task or max(1, self.cpus_here // self.tasks_here)


def step_of(environ: Mapping[str, str]) -> Step | None:
    """The srun step of this process; None outside of one, as in the shell of salloc."""
    if environ.get("SLURM_STEP_ID", _SHELL) == _SHELL or "SLURM_PROCID" not in environ:
        return None
    number = partial(number_in, environ)
    counts = expand(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = number("SLURM_NODEID")
    if node >= len(counts) or not environ.get("SLURM_STEP_NODELIST"):
        names = ("SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
        raise UserError(
            " ".join(f"{name}={environ.get(name, '')}" for name in names),
            expected="the number of this node, the tasks of each node and their names, from srun",
            instead="start it with srun, or type unset SLURM_STEP_ID to train with one process",
        )
    tasks = number("SLURM_STEP_NUM_TASKS", least=1)
    return Step(
        job=number("SLURM_JOB_ID"),
        step=number("SLURM_STEP_ID"),
        restarts=number("SLURM_RESTART_COUNT", 0),
        rank=number("SLURM_PROCID", most=tasks - 1),
        tasks=tasks,
        local_rank=number("SLURM_LOCALID", most=counts[node] - 1),
        node=node,
        tasks_here=counts[node],
        cpus_here=number("SLURM_CPUS_ON_NODE", counts[node], least=1),
        cpus_per_task=number("SLURM_CPUS_PER_TASK", 0),
        nodes=environ["SLURM_STEP_NODELIST"],
    )


def expand(counts: str) -> list[int]:
    """Slurm's short form of one number per node: `2(x3),1` -> [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(number) for number, times in parts for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first name of Slurm's short form of names: `gpu[07-09,12],cpu1` -> `gpu07`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found.group() if found else nodes)


def world_of_this_process() -> World:
    """Its place in the run, whoever started it; raises `UserError` where there can be none."""
    world = world_of_task(os.environ, World.of_this_process())
    refuse_impossible(world, os.environ)
    return world


def world_of_task(environ: Mapping[str, str], world: World) -> World:
    """The world of this process if it is a task of srun; else, or under another launcher, `world`.

    Address, port and threads set by the user's script are kept. A step of one task is no
    distributed run, but also gets its share of the cores.
    """
    step = step_of(environ)
    if step is None or world.is_launched:
        return world
    sees_own_gpu_only = _gpus(environ) == 1  # each task calls it number 0
    return replace(
        world,
        rank=step.rank,
        size=step.tasks,
        local_rank=step.local_rank,
        local_size=step.tasks_here,
        node=step.node,
        device=0 if sees_own_gpu_only else step.local_rank,
        address=world.address or first_host(step.nodes),
        port=world.port or step.port,
        launcher=Launcher.SRUN,
        threads=None if "OMP_NUM_THREADS" in environ else step.threads,
    )


def check(environ: Mapping[str, str], world: World) -> None:
    """Raise `UserError` where the processes do not match the job that Slurm gave."""
    step = step_of(environ)
    if world.is_launched:
        _check_launched(environ, step)
    elif step is None:
        _check_batch(environ)
    else:
        gpus = _gpus(environ)
        _check_leftovers(environ, step, world)
        _check_gpus(step, gpus, number_in(environ, "SLURM_GPUS_ON_NODE", gpus))


def _gpus(environ: Mapping[str, str]) -> int:
    """How many of the job's GPUs this process can see; 0 for a job on CPUs."""
    if is_true(environ.get("ACCELERATE_USE_CPU", "")):
        return 0
    given = number_in(environ, "SLURM_GPUS_ON_NODE", 0)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return given if visible is None or not given else len([d for d in visible.split(",") if d])


def _check_batch(environ: Mapping[str, str]) -> None:
    """Check a process of a job that was not started by srun."""
    nodes, gpus = number_in(environ, "SLURM_JOB_NUM_NODES", 1), _gpus(environ)
    if nodes > 1:
        raise UserError(
            f"a job of {nodes} nodes in which one process was started, on the first",
            expected="one process per GPU on every node",
            instead=f"type srun --ntasks-per-node={max(gpus, 1)} python -m launcher RECIPE ...",
        )
    if gpus > 1:
        raise _idle(gpus, 1)


def _idle(gpus: int, tasks: int) -> UserError:
    return UserError(
        f"{count(tasks, 'task')} on a node of which Slurm gave {gpus} GPUs",
        expected="one task per GPU",
        instead=f"type srun --ntasks-per-node={gpus} python -m launcher RECIPE ..., "
        "or set CUDA_VISIBLE_DEVICES=0 to use one of them",
    )


def _check_gpus(step: Step, visible: int, on_node: int) -> None:
    bound = visible == 1 and on_node >= step.tasks_here  # srun --gpus-per-task=1
    if visible and not bound and step.tasks_here > visible:
        raise UserError(
            f"{step.tasks_here} tasks on a node of which Slurm gave {count(visible, 'GPU')}",
            expected="at most one task per GPU",
            instead=f"type srun --ntasks-per-node={visible} python -m launcher RECIPE ...",
        )
    if visible > step.tasks_here:
        raise _idle(visible, step.tasks_here)


class _LeftoverError(UserError):
    """RANK and similar variables contradict Slurm's.

    RANK=0 is correct for rank 0, so rank 1 is the first to report it.
    """

    def __init__(self, name: str, value: str, expected: int, step: Step) -> None:
        self.first_rank = 1 if value == "0" else 0
        super().__init__(
            f"{name}={value} in the environment, in task {step.rank} of {step.tasks}",
            expected=f"{name}={expected}, which follows from Slurm",
            instead="type unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR "
            "MASTER_PORT before srun",
        )


def _check_leftovers(environ: Mapping[str, str], step: Step, world: World) -> None:
    """The user's script may set ranks, but only to Slurm's own values.

    To torch, a task that sees only its own GPU is a node of its own.
    """
    is_alone = _gpus(environ) == 1
    ours = {
        "WORLD_SIZE": world.size,
        "LOCAL_WORLD_SIZE": 1 if is_alone else world.local_size,
        "RANK": world.rank,
        "LOCAL_RANK": world.device,
    }
    for name, expected in ours.items():
        value = environ.get(name, f"{expected}")
        if value != f"{expected}":
            raise _LeftoverError(name, value, expected, step)


def _check_launched(environ: Mapping[str, str], step: Step | None) -> None:
    """Check `accelerate launch` or torchrun under srun: one per node, all in one training."""
    groups = number_in(environ, "GROUP_WORLD_SIZE", 1)
    wanted = step.tasks if step else number_in(environ, "SLURM_JOB_NUM_NODES", 1)
    if step and step.tasks_here > 1:
        raise UserError(
            f"accelerate launch or torchrun, started {step.tasks_here} times on one node",
            expected="one of them per node",
            instead="type srun --ntasks-per-node=1 in front of it, or srun python -m launcher "
            "without it",
        )
    if groups != wanted:
        raise UserError(
            f"a training of {count(groups, 'node')} in {'a step' if step else 'a job'} of {wanted}",
            expected="one training of all nodes",
            instead="type srun --ntasks-per-node=1 accelerate launch --num_machines $SLURM_NNODES "
            "--machine_rank $SLURM_NODEID ..., or srun python -m launcher",
        )


@dataclass(frozen=True)
class Allocation:
    """What a process knows about its batch job.

    `facts` are for the header. `stops_at`, in seconds since 1970, is when the run is to save and
    stop, and `stop_reason` why.
    """

    world: World
    facts: Mapping[str, str] = field(default_factory=dict)
    stops_at: float = math.inf
    stop_reason: str = ""


def enter(environ: Mapping[str, str], world: World, save_before: timedelta) -> Allocation:
    """Check this process of a job, and ask Slurm for the end of the job.

    The run stops `save_before` the end of the job's time, but not before half of it is over. An
    error is printed by one task, which raises `RankError`; the others raise `OtherRankError`.
    """
    if "SLURM_JOB_ID" not in environ:
        return Allocation(world)
    try:
        check(environ, world)
    except UserError as error:
        first = error.first_rank if isinstance(error, _LeftoverError) else 0
        # Under accelerate launch, each task has a rank 0; only that of the first task prints.
        if number_in(environ, "SLURM_PROCID", 0) != first or (world.is_launched and world.rank > 0):
            raise OtherRankError(error.exit_code) from None
        raise RankError(f"{error}", error.exit_code) from None
    world = with_known_address(environ, world)
    attempt = number_in(environ, "SLURM_RESTART_COUNT", 0) + 1
    about = f"Slurm {environ['SLURM_JOB_ID']}, attempt {attempt}"
    end = _end_of_job(environ) if world.is_main else None
    if end is None:
        return Allocation(world, {"batch job": about})
    saves = stop_time(time.time(), end, save_before)
    about += f", ends {_clock(end)}; saves and stops by itself {_clock(saves)}"
    reason = f"the time limit of the job at {_clock(end)}"
    return Allocation(world, {"batch job": about}, saves, reason)


def with_known_address(environ: Mapping[str, str], world: World) -> World:
    """The world with an address of rank 0 that this machine can resolve."""
    if world.launcher is Launcher.SRUN and world.size > 1 and "MASTER_ADDR" not in environ:
        return replace(world, address=_address(world.address))
    return world


def stop_time(now: float, end: float, save_before: timedelta) -> float:
    """The time at which to save and stop."""
    return end - min(save_before.total_seconds(), (end - now) / 2)


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}"


def _address(host: str) -> str:
    """The host by its name, if this machine can resolve it, or by Slurm's address."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", host))
        return found.group(1) if found else host
    return host


def _end_of_job(environ: Mapping[str, str]) -> float | None:
    """When Slurm will end this job, in seconds since 1970; None if it never will."""
    if "SLURM_JOB_END_TIME" in environ:
        return float(number_in(environ, "SLURM_JOB_END_TIME", most=_LAST_MOMENT))
    return end_time(_scontrol("show", "job", environ["SLURM_JOB_ID"]))


def end_time(shown: str) -> float | None:
    """The end of a job as `scontrol show job` prints it; None for a job without a time limit."""
    found = re.search(r"\bEndTime=(\d{4}-\S+)", shown)
    unlimited = "TimeLimit=UNLIMITED" in shown
    return datetime.fromisoformat(found.group(1)).timestamp() if found and not unlimited else None


def _scontrol(*words: str) -> str:
    """What scontrol prints; empty where it is missing or does not answer in time."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
