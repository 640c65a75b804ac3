"""Gradients of two ranks on one machine, averaged through a socket instead of gloo."""

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
from launcher.distributed.process_group import is_of_others
from launcher.nearby import Link, accept, average, average_nearby


class Bucket:
    """The part of DDP's bucket that the hook asks for."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def buffer(self) -> Tensor:
        return self.gradients


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    """Those of two ranks; here, two threads."""
    first, second = socket.socketpair()
    with first, second:
        first.settimeout(30)
        second.settimeout(30)
        yield Link(0, first), Link(1, second)


def averaged(links: tuple[Link, ...], gradients: list[Tensor]) -> list[Any]:
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
def test_both_ranks_have_the_mean_in_place(
    links: tuple[Link, Link], dtype: torch.dtype, count: int
) -> None:
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(count, generator=random).to(dtype) for _ in links]
    expected = gradients[0] / 2 + gradients[1] / 2
    found = averaged(links, gradients)
    for mean, own in zip(found, gradients, strict=True):
        assert torch.equal(mean, expected)
        assert mean.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("place", [0, 1])
def test_a_rank_that_is_gone_fails_the_other_at_once_and_is_not_its_own_fault(
    links: tuple[Link, Link], place: int
) -> None:
    links[1 - place].socket.close()
    (error,) = averaged(links[place : place + 1], [torch.ones(4)])
    assert f"rank {place} and its neighbour: " in str(error)
    assert is_of_others(error)


def test_a_rank_that_is_silent_fails_the_other_after_the_timeout(links: tuple[Link, Link]) -> None:
    links[0].socket.settimeout(0.2)
    (error,) = averaged(links[:1], [torch.ones(4)])
    assert "timed out" in str(error)
    assert is_of_others(error)


def test_more_bytes_go_the_way_of_ddp(
    links: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = nearby.MOST_BYTES // 4
    seen = []
    monkeypatch.setattr(nearby, "allreduce_hook", lambda group, bucket: seen.append(bucket))
    bucket = Bucket(torch.ones(most + 1))
    average(links[0], bucket)
    assert seen == [bucket]
    averaged(links, [torch.ones(most), torch.ones(most)])
    assert seen == [bucket]


def test_a_stranger_is_turned_away() -> None:
    token = bytes(range(16))
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(5)
        address = server.getsockname()
        stranger, friend = (
            stack.enter_context(socket.create_connection(address, 5)) for _ in range(2)
        )
        stranger.sendall(bytes(16))
        friend.sendall(token)
        found = stack.enter_context(accept(server, token, 5))
        assert found.getpeername() == friend.getsockname()
        assert stranger.recv(1) == b"", "closed"


def test_a_process_alone_needs_no_link() -> None:
    average_nearby(nn.Linear(1, 1), timedelta(seconds=1), {"LOCAL_WORLD_SIZE": "1"})
