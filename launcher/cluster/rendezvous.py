"""The machines of a run find each other, and those that do not come are named.

torchrun, and Accelerate with it, waits for a missing machine without a word and gives up without a
name. They find `handler` by the entry point of this package and meet here instead when they are
started with

    --rdzv_backend launcher --rdzv_endpoint 10.0.0.1:29500 --rdzv_conf rank=0,timeout=300

where `rank` is the number of the machine, and machine 0 the one at that address.
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
TIMEOUT = 300.0  # seconds for all machines to come, unless they are told otherwise
_NEWS = 10.0  # seconds of waiting until it is said for whom


def handler() -> "Callable[[RendezvousParameters], RendezvousHandler]":
    """What torch asks of an entry point in the group torchrun.handlers."""
    return _create  # torch is still being imported


def _create(parameters: "RendezvousParameters") -> "RendezvousHandler":
    """Torch's own rendezvous of numbered machines, once all of them are here."""
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Rendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return BACKEND

    try:
        address, port, machine = _place(parameters)
        machines = parameters.max_nodes
        timeout = seconds_in(parameters.config, f"rank={machine},timeout={TIMEOUT:g}")
        store = meet_machines(address, port, machine, machines, timeout)
    except LauncherError as error:
        say(str(error))
        raise SystemExit(error.exit_code) from None  # an exception would get torchrun's traceback
    made = Rendezvous(address, port, machine, machines, parameters.run_id, int(timeout))
    made._store = store  # else machine 0 would close it, and open another at the same port
    return made


def _place(parameters: "RendezvousParameters") -> tuple[str, int, int]:
    """Address and port of machine 0, and the number of this one."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    given, machines = parameters.config.get("rank"), parameters.max_nodes
    if not (isinstance(given, str) and given.isdecimal() and int(given) < machines):
        raise UserError(
            f"--rdzv_conf with rank={given}" if given else "--rdzv_conf without a rank",
            expected=f"this machine's number, 0 to {machines - 1}",
            instead=f"type --rdzv_conf rank={machines - 1} on the last machine",
        )
    address, port = parse_rendezvous_endpoint(parameters.endpoint, PORT)
    return address, port, int(given)


def seconds_in(config: Mapping[str, Any], instead: str) -> float:
    """How long to wait for the other machines; `instead` is what to type if that is no time."""
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


def meet_machines(address: str, port: int, machine: int, machines: int, timeout: float) -> "Store":
    """The store that machine 0 keeps, once all machines have said there that they are here.

    Raises `RankError` that names those that do not come within so many seconds.
    """
    from launcher.distributed.store import open_store

    host = "machine 0" if machine else None
    store = open_store(address, port, timeout, f"machine {machine}", host)
    store.set(f"machine/{machine}", socket.gethostname())
    began, said = time.monotonic(), False
    while missing := [n for n in range(machines) if not store.check([f"machine/{n}"])]:
        waited = time.monotonic() - began
        if waited > timeout:
            raise RankError(f"{_absence(store, machines, missing)} within {timeout:g} s")
        if waited > _NEWS and not said:
            say(f"{_absence(store, machines, missing)} yet; waiting until {timeout:g} s are over")
            said = True
        time.sleep(0.2)
    return store


def _absence(store: "Store", machines: int, missing: list[int]) -> str:
    here = [
        f"{n} ({store.get(f'machine/{n}').decode()})" for n in range(machines) if n not in missing
    ]
    return (
        f"machine(s) {', '.join(here)} of {machines} are here; "
        f"machine(s) {', '.join(map(str, missing))} did not come"
    )


def say(text: str) -> None:
    """One line to whoever started the launch."""
    sys.stderr.write(f"launcher: {text}\n")
