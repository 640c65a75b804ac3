"""Which process of how many this is, and the guards on the number of processes.

`World.of_this_process` reads the environment and the launching process once, in `cli`; everything
else is handed the value. Some ways of launching ask for several processes and start one, or start
several of which each trains alone; both train wrongly without a message, so both are stopped here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from launcher.distributed.environment import is_true, number_in
from launcher.errors import UserError
from launcher.utils.text import count

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What only launching programs set; ACCELERATE_MIXED_PRECISION may be the user's own.
LAUNCH_MARKS = frozenset(("ACCELERATE_DYNAMO_USE_FULLGRAPH", "TORCHELASTIC_RUN_ID"))
_SEVERAL_ON_CPU = (
    "type ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {count} "
    "-m launcher RECIPE"
)


class Launcher(Enum):
    """What started this process."""

    NONE = "the user"
    AGENT = "accelerate launch or torchrun"
    SRUN = "srun"


@dataclass(frozen=True)
class Parent:
    """The launching process, as far as it may be read."""

    command: tuple[str, ...] = ()
    variables: frozenset[str] | None = None  # the names in its environment; None: unreadable

    @classmethod
    def of_this_process(cls) -> "Parent":
        """Read command line and environment of the parent process."""
        import psutil

        command: tuple[str, ...] = ()
        try:
            parent = psutil.Process(os.getppid())
            command = tuple(parent.cmdline())
            return cls(command, frozenset(parent.environ()))
        except psutil.Error:
            return cls(command)

    def chose_threads(self) -> bool:
        """Whether OMP_NUM_THREADS is the choice of a user, who gave it to the launcher as well."""
        if self.variables is None or "OMP_NUM_THREADS" in self.variables:
            return True
        flags = [word.partition("=")[0] for word in self.command]
        return "--num_cpu_threads_per_process" in flags


@dataclass(frozen=True)
class World:
    """This process among all processes of the run, and how they reach each other.

    `local_rank` of `local_size` is its place on this node, and `device` the number of its GPU, of
    those that it can see. The key-value store of all ranks is at `address` and `port`; where
    `agent_hosts_store` is false, rank 0 hosts it. `attempt` counts restarts of the same job,
    and `run` the runs that its processes train one after the other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    device: int = 0
    address: str = ""
    port: int = 0
    attempt: int = 0
    run: int = 0
    launcher: Launcher = Launcher.NONE
    agent_hosts_store: bool = False
    use_cpu: bool = False  # the user said so; else the GPU is used if there is one
    mixed_precision: str = ""  # of Accelerate's config: "no", "bf16", ...
    threads: int | None = None  # to be set for torch; None: torch's own choice
    shares_cores: bool = False  # 1 thread was set by the launcher, which knows nothing of the cores
    parent: Parent = Parent()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], parent: Parent | None = None) -> "World":
        """What `accelerate launch`, torchrun or a user has set; 1 process where nothing is."""

        number = partial(number_in, environ)
        is_launched = not LAUNCH_MARKS.isdisjoint(environ)
        rank, local_rank = number("RANK", 0), number("LOCAL_RANK", 0)
        local_size = number("LOCAL_WORLD_SIZE", 1, least=1)
        has_default_threads = environ.get("OMP_NUM_THREADS", "1") == "1"
        return cls(
            rank=rank,
            size=number("WORLD_SIZE", 1, least=1),
            local_rank=local_rank,
            local_size=local_size,
            node=number("GROUP_RANK", max(rank - local_rank, 0) // local_size),
            device=local_rank,
            address=environ.get("MASTER_ADDR", ""),
            port=number("MASTER_PORT", 0, least=1, most=65535),
            attempt=number("TORCHELASTIC_RESTART_COUNT", number("SLURM_RESTART_COUNT", 0)),
            launcher=Launcher.AGENT if is_launched else Launcher.NONE,
            agent_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            use_cpu=is_true(environ.get("ACCELERATE_USE_CPU", "")),
            mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION", "").lower(),
            shares_cores=bool(
                is_launched and has_default_threads and parent and not parent.chose_threads()
            ),
            parent=parent or Parent(),
        )

    @classmethod
    def of_this_process(cls) -> "World":
        """Read the environment and the launching process; called once, at the edge."""
        is_launched = not LAUNCH_MARKS.isdisjoint(os.environ)
        return cls.from_env(os.environ, Parent.of_this_process() if is_launched else None)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def is_launched(self) -> bool:
        """Whether `accelerate launch` or torchrun stands between the user and this process."""
        return self.launcher is Launcher.AGENT

    @property
    def hosts_store(self) -> bool:
        """Whether the store of all ranks ends with this process."""
        return self.is_main and not self.agent_hosts_store


ALONE = World()


def refuse_impossible(world: World, environ: Mapping[str, str]) -> None:
    """Raise `UserError` where this cannot be one process of a run, or lacks what leads to others.

    What follows from Slurm is right, and what else is set there is compared with it.
    """
    if world.launcher is Launcher.SRUN and world.size > 1:
        return
    instead = f"type unset {' '.join(PLACE)} to train with one process"
    asks = "WORLD_SIZE" if world.size > 1 else "LOCAL_RANK"  # of which Accelerate takes note
    missing = [name for name in PLACE if not environ.get(name) and name != "LOCAL_WORLD_SIZE"]
    if asks in environ and missing:
        raise UserError(
            f"{asks}={environ[asks]} in the environment without {', '.join(missing)}",
            expected="all of them, as accelerate launch and torchrun set them",
            instead=instead,
        )
    limit, here = "WORLD_SIZE", world.size
    if "LOCAL_WORLD_SIZE" in environ:
        limit, here = "LOCAL_WORLD_SIZE", world.local_size
    for name, value, most, of in (
        ("RANK", world.rank, world.size - 1, f"WORLD_SIZE={world.size}"),
        ("LOCAL_RANK", world.local_rank, here - 1, f"{limit}={here}"),
        ("LOCAL_WORLD_SIZE", world.local_size, world.size, f"WORLD_SIZE={world.size}"),
        ("GROUP_RANK", world.node, world.size - 1, f"WORLD_SIZE={world.size}"),
    ):
        if value > most:
            raise UserError(
                f"{name}={value} in the environment, of {of}",
                expected=f"at most {most}, as accelerate launch and torchrun set it",
                instead=instead,
            )


def check_world(world: World, running: int) -> None:
    """Stop where the processes that were asked for, announced and running are not the same."""
    if world.size != running:
        raise UserError(
            f"{count(world.size, 'process')} were started, but each of them trains alone",
            expected="one run of all processes together",
            instead=_SEVERAL_ON_CPU.format(count=world.size),
        )
    asked = processes_in(world.parent.command) if world.size == 1 else None
    if asked is not None and running < asked:
        raise UserError(
            f"{asked} processes were asked for, but accelerate launch started {running}",
            expected="as many processes as asked for",
            instead=_SEVERAL_ON_CPU.format(count=asked),
        )


_LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")


def processes_in(words: Sequence[str]) -> int | None:
    """The number of processes that an `accelerate launch` command line asks for.

    Its single-process launcher ignores the number and does not pass it on. None where the words
    are no such command line.
    """
    start = next((i for i, word in enumerate(words) if Path(word).name in _LAUNCHERS), None)
    if start is None:
        return None
    own = words[start + 1 :]
    own = own[: own.index("launcher")] if "launcher" in own else own
    flag = _flag(own, "--num_processes")
    return int(flag) if flag else _processes_in_config(_flag(own, "--config_file"))


def _flag(words: Sequence[str], name: str) -> str | None:
    """The value of a flag, which Accelerate lets people write with hyphens as well."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name[2:]:
            return value if equals else following
    return None


def _processes_in_config(config_file: str | None) -> int | None:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if config_file is None and not Path(default_config_file).is_file():
        return None
    return load_config_from_file(config_file).num_processes


_ACCELERATES = frozenset(
    ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
) | {"mixed_precision", "config_file", "multi_gpu", "gpu_ids", "cpu"}
_TORCHRUNS = frozenset(("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"))
_OTHERS = frozenset(("gpus", "num_gpus", "ngpus", "devices", "nproc", "world_size"))


def refuse_misplaced(words: list[str]) -> None:
    """Refuse flags of Accelerate, of torchrun and the like behind the recipe."""
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        for flags, whose, command in (
            (_ACCELERATES, "Accelerate's flags", f"accelerate launch {word} ..."),
            (_TORCHRUNS, "torchrun's flags", f"torchrun {word} ..."),
            (_OTHERS, "one process for each GPU,", "accelerate launch --num_processes 2"),
        ):
            if word.startswith("--") and flag in flags:
                raise UserError(
                    f"{word} after the recipe",
                    expected=f"{whose} before -m launcher",
                    instead=f"type {command} -m launcher RECIPE",
                )
