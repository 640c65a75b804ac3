"""The network between nodes: clocks, connections, and all-reduce as a run does it.

Connections are tested with our own sockets, at the address that gloo would announce: a failure
is reported within seconds and with both nodes; gloo names none.
"""

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from launcher.checks.doctor.board import Board
from launcher.distributed.accelerator import device_of, synchronize
from launcher.distributed.process_group import RankGroup, Timeouts
from launcher.distributed.store import in_thread
from launcher.distributed.world import World

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

SIZES = (10**3, 64 * 10**3, 10**6, 16 * 10**6, 256 * 10**6)  # bytes of an all-reduce
FEW_NODES = 16  # with at most so many, every node tests its link to every other one
_TURNS = 3  # of a measurement; the fastest counts
_CONNECT = 3.0  # seconds for a connection: a second packet is sent after one
_STREAM = 0.7  # seconds of the measurement of a link's bandwidth
_CHUNK = bytes(2**18)
_NEVER = 1e5  # seconds


@dataclass(frozen=True)
class Offset:
    """How far the clock of a rank is ahead of rank 0's, give or take `bound` seconds."""

    seconds: float
    bound: float


@dataclass(frozen=True)
class Link:
    """From another node to this one."""

    latency: float = 0.0  # seconds of a connect: there and back
    bandwidth: float = 0.0  # bytes per second; 0: not measured
    fault: str = ""


@dataclass(frozen=True)
class Collective:
    """The all-reduce as one rank measured it: seconds by bytes."""

    backend: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""


# Clocks


def ask_clocks(board: Board, ranks: Sequence[int], seconds: float) -> dict[int, Offset]:
    """The offsets of the other ranks' clocks to this one's; a rank without an answer has none."""
    offsets = {}
    until = time.monotonic() + seconds
    for rank in ranks:
        turns = []
        for turn in range(_TURNS):
            sent = time.time()
            board.put(f"ask/{rank}/{turn}", "")
            answer = board.get(f"clock/{rank}/{turn}", max(0.0, min(2.0, until - time.monotonic())))
            received = time.time()
            if answer is None:
                break
            turns.append(Offset(answer - (sent + received) / 2, (received - sent) / 2))
        if turns:
            offsets[rank] = min(turns, key=lambda offset: offset.bound)
    return offsets


def tell_clock(board: Board, rank: int, seconds: float) -> None:
    """Answer `ask_clocks`, until it has moved on to the next rank or the time is over."""
    until = time.monotonic() + seconds
    for turn in range(_TURNS):
        if board.get(f"ask/{rank}/{turn}", max(0.0, until - time.monotonic())) is None:
            return
        board.put(f"clock/{rank}/{turn}", time.time())


# Connections


class Listener:
    """Sends zeros to each connection until the other side closes it."""

    def __init__(self, address: str) -> None:
        """Listen at any free port of an address; raises `OSError` if this host does not have it."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=_send_zeros, args=(connection,), daemon=True).start()


def _send_zeros(connection: socket.socket) -> None:
    with suppress(OSError), connection:  # closed by the other side, or cut off
        connection.settimeout(10 * _STREAM)
        while True:
            connection.sendall(_CHUNK)


def try_link(address: str, port: int, with_bandwidth: bool) -> Link:
    """Connect to the `Listener` of another node, and receive for a moment."""
    latencies, bandwidth = [], 0.0
    try:
        for turn in range(_TURNS):
            began = time.perf_counter()
            with socket.create_connection((address, port), timeout=_CONNECT) as connection:
                latencies.append(time.perf_counter() - began)
                if with_bandwidth and turn == _TURNS - 1:
                    bandwidth = _receive(connection)
    except OSError as error:
        return Link(fault=str(error.strerror or error))
    return Link(min(latencies), bandwidth)


def _receive(connection: socket.socket) -> float:
    """Bytes per second, from the first byte on."""
    buffer, received = bytearray(2**20), 0
    connection.recv_into(buffer)
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < _STREAM:
        received += connection.recv_into(buffer)
    return received / spent


def try_links(place: int, addresses: Sequence[tuple[str, int] | None]) -> dict[int, Link]:
    """This node's links to the others: all of few nodes, else the two beside it in a ring.

    All nodes call it at once. The bandwidth is measured from the node before, so that each sends
    to one and receives from one, as in an all-reduce.
    """
    nodes = len(addresses)
    before, after = (place - 1) % nodes, (place + 1) % nodes
    others = range(nodes) if nodes <= FEW_NODES else sorted({before, after})
    trials = {}
    for other in others:
        address = addresses[other]
        if other != place and address is not None:
            trials[other] = in_thread(partial(try_link, *address, other == before))
    return {other: trial.result() for other, trial in trials.items()}


# All-reduce


@dataclass(frozen=True)
class Group:
    """The ranks that measure together, for so many seconds at most, up to so many bytes."""

    ranks: Sequence[int]
    seconds: float
    most_bytes: int


def all_reduce(world: World, group: Group, store: "Store") -> Collective:
    """Measure in the process group that a run would make; blocks, so call it in a thread.

    All ranks stop at the same size, since each goes by the slowest rank's time.
    """
    import torch
    from torch import distributed

    device = device_of(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # At its time-out NCCL ends the process; gloo raises, which only ends the thread.
    patience = group.seconds if device.type == "cpu" else _NEVER
    own = replace(world, rank=group.ranks.index(world.rank), size=len(group.ranks))
    began = time.perf_counter()
    RankGroup(own, Timeouts(collective=patience), store).init_process_group()
    _slowest(0.0, device)  # NCCL connects with the first
    found: dict[str, float] = {}
    for size, following in zip(SIZES, (*SIZES[1:], 0), strict=True):
        values = torch.zeros(size // 4, device=device)
        turns = _TURNS if size <= 10**6 else 1
        seconds = _slowest(median(_reduce(values) for _ in range(turns)), device)
        found[str(size)] = seconds
        spent = _slowest(time.perf_counter() - began, device)
        predicted = seconds * following / size
        if following > group.most_bytes or spent + 2 * predicted > group.seconds:
            break
    backend = distributed.get_backend()
    distributed.destroy_process_group()
    return Collective(backend, found)


def _reduce(values: "torch.Tensor") -> float:
    from torch import distributed

    synchronize()
    began = time.perf_counter()
    distributed.all_reduce(values)
    synchronize()
    return time.perf_counter() - began


def _slowest(seconds: float, device: "torch.device") -> float:
    """The largest value of all ranks, on all ranks."""
    import torch
    from torch import distributed

    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return float(value)
