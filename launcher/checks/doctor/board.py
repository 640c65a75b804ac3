"""Where the ranks of `doctor` write for each other; each wait has a time limit.

It uses the key-value store, which outlives a failed collective. Each request runs in a thread of
its own: where the link is down, or the process of the store is stopped, the store never answers,
and a thread within torch cannot be interrupted. After the first such request no other one is tried.
"""

import json
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.distributed.store import in_thread, is_set

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
ANSWER = 4.0  # seconds for a store that reads or writes, which takes milliseconds
_LOOK = 0.25  # seconds between two requests for the missing keys


class Board:
    """Keys with JSON values, common to all ranks."""

    def __init__(self, store: "Store") -> None:
        """`store` is for this board alone: a waiting request keeps others from the connection."""
        self.store = store
        self.is_lost = False  # the store does not answer any more

    def put(self, key: str, value: Any) -> None:
        """Write a value, if the store still answers."""
        self._ask(lambda: self.store.set(key, json.dumps(value)), None)

    def count(self, key: str, by: int = 1) -> int:
        """Increment a key; returns its value, or 0 where the store does not answer."""
        return self._ask(lambda: self.store.add(key, by), 0)

    def wait_for_count(self, key: str, least: int, seconds: float) -> None:
        """Wait until a key has reached a count, or the time is over."""
        until = time.monotonic() + seconds
        while self.count(key, 0) < least and not self.is_lost and time.monotonic() < until:
            time.sleep(0.01)

    def get(self, key: str, seconds: float) -> Any:
        """The value, as soon as it is there; None where it does not come."""
        return self.collect([key], seconds).get(key)

    def collect(self, keys: Iterable[str], seconds: float) -> dict[str, Any]:
        """The values that arrive in time; returns as soon as all have."""
        missing, found = list(keys), dict[str, Any]()
        until = time.monotonic() + seconds
        while missing and not self.is_lost:
            is_over = time.monotonic() >= until
            found |= self._present(missing, max(0.0, min(_LOOK, until - time.monotonic())))
            missing = [key for key in missing if key not in found]
            if is_over:
                break
        return found

    def _present(self, keys: list[str], seconds: float) -> dict[str, Any]:
        """The values that have arrived, after a wait for the first of them."""

        def look() -> dict[str, Any]:
            is_set(self.store, keys[0], seconds)
            present = [key for key in keys if self.store.check([key])]
            values = self.store.multi_get(present) if present else []
            return {key: json.loads(value) for key, value in zip(present, values, strict=True)}

        return self._ask(look, {})

    def _ask(self, request: Callable[[], T], otherwise: T) -> T:
        if self.is_lost:
            return otherwise
        try:
            return in_thread(request).result(ANSWER + _LOOK)
        except (TimeoutError, RuntimeError):  # the latter where the process of the store has ended
            self.is_lost = True
            return otherwise
