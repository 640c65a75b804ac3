"""The knowledge of rank 0 about all ranks: as values, as a table of nodes, and in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.checks.doctor.facts import Facts, Tracking, read
from launcher.checks.doctor.links import Collective, Link, Offset
from launcher.checks.doctor.products import Product
from launcher.distributed.world import World
from launcher.utils.text import count, sizes

_NAMED = 4  # outliers in a line
_ROWS = 32  # of the table


@dataclass(frozen=True)
class Findings:
    """What one rank measured with the others; the keys of `links` are the first ranks of nodes."""

    product: Product
    links: Mapping[str, Link] = field(default_factory=dict)
    sees_mark: bool | None = None  # of rank 0 in the folder of runs; None: not asked


@dataclass(frozen=True)
class Report:
    """All that rank 0 knows; a rank that did not answer is missing in the mappings."""

    world: World
    facts: dict[int, Facts]
    offsets: Mapping[int, Offset] = field(default_factory=dict)
    findings: Mapping[int, Findings] = field(default_factory=dict)
    collectives: Mapping[int, Collective] = field(default_factory=dict)
    group: Sequence[int] = ()  # the ranks of the all-reduce
    tracking: Tracking | None = None
    apart: str = ""  # why the ranks did not meet

    @property
    def firsts(self) -> list[Facts]:
        """The first rank of each node that answered, which represents the node."""
        by_node: dict[int, Facts] = {}
        for rank in sorted(self.facts):
            by_node.setdefault(self.facts[rank].node, self.facts[rank])
        return [by_node[node] for node in sorted(by_node)]

    @property
    def lost(self) -> list[int]:
        """Ranks that answered at first, but not later."""
        return [] if self.apart else [rank for rank in self.facts if rank not in self.findings]

    def name(self, rank: int) -> str:
        """Host and rank; for a silent rank, the host of its node if known."""
        if rank in self.facts:
            return self.facts[rank].name
        node = rank // self.world.local_size
        host = next((facts.host for facts in self.firsts if facts.node == node), "an unknown host")
        return f"rank {rank} on {host}"


def read_findings(values: Mapping[str, Any]) -> Findings:
    """What another rank found, from JSON."""
    links = {rank: read(Link, link) for rank, link in values["links"].items()}
    return Findings(read(Product, values["product"]), links, values.get("sees_mark"))


def as_values(report: Report) -> dict[str, Any]:
    """The report as JSON values: the facts of each rank."""
    ranks = []
    for rank in range(report.world.size):
        if rank not in report.facts:
            ranks.append({"rank": rank, "answered": False})
            continue
        values: dict[str, Any] = {"answered": True, **asdict(report.facts[rank])}
        for name, found in (
            ("clock", report.offsets.get(rank)),
            ("findings", report.findings.get(rank)),
            ("all_reduce", report.collectives.get(rank)),
        ):
            values[name] = asdict(found) if found else None
        ranks.append(values)
    tracking = asdict(report.tracking) if report.tracking else None
    return {"world_size": report.world.size, "ranks": ranks, "tracking": tracking}


def node_table(report: Report) -> list[str]:
    """The nodes side by side, a line each; nothing where there is one rank."""
    if report.world.size == 1:
        return []
    rows = [("node", "ranks", "cores", "threads", "memory", "GPUs", "free", "written", "clock")]
    for first in report.firsts[:_ROWS]:
        ranks = [facts for facts in report.facts.values() if facts.node == first.node]
        cores, memory, disk = first.cores, first.memory, first.disk
        offset = report.offsets.get(first.rank)
        rows.append(
            (
                first.host,
                f"{len(ranks)} of {first.local_size}",
                f"{cores.granted}" if cores else "?",
                f"{cores.threads}" if cores else "?",
                sizes(memory.granted) if memory else "?",
                "?" if first.gpus is None else f"{len(first.gpus)}",
                sizes(disk.free) if disk else "?",
                f"{sizes(disk.speed)}/s" if disk else "?",
                f"{offset.seconds:+.3f} s" if offset else "-" if first.rank == 0 else "?",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if len(report.firsts) > _ROWS:
        lines.append(f"and {count(len(report.firsts) - _ROWS, 'node')} more; --json shows all")
    return lines


# Words


def listed(parts: Iterable[str]) -> str:
    """The first few items, and the number of the others."""
    found = list(parts)
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more:,} more" if more > 0 else "")


def in_bits(bytes_per_second: float) -> str:
    """Bits per second, as for network links: `9.4 Gb/s`."""
    megabits = bytes_per_second * 8 / 1e6
    return f"{short(megabits / 1e3)} Gb/s" if megabits >= 1e3 else f"{short(megabits)} Mb/s"


def short(number: float) -> str:
    """Three digits, and all of a larger number: `0.0123`, `1024`."""
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
