"""The step time on N GPUs on paper: its limits, its direction, its units."""

import itertools
import math
from dataclasses import replace

import pytest

from launcher.checks.scaling import (
    BUCKET,
    CLUSTERS,
    FIRST_BUCKET,
    Cluster,
    Compute,
    Link,
    all_reduce,
    buckets,
    predict,
    ring,
    table,
    tree,
)
from tests.support.helpers import ROOT

WORLDS = (1, 2, 3, 8, 9, 16, 64, 100, 1024)
MEGABYTE = 10**6
COMPUTE = Compute(total=0.030, backward=0.020)
FREE = Link("free", latency=0.0, bandwidth=math.inf)
IDEAL = Cluster(FREE, FREE)
ONE_NODE = Cluster(Link("wire", latency=1e-5, bandwidth=1e9), FREE, gpus=1024)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_one_gpu_computes_and_never_waits(cluster: Cluster) -> None:
    step = predict(COMPUTE, 100 * MEGABYTE, 1, cluster)
    assert step.seconds == COMPUTE.total
    assert step.efficiency(step) == 1.0


@pytest.mark.parametrize("world", WORLDS)
def test_a_link_without_latency_or_limit_costs_nothing(world: int) -> None:
    assert predict(COMPUTE, 100 * MEGABYTE, world, IDEAL).seconds == COMPUTE.total


def test_a_ring_of_two_moves_every_byte_once_each_way() -> None:
    # Two hops with half of 1 MB each, at 1 GB/s and 10 microseconds.
    assert ring(MEGABYTE, 2, ONE_NODE) == pytest.approx(2 * 1e-5 + 1e-3)


def test_a_large_ring_moves_the_bytes_twice_and_pays_each_hop() -> None:
    assert ring(MEGABYTE, 1024, ONE_NODE) == pytest.approx(2046 * 1e-5 + 2046 / 1024 * 1e-3)


def test_a_tree_over_nodes_is_logarithmic() -> None:
    flat = Cluster(FREE, Link("wire", 1e-5, 1e9), gpus=1)
    assert tree(MEGABYTE, 1024, flat) == pytest.approx(2 * 10 * 1e-5 + 2e-3 / 0.9)


def test_small_messages_take_the_tree_and_large_ones_the_ring() -> None:
    cluster = CLUSTERS[0]
    small, large = 1_000, 10**11
    assert all_reduce(small, 1024, cluster) == tree(small, 1024, cluster)
    assert tree(small, 1024, cluster) < ring(small, 1024, cluster) / 10
    assert all_reduce(large, 1024, cluster) == ring(large, 1024, cluster)


def test_the_slower_link_decides_as_soon_as_there_are_two_nodes() -> None:
    cluster = Cluster(Link("fast", 0.0, 100e9), Link("slow", 0.0, 1e9), gpus=8)
    assert ring(MEGABYTE, 8, cluster) == pytest.approx(14 / 8 * 1e-5)
    assert ring(MEGABYTE, 16, cluster) == pytest.approx(30 / 16 * 1e-3)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_more_ranks_or_more_bytes_never_travel_faster(cluster: Cluster) -> None:
    sizes = (1, 1_000, MEGABYTE, 100 * MEGABYTE)
    for before, after in itertools.pairwise(WORLDS):
        for size in sizes:
            assert all_reduce(size, before, cluster) <= all_reduce(size, after, cluster)
    for before, after in itertools.pairwise(sizes):
        for world in WORLDS[1:]:
            assert all_reduce(before, world, cluster) < all_reduce(after, world, cluster)


def test_efficiency_falls_with_the_ranks_where_compute_shrinks_ideally() -> None:
    alone = predict(COMPUTE, 45 * MEGABYTE, 1, CLUSTERS[1])
    shares = [
        predict(Compute(0.030 / n, 0.020 / n), 45 * MEGABYTE, n, CLUSTERS[1]).efficiency(alone)
        for n in WORLDS
    ]
    assert all(after < before for before, after in itertools.pairwise(shares))
    assert shares[-1] < 0.01


def test_compute_that_does_not_shrink_halves_the_efficiency_of_two() -> None:
    alone = predict(COMPUTE, MEGABYTE, 1, IDEAL)
    assert predict(COMPUTE, MEGABYTE, 2, IDEAL).efficiency(alone) == 0.5


@pytest.mark.parametrize("size", [1, FIRST_BUCKET, FIRST_BUCKET + 1, 100 * MEGABYTE])
def test_buckets_hold_every_byte_once(size: int) -> None:
    sizes = buckets(size)
    assert sum(sizes) == size
    assert sizes[0] <= FIRST_BUCKET
    assert all(0 < bucket <= BUCKET for bucket in sizes)


def test_without_a_backward_pass_to_hide_behind_all_communication_is_waited_for() -> None:
    compute = Compute(total=0.010, backward=0.0)
    size = 100 * MEGABYTE
    travel = sum(all_reduce(bucket, 8, ONE_NODE) for bucket in buckets(size))
    assert predict(compute, size, 8, ONE_NODE).waiting == pytest.approx(travel)


def test_behind_a_long_backward_pass_only_the_last_bucket_is_waited_for() -> None:
    compute = Compute(total=1000.0, backward=900.0)
    size = 100 * MEGABYTE
    last = all_reduce(buckets(size)[-1], 8, ONE_NODE)
    assert predict(compute, size, 8, ONE_NODE).waiting == pytest.approx(last)


def test_a_small_network_is_one_bucket_which_nothing_hides() -> None:
    compute = Compute(total=1000.0, backward=900.0)
    expected = all_reduce(MEGABYTE, 8, ONE_NODE)
    assert predict(compute, MEGABYTE, 8, ONE_NODE).waiting == pytest.approx(expected)


def test_a_network_without_gradients_has_nothing_to_send() -> None:
    assert predict(COMPUTE, 0, 64, CLUSTERS[0]).waiting == 0.0


def test_the_table_is_in_milliseconds_and_images() -> None:
    wire = replace(ONE_NODE, inside=replace(ONE_NODE.inside, latency=0.0))
    computes = {1: Compute(0.040, 0.020), 4: Compute(0.0085, 0.0)}
    lines = table(computes, MEGABYTE, batch_size=100, clusters=[wire])
    assert lines[2].split() == ["1", "100", "40.000", "0.000", "40.000", "2,500", "100.0%"]
    assert lines[3].split() == ["4", "25", "8.500", "1.500", "10.000", "10,000", "100.0%"]


def test_the_documents_example_is_what_the_formula_gives() -> None:
    compute, rows = Compute(0.01141, 0.01141 * 2 / 3), []
    for world in (8, 64, 1024):
        cells = [f"{world:,}"]
        for cluster in CLUSTERS:
            step = predict(compute, 44_700_000, world, cluster)
            cells.append(f"{step.waiting * 1e3:.2f} ms, {compute.total / step.seconds:.1%}")
        rows.append(f"| {' | '.join(cells)} |")
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in text, "\n".join(rows)
