"""Each rank says through the store that it lives: all the time while it prepares, later if asked.

A rank that loads for long beats on; one that is killed or stopped does not, and is not waited for.
"""

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

ATTENTION = 0.5  # seconds between two heartbeats, or two looks at whether somebody asks who lives


class Heartbeat:
    """What this rank lets the others know of it, and what it knows of them."""

    def __init__(self, world: World, store: "Store") -> None:
        """Nothing is said before `begin`."""
        self._world, self._store = world, store
        self._leaves, self._is_prepared = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._attend, name="attendance", daemon=True)
        # Rank 0 watches all, and all watch rank 0: the store has to bear it with a thousand ranks.
        self._watched = range(world.size) if world.is_main else range(1)
        self._beats: dict[int, bytes] = {}
        self._unchanged: dict[int, int] = {}

    def begin(self) -> None:
        """Say that this rank lives from now on; all ranks have done a first `beat`."""
        self._thread.start()

    def prepared(self) -> None:
        """From now on the collectives tell who does not answer."""
        self._is_prepared.set()

    def leave(self, patience: float) -> None:
        """Say nothing more."""
        self._leaves.set()
        if self._thread.is_alive():
            self._thread.join(patience)  # where the link is down, the store never answers it

    def beat(self) -> None:
        """Say once that this rank lives."""
        self._store.add(f"beat/{self._world.rank}", 1)

    def silent(self, looks: int) -> list[int]:
        """The ranks whose hearts did not beat between so many calls of this.

        Calls and not seconds, since a whole job may have been suspended and continued.
        """
        keys = [f"beat/{rank}" for rank in self._watched]
        for rank, beat in zip(self._watched, self._store.multi_get(keys), strict=True):
            same = self._beats.get(rank) == beat
            self._unchanged[rank] = self._unchanged.get(rank, 0) + 1 if same else 0
            self._beats[rank] = beat
        return [rank for rank, count in self._unchanged.items() if count >= looks]

    def _attend(self) -> None:
        """The main thread may be loading data, or waiting for a dead rank."""
        with suppress(RuntimeError):  # the store is gone, and with it whoever could ask
            while not self._leaves.wait(ATTENTION):
                if not self._is_prepared.is_set():
                    self.beat()
                if self._store.check(["roll"]):
                    self._store.set(f"alive/{self._world.rank}", "")
                    return
