"""torchrun that names the machines that do not come, and ends as the first failed rank did.

torchrun itself waits without a word, gives up without a name, and ends with 1 whatever its ranks
said; Kubernetes needs to know whether the state was saved (75), the input was wrong (2) or a signal
ended it (128 and the signal's number). The words are torchrun's own:

    python -m launcher.elastic --nnodes 2 --nproc-per-node 8 --node-rank 0 \\
        --master-addr 10.0.0.1 --master-port 29500 -m launcher RECIPE
"""

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.errors import LauncherError, RankError
from launcher.joining import open_store

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

TIMEOUT = 300.0  # seconds for all machines to come, unless --rdzv-conf timeout=SECONDS
_NEWS = 10.0  # seconds of waiting until it is said for whom


def main(words: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code; the failed ranks have said why by themselves."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        arguments = run.parse_args(words)  # type: ignore[no-untyped-call]
        store = _meet(arguments)
        run.main(words)
    except LauncherError as error:
        _say(str(error))
        return error.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        _say(f"rank {rank} was the first to fail, with exit code {code}")
        return code
    except SignalException as stop:
        return 128 + stop.sigval
    del store  # kept until here: on machine 0 torchrun uses it as well
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"launcher: {text}\n")


def _meet(arguments: argparse.Namespace) -> "Store | None":
    """Wait for all machines; raises `RankError` that names those that do not come.

    Only where each machine was told its number: a rendezvous that numbers them itself may do with
    fewer.
    """
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    if arguments.rdzv_backend != "static" or arguments.nnodes in ("1", "1:1"):
        return None
    timeout = float(_parse_rendezvous_config(arguments.rdzv_conf).get("timeout", TIMEOUT))
    place, machine = (arguments.master_addr, int(arguments.master_port)), arguments.node_rank
    host = "machine 0" if machine else None
    store = open_store(*place, timeout, f"machine {machine}", host)
    _call_roll(store, machine, int(arguments.nnodes.split(":")[0]), timeout)
    return store


def _call_roll(store: "Store", place: int, machines: int, timeout: float) -> None:
    store.set(f"machine/{place}", socket.gethostname())
    began, said = time.monotonic(), False
    while missing := [n for n in range(machines) if not store.check([f"machine/{n}"])]:
        waited = time.monotonic() - began
        if waited > timeout:
            raise RankError(f"{_absence(store, machines, missing)} within {timeout:g} s")
        if waited > _NEWS and not said:
            _say(f"{_absence(store, machines, missing)} yet; waiting until {timeout:g} s are over")
            said = True
        time.sleep(0.2)


def _absence(store: "Store", machines: int, missing: list[int]) -> str:
    here = [
        f"{n} ({store.get(f'machine/{n}').decode()})" for n in range(machines) if n not in missing
    ]
    return (
        f"machine(s) {', '.join(here)} of {machines} are here; "
        f"machine(s) {', '.join(map(str, missing))} did not come"
    )


if __name__ == "__main__":
    sys.exit(main())
