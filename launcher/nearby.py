"""The gradients of two ranks that share the CPUs of a machine, averaged through a socket.

gloo wakes several threads for an all-reduce. Between two processes on two cores that takes 1 to
2 ms, however little there is to add: as long as the backward pass of a small network. Here the main
threads of the ranks hand each other their gradients. Many bytes stay with gloo, which adds them
while the backward pass goes on. Two numbers have one sum, so the result is gloo's to the last bit;
of more ranks the order would decide, and a run could not go on with the same bits elsewhere.
"""

import os
import secrets
import select
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

MOST_BYTES = 2**20  # of one bucket of DDP
_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Link:
    """What this rank has to the other of the two."""

    rank: int
    socket: socket.socket


def average_nearby(
    wrapped: nn.Module, timeout: timedelta, environ: Mapping[str, str] = os.environ
) -> None:
    """Average small gradients in this way from now on, if there are two ranks, here and on CPUs.

    Every rank calls it. A rank that is gone, or silent for longer than `timeout`, is a
    `torch.distributed.DistError` in the backward pass of the other.
    """
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.device_type != "cpu":
        return
    if distributed.get_world_size() == 2 and environ.get("LOCAL_WORLD_SIZE") == "2":
        wrapped.register_comm_hook(connect(timeout), average)


def connect(timeout: timedelta) -> Link:
    """Connect the two; over 127.0.0.1, since the path of a Unix socket may be too long."""
    seconds = timeout.total_seconds()
    if distributed.get_rank() == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(seconds)
            token = secrets.token_bytes(_TOKEN_BYTES)
            distributed.broadcast_object_list([server.getsockname(), token])
            link = accept(server, token, seconds)
    else:
        told: list[Any] = [None, None]
        distributed.broadcast_object_list(told)
        address, token = told
        link = socket.create_connection(address, seconds)
        link.sendall(token)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Link(distributed.get_rank(), link)


def accept(server: socket.socket, token: bytes, seconds: float) -> socket.socket:
    """The connection of the one who knows the token; strangers are turned away."""
    while True:
        link, _ = server.accept()
        link.settimeout(seconds)
        hello = bytearray(len(token))
        _fill(link, memoryview(hello))
        if hello == token:
            return link
        link.close()


def average(
    link: Link,
    bucket: distributed.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DDP's hook: the mean over both ranks of one bucket of gradients, `(n,)`, in their place."""
    gradients = bucket.buffer()
    if gradients.nbytes > MOST_BYTES:
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: the ranks of all
    gradients.div_(2)
    others = torch.empty_like(gradients)
    try:
        _exchange(link.socket, _bytes_of(gradients), _bytes_of(others))
    except OSError as error:
        raise distributed.DistError(f"rank {link.rank} and its neighbour: {error}") from error
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients.add_(others))
    return done


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a tensor `(n,)` of any type; numpy has no bfloat16."""
    return values.view(torch.uint8).numpy().data


def _exchange(link: socket.socket, ours: memoryview, theirs: memoryview) -> None:
    """Send and receive at once: neither rank waits for its turn, nor for room to send into."""
    while ours or theirs:
        wanted = [link] * bool(theirs), [link] * bool(ours)
        readable, writable, _ = select.select(*wanted, [], link.gettimeout())
        if not readable and not writable:
            raise TimeoutError("timed out")
        if writable:
            ours = ours[link.send(ours) :]
        if readable:
            theirs = theirs[_receive(link, theirs) :]


def _fill(link: socket.socket, memory: memoryview) -> None:
    """Receive as many bytes as there are."""
    while memory:
        memory = memory[_receive(link, memory) :]


def _receive(link: socket.socket, memory: memoryview) -> int:
    """How many bytes there were, at least one."""
    received = link.recv_into(memory)
    if not received:
        raise ConnectionResetError("connection closed by peer")
    return received
