"""The processes of a run find each other, and those that do not come or do not answer are named.

Every rank says its host in a key-value store that all can reach: torchrun's and Accelerate's agent
keeps it, and rank 0 where there is none. The store outlives a failed collective, so the ranks can
still agree on who failed first, and only that one speaks.
"""

import math
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from launcher.distributed import signals
from launcher.distributed.accelerator import runs_on_cpu
from launcher.distributed.heartbeat import Heartbeat
from launcher.distributed.store import in_thread, is_set, open_store
from launcher.distributed.world import World
from launcher.errors import EXIT_SAVED, LauncherError, RankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

GRACE = 4.0  # seconds for all who live to say so, after a failure
POLL = 2.0  # seconds between two looks at whether a rank has failed or fallen silent meanwhile
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


class RankGroup:
    """The ranks of a run, this one among them; without a store, this one alone."""

    def __init__(self, world: World, store: "Store | None" = None, *, hosts: bool = False) -> None:
        """`hosts` says that the store ends with this process."""
        self._world, self._store, self._hosts = world, store, hosts
        self._attendance = Heartbeat(world, store) if store is not None else None
        self._looks = 0  # at the store, while this rank waits for all
        self._first_host = "?"
        self._name = _full_name(world)

    def wait_for_ranks(self, timeout: timedelta) -> None:
        """Wait until all are here; raises `RankError` that names those who are not."""
        if self._store is not None and self._attendance is not None:
            self._store.set(f"host/{self._world.rank}", socket.gethostname())
            self._attendance.beat()
            if not self._all_at("here", timeout, timeout, lambda: _end_if_stopped(self._name)):
                raise RankError(self._absence(timeout)) if self._world.is_main else RankError("")
            self._first_host = self._host(0)
            self._attendance.begin()

    def leave(self) -> None:
        """The run is over for this rank."""
        if self._attendance is not None:
            self._attendance.leave(GRACE)

    def agree(self, problem: UserError | None, silence: timedelta) -> None:
        """Raise the first rank's `problem`, if any has one, on every rank.

        A rank that is silent for longer than `silence` is given up. If a signal has come to any
        rank meanwhile, all end before they begin.
        """
        store = self._store
        if store is None or self._attendance is None:
            if problem:
                raise problem
            return
        if problem and store.add("problems", 1) == 1:
            store.set(
                "problem", f"{problem}" if self._world.is_main else f"{self._name}: {problem}"
            )
        if not self._all_at("ready", PREPARATION, silence, lambda: self._look_around(silence)):
            raise RankError("" if not self._world.is_main else "not all ranks could load the data")
        self._attendance.prepared()
        if store.add("problems", 0):
            raise _ToldError(store.get("problem").decode())
        if stop := store.get("all-ready").decode():
            raise _StoppedError(stop if self._world.is_main else "")

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

    def explain(self, error: Exception, moment: str) -> Exception:
        """What this rank is to say of its failure at some moment of the training."""
        if self._store is None:
            return error
        try:  # where the link is down, the store would let it wait for ever
            return in_thread(lambda: self._explain(error, moment)).result(5 * GRACE)
        except TimeoutError:
            return self._silence()

    def _explain(self, error: Exception, moment: str) -> Exception:
        assert self._store is not None
        text = "".join(traceback.format_exception(error))
        try:
            if not is_of_others(error):
                first = self._store.add("failures", 1) == 1
                time.sleep(GRACE if self._hosts else 0)  # the others still have to ask who failed
                return RankError(f"{self._name} failed\n{text}" if first else "")
            return RankError(self._account(text, moment))
        except RuntimeError:  # the store is gone
            return self._silence()

    def _silence(self) -> RankError:
        return RankError(
            f"rank 0 on {self._first_host}, with which all the others began, "
            f"does not answer any more ({self._name})"
        )

    def _account(self, text: str, moment: str) -> str:
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
        return self._lost(missing, moment)

    def _lost(self, ranks: list[int], moment: str) -> str:
        where = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in ranks)
        return f"{where} does not answer: killed, stopped or cut off ({self._name}, {moment})"

    def _all_at(
        self, place: str, timeout: timedelta, silence: timedelta, look: Callable[[], None]
    ) -> bool:
        """Whether all ranks come to `place` in time; `look` may raise why they will not."""
        waiting = in_thread(lambda: self._wait_for_all(place, timeout, look))
        while True:
            looks = self._looks
            try:
                return waiting.result(silence.total_seconds() + GRACE)
            except TimeoutError:
                if looks == self._looks:  # the process that keeps the store is stopped
                    raise self._gone() from None
            except RuntimeError:
                raise self._gone() from None

    def _wait_for_all(self, place: str, timeout: timedelta, look: Callable[[], None]) -> bool:
        assert self._store is not None
        until = time.monotonic() + timeout.total_seconds()
        look()
        if self._store.add(place, 1) == self._world.size:  # the last one decides for all
            stopped = self._store.check(["stopped"])
            self._store.set(f"all-{place}", self._store.get("stopped").decode() if stopped else "")
        while not is_set(self._store, f"all-{place}", min(POLL, until - time.monotonic())):
            self._looks += 1
            if self._store.add("failures", 0):
                raise RankError("")
            look()
            if time.monotonic() >= until:
                return False
        return True

    def _look_around(self, silence: timedelta) -> None:
        """Say that this rank lives, and whether it was stopped; give up those who say nothing."""
        assert self._store is not None
        assert self._attendance is not None
        if reason := signals.stop_reason():
            self._store.set("stopped", f"{_stopped(self._name, reason)}")
        self._attendance.beat()
        silent = self._attendance.silent(2 + math.ceil(silence.total_seconds() / POLL))
        if silent:
            first = self._store.add("failures", 1) == 1
            time.sleep(GRACE if self._hosts else 0)  # the others still have to ask who failed
            raise RankError(self._lost(silent, "before training") if first else "")

    def _gone(self) -> RankError:
        """The store is gone; after a signal nobody is to blame."""
        _end_if_stopped(self._name)
        return self._silence()

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


class _StoppedError(RankError):
    """A signal came before all were there; a resume begins where this one was to."""

    exit_code = EXIT_SAVED


def _stopped(name: str, reason: str) -> _StoppedError:
    return _StoppedError(
        f"{name} was stopped by {reason} before training began; "
        "nothing is lost: run it again with --resume"
    )


def _end_if_stopped(name: str) -> None:
    """Until all are here, and where nobody is any more, a signal is reason enough to end."""
    if reason := signals.stop_reason():
        raise _stopped(name, reason)


class _ToldError(LauncherError):
    """A `UserError` of some rank, as all of them end with it."""

    exit_code = UserError.exit_code


def meet(world: World, timeouts: Timeouts) -> RankGroup:
    """Find the other ranks of the run.

    Raises `RankError` where they cannot be reached or do not come in time.
    """
    name = _full_name(world)
    if world.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:  # else nobody is to be asked
        _end_if_stopped(name)
    if world.size == 1:
        return RankGroup(world)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    hosts = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        store = open_store(*place, timeouts.join, f"rank {world.rank}", None if hosts else "rank 0")
    except RankError:
        _end_if_stopped(name)  # so was rank 0, probably
        raise
    group = RankGroup(world, PrefixStore(f"launcher/{_attempt()}", store), hosts=hosts)
    group.wait_for_ranks(timedelta(seconds=timeouts.join))
    return group


def is_of_others(error: BaseException) -> bool:
    """Whether a failure of another rank, or of the connection to it, is behind an exception."""
    from torch.distributed import DistError

    text = str(error).lower()
    of_gloo = isinstance(error, RuntimeError) and any(part in text for part in _OF_OTHERS)
    return isinstance(error, DistError) or of_gloo


def _full_name(world: World) -> str:
    return f"rank {world.rank} of {world.size} on {socket.gethostname()}"


def _attempt() -> str:
    """Which start of the job this is: the keys of an earlier one may still be in the store."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))


def _ranges(ranks: list[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
