"""What one rank knows of its machine: values that travel between ranks as JSON.

A rank with another version of the launcher may send other fields: missing ones have a default,
unknown ones are ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Cores:
    """The cores of this process, and the quota of them that it may use."""

    usable: int = 1
    quota: float | None = None
    threads: int = 0  # of torch; 0: torch could not be asked
    chosen: str = ""  # OMP_NUM_THREADS as the user has set it

    @property
    def granted(self) -> int:
        """Whole cores within the quota."""
        return self.usable if self.quota is None else max(1, min(self.usable, int(self.quota)))


@dataclass(frozen=True)
class Memory:
    """In bytes; this process may take the smaller of `available` and `limit`."""

    total: int = 0
    available: int = 0
    limit: int | None = None
    shared: int = 0  # /dev/shm
    open_files: int = 0

    @property
    def granted(self) -> int:
        """The memory of the machine, or the limit below it."""
        return min(self.total, self.limit or self.total)


@dataclass(frozen=True)
class Gpu:
    """One device, and what its driver says of it where `pynvml` can ask."""

    name: str = ""
    memory: int = 0
    clock: int = 0  # MHz
    most_clock: int = 0
    ecc_errors: int = 0  # uncorrected ones, since the driver was loaded
    throttled: str = ""  # the reason, such as heat or power


@dataclass(frozen=True)
class Disk:
    """The folder of runs, or the nearest existing folder above it."""

    folder: str = ""
    free: int = 0
    total: int = 0
    speed: float = 0.0  # of writing and flushing, in bytes per second
    fault: str = ""  # why it cannot be written


@dataclass(frozen=True)
class Place:
    """Where other nodes find this process: the address that gloo gives them."""

    host: str = ""
    address: str = ""
    interface: str = ""
    speed: int = 0  # Mb/s of the interface; 0: not known
    origin: str = ""  # where the address comes from
    towards_first: str = ""  # the interface through which MASTER_ADDR is reached
    fault: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine reach it."""
        return self.address.startswith("127.") or self.address in ("::1", "")


@dataclass(frozen=True)
class Port:
    """The port at which the ranks meet."""

    number: int = 0
    state: str = "free"  # or taken, or served by an agent
    owner: str = ""


@dataclass(frozen=True)
class Cache:
    """The folder of torch's compile cache."""

    folder: str = ""
    free: int = 0
    fault: str = ""
    shared: str = ""  # why it may be shared with other users


@dataclass(frozen=True)
class Tracking:
    """What W&B would do here."""

    mode: str = "off"
    notice: str = ""


@dataclass(frozen=True)
class Mistake:
    """The reason for which a run would be refused, and what to do instead."""

    what: str = ""
    instead: str = ""


@dataclass(frozen=True)
class Facts:
    """What one rank knows of its machine before it asks the others; None: not asked, or no answer.

    `unanswered` says why, for each question.
    """

    rank: int = 0
    node: int = 0
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    cores: Cores | None = None
    memory: Memory | None = None
    gpus: tuple[Gpu, ...] | None = None
    disk: Disk | None = None
    place: Place | None = None
    port: Port | None = None
    cache: Cache | None = None
    listens: int = 0  # the port at which other nodes can test the connection
    mistakes: tuple[Mistake, ...] = ()
    unanswered: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Host and rank."""
        return f"rank {self.rank} on {self.host}"


_PARTS = {
    "cores": Cores,
    "memory": Memory,
    "disk": Disk,
    "place": Place,
    "port": Port,
    "cache": Cache,
}


def read(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from JSON, as far as this version of the launcher knows its fields."""
    known = {part.name for part in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})


def read_facts(values: Mapping[str, Any]) -> Facts:
    """The facts of another rank."""
    found = dict(values)
    for name, kind in _PARTS.items():
        if found.get(name) is not None:
            found[name] = read(kind, found[name])
    for name, kind in (("gpus", Gpu), ("mistakes", Mistake)):
        if found.get(name) is not None:
            found[name] = tuple(read(kind, one) for one in found[name])
    return read(Facts, found)
