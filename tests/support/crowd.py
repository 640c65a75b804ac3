"""The processes of several nodes load a small CIFAR-10, and every open of its files is counted.

    crowd.py ROOT [--nodes N] [--processes N] [--kill RANK] [--no-room]

Prints a JSON object: how often each file below ROOT was opened by all processes together, the exit
code of each rank, and the distinct results. The processes are forked after torch has been imported,
which 32 fresh interpreters would take minutes over on a small machine.
"""

import argparse
import collections
import fcntl
import hashlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher import Images
from launcher.data import cache
from launcher.distributed.process_group import Timeouts
from launcher.distributed.world import World
from launcher.errors import LauncherError, OtherRankError
from launcher.run.train import ranks_together
from tests.support.helpers import HALF
from tests.unit.data.test_sources import Cifar

ROOM = 10_000  # bytes of a file at most, with --no-room


def killed(base: Any) -> Any:
    """A source whose reader is killed when it has opened both halves, in either order."""
    opened = itertools.count(1)

    def start(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        base.__init__(self, root, train=train, download=download)
        if next(opened) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return type("SmallCIFAR", (base,), {"__init__": start})


def count_opens(root: Path, log: int) -> None:
    """Write the name of each file below `root` that this process opens to `log`."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{root}/"):
            os.write(log, f"{Path(str(arguments[0])).name}\n".encode())

    sys.addaudithook(note)


def one_process(world: World, data: Images, results: int, silence: float) -> int:
    try:
        with ranks_together(world, Timeouts(collective=silence)) as group, group.sync_errors():
            loaded = cache.load(data, group)
    except OtherRankError as error:
        return error.exit_code
    except LauncherError as error:
        os.write(results, f"{error}\n".encode())
        return error.exit_code
    digest = hashlib.sha256(loaded.fallback.encode() if loaded.fallback else b"")
    for half in (loaded.train, loaded.test):
        digest.update(half.tensor.numpy().tobytes())
        digest.update(half.labels.numpy().tobytes())
        digest.update(" ".join(half.classes).encode())
    memory = mapping_of(loaded.test.tensor)
    loaded.train.tensor.zero_()  # is seen by nobody else
    os.write(results, f"{loaded.name} {digest.hexdigest()} {memory}\n".encode())
    return 0


def mapping_of(images: Tensor) -> str:
    """The file that the memory of the images maps, as a number; none if it is this process's."""
    address = images.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, inode = line.split()[:5]
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return f"maps {inode}" if inode != "0" else "own memory"
    return "unknown"


def run(root: Path, words: argparse.Namespace) -> dict[str, Any]:
    opens, results = os.memfd_create("opens"), os.memfd_create("results")
    for file in (opens, results):  # else two threads may write at one place
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
    source = Cifar().source()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(words.nodes * words.processes):
        if child := os.fork():
            children.append(child)
            continue
        node, local_rank = divmod(rank, words.processes)
        size = words.nodes * words.processes
        place = World(rank, size, local_rank, words.processes, node, address="127.0.0.1", port=port)
        chosen = killed(source) if rank == words.kill else source
        data = Images(chosen, batch_size=4, mean=HALF, std=HALF, root=str(root))
        count_opens(root, opens)
        if words.no_room:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
        # Short where a process is killed and waited for; 32 on a busy machine may need long.
        silence = 60.0 if words.kill is None else 2.0
        os._exit(one_process(place, data, results, silence))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {
        "opens": collections.Counter(_lines(opens)),
        "codes": codes,
        "results": sorted(_lines(results)),
    }


def _lines(file: int) -> list[str]:
    os.lseek(file, 0, os.SEEK_SET)
    with open(file, closefd=False) as text:
        return text.read().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--no-room", action="store_true")
    words = parser.parse_args()
    json.dump(run(words.root, words), sys.stdout)


if __name__ == "__main__":
    main()
