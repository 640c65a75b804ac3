"""The processes of a run find each other, and those that do not come or do not answer are named.

Every rank says its host in a key-value store that all can reach: torchrun's and Accelerate's agent
keeps it, and rank 0 where there is none. The store outlives a failed collective, so the ranks can
still agree on who failed first, and only that one speaks.
"""

import os
import socket
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from launcher import signals
from launcher.cluster import World, runs_on_cpu
from launcher.errors import LauncherError, RankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

GRACE = 4.0  # seconds for all who live to say so, after a failure
ATTENTION = 0.5  # seconds between two looks at whether somebody asks who lives
POLL = 2.0  # seconds between two looks at whether a rank has failed meanwhile
PREPARATION = timedelta(minutes=30)  # for data and network to be ready on the slowest rank
# What gloo says where it is not this rank that failed; NCCL has an exception of its own.
_OF_OTHERS = ("closed by peer", "reset by peer", "gloo", "timed out", "broken pipe")


@dataclass(frozen=True)
class Timeouts:
    """Seconds until a rank that does not come, or does not answer, ends the run."""

    join: float = 300.0
    collective: float | None = None  # None: 60 on a CPU, 600 on GPUs

    @property
    def of_collectives(self) -> timedelta:
        """For one collective."""
        return timedelta(seconds=self.collective or (60.0 if runs_on_cpu() else 600.0))


PATIENT = Timeouts()


class Company:
    """The ranks of a run, this one among them; without a store, this one alone."""

    def __init__(self, world: World, store: "Store | None" = None, *, hosts: bool = False) -> None:
        """`hosts` says that the store ends with this process."""
        self._world, self._store, self._hosts = world, store, hosts
        self._leaves = threading.Event()
        self._attendant = threading.Thread(target=self._attend, name="attendance", daemon=True)
        self._first_host = "?"
        self._name = f"rank {world.rank} of {world.size} on {socket.gethostname()}"

    def call_roll(self, timeout: timedelta) -> None:
        """Wait until all are here; raises `RankError` that names those who are not."""
        if self._store is not None:
            self._store.set(f"host/{self._world.rank}", socket.gethostname())
            if not self._all_at("here", timeout):
                raise RankError(self._absence(timeout)) if self._world.is_main else RankError("")
            self._first_host = self._host(0)
            self._attendant.start()

    def leave(self) -> None:
        """The run is over for this rank."""
        self._leaves.set()
        if self._attendant.is_alive():
            self._attendant.join(GRACE)  # where the link is down, the store never answers it

    def _attend(self) -> None:
        """Answer who asks which ranks live; the main thread may be waiting for a dead one."""
        assert self._store is not None
        with suppress(RuntimeError):  # the store is gone, and with it whoever could ask
            while not self._leaves.wait(ATTENTION):
                if self._store.check(["roll"]):
                    self._store.set(f"alive/{self._world.rank}", "")
                    return

    def agree(self, problem: UserError | None) -> None:
        """Raise the first rank's `problem`, if any has one, on every rank."""
        store = self._store
        if store is None:
            if problem:
                raise problem
            return
        if problem and store.add("problems", 1) == 1:
            store.set(
                "problem", f"{problem}" if self._world.is_main else f"{self._name}: {problem}"
            )
        if not self._all_at("ready", PREPARATION):
            raise RankError("" if not self._world.is_main else "not all ranks could load the data")
        if store.add("problems", 0):
            raise _ToldError(store.get("problem").decode())

    def found(self, timeout: timedelta) -> None:
        """Make the process group, of which Accelerate then makes use."""
        if self._store is not None:
            import torch
            from torch import distributed

            device = torch.accelerator.current_accelerator()
            if runs_on_cpu() or device is None:
                device = torch.device("cpu")
            distributed.init_process_group(
                distributed.get_default_backend_for_device(device),
                store=distributed.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self._world.rank,
                world_size=self._world.size,
                timeout=timeout,
            )

    def explain(self, error: Exception) -> Exception:
        """What this rank is to say of its failure: all, or nothing if another failed before."""
        if self._store is None:
            return error
        answers: list[Exception] = []
        asking = threading.Thread(target=lambda: answers.append(self._explain(error)), daemon=True)
        asking.start()  # where the link is down, the store would let it wait for ever
        asking.join(5 * GRACE)
        return answers[0] if answers else self._silence()

    def _explain(self, error: Exception) -> Exception:
        assert self._store is not None
        text = "".join(traceback.format_exception(error))
        try:
            if not is_of_others(error):
                first = self._store.add("failures", 1) == 1
                time.sleep(GRACE if self._hosts else 0)  # the others still have to ask who failed
                return RankError(f"{self._name} failed\n{text}" if first else "")
            return RankError(self._account(text))
        except RuntimeError:  # the store is gone
            return self._silence()

    def _silence(self) -> RankError:
        return RankError(
            f"rank 0 on {self._first_host}, with which all the others began, "
            f"does not answer any more ({self._name})"
        )

    def _account(self, text: str) -> str:
        """Who is missing after a collective that failed; empty if another rank says so."""
        assert self._store is not None
        self._store.set(f"alive/{self._world.rank}", "")
        speaks = self._store.add("roll", 1) == 1
        until = time.monotonic() + GRACE + (1 if self._hosts else 0)
        while (speaks or self._hosts) and time.monotonic() < until:
            if self._store.add("failures", 0):
                return ""
            time.sleep(0.1)
        if not speaks:
            return ""
        missing = self._without("alive")
        if not missing:
            return f"{self._name} could not reach the others\n{text}"
        where = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in missing)
        return (
            f"{where} does not answer: killed, stopped or cut off ({self._name}, {_step_of(text)})"
        )

    def _all_at(self, place: str, timeout: timedelta) -> bool:
        """Whether all ranks come to `place` in time."""
        assert self._store is not None
        until = time.monotonic() + timeout.total_seconds()
        try:
            if self._store.add(place, 1) == self._world.size:
                self._store.set(f"all-{place}", "")
            while not self._is_set(f"all-{place}", min(POLL, until - time.monotonic())):
                if self._store.add("failures", 0):
                    raise RankError("")
                if reason := signals.stop_reason():
                    raise RankError(f"{self._name} was stopped by {reason} before all were {place}")
                if time.monotonic() >= until:
                    return False
        except RuntimeError:  # the store is gone
            raise self._silence() from None
        return True

    def _is_set(self, key: str, seconds: float) -> bool:
        """Wait up to so many seconds for a key."""
        assert self._store is not None
        try:
            self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError:
            return False
        return True

    def _absence(self, timeout: timedelta) -> str:
        missing = self._without("host")
        present = [rank for rank in range(self._world.size) if rank not in missing]
        hosts = sorted({self._host(rank) for rank in present})
        return (
            f"{len(missing)} of {self._world.size} processes did not come within "
            f"{timeout.total_seconds():g} s: ranks {_ranges(missing)}; "
            f"ranks {_ranges(present)} are here, on {', '.join(hosts)}; "
            "look for the missing on their machines, or give them longer by --join-timeout"
        )

    def _without(self, key: str) -> list[int]:
        assert self._store is not None
        return [r for r in range(self._world.size) if not self._store.check([f"{key}/{r}"])]

    def _host(self, rank: int) -> str:
        assert self._store is not None
        return self._store.get(f"host/{rank}").decode()


class _ToldError(LauncherError):
    """A `UserError` of some rank, as all of them end with it."""

    exit_code = UserError.exit_code


def meet(world: World, timeouts: Timeouts) -> Company:
    """Find the other ranks of the run.

    Raises `RankError` where they cannot be reached or do not come in time.
    """
    if world.size == 1:
        return Company(world)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    hosts = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = open_store(*place, timeouts.join, f"rank {world.rank}", None if hosts else "rank 0")
    company = Company(world, PrefixStore(f"launcher/{_attempt()}", store), hosts=hosts)
    company.call_roll(timedelta(seconds=timeouts.join))
    return company


def open_store(address: str, port: int, seconds: float, name: str, host: str | None) -> "Store":
    """The key-value store that `host` keeps there, or with None this process, called `name`.

    Raises `RankError` where nobody answers within so many seconds, or the port is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            address,
            port,
            is_master=host is None,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise RankError(
            f"{name} on {socket.gethostname()} cannot {f'reach {host}' if host else 'listen'} at "
            f"{address} port {port} within {seconds:g} s: {reason}"
        ) from None


def is_of_others(error: BaseException) -> bool:
    """Whether a failure of another rank, or of the connection to it, is behind an exception."""
    from torch.distributed import DistError

    text = str(error).lower()
    of_gloo = isinstance(error, RuntimeError) and any(part in text for part in _OF_OTHERS)
    return isinstance(error, DistError) or of_gloo


def _attempt() -> str:
    """Which start of the job this is: the keys of an earlier one may still be in the store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))


def _step_of(text: str) -> str:
    """The loop's note on where it was."""
    notes = [line for line in text.splitlines() if line.startswith("in step ")]
    return notes[-1] if notes else "outside training"


def _ranges(ranks: list[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
