"""The key-value store through which ranks, and nodes, find each other."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from launcher.distributed import signals
from launcher.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")
_TRY = 2.0  # seconds for one connection


def open_store(address: str, port: int, seconds: float, name: str, host: str | None) -> "Store":
    """Connect `name` to the store that `host` serves; with None, serve it in this process.

    Raises `RankError` where nothing answers within so many seconds, or the port is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        if host is not None:
            _wait_until_open(address, port, seconds, name)
        with _silent_torch():  # before the thread begins, which may fail at once
            opening: Future[Store] = in_thread(
                lambda: TCPStore(
                    address,
                    port,
                    is_master=host is None,
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
            return _result(opening, seconds, name)
    except (OSError, RuntimeError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = " ".join(str(error).split("\n")[0].split())
        raise RankError(
            f"{name} on {socket.gethostname()} cannot {f'reach {host}' if host else 'listen'} at "
            f"{address} port {port} within {seconds:g} s: {reason}"
        ) from None


def _wait_until_open(address: str, port: int, seconds: float, name: str) -> None:
    """Raise `OSError` where nothing listens in time; a signal ends this wait, and not torch's."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=_TRY).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
        signals.end_if_stopped(f"{name} on {socket.gethostname()}")
        time.sleep(0.2)


def _result(opening: "Future[Store]", seconds: float, name: str) -> "Store":
    """Where something takes the connection and never speaks, torch waits beyond its timeout."""
    until = time.monotonic() + seconds + _TRY
    while True:
        try:
            return opening.result(0.1)
        except TimeoutError:
            if opening.done():
                raise
            if time.monotonic() >= until:
                raise TimeoutError("what listens there is no store: it does not answer") from None
        signals.end_if_stopped(f"{name} on {socket.gethostname()}")


@contextmanager
def _silent_torch() -> Iterator[None]:
    """Leave out the C++ traces that torch prints beside its exception, which says it all."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
