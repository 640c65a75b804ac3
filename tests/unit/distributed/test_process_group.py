"""Ranks that meet in one process, each in a thread of its own."""

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from launcher.distributed import signals
from launcher.distributed.process_group import RankGroup
from launcher.distributed.world import World
from launcher.errors import EXIT_SAVED, LauncherError, OtherRankError, StoppedBeforeTrainingError


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
