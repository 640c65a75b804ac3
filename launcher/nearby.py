"""The gradients of ranks that share the CPUs of one machine, averaged through sockets.

gloo wakes several threads for an all-reduce. Between two processes on two cores that takes 1 to
2 ms, however little there is to add: as long as the backward pass of a small network. Here the main
thread of each rank sends its gradients to rank 0, which adds them in the order of the ranks and
sends back the mean, the same bits to all. Many bytes stay with gloo, which adds them while the
backward pass goes on; so does all between machines, and NCCL's part are GPUs.
"""

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

MOST_BYTES = 2**20  # that rank 0 receives for one bucket of DDP
_TOKEN_BYTES, _RANK_BYTES = 16, 4


@dataclass(frozen=True)
class Links:
    """On rank 0 a socket to each other rank, in their order; on these one to rank 0."""

    rank: int
    sockets: tuple[socket.socket, ...]
    ranks: int


def average_nearby(
    wrapped: nn.Module, timeout: timedelta, environ: Mapping[str, str] = os.environ
) -> None:
    """Average small gradients in this way from now on, if all ranks are on this machine's CPUs.

    Every rank calls it. A rank that is gone, or silent for longer than `timeout`, is a
    `torch.distributed.DistError` in the backward pass of the others.
    """
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.device_type != "cpu":
        return
    if environ.get("LOCAL_WORLD_SIZE") == str(distributed.get_world_size()):
        wrapped.register_comm_hook(connect(timeout), average)


def connect(timeout: timedelta) -> Links:
    """Connect each rank to rank 0; over 127.0.0.1, since the path of a Unix socket may be long."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0), backlog=ranks) as server:
            server.settimeout(timeout.total_seconds())
            token = secrets.token_bytes(_TOKEN_BYTES)
            distributed.broadcast_object_list([server.getsockname(), token])
            sockets = _accept(server, token, ranks - 1, timeout)
    else:
        told: list[Any] = [None, None]
        distributed.broadcast_object_list(told)
        address, token = told
        sockets = (socket.create_connection(address, timeout.total_seconds()),)
        sockets[0].sendall(token + rank.to_bytes(_RANK_BYTES))
    for link in sockets:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Links(rank, sockets, ranks)


def _accept(
    server: socket.socket, token: bytes, count: int, timeout: timedelta
) -> tuple[socket.socket, ...]:
    """The sockets of the other ranks, in the order of the ranks; strangers are turned away."""
    found: dict[int, socket.socket] = {}
    while len(found) < count:
        link, _ = server.accept()
        link.settimeout(timeout.total_seconds())
        hello = bytearray(_TOKEN_BYTES + _RANK_BYTES)
        _fill(link, memoryview(hello))
        if hello[:_TOKEN_BYTES] == token:
            found[int.from_bytes(hello[_TOKEN_BYTES:])] = link
        else:
            link.close()
    return tuple(found[rank] for rank in sorted(found))


def average(
    links: Links,
    bucket: distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DDP's hook: the mean over the ranks of one bucket of gradients, `(n,)`, in their place."""
    gradients = bucket.buffer()
    if gradients.nbytes * (links.ranks - 1) > MOST_BYTES:
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the ranks of all
    try:
        _exchange(links, gradients)
    except OSError as error:
        text = f"rank {links.rank} and its neighbours: {error}"
        raise distributed.DistError(text) from error
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def _exchange(links: Links, gradients: Tensor) -> None:
    mine = _bytes_of(gradients)
    if links.rank == 0:
        others = torch.empty_like(gradients)
        for link in links.sockets:
            _fill(link, _bytes_of(others))
            gradients.add_(others)
        gradients.div_(links.ranks)
        for link in links.sockets:
            link.sendall(mine)
    else:
        links.sockets[0].sendall(mine)
        _fill(links.sockets[0], mine)


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a tensor `(n,)` of any type; numpy has no bfloat16."""
    return values.view(torch.uint8).numpy().data


def _fill(link: socket.socket, memory: memoryview) -> None:
    """Receive as many bytes as there are."""
    while memory:
        received = link.recv_into(memory)
        if not received:
            raise ConnectionResetError("connection closed by peer")
        memory = memory[received:]
