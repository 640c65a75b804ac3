"""A key-value store out of reach is one line, and a signal ends the wait for it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import pytest

from launcher.distributed import signals, store
from launcher.distributed.store import in_thread, open_store
from launcher.errors import RankError, StoppedBeforeTrainingError

HERE = "127.0.0.1"
T = TypeVar("T")


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a server that speaks another language."""
    with socket.create_server((HERE, 0)) as server:

        def answer() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:  # closed
                    return
                with client:
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def closed_port() -> int:
    with socket.create_server((HERE, 0)) as server:
        return int(server.getsockname()[1])


def test_a_closed_port_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    port = closed_port()
    with pytest.raises(RankError, match=f"rank 1 on .* cannot reach rank 0 at {HERE} port {port} "):
        open_store(HERE, port, 0.3, "rank 1", host="rank 0")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 100])
def test_a_host_that_is_none_is_one_line(host: str) -> None:
    with pytest.raises(RankError, match=f"cannot reach rank 0 at {host} port 29500 within 0.1 s: "):
        open_store(host, 29500, 0.1, "rank 1", host="rank 0")


def test_another_server_is_one_line(
    stranger: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def thread_that_is_ahead(action: Callable[[], T]) -> "Future[T]":
        future = in_thread(action)
        time.sleep(0.2)  # as on a busy machine, where it fails before its caller goes on
        return future

    monkeypatch.setattr(store, "in_thread", thread_that_is_ahead)
    with pytest.raises(RankError, match="cannot reach rank 0") as caught:
        open_store(HERE, stranger, 1.0, "rank 1", host="rank 0")
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err == "", "traces of torch's C++"


def test_a_signal_ends_the_wait() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with (
        signals.listening(ends_process=False),
        pytest.raises(StoppedBeforeTrainingError, match=r"rank 1 .* was stopped by SIGTERM"),
    ):
        open_store(HERE, closed_port(), 60, "rank 1", host="rank 0")
    assert time.monotonic() - began < 10
    with signals.listening(ends_process=False):
        pass  # forgets the signal


def test_a_store_is_found_by_those_who_come_first() -> None:
    port = closed_port()
    hosted = []
    later = threading.Timer(0.5, lambda: hosted.append(open_store(HERE, port, 10, "rank 0", None)))
    later.start()
    store = open_store(HERE, port, 10, "rank 1", host="rank 0")
    later.join()
    hosted[0].set("key", "value")
    assert store.get("key") == b"value"


def test_what_listens_and_never_speaks_is_given_up() -> None:
    with socket.socket() as mute:
        mute.bind((HERE, 0))
        mute.listen()
        begin = time.monotonic()
        with pytest.raises(RankError, match="is no store: it does not answer"):
            open_store(HERE, mute.getsockname()[1], 0.5, "rank 1", host="rank 0")
        assert time.monotonic() - begin < 20
