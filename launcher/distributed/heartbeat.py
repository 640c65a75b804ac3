"""Each rank counts up a key of its own in the store while it prepares; a stale one has failed.

A rank that loads for a long time keeps counting; one that is killed or stopped does not, and the
others end instead of waiting for it. During training the collectives notice a rank that does not
answer, and the thread only replies when a rank asks which of them still run, and notes that a rank
has failed: where that one hosts the store, nobody can ask it afterwards.
"""

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

INTERVAL = 0.5  # seconds between two heartbeats, and between two looks for a liveness check


class Heartbeat:
    """The heartbeat of this rank, and what it has seen of the others'."""

    def __init__(self, world: World, store: "Store") -> None:
        """No thread runs before `start`."""
        self._rank, self._store = world.rank, store
        self._is_over, self._is_training = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        # Rank 0 watches all, and all watch rank 0: the load of the store grows with the ranks only.
        self._watched = range(world.size) if world.is_main else range(1)
        self._beats: dict[int, bytes] = {}
        self._unchanged: dict[int, int] = {}
        self.exit_code: int | None = None  # of a rank that has reported a failure

    def start(self) -> None:
        """Beat from now on, in a thread; all ranks have done a first `beat`."""
        self._thread.start()

    def training_begins(self) -> None:
        """Stop beating; only reply to liveness checks."""
        self._is_training.set()

    def stop(self, timeout: float) -> None:
        """End the thread."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout)  # where the link is down, the store never answers it

    def beat(self) -> None:
        """Count up the key of this rank once."""
        self._store.add(f"beat/{self._rank}", 1)

    def stale_ranks(self, polls: int) -> list[int]:
        """The watched ranks whose key stayed the same in so many calls of this.

        Calls and not seconds, since a whole job may have been suspended and continued.
        """
        keys = [f"beat/{rank}" for rank in self._watched]
        for rank, beat in zip(self._watched, self._store.multi_get(keys), strict=True):
            is_same = self._beats.get(rank) == beat
            self._unchanged[rank] = self._unchanged.get(rank, 0) + 1 if is_same else 0
            self._beats[rank] = beat
        return [rank for rank, unchanged in self._unchanged.items() if unchanged >= polls]

    def reply(self) -> None:
        """Answer a liveness check."""
        self._store.set(f"alive/{self._rank}", "")

    def _run(self) -> None:
        """In a thread, since the main one may be loading data, or waiting for a dead rank."""
        with suppress(RuntimeError):  # the store is gone, and no rank can ask any more
            while not self._is_over.wait(INTERVAL):
                if not self._is_training.is_set():
                    self.beat()
                if self._store.check(["exit-code"]):
                    self.exit_code = int(self._store.get("exit-code"))
                if self._store.check(["liveness-check"]):
                    self.reply()
                    return
