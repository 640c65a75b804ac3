"""The processes of one node load a small CIFAR-10, and every open of its files is counted.

    crowd.py ROOT PROCESSES [--kill-first]

Prints a JSON object: how often each file below ROOT was opened by all processes together, the
exit codes, and the distinct results. The processes are forked after torch has been imported,
which 32 fresh interpreters would take minutes over on a small machine.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from launcher import Images
from launcher.data import cache
from launcher.errors import UserError
from tests.support.helpers import HALF
from tests.unit.data.test_sources import Cifar


def killed_once(base: Any, marker: Path) -> Any:
    """A source whose first reader is killed when it has opened both halves, in either order."""
    opened = itertools.count(1)

    def start(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        base.__init__(self, root, train=train, download=download)
        if next(opened) == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return type("SmallCIFAR", (base,), {"__init__": start})


def count_opens(root: Path, log: int) -> None:
    """Write the name of each file below `root` that this process opens to `log`."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{root}/"):
            os.write(log, f"{Path(str(arguments[0])).name}\n".encode())

    sys.addaudithook(note)


def one_process(rank: int, data: Images, results: int) -> int:
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        loaded = cache.load(data)
    except UserError as error:
        os.write(results, f"{error}\n".encode())
        return error.exit_code
    digest = hashlib.sha256(loaded.fallback.encode() if loaded.fallback else b"")
    for half in (loaded.train, loaded.test):
        digest.update(half.images.numpy().tobytes())
        digest.update(half.labels.numpy().tobytes())
        digest.update(" ".join(half.classes).encode())
    loaded.train.images.zero_()  # is seen by nobody else
    os.write(results, f"{loaded.name} {digest.hexdigest()}\n".encode())
    return 0


def run(root: Path, processes: int, source: Any) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    opens, results = os.memfd_create("opens"), os.memfd_create("results")
    data = Images(source, batch_size=4, mean=HALF, std=HALF, root=str(root))
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        count_opens(root, opens)
        os._exit(one_process(rank, data, results))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {
        "opens": collections.Counter(_lines(opens)),
        "codes": sorted(codes),
        "results": sorted(set(_lines(results))),
    }


def _lines(file: int) -> list[str]:
    os.lseek(file, 0, os.SEEK_SET)
    with open(file, closefd=False) as text:
        return text.read().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("processes", type=int)
    parser.add_argument("--kill-first", action="store_true")
    arguments = parser.parse_args()
    source = Cifar().source()
    if arguments.kill_first:
        source = killed_once(source, arguments.root.parent / "killed")
    json.dump(run(arguments.root, arguments.processes, source), sys.stdout)


if __name__ == "__main__":
    main()
