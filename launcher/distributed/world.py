"""Which process of how many this is, and the guards on the number of processes.

Accelerate and torchrun tell each process its rank and the world size in RANK and WORLD_SIZE. Some
ways of launching ask for several processes and start one, or start several that each believe to
be alone; both train wrongly without a word, so both are stopped here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError

_SEVERAL_ON_CPU = (
    "type ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {count} "
    "-m launcher RECIPE"
)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run, as its launcher announced it."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "World":
        """Read rank and world size from the environment; 1 process where nothing is set."""
        return cls(
            rank=int(environ.get("RANK") or 0),  # empty where a batch script names what is not set
            local_rank=int(environ.get("LOCAL_RANK") or 0),
            size=int(environ.get("WORLD_SIZE") or 1),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def check_world(announced_size: int, running: int, asked: int | None) -> None:
    """Stop where the processes that were asked for, announced and running are not the same."""
    if announced_size != running:
        raise UserError(
            f"{announced_size} processes were started, but each of them believes to be alone",
            expected="one run of all processes together",
            instead=_SEVERAL_ON_CPU.format(count=announced_size),
        )
    if asked is not None and running < asked:
        raise UserError(
            f"{asked} processes were asked for, but accelerate launch started {running}",
            expected="as many processes as asked for",
            instead=_SEVERAL_ON_CPU.format(count=asked),
        )


def asked_processes() -> int | None:
    """How many processes an `accelerate launch` above this process was told to start in all.

    Its single-process launcher ignores the number and does not pass it on, so it is read from the
    parent's command line and config file. None where there is no such parent.
    """
    import psutil

    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return None
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    return processes_in(words)


_LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")


def processes_in(words: list[str]) -> int | None:
    """The number of processes that an `accelerate launch` command line asks for."""
    start = next((i for i, word in enumerate(words) if Path(word).name in _LAUNCHERS), None)
    if start is None:
        return None
    own = words[start + 1 :]
    own = own[: own.index("launcher")] if "launcher" in own else own
    flag = _flag(own, "--num_processes")
    return int(flag) if flag else _processes_in_config(_flag(own, "--config_file"))


def _flag(words: list[str], name: str) -> str | None:
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


def refuse_misplaced(words: list[str]) -> None:
    """Refuse Accelerate's own flags behind the recipe, where they have no effect."""
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag in _ACCELERATES:
            raise UserError(
                f"{word} after the recipe",
                expected="Accelerate's flags before -m launcher",
                instead=f"type accelerate launch {word} ... -m launcher RECIPE",
            )
