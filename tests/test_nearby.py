"""Gradients of ranks on one machine, averaged through sockets instead of gloo."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from launcher import nearby
from launcher.joining import is_of_others
from launcher.nearby import Links, average, average_nearby

RANKS = 3


class Bucket:
    """The part of DDP's bucket that the hook asks for."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def buffer(self) -> Tensor:
        return self.gradients


@pytest.fixture
def links() -> Iterator[list[Links]]:
    """Those of three ranks; here, three threads."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(RANKS - 1)]
        for link in (link for pair in pairs for link in pair):
            stack.enter_context(link).settimeout(30)
        hub = Links(0, tuple(pair[0] for pair in pairs), RANKS)
        yield [hub, *(Links(n, (pair[1],), RANKS) for n, pair in enumerate(pairs, start=1))]


def averaged(links: list[Links], gradients: list[Tensor]) -> list[Any]:
    """What the hook gives or raises on each rank."""
    results: list[Any] = [None] * len(links)

    def rank(number: int) -> None:
        try:
            results[number] = average(links[number], Bucket(gradients[number])).value()
        except distributed.DistError as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(len(links))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 30_000])
def test_all_ranks_have_the_same_mean_in_place(
    links: list[Links], dtype: torch.dtype, count: int
) -> None:
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(count, generator=random).to(dtype) for _ in range(RANKS)]
    expected = (gradients[0].clone() + gradients[1] + gradients[2]) / RANKS  # in this order
    found = averaged(links, gradients)
    for mean, own in zip(found, gradients, strict=True):
        assert torch.equal(mean, expected)
        assert mean.data_ptr() == own.data_ptr()


def test_a_rank_that_is_gone_fails_the_others_at_once_and_is_not_their_own_fault(
    links: list[Links],
) -> None:
    links[2].sockets[0].close()
    found = averaged(links[:2], [torch.ones(4), torch.ones(4)])
    assert "rank 0 and its neighbours: connection closed by peer" in str(found[0])
    assert all(is_of_others(error) for error in found)


def test_a_rank_that_is_silent_fails_the_others_after_the_timeout(links: list[Links]) -> None:
    for link in (*links[0].sockets, *links[1].sockets):
        link.settimeout(0.3)
    found = averaged(links[:2], [torch.ones(4), torch.ones(4)])
    assert ["timed out" in str(error) for error in found] == [True, True]
    assert all(is_of_others(error) for error in found)


def test_more_bytes_go_the_way_of_ddp(links: list[Links], monkeypatch: pytest.MonkeyPatch) -> None:
    most = nearby.MOST_BYTES // (4 * (RANKS - 1))
    seen = []
    monkeypatch.setattr(nearby, "allreduce_hook", lambda group, bucket: seen.append(bucket))
    bucket = Bucket(torch.ones(most + 1))
    average(links[0], bucket)
    assert seen == [bucket]
    averaged(links, [torch.ones(most) for _ in range(RANKS)])
    assert seen == [bucket]


def test_a_stranger_is_turned_away_and_the_ranks_are_put_in_order() -> None:
    token = bytes(range(16))
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(5)
        hellos = (bytes(20), token + (2).to_bytes(4), token + (1).to_bytes(4))
        clients = [
            stack.enter_context(socket.create_connection(server.getsockname())) for _ in hellos
        ]
        for client, hello in zip(clients, hellos, strict=True):
            client.sendall(hello)
        first, second = nearby._accept(server, token, 2, timedelta(seconds=5))
        stack.enter_context(first)
        stack.enter_context(second)
        assert first.getpeername() == clients[2].getsockname()
        assert second.getpeername() == clients[1].getsockname()
        assert clients[0].recv(1) == b"", "closed"


def test_a_process_alone_needs_no_links() -> None:
    average_nearby(nn.Linear(1, 1), timedelta(seconds=1), {"LOCAL_WORLD_SIZE": "1"})
