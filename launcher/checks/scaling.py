"""How long a step takes on N GPUs: a formula, from what one GPU was measured to need.

docs/scaling.md derives it and says what it leaves out. All times are in seconds, all sizes in
bytes. The links are assumptions: their latency and bandwidth are those of data sheets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes of gradients that DDP reduces together
TREE_SHARE = 0.9  # fraction of the bandwidth that a tree reaches, in NCCL's own model
_HEAD = "   ranks  images each  compute ms  waiting ms     step ms    images/s  effic."
SHOWN_WORLDS = (1, 8, 64, 1024)


@dataclass(frozen=True)
class Link:
    """A connection: seconds until the first byte arrives, bytes per second in each direction."""

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `gpus` GPUs: the link inside a node, and a node's link to the others."""

    inside: Link
    between: Link
    gpus: int = 8

    @property
    def name(self) -> str:
        """Both links."""
        return f"{self.inside.name} + {self.between.name}"


CLUSTERS = (
    Cluster(Link("NVLink 4", 3.4e-6, 450e9), Link("8 x 400 Gb/s InfiniBand", 9.6e-6, 400e9)),
    Cluster(Link("PCIe 4", 5.7e-6, 32e9), Link("100 Gb/s Ethernet", 30e-6, 12.5e9)),
)


@dataclass(frozen=True)
class Compute:
    """What one rank computes in a step: all of it, and its last backward pass alone."""

    total: float
    backward: float


@dataclass(frozen=True)
class Step:
    """A step on `world` ranks; `waiting` is the communication that no computation hides."""

    world: int
    compute: float
    waiting: float

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return self.compute + self.waiting

    def efficiency(self, alone: "Step") -> float:
        """The speed, over that of `world` single ranks like `alone` on the same global batch."""
        return alone.seconds / (self.world * self.seconds)


def ring(size: float, world: int, cluster: Cluster) -> float:
    """All-reduce of `size` bytes round a ring: 2 (N - 1) hops, each with an Nth of the bytes."""
    nodes = _nodes(world, cluster)
    hops = 2 * (world - 1)
    between = 2 * (nodes - 1)
    latency = between * cluster.between.latency + (hops - between) * cluster.inside.latency
    return latency + hops / world * size / _bandwidth(nodes, cluster)


def tree(size: float, world: int, cluster: Cluster) -> float:
    """All-reduce up and down two binary trees of nodes, a chain within each node."""
    nodes = _nodes(world, cluster)
    inside = min(world, cluster.gpus) - 1
    latency = inside * cluster.inside.latency
    latency += math.ceil(math.log2(nodes)) * cluster.between.latency
    seconds = 2 * size / (TREE_SHARE * _bandwidth(nodes, cluster))
    return 2 * latency + (seconds if world > 1 else 0.0)


def all_reduce(size: float, world: int, cluster: Cluster) -> float:
    """The faster of the two, as NCCL chooses: rings for many bytes, trees for many ranks."""
    return min(ring(size, world, cluster), tree(size, world, cluster))


def buckets(gradient_bytes: int) -> list[int]:
    """The sizes in which DDP reduces the gradients, in the order in which they are ready."""
    sizes = [min(FIRST_BUCKET, gradient_bytes)]
    while (left := gradient_bytes - sum(sizes)) > 0:
        sizes.append(min(BUCKET, left))
    return sizes


def predict(compute: Compute, gradient_bytes: int, world: int, cluster: Cluster) -> Step:
    """One step: buckets are ready evenly over the backward pass and travel one after another."""
    ready = finished = 0.0
    for size in buckets(gradient_bytes) if gradient_bytes else []:
        ready += compute.backward * size / gradient_bytes
        finished = max(ready, finished) + all_reduce(size, world, cluster)
    waiting = max(0.0, finished - compute.backward)
    return Step(world, compute.total, waiting if world > 1 else 0.0)


def table(
    computes: Mapping[int, Compute],
    gradient_bytes: int,
    batch_size: int,
    clusters: Sequence[Cluster] = CLUSTERS,
) -> list[str]:
    """The lines of `check --world-size`: a row for each world size that was measured."""
    lines = []
    for cluster in clusters:
        alone = predict(computes[1], gradient_bytes, 1, cluster)
        lines.append(f"  {cluster.name}")
        lines.append(_HEAD)
        for world, compute in computes.items():
            step = predict(compute, gradient_bytes, world, cluster)
            lines.append(
                f"  {world:>6,}  {batch_size / world:>11,.4g}  {compute.total * 1e3:>10,.3f}"
                f"  {step.waiting * 1e3:>10,.3f}  {step.seconds * 1e3:>10,.3f}"
                f"  {batch_size / step.seconds:>10,.0f}  {step.efficiency(alone):>6.1%}"
            )
    return lines


def _nodes(world: int, cluster: Cluster) -> int:
    return math.ceil(world / cluster.gpus)


def _bandwidth(nodes: int, cluster: Cluster) -> float:
    """A ring or tree is as fast as its slowest link."""
    if nodes == 1:
        return cluster.inside.bandwidth
    return min(cluster.inside.bandwidth, cluster.between.bandwidth)
