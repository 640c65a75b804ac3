"""torchrun that names missing nodes, and ends with the exit code of the first failed rank.

torchrun itself waits without a message, names no node in its error, and exits with 1 whatever its
ranks exited with; Kubernetes needs to know whether the state was saved (75), the input was wrong
(2) or a signal ended it (128 and the signal's number). The arguments are torchrun's own:

    python -m launcher.cluster.torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 \\
        --master-addr 10.0.0.1 --master-port 29500 -m launcher RECIPE
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from launcher.cluster.rendezvous import (
    PORT,
    TIMEOUT,
    address_and_port,
    print_line,
    seconds_in,
    wait_for_nodes,
)
from launcher.errors import LauncherError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


def main(words: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code; the failed ranks have printed why."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        arguments = run.parse_args(words)  # type: ignore[no-untyped-call]
        store = _rendezvous(arguments)
        run.main(words)
    except LauncherError as error:
        print_line(str(error))
        return error.exit_code
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print_line(f"rank {rank} was the first to fail, with exit code {code}")
        return code
    except SignalException as stop:
        return 128 + stop.sigval
    del store  # kept until here: on node 0 torchrun uses it as well
    return 0


def _rendezvous(arguments: argparse.Namespace) -> "Store | None":
    """Wait for all nodes; raises `RankError` that names those that do not come.

    Only where each node was given its number: an elastic rendezvous may start with fewer.
    """
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    if arguments.rdzv_backend != "static" or arguments.nnodes in ("1", "1:1"):
        return None
    given = re.fullmatch(r"([1-9]\d{0,5})(:[1-9]\d{0,5})?", arguments.nnodes, re.ASCII)
    if given is None:
        raise UserError(
            f"--nnodes {arguments.nnodes}",
            expected="a number of nodes",
            instead="type --nnodes 2, for example",
        )
    node, nodes = arguments.node_rank, int(given[1])
    if not 0 <= node < nodes:
        raise UserError(
            f"--node-rank {node} with --nnodes {arguments.nnodes}",
            expected=f"this node's number, 0 to {nodes - 1}",
            instead=f"type --node-rank {nodes - 1} on the last node",
        )
    example = f"timeout={TIMEOUT:g}"
    try:
        timeout = seconds_in(_parse_rendezvous_config(arguments.rdzv_conf), example)
    except ValueError as error:
        instead = f"type --rdzv-conf {example}"
        raise UserError(f"{error}", expected="NAME=VALUE,...", instead=instead) from None
    first = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port or PORT}"
    return wait_for_nodes(address_and_port(first), node, nodes, timeout)


def _end(number: int, frame: FrameType | None) -> None:
    """Until torchrun handles signals itself: process 1 of a container ignores them by default."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each lost connection has a trace
    sys.exit(main())
