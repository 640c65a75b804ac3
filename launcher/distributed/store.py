"""The key-value store through which ranks, and nodes, find each other."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from launcher.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")


def open_store(address: str, port: int, seconds: float, name: str, host: str | None) -> "Store":
    """Connect `name` to the store that `host` serves; with None, serve it in this process.

    Raises `RankError` where nothing answers within so many seconds, or the port is taken.
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


def is_set(store: "Store", key: str, seconds: float) -> bool:
    """Wait up to so many seconds for a key."""
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except RuntimeError:
        return False
    return True


def in_thread(action: Callable[[], T]) -> "Future[T]":
    """Run a request to the store, which may never answer, so that its caller can give it up."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
