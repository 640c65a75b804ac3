"""A lock on a file; a signal ends the wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from launcher.distributed import signals


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock. Raises `OSError` where its file cannot be made."""
    path.touch()  # where that fails FileLock would wait for ever
    lock = FileLock(path)
    while True:
        with suppress(Timeout):
            lock.acquire(timeout=0.5)
            break
        signals.end_if_stopped(f"the wait for another process, which holds {path},")
    try:
        yield
    finally:
        lock.release()
