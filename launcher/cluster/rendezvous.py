"""The nodes of a run find each other, and the missing ones are named.

torchrun, and Accelerate with it, waits for a missing node without a message, and its error names no
node. They find `handler` by the entry point of this package, and use this rendezvous when they are
started with

    --rdzv_backend launcher --rdzv_endpoint 10.0.0.1:29500 --rdzv_conf rank=0,timeout=300

where `rank` is the number of the node, and node 0 the one at that address.
"""

import math
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from launcher.errors import LauncherError, RankError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

BACKEND = "launcher"
PORT = 29500  # torchrun's, where none is given
TIMEOUT = 300.0  # seconds to wait for all nodes, by default
_REPORT_AFTER = 10.0  # seconds of waiting before the missing nodes are named


def handler() -> "Callable[[RendezvousParameters], RendezvousHandler]":
    """The entry point in torch's group torchrun.handlers."""
    return _create  # it imports torch, which is still being imported now


def _create(parameters: "RendezvousParameters") -> "RendezvousHandler":
    """Torch's own static rendezvous, once all nodes are here."""
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Rendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return BACKEND

    try:
        address, port, node = _endpoint_and_node(parameters)
        nodes = parameters.max_nodes
        timeout = seconds_in(parameters.config, f"rank={node},timeout={TIMEOUT:g}")
        store = wait_for_nodes((address, port), node, nodes, timeout)
    except LauncherError as error:
        print_line(str(error))
        raise SystemExit(error.exit_code) from None  # an exception would show torchrun's traceback
    rendezvous = Rendezvous(address, port, node, nodes, parameters.run_id, int(timeout))
    rendezvous._store = store  # else node 0 would close it, and open another at the same port
    return rendezvous


def _endpoint_and_node(parameters: "RendezvousParameters") -> tuple[str, int, int]:
    """Address and port of node 0, and the number of this one."""
    given, nodes = parameters.config.get("rank"), parameters.max_nodes
    if not (isinstance(given, str) and given.isdecimal() and int(given) < nodes):
        raise UserError(
            f"--rdzv_conf with rank={given}" if given else "--rdzv_conf without a rank",
            expected=f"this node's number, 0 to {nodes - 1}",
            instead=f"type --rdzv_conf rank={nodes - 1} on the last node",
        )
    return *address_and_port(parameters.endpoint), int(given)


def address_and_port(endpoint: str) -> tuple[str, int]:
    """The address and port of node 0; torchrun's port by default."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return parse_rendezvous_endpoint(endpoint, PORT)
    except ValueError as error:
        example = f"10.0.0.1 and port {PORT}, for example"
        raise UserError(f"{error}", expected="the address of node 0", instead=example) from None


def seconds_in(config: Mapping[str, Any], instead: str) -> float:
    """The time to wait for the other nodes; `instead` is the advice for an invalid one."""
    given = config.get("timeout", TIMEOUT)
    try:
        if 0 < float(given) < math.inf:
            return float(given)
    except ValueError:
        pass
    raise UserError(
        f"--rdzv_conf with timeout={given}",
        expected="a number of seconds above 0",
        instead=f"type --rdzv_conf {instead}",
    )


def wait_for_nodes(endpoint: tuple[str, int], node: int, nodes: int, timeout: float) -> "Store":
    """The store that node 0 hosts at `endpoint`, once all nodes have registered there.

    Raises `RankError` that names those that do not come in time, or node 0 where it
    ends meanwhile.
    """
    from launcher.distributed.store import open_store

    host = "node 0" if node else None
    store = open_store(*endpoint, timeout, f"node {node}", host)
    try:
        _wait(store, node, nodes, timeout)
    except RuntimeError:  # torch's, of a connection that has ended
        lost = f"node {node} on {socket.gethostname()} has lost node 0"
        raise RankError(f"{lost} while it waited for the others") from None
    return store


def _wait(store: "Store", node: int, nodes: int, timeout: float) -> None:
    store.set(f"node/{node}", socket.gethostname())
    began, is_reported = time.monotonic(), False
    while missing := [n for n in range(nodes) if not store.check([f"node/{n}"])]:
        waited = time.monotonic() - began
        if waited > timeout:
            raise RankError(f"{_missing_nodes(store, nodes, missing)} within {timeout:g} s")
        if waited > _REPORT_AFTER and not is_reported:
            about = _missing_nodes(store, nodes, missing)
            print_line(f"{about} yet; waiting until {timeout:g} s are over")
            is_reported = True
        time.sleep(0.2)


def _missing_nodes(store: "Store", nodes: int, missing: list[int]) -> str:
    """`nodes 0 (gpu7), 2 (gpu9) of 3 are here; node 1 did not come`."""
    here = [f"{n} ({store.get(f'node/{n}').decode()})" for n in range(nodes) if n not in missing]
    noun, verb = ("node", "is") if len(here) == 1 else ("nodes", "are")
    absent = "node" if len(missing) == 1 else "nodes"
    return (
        f"{noun} {', '.join(here)} of {nodes} {verb} here; "
        f"{absent} {', '.join(map(str, missing))} did not come"
    )


def print_line(text: str) -> None:
    """Print one line to stderr."""
    sys.stderr.write(f"launcher: {text}\n")
