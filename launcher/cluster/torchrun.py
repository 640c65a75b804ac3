"""torchrun that names the machines that do not come, and ends as the first failed rank did.

torchrun itself waits without a word, gives up without a name, and ends with 1 whatever its ranks
said; Kubernetes needs to know whether the state was saved (75), the input was wrong (2) or a signal
ended it (128 and the signal's number). The words are torchrun's own:

    python -m launcher.cluster.torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 \\
        --master-addr 10.0.0.1 --master-port 29500 -m launcher RECIPE
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.cluster.rendezvous import PORT, TIMEOUT, meet_machines, say, seconds_in
from launcher.errors import LauncherError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


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
        say(str(error))
        return error.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        say(f"rank {rank} was the first to fail, with exit code {code}")
        return code
    except SignalException as stop:
        return 128 + stop.sigval
    del store  # kept until here: on machine 0 torchrun uses it as well
    return 0


def _meet(arguments: argparse.Namespace) -> "Store | None":
    """Wait for all machines; raises `RankError` that names those that do not come.

    Only where each machine was told its number: a rendezvous that numbers them itself may do with
    fewer.
    """
    from torch.distributed.elastic.rendezvous.utils import (
        _parse_rendezvous_config,
        parse_rendezvous_endpoint,
    )

    if arguments.rdzv_backend != "static" or arguments.nnodes in ("1", "1:1"):
        return None
    machine, machines = arguments.node_rank, int(arguments.nnodes.split(":")[0])
    if not 0 <= machine < machines:
        raise UserError(
            f"--node-rank {machine} with --nnodes {arguments.nnodes}",
            expected=f"this machine's number, 0 to {machines - 1}",
            instead=f"type --node-rank {machines - 1} on the last machine",
        )
    timeout = seconds_in(_parse_rendezvous_config(arguments.rdzv_conf), f"timeout={TIMEOUT:g}")
    given = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or PORT}"
    address, port = parse_rendezvous_endpoint(given, PORT)
    return meet_machines(address, port, machine, machines, timeout)


if __name__ == "__main__":
    sys.exit(main())
