"""Ranks that meet in one process, each in a thread of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from launcher.distributed import process_group, signals
from launcher.distributed import store as store_module
from launcher.distributed.process_group import RankGroup, Timeouts
from launcher.distributed.store import in_thread, open_store
from launcher.distributed.world import World
from launcher.errors import (
    EXIT_SAVED,
    LauncherError,
    OtherRankError,
    RankError,
    StoppedBeforeTrainingError,
)
from tests.support.processes import free_port


@pytest.fixture
def stopped() -> Iterator[None]:
    """As after a signal."""
    with signals.listening(ends_process=False):
        os.kill(os.getpid(), signal.SIGTERM)
        yield


def on_two_ranks(block: Callable[[RankGroup], None]) -> list[LauncherError | None]:
    """What `sync_errors` around a block raises on rank 0 and on rank 1."""
    store, raised = HashStore(), dict[int, LauncherError]()

    def run(rank: int) -> None:
        group = RankGroup(World(rank=rank, size=2, local_rank=rank, local_size=2), store=store)
        try:
            with group.sync_errors():
                block(group)
        except LauncherError as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for ever"
    return [raised.get(rank) for rank in (0, 1)]


@pytest.mark.usefixtures("stopped")
def test_a_signal_in_a_wait_ends_the_ranks_that_wait_for_this_one() -> None:
    def wait(group: RankGroup) -> None:
        if group.world.rank == 0:  # in the wait for a lock
            signals.end_if_stopped("this one")
        group.broadcast_on_node("images")

    first, second = on_two_ranks(wait)
    assert isinstance(first, StoppedBeforeTrainingError)
    assert isinstance(second, OtherRankError)
    assert first.exit_code == second.exit_code == EXIT_SAVED


@pytest.mark.usefixtures("stopped")
def test_a_signal_in_a_wait_ends_a_process_alone() -> None:
    with (
        pytest.raises(StoppedBeforeTrainingError, match="this one was stopped by SIGTERM"),
        RankGroup(World()).sync_errors(),
    ):
        signals.end_if_stopped("this one")


HOSTS = """
import sys, time
from launcher.distributed.store import open_store
store = open_store("127.0.0.1", int(sys.argv[1]), 20, "rank 0", None)
store.set("key", "value")
time.sleep(60)
"""


def test_a_rank_that_is_stopped_after_it_has_given_a_value_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another rank saw that the value is there, and then asked for it for ever."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", HOSTS, str(port)]) as host:
        store = open_store("127.0.0.1", port, 20, "rank 1", host="rank 0")

        def is_set(store: Store, key: str, seconds: float) -> bool:
            found = store_module.is_set(store, key, 20)
            host.send_signal(signal.SIGSTOP)
            os.waitpid(host.pid, os.WUNTRACED)  # all of its threads stand
            return found

        monkeypatch.setattr(process_group, "is_set", is_set)
        timeouts = Timeouts(collective=0.5)
        group = RankGroup(World(rank=1, size=2), timeouts, store)
        asked = in_thread(lambda: group.broadcast("key"))
        try:
            with pytest.raises(RankError, match=r"rank 0 on .* does not answer any more"):
                asked.result(20)
        finally:
            host.kill()
