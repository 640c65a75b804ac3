"""The ranks of a run find each other, and a rank that is missing or does not answer is named.

All ranks use one key-value store: torchrun's and Accelerate's agent hosts it, and rank 0 where
there is none. It outlives a failed collective, so through it the ranks still find out which of them
failed first, and only that one prints why.
"""

import json
import math
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from launcher.distributed import signals
from launcher.distributed.accelerator import device_of, runs_on_cpu
from launcher.distributed.heartbeat import Heartbeat
from launcher.distributed.store import in_thread, is_set, open_store
from launcher.distributed.world import World
from launcher.errors import (
    EXIT_FAULT,
    EXIT_SAVED,
    LauncherError,
    OtherRankError,
    RankError,
    SharedUserError,
    StoppedBeforeTrainingError,
    UserError,
)

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
GRACE = 4.0  # seconds for all running ranks to reply after a failure
MOST_DIFFERENCES = 5  # between two ranks, that are named
POLL = 2.0  # seconds between two looks at whether a rank has failed or become stale meanwhile
JOIN_WITH_ERROR = 30.0  # seconds that a rank with an error waits for the others
PREPARATION = timedelta(minutes=30)  # for data and network to be ready on the slowest rank
# What gloo says where it is not this rank that failed; NCCL has an exception of its own.
_CONNECTION_ERRORS = ("closed by peer", "reset by peer", "gloo", "timed out", "broken pipe")
_BEFORE_TRAINING = "before training"


@dataclass(frozen=True)
class Timeouts:
    """Seconds until a rank that does not come, or does not answer, ends the run."""

    join: float = 300.0
    collective: float | None = None  # None: 60 on a CPU, 600 on GPUs

    def of_collectives(self, world: World) -> timedelta:
        """For one collective."""
        return timedelta(seconds=self.collective or (60.0 if runs_on_cpu(world) else 600.0))


PATIENT = Timeouts()


class _OtherRankGaveUpError(LauncherError):
    """A `UserError` or a signal ends all ranks: this one need not finish what it waits for."""


def rendezvous(world: World, timeouts: Timeouts = PATIENT) -> "RankGroup":
    """Find the other ranks of the run.

    Raises `RankError` where they cannot be reached or do not come in time.
    """
    name = _full_name(world)
    if world.size > 1 or world.is_launched:  # a process alone stops after its first step instead
        signals.end_if_stopped(name)
    if world.size == 1:
        return RankGroup(world, timeouts)
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    host = None if world.hosts_store else "rank 0"
    try:
        store = open_store(
            world.address, world.port, timeouts.join, f"rank {world.rank}", host=host
        )
    except RankError:
        signals.end_if_stopped(name)  # so was rank 0, probably
        raise
    # The keys of an earlier attempt or run may still be in the store.
    prefix = f"launcher/{world.attempt}/{world.run}"
    group = RankGroup(world, timeouts, PrefixStore(prefix, store))
    group.wait_for_ranks()
    return group


def raise_on_all_ranks(error: UserError, world: World, timeouts: Timeouts) -> NoReturn:
    """Raise what is wrong before the ranks have met, which may be so on this one only.

    So they meet for it, and it is said once. Where they do not, this rank says it.
    """
    if world.size == 1:
        raise error
    try:
        group = rendezvous(world, replace(timeouts, join=min(timeouts.join, JOIN_WITH_ERROR)))
        try:
            with group.sync_errors():
                raise error
        finally:  # a thread that asks the store while Python ends would abort the process
            group.stop_heartbeat()
    except RankError:
        raise RankError(f"{_full_name(world)}: {error}", error.exit_code) from None


class RankGroup:
    """The ranks of a run, this one among them; without a store, this one alone.

    Keys of the store: `host/R` and `beat/R` of each rank R; `failures`, how many ranks failed;
    `user-errors`, how many ranks have one, `user-error/0`, that of rank 0, which may be all ranks',
    and `user-error`, the first of another; `stopped`, by which signal;
    `read`, how many ranks know the outcome of `sync_errors`; `left`, how many have ended;
    `liveness-check`, how many ranks ask who still runs, and `alive/R`; `barrier/B`, how many ranks
    are at barrier B, and `open/B`; `node/N/K` for key K of node N; `facts` and `images`, which all
    must share.
    """

    def __init__(
        self, world: World, timeouts: Timeouts = PATIENT, store: "Store | None" = None
    ) -> None:
        """`rendezvous` makes one."""
        self.world, self._timeouts, self._optional_store = world, timeouts, store
        self._heartbeat = Heartbeat(world, store) if store is not None else None
        self._polls = 0  # of the store, in all waits
        self._first_host = "?"
        self._name = _full_name(world)

    @property
    def _store(self) -> "Store":
        assert self._optional_store is not None, "a process alone has no store"
        return self._optional_store

    def wait_for_ranks(self) -> None:
        """Wait until all are here; raises `RankError` that names those who are not."""
        if self._heartbeat is None:
            return
        timeout = timedelta(seconds=self._timeouts.join)
        self._store.set(f"host/{self.world.rank}", socket.gethostname())
        self._heartbeat.beat()

        def arrive_and_wait() -> bool:
            self._arrive("here", self.world.size)
            came = self._poll("open/here", timeout, lambda: signals.end_if_stopped(self._name))
            self._first_host = self._host(0) if came else "?"
            return came

        if not self._guard(arrive_and_wait, timeout):
            if self.world.is_main:
                raise RankError(self._missing_ranks(timeout))
            raise OtherRankError
        self._heartbeat.start()

    def leave(self) -> None:
        """The run is over for this rank; rank 0 waits until all have left the store it hosts."""
        if self._heartbeat is not None:
            self.stop_heartbeat()
            with suppress(RuntimeError, TimeoutError):  # the store is gone, or the link is down
                in_thread(lambda: self._hold_store_until_all("left")).result(5 * GRACE)

    def stop_heartbeat(self) -> None:
        """Be as silent as a rank that has ended: after a failure, for which nobody waits."""
        if self._heartbeat is not None:
            self._heartbeat.stop(GRACE)

    # Preparation

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Run a block on all ranks, and continue when all have; a `UserError` of one ends all.

        So does a signal that came to any rank meanwhile, or a rank whose heartbeat is stale. After
        a signal a block may raise `StoppedBeforeTrainingError` instead of waiting.
        """
        error = None
        try:
            yield
        except UserError as raised:
            if self._heartbeat is None:
                raise
            error = raised
        except StoppedBeforeTrainingError:  # `_sync` tells the others
            if self._heartbeat is None:
                raise
        except _OtherRankGaveUpError:
            pass
        if self._heartbeat is not None:
            self._sync(error)
            self._heartbeat.training_begins()

    def _sync(self, error: UserError | None) -> None:
        met = self._guard(lambda: self._meet(error), self._silence)
        if met is None:
            if self.world.is_main:
                raise RankError("not all ranks could load the data")
            raise OtherRankError
        parts, stopped = met
        if parts:
            given, expected, instead = parts
            raise SharedUserError(given, expected=expected, instead=instead)
        if stopped:
            if self.world.is_main:
                raise StoppedBeforeTrainingError(stopped)
            raise OtherRankError(EXIT_SAVED)

    def _meet(self, error: UserError | None) -> tuple[list[str] | None, str] | None:
        """What all ranks know then: a refusal, and a signal; None where not all came in time."""
        store = self._store
        if error and (store.add("user-errors", 1) == 1 or self.world.is_main):
            place = "" if self.world.is_main else f"{self._name}: "
            text = json.dumps((f"{place}{error.given}", error.expected, error.instead))
            store.set("user-error/0" if self.world.is_main else "user-error", text)
        self._report_signal()
        self._arrive("ready", self.world.size)
        if not self._poll("open/ready", PREPARATION, self._check_ranks):
            return None
        has_error = store.add("user-errors", 0) > 0
        key = "user-error/0" if store.check(["user-error/0"]) else "user-error"
        parts = json.loads(store.get(key)) if has_error else None
        stopped = store.get("open/ready").decode()
        self._hold_store_until_all("read")
        return parts, stopped

    def _hold_store_until_all(self, key: str) -> None:
        """Count up a key; where this process hosts the store, keep it while others still come."""
        count, until = self._store.add(key, 1), time.monotonic() + GRACE
        while self.world.hosts_store and count < self.world.size and time.monotonic() < until:
            time.sleep(0.01)
            self._polls += 1
            before, count = count, self._store.add(key, 0)
            if count > before:
                until = time.monotonic() + GRACE

    def broadcast_on_node(self, key: str, value: str | None = None) -> str:
        """The value that one process of this node gives, on all processes of the node.

        To be called within `sync_errors`, which every rank then reaches: also where another rank
        has a `UserError` and never gives a value.
        """
        return self.broadcast(f"node/{self.world.node}/{key}", value)

    def broadcast(self, key: str, value: str | None = None) -> str:
        """The value that one rank gives, on all ranks; within `sync_errors` as well."""
        if value is not None:
            if self._heartbeat is not None:
                self._store.set(key, value)
            return value

        def wait() -> str:
            self._poll(key, None, self._check_whether_all_end)
            return self._store.get(key).decode()

        return self._guard(wait, self._silence)

    def refuse_differences(
        self,
        facts: Mapping[str, str],
        key: str = "facts",
        expected: str = "the same recipe, settings and versions on all ranks",
        instead: str = "start every rank with the same command, files and environment",
    ) -> None:
        """Raise `UserError` where the facts of this rank are not those of rank 0.

        To be called within `sync_errors`, once for each `key`.
        """
        if self._heartbeat is None:
            return
        first = json.loads(self.broadcast(key, json.dumps(facts) if self.world.is_main else None))
        names = [n for n in {**first, **facts} if first.get(n) != facts.get(n)]
        if names:
            own, others = (
                ", ".join(f"{n} {values.get(n, 'missing')}" for n in names[:MOST_DIFFERENCES])
                for values in (facts, first)
            )
            raise UserError(
                f"{own}, but rank 0 on {self._first_host} has {others}",
                expected=expected,
                instead=instead,
            )

    def node_barrier(self, name: str) -> None:
        """Wait for all processes of this node; within `sync_errors`, as `broadcast_on_node`."""
        name = f"{name}/{self.world.node}"

        def arrive_and_wait() -> bool:
            self._arrive(name, self.world.local_size)
            return self._poll(f"open/{name}", None, self._check_whether_all_end)

        self._guard(arrive_and_wait, self._silence)

    def init_process_group(self) -> None:
        """Make torch's process group, which Accelerate then uses."""
        if self._optional_store is not None:
            from torch import distributed

            distributed.init_process_group(
                distributed.get_default_backend_for_device(device_of(self.world)),
                store=distributed.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self.world.rank,
                world_size=self.world.size,
                timeout=self._silence,
            )

    # Failures

    def attribute_failure(self, error: Exception, moment: str) -> Exception:
        """What this rank raises after `error`: `OtherRankError` if another failed before.

        A `UserError` that rank 0 has as well, it alone raises. `moment` says where the training
        was: `in step 17 (epoch 2)`.
        """
        if self._optional_store is None:
            return error
        try:  # where the link is down, the store would never answer
            return in_thread(lambda: self._attribute(error, moment)).result(5 * GRACE)
        except TimeoutError:
            return self._store_lost()

    def _attribute(self, error: Exception, moment: str) -> Exception:
        text = "".join(traceback.format_exception(error))
        try:
            if is_of_other_rank(error):
                return self._find_failed_rank(text, moment)
            if isinstance(error, UserError) and not self.world.is_main:
                self._wait_for_failure(GRACE)
            if not self._report_failure(code := getattr(error, "exit_code", EXIT_FAULT)):
                return OtherRankError(int(self._store.get("exit-code")))
            if isinstance(error, UserError) and self.world.is_main:
                return error.shared()  # by now, and the others print nothing
            if isinstance(error, LauncherError):
                return RankError(f"{error} ({self._name}, {moment})", code)
            return RankError(f"{self._name} failed\n{text}")
        except RuntimeError:  # the store is gone
            return self._store_lost()

    def _report_failure(self, exit_code: int = EXIT_FAULT) -> bool:
        """Count a failure; returns whether it is the first of the run."""
        self._store.set("exit-code", str(exit_code))
        is_first = self._store.add("failures", 1) == 1
        time.sleep(GRACE if self.world.hosts_store else 0)  # the others have yet to ask who failed
        return is_first

    def _find_failed_rank(self, text: str, moment: str) -> Exception:
        """Which ranks do not reply after a failed collective; one rank alone reports them."""
        assert self._heartbeat is not None
        self._heartbeat.reply()
        reports = self._store.add("liveness-check", 1) == 1
        seconds = GRACE + (1 if self.world.hosts_store else 0)
        if (reports or self.world.hosts_store) and self._wait_for_failure(seconds):
            return OtherRankError(int(self._store.get("exit-code")))
        if not reports:
            return OtherRankError()
        missing = self._ranks_without("alive")
        if not missing:
            return RankError(f"{self._name} could not reach the others\n{text}")
        return RankError(self._not_answering(missing, moment))

    def _wait_for_failure(self, seconds: float) -> bool:
        """Returns whether a rank has reported one by then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._store.add("failures", 0):
                return True
            time.sleep(0.1)
        return False

    def _store_lost(self) -> LauncherError:
        if self._heartbeat is not None and self._heartbeat.exit_code is not None:
            return OtherRankError(self._heartbeat.exit_code)  # it says why, and the store went too
        return RankError(
            f"rank 0 on {self._first_host}, or the key-value store there, "
            f"does not answer any more ({self._name})"
        )

    def _not_answering(self, ranks: list[int], moment: str) -> str:
        where = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in ranks)
        return f"{where} does not answer: killed, stopped or cut off ({self._name}, {moment})"

    def _missing_ranks(self, timeout: timedelta) -> str:
        missing = self._ranks_without("host")
        present = [rank for rank in range(self.world.size) if rank not in missing]
        hosts = sorted({self._host(rank) for rank in present})
        return (
            f"{len(missing)} of {self.world.size} processes did not come within "
            f"{timeout.total_seconds():g} s: ranks {_ranges(missing)}; "
            f"ranks {_ranges(present)} are here, on {', '.join(hosts)}; "
            "look for the missing on their machines, or give them longer by --join-timeout"
        )

    def _ranks_without(self, key: str) -> list[int]:
        return [r for r in range(self.world.size) if not self._store.check([f"{key}/{r}"])]

    def _host(self, rank: int) -> str:
        return self._store.get(f"host/{rank}").decode()

    # Waiting

    @property
    def _silence(self) -> timedelta:
        """How long a rank may not answer."""
        return self._timeouts.of_collectives(self.world)

    def _arrive(self, name: str, size: int) -> None:
        """Count up a barrier; the last of `size` opens it, and says whether the run was stopped."""
        if self._store.add(f"barrier/{name}", 1) == size:
            was_stopped = self._store.check(["stopped"])
            self._store.set(
                f"open/{name}", self._store.get("stopped").decode() if was_stopped else ""
            )

    def _poll(self, key: str, timeout: timedelta | None, check: Callable[[], None]) -> bool:
        """Wait until a key is in the store; returns whether it came in time.

        `check` is called every `POLL` seconds and may raise.
        """
        until = time.monotonic() + timeout.total_seconds() if timeout else math.inf
        while not is_set(self._store, key, min(POLL, until - time.monotonic())):
            self._polls += 1
            if self._store.add("failures", 0):
                raise OtherRankError
            check()
            if time.monotonic() >= until:
                return False
        return True

    def _guard(self, wait: Callable[[], T], silence: timedelta) -> T:
        """Run a wait that polls, in a thread: a store that does not answer has no time-out.

        After `silence` without a poll, the process that hosts it has been stopped.
        """
        waiting = in_thread(wait)
        while True:
            polls = self._polls
            try:
                return waiting.result(silence.total_seconds() + GRACE)
            except TimeoutError:
                if polls == self._polls:
                    self._give_up_store()
            except RuntimeError:
                self._give_up_store()

    def _check_ranks(self) -> None:
        """Beat, report a signal, and end the run where another rank's heartbeat is stale."""
        assert self._heartbeat is not None
        self._report_signal()
        self._heartbeat.beat()
        polls = 2 + math.ceil(self._silence.total_seconds() / POLL)
        if stale := self._heartbeat.stale_ranks(polls):
            if self._report_failure():
                raise RankError(self._not_answering(stale, _BEFORE_TRAINING))
            raise OtherRankError

    def _report_signal(self) -> None:
        if reason := signals.stop_reason():
            self._store.set("stopped", signals.stopped_line(self._name, reason))

    def _check_whether_all_end(self) -> None:
        self._check_ranks()
        if self._store.add("user-errors", 0) or self._store.check(["stopped"]):
            raise _OtherRankGaveUpError

    def _give_up_store(self) -> NoReturn:
        signals.end_if_stopped(self._name)  # after a signal no rank has failed
        raise self._store_lost() from None


def is_of_other_rank(error: BaseException) -> bool:
    """Whether a failure of another rank, or of the connection to it, is behind an exception."""
    from torch.distributed import DistError

    text = str(error).lower()
    of_gloo = isinstance(error, RuntimeError) and any(part in text for part in _CONNECTION_ERRORS)
    return isinstance(error, DistError) or of_gloo


def _full_name(world: World) -> str:
    return f"rank {world.rank} of {world.size} on {socket.gethostname()}"


def _ranges(ranks: list[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)
