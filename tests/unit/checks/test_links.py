"""Keys that ranks wait for, clocks, and connections between nodes; in one process."""

import socket
import time
from datetime import timedelta
from threading import Thread, Timer
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from launcher.checks.doctor import board as board_module
from launcher.checks.doctor import links
from launcher.checks.doctor.board import Board
from launcher.checks.doctor.links import Group, Listener, try_link, try_links
from launcher.distributed.world import World
from tests.support.processes import free_port


class Silent:
    """A store whose process was stopped."""

    def __getattr__(self, name: str) -> Any:
        return lambda *words: time.sleep(60)


def test_values_are_collected_as_far_as_they_come() -> None:
    board = Board(HashStore())
    board.put("a/0", {"x": [1, None]})
    board.put("a/2", "two")
    began = time.monotonic()
    assert board.collect(["a/0", "a/2"], 5) == {"a/0": {"x": [1, None]}, "a/2": "two"}
    assert time.monotonic() - began < 1
    assert board.collect(["a/1", "a/0", "a/2"], 0.3) == {"a/0": {"x": [1, None]}, "a/2": "two"}
    assert 0.3 <= time.monotonic() - began < 2
    assert board.get("a/1", 0) is None
    assert not board.is_lost


def test_a_value_that_comes_late_is_waited_for() -> None:
    board = Board(HashStore())
    Timer(0.4, board.put, ("late", 1)).start()
    assert board.get("late", 5) == 1
    Timer(0.2, board.count, ("left",)).start()
    board.wait_for_count("left", 1, 5)
    assert board.count("left", 0) == 1


def test_a_store_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "ANSWER", 0.2)
    board = Board(Silent())  # type: ignore[arg-type]
    began = time.monotonic()
    board.put("a", 1)
    assert board.is_lost
    assert board.get("a", 60) is None
    assert board.count("a") == 0
    board.wait_for_count("a", 1, 60)
    assert time.monotonic() - began < 2


def test_clocks_are_compared_with_half_the_round_trip_as_bound() -> None:
    store = HashStore()
    mine, other = Board(store), Board(store)
    Thread(target=links.tell_clock, args=(other, 1, 10)).start()
    offsets = links.ask_clocks(mine, [1], 10)
    assert abs(offsets[1].seconds) <= offsets[1].bound < 2


def test_a_clock_that_does_not_answer_is_left_out() -> None:
    board = Board(HashStore())
    assert links.ask_clocks(board, [1], 0.1) == {}
    links.tell_clock(Board(HashStore()), 1, 0.1)  # returns, although nobody asks


def test_a_link_has_latency_and_bandwidth() -> None:
    listener = Listener("127.0.0.1")
    link = try_link("127.0.0.1", listener.port, with_bandwidth=True)
    assert link.fault == ""
    assert 0 < link.latency < 1
    assert link.bandwidth > 1e6
    assert try_link("127.0.0.1", listener.port, with_bandwidth=False).bandwidth == 0
    listener.close()
    assert try_link("127.0.0.1", listener.port, True).fault == "Connection refused"


def test_a_node_that_listens_but_sends_nothing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert try_link("127.0.0.1", silent.getsockname()[1], True).fault == "timed out"


def test_few_nodes_try_all_others_and_many_their_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = Listener("127.0.0.1")
    address = ("127.0.0.1", listener.port)
    found = try_links(0, [address, address, None, address])
    assert sorted(found) == [1, 3]
    assert [link.bandwidth > 0 for _, link in sorted(found.items())] == [False, True]
    assert sorted(try_links(0, [address] * 20)) == [1, 19]
    listener.close()


def test_all_reduce_stops_where_memory_ends() -> None:
    """A group of one: the sizes and the end are those of any group."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, timeout=timedelta(seconds=20))
    found = links.all_reduce(World(use_cpu=True), Group([0], 20.0, 2**20), store)
    assert found.backend == "gloo"
    assert list(found.seconds) == ["1000", "64000", "1000000"]
    assert all(value > 0 for value in found.seconds.values())
