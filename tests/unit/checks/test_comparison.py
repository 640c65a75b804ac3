"""What the facts of many ranks say together: each outlier is named, by host and rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launcher.checks.doctor.comparison import verdicts
from launcher.checks.doctor.facts import (
    Cache,
    Cores,
    Disk,
    Facts,
    Gpu,
    Memory,
    Mistake,
    Place,
    Port,
    Tracking,
)
from launcher.checks.doctor.links import Collective, Link, Offset
from launcher.checks.doctor.products import Product
from launcher.checks.doctor.report import Findings, Report, as_values, node_table
from launcher.checks.verdicts import Verdict, exit_code
from launcher.distributed.world import Launcher, World

NODES, EACH = 8, 8
GB = 10**9
WORLD = World(size=NODES * EACH, local_size=EACH, launcher=Launcher.SRUN)
H100 = Gpu("NVIDIA H100", 80 * GB, clock=1980, most_clock=1980)


def facts_of(rank: int) -> Facts:
    node, local_rank = divmod(rank, EACH)
    host = f"gpu{node}"
    place = Place(host, f"10.0.0.{node + 1}", "eth0", 10_000, f"the host name {host}", "eth0")
    return Facts(
        rank=rank,
        node=node,
        local_rank=local_rank,
        local_size=EACH,
        host=host,
        versions={"Python": "3.11.7", "torch": "2.14.1", "driver": "570.1"},
        cores=Cores(usable=64, threads=8),
        memory=Memory(512 * GB, 400 * GB, None, 64 * GB, 65_536),
        gpus=(H100,) * EACH,
        disk=Disk("/home/runs", 900 * GB, 1000 * GB, 5e8) if local_rank == 0 else None,
        place=place,
        port=Port(29500) if rank == 0 else None,
        cache=Cache("/tmp/torchinductor_me", 100 * GB),
        listens=4000 + rank,
    )


def findings_of(rank: int) -> Findings:
    node, local_rank = divmod(rank, EACH)
    others = [other * EACH for other in range(NODES) if other != node] if local_rank == 0 else []
    links = {str(other): Link(5e-5, 1e9) for other in others}
    sees_mark = True if local_rank == 0 and rank else None
    return Findings(Product("NVIDIA H100", 5e13), links, sees_mark)


def report() -> Report:
    ranks = range(WORLD.size)
    collective = Collective("nccl", {str(10**6): 1e-3, str(256 * 10**6): 0.4})
    return Report(
        WORLD,
        {rank: facts_of(rank) for rank in ranks},
        {rank: Offset(2e-4, 1e-4) for rank in range(EACH, WORLD.size, EACH)},
        {rank: findings_of(rank) for rank in ranks},
        dict.fromkeys(ranks, collective),
        list(ranks),
        Tracking("online"),
    )


def with_facts(rank: int, **changes: Any) -> Report:
    found = report()
    found.facts[rank] = replace(found.facts[rank], **changes)
    return found


def with_findings(rank: int, **changes: Any) -> Report:
    found = report()
    return replace(
        found, findings={**found.findings, rank: replace(found.findings[rank], **changes)}
    )


def without(rank: int) -> Report:
    found = report()
    del found.facts[rank]
    return replace(found, findings={r: f for r, f in found.findings.items() if r != rank})


def about(found: Report, question: str) -> Verdict:
    """The worst answer to a question."""
    order = ("wrong", "notice", "good", "not asked")
    return min(
        (verdict for verdict in verdicts(found) if verdict.question == question),
        key=lambda verdict: order.index(verdict.standing),
    )


def test_all_is_well_with_sixty_four_equal_ranks() -> None:
    found = verdicts(report())
    assert {verdict.standing for verdict in found} == {"good"}, found
    questions = [verdict.question for verdict in found]
    assert questions[:5] == ["launch", "versions", "GPUs", "cores", "memory"]
    assert set(questions) >= {"clocks", "disk", "cache", "port", "host name", "links"}
    assert "64 ranks on 8 nodes, started by srun" in found[0].answer
    assert about(report(), "GPUs").answer.startswith("8 x NVIDIA H100 on every node; clocks")
    assert "nccl, 64 ranks" in about(report(), "all-reduce").answer
    assert "all nodes see the same folder" in " ".join(v.answer for v in found)


DISK = Disk("/home/runs", 900 * GB, 1000 * GB, 5e8)
MEMORY = Memory(512 * GB, 400 * GB, None, 64 * GB, 65_536)
LOOPBACK = Place("gpu2", "127.0.0.1", "lo", 0, "the host name gpu2", "ib0")
CASES: dict[str, tuple[Callable[[], Report], str, str, list[str]]] = {
    "another torch": (
        lambda: with_facts(9, versions={**facts_of(9).versions, "torch": "2.13.0"}),
        *("versions", "wrong", ["torch 2.14.1", "torch 2.13.0 on rank 9 on gpu1"]),
    ),
    "another driver": (
        lambda: with_facts(9, versions={**facts_of(9).versions, "driver": "560.2"}),
        *("versions", "notice", ["driver 560.2 on rank 9 on gpu1"]),
    ),
    "fewer GPUs": (
        lambda: with_facts(16, gpus=(H100,) * 7),
        *("GPUs", "notice", ["7 x NVIDIA H100 for rank 16 on gpu2"]),
    ),
    "memory errors": (
        lambda: with_facts(16, gpus=(H100, replace(H100, ecc_errors=2))),
        *("GPUs", "wrong", ["2 memory errors (ECC) of GPU 1 for rank 16 on gpu2"]),
    ),
    "heat": (
        lambda: with_facts(16, gpus=(replace(H100, throttled="heat"), *(H100,) * 7)),
        *("GPUs", "notice", ["GPU 0 for rank 16 on gpu2 is slowed down by heat"]),
    ),
    "too many threads": (
        lambda: with_facts(3, cores=Cores(usable=64, quota=8.0, threads=8)),
        *("cores", "notice", ["too many threads", "a quota of 8", "rank 3 on gpu0", "THREADS=1 "]),
    ),
    "one thread": (
        lambda: with_facts(3, cores=Cores(usable=64, threads=1)),
        *("cores", "notice", ["few threads", "rank 3 on gpu0", "OMP_NUM_THREADS=8 "]),
    ),
    "little memory": (
        lambda: with_facts(8, memory=replace(MEMORY, limit=GB // 2)),
        *("memory", "notice", ["500 MB free (rank 8 on gpu1)"]),
    ),
    "small /dev/shm": (
        lambda: with_facts(8, memory=replace(MEMORY, shared=64 * 2**20)),
        *("memory", "notice", ["small /dev/shm (rank 8 on gpu1)", "--shm-size"]),
    ),
    "few files": (
        lambda: with_facts(8, memory=replace(MEMORY, open_files=256)),
        *("memory", "notice", ["fewer than 1,024 open files (rank 8 on gpu1)", "ulimit"]),
    ),
    "a clock": (
        lambda: replace(report(), offsets={8: Offset(-90.0, 0.001)}),
        *("clocks", "notice", ["rank 8 on gpu1 is 90.00 s behind rank 0 (± 0.001 s)"]),
    ),
    "a full disk": (
        lambda: with_facts(0, disk=replace(DISK, fault="No space left on device", free=0)),
        *("disk", "wrong", ["cannot be written: No space left", "rank 0 on gpu0", "--runs"]),
    ),
    "a disk of another node": (
        lambda: with_facts(8, disk=replace(DISK, fault="Read-only file system")),
        *("disk", "notice", ["cannot be written: Read-only", "rank 8 on gpu1"]),
    ),
    "little room": (
        lambda: with_facts(0, disk=replace(DISK, free=GB // 4)),
        *("disk", "notice", ["250 MB of 1.0 TB free"]),
    ),
    "another folder": (
        lambda: with_findings(24, sees_mark=False),
        *("disk", "notice", ["rank 24 on gpu3 and rank 0 see different folders", "--resume"]),
    ),
    "a cache without access": (
        lambda: with_facts(5, cache=Cache("/tmp/x", GB, fault="/tmp cannot be written")),
        *("cache", "notice", ["/tmp cannot be written (rank 5 on gpu0)", "INDUCTOR_CACHE_DIR"]),
    ),
    "a shared cache": (
        lambda: with_facts(5, cache=Cache("/tmp/x", GB, shared="it belongs to user 7")),
        *("cache", "notice", ["/tmp/x: it belongs to user 7 (rank 5 on gpu0)"]),
    ),
    "a port": (
        lambda: with_facts(0, port=Port(29500, "taken", "process 7 (nginx)")),
        *("port", "wrong", ["port 29500", "process 7 (nginx)"]),
    ),
    "a loopback that works by luck": (
        lambda: with_facts(16, place=LOOPBACK),
        *("host name", "notice", ["gpu2 resolves to 127.0.0.1", "GLOO_SOCKET_IFNAME=ib0"]),
    ),
    "a loopback": (
        lambda: replace(with_facts(16, place=LOOPBACK), group=()),
        *("host name", "wrong", ["gpu2 resolves to 127.0.0.1", "(rank 16 on gpu2)"]),
    ),
    "a name of another host": (
        lambda: with_facts(16, place=replace(LOOPBACK, address="10.0.0.3", fault="it is not")),
        *("host name", "notice", ["it is not (rank 16 on gpu2)"]),
    ),
    "a slow link": (
        lambda: with_findings(0, links={**findings_of(0).links, "8": Link(5e-5, 1e7)}),
        *("links", "notice", ["80 Mb/s of 10 Gb/s from rank 8 on gpu1 to rank 0 on gpu0"]),
    ),
    "a far node": (
        lambda: with_findings(0, links={"8": Link(0.02, 1e9)}),
        *("links", "notice", ["20.0 ms between rank 0 on gpu0 and rank 8 on gpu1"]),
    ),
    "no link": (
        lambda: with_findings(0, links={"8": Link(fault="timed out")}),
        *("links", "wrong", ["from rank 0 on gpu0 to rank 8 on gpu1: timed out", "firewall"]),
    ),
    "a slow device": (
        lambda: with_findings(33, product=Product("NVIDIA H100", 2e13)),
        *("product", "notice", ["rank 33 on gpu4 computes at 40% of the speed of its peers"]),
    ),
    "a wrong device": (
        lambda: with_findings(33, product=Product("NVIDIA H100", 5e13, "it is wrong")),
        *("product", "wrong", ["it is wrong (rank 33 on gpu4)"]),
    ),
    "a rank that never came": (
        lambda: without(33),
        *("launch", "wrong", ["no answer from rank 33 on gpu4"]),
    ),
    "a rank that went": (
        lambda: replace(report(), findings={r: findings_of(r) for r in range(63)}),
        *("launch", "wrong", ["no answer any more from rank 63 on gpu7"]),
    ),
    "a rank that went later": (
        lambda: replace(report(), collectives=dict.fromkeys(range(63), Collective())),
        *("all-reduce", "wrong", ["no answer any more from rank 63 on gpu7"]),
    ),
    "an all-reduce without an end": (
        lambda: replace(report(), collectives=dict.fromkeys(range(64), Collective(fault="lost"))),
        *("all-reduce", "wrong", ["rank 0 on gpu0: lost", "and 60 more"]),
    ),
    "a slow all-reduce": (
        lambda: replace(
            report(),
            collectives=dict.fromkeys(range(64), Collective("gloo", {str(16 * 10**6): 1.0})),
        ),
        *(
            "all-reduce",
            "notice",
            ["gloo, 64 ranks: 16.0 MB in 1,000 ms; 252 Mb/s per link, of"],
        ),
    ),
    "nobody to reduce with": (
        lambda: replace(report(), group=(), collectives={}),
        *("all-reduce", "not asked", ["two ranks"]),
    ),
    "ranks that do not meet": (
        lambda: replace(report(), apart="rank 0 cannot listen", group=()),
        *("launch", "wrong", ["rank 0 cannot listen", "MASTER_ADDR", "(10.0.0.1)"]),
    ),
    "a mistake": (
        lambda: with_facts(0, mistakes=(Mistake("two were asked for", "type that"),)),
        *("launch", "wrong", ["two were asked for (rank 0 on gpu0)", "type that"]),
    ),
    "a question without an answer": (
        lambda: with_facts(8, disk=None, unanswered={"disk": "no answer within 20 s"}),
        *("disk", "wrong", ["no answer within 20 s (rank 8 on gpu1)"]),
    ),
    "W&B": (
        lambda: replace(report(), tracking=Tracking("offline", "nobody is logged in")),
        *("W&B", "notice", ["offline: nobody is logged in"]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_outlier_is_named(case: str) -> None:
    make, question, standing, parts = CASES[case]
    found = make()
    verdict = about(found, question)
    assert verdict.standing == standing, verdict
    for part in parts:
        assert part in f"{verdict.answer} {verdict.instead}", verdict
    assert exit_code(verdicts(found)) == (2 if standing == "wrong" else 0)


def test_links_to_a_lost_rank_are_not_blamed_on_the_network() -> None:
    found = with_findings(0, links={"8": Link(fault="timed out")})
    findings = {rank: value for rank, value in found.findings.items() if rank != 8}
    assert about(replace(found, findings=findings), "links").standing == "good"


def test_a_taken_port_or_a_missing_torch_is_said_once() -> None:
    taken = replace(with_facts(0, port=Port(29500, "taken")), apart="cannot listen")
    assert not any(verdict.answer == "cannot listen" for verdict in verdicts(taken))
    broken = replace(with_facts(0, unanswered={"torch": "no answer"}), apart="cannot import torch")
    assert [v.question for v in verdicts(broken) if v.standing == "wrong"] == ["torch"]


def test_many_outliers_are_counted() -> None:
    found = report()
    slow = {
        rank: replace(one, product=Product("NVIDIA H100", 1e13 if rank < 20 else 5e13))
        for rank, one in found.findings.items()
    }
    answer = about(replace(found, findings=slow), "product").answer
    assert "rank 3 on gpu0 computes at 20%" in answer
    assert "rank 4 " not in answer
    assert answer.endswith("and 16 more")


def test_the_nodes_stand_side_by_side() -> None:
    lines = node_table(report())
    assert len(lines) == 1 + NODES
    assert lines[0].split()[:3] == ["node", "ranks", "cores"]
    assert lines[2].split()[:5] == ["gpu1", "8", "of", "8", "64"]
    assert "+0.000 s" in lines[2]
    unknown = with_facts(8, cores=None, memory=None, gpus=None, disk=None)
    assert "?" in node_table(unknown)[2]


def test_of_a_thousand_nodes_some_are_shown() -> None:
    world = replace(WORLD, size=1000, local_size=1)
    facts = {rank: replace(facts_of(0), rank=rank, node=rank) for rank in range(1000)}
    lines = node_table(Report(world, facts))
    assert len(lines) == 34
    assert lines[-1] == "and 968 nodes more; --json shows all"


def test_machines_get_the_facts_of_every_rank() -> None:
    values = as_values(without(33))
    assert values["world_size"] == len(values["ranks"]) == 64
    assert values["ranks"][33] == {"rank": 33, "answered": False}
    assert values["ranks"][8]["clock"] == {"seconds": 2e-4, "bound": 1e-4}
    assert values["ranks"][8]["findings"]["product"]["speed"] == 5e13


def test_one_process_has_no_table_and_no_questions_about_others() -> None:
    alone = Report(World(), {0: replace(facts_of(0), local_size=1)}, findings={0: findings_of(1)})
    assert node_table(alone) == []
    questions = {verdict.question for verdict in verdicts(alone)}
    assert not questions & {"clocks", "links", "all-reduce"}
