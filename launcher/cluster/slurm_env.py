"""Inside a Slurm job: ranks, first host and port from Slurm's environment, and the time left.

With `srun python -m launcher`, one task per GPU (or per process on CPUs), Slurm is the launcher:
its variables become those that torch and Accelerate read. With `srun accelerate launch`, one task
per node, nothing is changed. Combinations that would train something else than meant are refused.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from launcher.distributed import signals
from launcher.errors import UserError

# Below the ports that systems hand out by themselves (32768 and up), above those of most services.
FIRST_PORT, PORTS = 12_000, 20_000
_SHELL = str(0xFFFFFFFA)  # the step of the shell that salloc opens on a node


@dataclass(frozen=True)
class Step:
    """This task among all tasks that one srun started."""

    job: int
    step: int
    restarts: int
    rank: int
    tasks: int
    local_rank: int
    tasks_here: int
    cpus_here: int
    cpus_per_task: int
    nodes: str

    @property
    def port(self) -> int:
        """A port of this attempt's own: other jobs, steps and attempts have others."""
        return FIRST_PORT + (self.job + 7919 * self.restarts + 3571 * self.step) % PORTS

    @property
    def threads(self) -> int:
        """This task's share of the cores."""
        return self.cpus_per_task or max(1, self.cpus_here // self.tasks_here)


def step_of(environ: Mapping[str, str]) -> Step | None:
    """The step of srun that this process is a task of; None outside, as in the shell of salloc."""
    if environ.get("SLURM_STEP_ID", _SHELL) == _SHELL or "SLURM_PROCID" not in environ:
        return None
    tasks_here = expand(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    return Step(
        job=int(environ["SLURM_JOB_ID"]),
        step=int(environ["SLURM_STEP_ID"]),
        restarts=int(environ.get("SLURM_RESTART_COUNT", 0)),
        rank=int(environ["SLURM_PROCID"]),
        tasks=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        tasks_here=tasks_here,
        cpus_here=int(environ.get("SLURM_CPUS_ON_NODE", tasks_here)),
        cpus_per_task=int(environ.get("SLURM_CPUS_PER_TASK", 0)),
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


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What torch and Accelerate are to find in the environment, beside what is there.

    Raises `UserError` where what would run is not what was asked of Slurm.
    """
    step = step_of(environ)
    if signals.is_launched(environ):
        _check_launched(environ, step)
        return {}
    if step is None:
        _check_batch(environ)
        return {}
    gpus = _gpus(environ)
    ranks = _ranks(step, alone=gpus == 1)
    _check_leftovers(environ, step, ranks)
    _check_gpus(step, gpus, int(environ.get("SLURM_GPUS_ON_NODE", gpus)))
    found = {"OMP_NUM_THREADS": str(step.threads)}
    if step.tasks > 1:
        found |= ranks
    return {name: value for name, value in found.items() if name not in environ}


def _ranks(step: Step, alone: bool) -> dict[str, str]:
    """Ranks and meeting point; a task that sees only its own GPU is a node of its own to torch."""
    return {
        "RANK": str(step.rank),
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_RANK": "0" if alone else str(step.local_rank),
        "LOCAL_WORLD_SIZE": "1" if alone else str(step.tasks_here),
        "MASTER_ADDR": first_host(step.nodes),
        "MASTER_PORT": str(step.port),
    }


def _gpus(environ: Mapping[str, str]) -> int:
    """How many of the GPUs that Slurm gave can be seen from here; 0 for a job on CPUs."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return 0
    given = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return given if visible is None or not given else len([d for d in visible.split(",") if d])


def _check_batch(environ: Mapping[str, str]) -> None:
    """A process that runs in a job, but was not started by srun."""
    nodes, gpus = int(environ.get("SLURM_JOB_NUM_NODES", 1)), _gpus(environ)
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
        f"{tasks} task(s) on a node of which Slurm gave {gpus} GPUs",
        expected="one task per GPU",
        instead=f"type srun --ntasks-per-node={gpus} python -m launcher RECIPE ..., "
        "or set CUDA_VISIBLE_DEVICES=0 to use one of them",
    )


def _check_gpus(step: Step, visible: int, on_node: int) -> None:
    bound = visible == 1 and on_node >= step.tasks_here  # srun --gpus-per-task=1
    if visible and not bound and step.tasks_here > visible:
        raise UserError(
            f"{step.tasks_here} tasks on a node of which Slurm gave {visible} GPU(s)",
            expected="at most one task per GPU",
            instead=f"type srun --ntasks-per-node={visible} python -m launcher RECIPE ...",
        )
    if visible > step.tasks_here:
        raise _idle(visible, step.tasks_here)


def _check_leftovers(environ: Mapping[str, str], step: Step, ranks: Mapping[str, str]) -> None:
    """Ranks may be set by the user's script, but not to something else."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        ours = ranks[name]
        if environ.get(name, ours) != ours:
            raise UserError(
                f"{name}={environ[name]} in the environment, in task {step.rank} of {step.tasks}",
                expected=f"{name}={ours}, which follows from Slurm",
                instead="type unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR "
                "MASTER_PORT before srun",
            )


def _check_launched(environ: Mapping[str, str], step: Step | None) -> None:
    """`accelerate launch` or torchrun above: one of them per node, all in one training."""
    groups = int(environ.get("GROUP_WORLD_SIZE", 1))
    wanted = step.tasks if step else int(environ.get("SLURM_JOB_NUM_NODES", 1))
    if step and step.tasks_here > 1:
        raise UserError(
            f"accelerate launch or torchrun, started {step.tasks_here} times on one node",
            expected="one of them per node",
            instead="type srun --ntasks-per-node=1 in front of it, or srun python -m launcher "
            "without it",
        )
    if groups != wanted:
        raise UserError(
            f"a training of {groups} node(s) in {'a step' if step else 'a job'} of {wanted}",
            expected="one training of all nodes",
            instead="type srun --ntasks-per-node=1 accelerate launch --num_machines $SLURM_NNODES "
            "--machine_rank $SLURM_NODEID ..., or srun python -m launcher",
        )


def enter(save_before: timedelta) -> dict[str, str]:
    """Take over what Slurm says; returns what a user should know about it, none outside a job.

    A stop is asked for `save_before` the end of the job's time, but not before half of it is over.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    try:
        found = variables(os.environ)
    except UserError:
        _speak_once()
        raise
    if "MASTER_ADDR" in found:
        found["MASTER_ADDR"] = _address(found["MASTER_ADDR"])
    os.environ.update(found)
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
    about = f"Slurm {os.environ['SLURM_JOB_ID']}, attempt {attempt}"
    end = _end_of_job() if os.environ.get("RANK", "0") == "0" else None
    if end is None:
        return {"batch job": about}
    saves = stop_time(time.time(), end, save_before)
    signals.stop_at(saves, f"the time limit of the job at {_clock(end)}")
    return {"batch job": f"{about}, ends {_clock(end)}; saves and stops by itself {_clock(saves)}"}


def _speak_once() -> None:
    """Let the first task alone say what is wrong, whatever RANK says.

    Or the second one, where what another launcher has left happens to be right for the first.
    """
    task, local = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_LOCALID")
    is_first = os.environ.get("RANK") == "0" or (os.environ.get("LOCAL_RANK") == "0" != local)
    if task == "1" and is_first and not signals.is_launched():
        os.environ["RANK"] = "0"
    elif task != "0" or not signals.is_launched():
        os.environ["RANK"] = task


def stop_time(now: float, end: float, save_before: timedelta) -> float:
    """When to save and stop."""
    return end - min(save_before.total_seconds(), (end - now) / 2)


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}"


def _address(host: str) -> str:
    """The host as this machine finds it: by its name, or by the address that Slurm uses."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", host))
        return found.group(1) if found else host
    return host


def _end_of_job() -> float | None:
    """When Slurm will end this job, in seconds since 1970; None if it never will."""
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    return end_time(_scontrol("show", "job", os.environ["SLURM_JOB_ID"]))


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
