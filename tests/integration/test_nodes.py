"""Several machines without a scheduler: one run, and each failure ends or heals in its time."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.distributed.process_group import GRACE
from tests.support.helpers import alike
from tests.support.node_network import Node, needs_networks, network
from tests.support.processes import ACCELERATE, ROOT, Run, write_double

pytestmark = [pytest.mark.slow, needs_networks]

CONFIG = str(ROOT / "accelerate_config" / "nodes.yaml")
EPOCHS = "epochs=4"
PAUSE = 0.03  # seconds per forward pass: four epochs take at least 4 seconds
SILENCE = 6.0  # --timeout
STARTING = 60.0  # seconds at most until a process on a busy machine is under way
AGENTS = {"torchrun": "torch.distributed.run", "ours": "launcher.cluster.torchrun"}
WAYS = [alike("accelerate"), alike("torchrun"), "ours"]


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    with network(2) as nodes:
        yield nodes


@pytest.fixture
def four() -> Iterator[list[Node]]:
    with network(4) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_double(tmp_path_factory.mktemp("recipe") / "double.py", PAUSE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """One process, without interruption."""
    folder = tmp_path_factory.mktemp("alone")
    run = Run(1, folder, "--name", "run", EPOCHS, recipe=recipe)
    assert run.end() == 0, run.text()
    return folder / "runs" / "run"


def same_weights(folder: Path, alone: Path) -> None:
    """To 1e-12, in float64."""
    expected = load_file(alone / "final.safetensors")
    found = load_file(folder / "runs" / "run" / "final.safetensors")
    assert expected["layers.0.weight"].dtype == torch.float64
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12, msg=key)


def by(way: str, nodes: list[Node], place: int, *words: str, timeout: int = 60) -> tuple[str, ...]:
    """The command for the machine in this place, by one of `WAYS`."""
    first, mine = nodes[0].address, f"rank={place},timeout={timeout}"
    return nodes[place].on(*_agent(way, str(len(nodes)), first, place, mine), *words)


def _agent(way: str, machines: str, first: str, place: int, conf: str) -> tuple[str, ...]:
    if way == "accelerate":
        count = ("--num_machines", machines, "--num_processes", machines)
        where = ("--main_process_ip", first, "--rdzv_backend", "launcher", "--rdzv_conf", conf)
        return (*ACCELERATE, "--config_file", CONFIG, *count, *where)
    command = (sys.executable, "-m", AGENTS[way], "--nnodes", machines, "--nproc-per-node", "1")
    if way == "torchrun":
        meet = ("--rdzv-backend", "launcher", "--rdzv-endpoint", f"{first}:29500")
        return (*command, *meet, "--rdzv-conf", conf)
    where = ("--node-rank", str(place), "--master-addr", first, "--master-port", "29500")
    return (*command, *where, "--rdzv-conf", conf)


def elastically(nodes: list[Node], place: int, last_call: int = 5) -> tuple[str, ...]:
    """The command for one of one or two machines, whichever are there."""
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0].address}:29500")
    patience = ("--rdzv-conf", f"join_timeout=60,last_call_timeout={last_call}")
    words = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *meet, *patience)
    command = (sys.executable, "-m", "torch.distributed.run", *words, "--rdzv-id", "run")
    # Else a machine that joins later waits in vain for an address: torch 2.14.1 tells it only in
    # the first round.
    return nodes[place].on("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *command)


def start(launch: tuple[str, ...], folder: Path, recipe: Path, *words: str) -> Run:
    words = ("--name", "run", "--resume", EPOCHS, "precision=fp32", *words)
    return Run(launch, folder, *words, "--checkpoint-every", "7", recipe=recipe)


def wait_for_either(runs: list[Run], text: str) -> Run:
    """The one whose output contains `text`: c10d chooses where rank 0 is."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        for run in runs:
            if text in run.text():
                return run
        time.sleep(0.05)
    raise AssertionError("\n".join(run.text() for run in runs))


def seconds_until_end(run: Run) -> float:
    began = time.monotonic()
    assert run.end() != 0, run.text()
    return time.monotonic() - began


# One run


@pytest.mark.parametrize("way", [alike("accelerate"), "torchrun"])
def test_two_machines_compute_what_one_process_does(
    way: str, pair: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    runs = [start(by(way, pair, place), tmp_path, recipe) for place in range(2)]
    assert [run.end() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert "2 ranks" in runs[0].text()
    same_weights(tmp_path, alone)


@pytest.mark.thorough
def test_four_machines_compute_what_one_process_does(
    four: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    runs = [start(by("ours", four, place), tmp_path, recipe) for place in range(4)]
    assert [run.end() for run in runs] == [0] * 4, "\n".join(run.text() for run in runs)
    assert "4 ranks" in runs[0].text()
    same_weights(tmp_path, alone)


# Machines that go


def under_way(nodes: list[Node], folder: Path, recipe: Path) -> list[Run]:
    words = ("--timeout", str(SILENCE))
    runs = [
        start(by("ours", nodes, place), folder, recipe, "epochs=4000", *words) for place in range(2)
    ]
    runs[0].wait_for("epoch    1/4000")
    return runs


def test_a_machine_that_dies_is_named_and_the_other_ends(
    pair: list[Node], tmp_path: Path, recipe: Path
) -> None:
    runs = under_way(pair, tmp_path, recipe)
    pair[1].kill()
    assert seconds_until_end(runs[0]) < SILENCE + 5 * GRACE
    assert "rank 1 on node2 does not answer: killed, stopped or cut off" in runs[0].text()
    runs[1].end()


def test_the_first_machine_that_dies_is_named_and_the_other_ends(
    pair: list[Node], tmp_path: Path, recipe: Path
) -> None:
    runs = under_way(pair, tmp_path, recipe)
    pair[0].kill()
    assert seconds_until_end(runs[1]) < SILENCE + 5 * GRACE
    assert "rank 0 on node1, or the key-value store there, does not answer" in runs[1].text()
    runs[0].end()


def test_when_the_link_is_cut_both_sides_end_and_name_each_other(
    pair: list[Node], tmp_path: Path, recipe: Path
) -> None:
    runs = under_way(pair, tmp_path, recipe)
    pair[1].cut()
    began = time.monotonic()
    for run in runs:
        seconds_until_end(run)
    assert time.monotonic() - began < 2 * SILENCE + 5 * GRACE + 10
    assert "rank 1 on node2 does not answer" in runs[0].text()
    assert "rank 0 on node1, or the key-value store there, does not answer" in runs[1].text()


# Machines that do not come, or late


@pytest.mark.parametrize("way", WAYS)
def test_a_machine_that_never_comes_is_named_in_time(
    way: str, four: list[Node], tmp_path: Path, recipe: Path
) -> None:
    runs = [start(by(way, four, n, timeout=12), tmp_path, recipe) for n in (0, 2, 3)]
    assert [run.end() for run in runs] == [1, 1, 1]
    missing = "nodes 0 (node1), 2 (node3), 3 (node4) of 4 are here; node 1 did not come"
    assert f"launcher: {missing} yet; waiting until 12 s are over" in runs[0].text()
    assert f"launcher: {missing} within 12 s" in runs[0].text()
    assert "Traceback" not in runs[0].text()


@pytest.mark.parametrize("way", WAYS)
def test_a_first_machine_that_never_comes_is_named_in_time(
    way: str, pair: list[Node], tmp_path: Path, recipe: Path
) -> None:
    run = start(by(way, pair, 1, timeout=4), tmp_path, recipe)
    assert run.end() == 1
    said = "node 1 on node2 cannot reach node 0 at 10.0.0.1 port 29500 within 4 s"
    assert f"launcher: {said}" in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("way", [alike("accelerate"), "ours"])
def test_a_machine_that_comes_late_is_waited_for(
    way: str, pair: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    first = start(by(way, pair, 0), tmp_path, recipe)
    first.wait_for("node 0 (node1) of 2 is here; node 1 did not come yet")
    second = start(by(way, pair, 1), tmp_path, recipe)
    assert (first.end(), second.end()) == (0, 0), first.text() + second.text()
    same_weights(tmp_path, alone)


# Healing


@pytest.mark.parametrize("way", ["accelerate", alike("ours")])
def test_a_killed_rank_comes_back_from_the_last_checkpoint(
    way: str, pair: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    again = ("--max_restarts" if way == "accelerate" else "--max-restarts", "1")
    runs = [start(by(way, pair, place, *again), tmp_path, recipe) for place in range(2)]
    runs[0].wait_for("epoch 1/4")
    runs[1].ranks()[0].kill()
    assert [run.end() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert "resumed after step" in runs[0].text()
    same_weights(tmp_path, alone)


def test_the_job_goes_on_with_fewer_machines_on_the_same_trajectory(
    pair: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    runs = [start(elastically(pair, place), tmp_path, recipe) for place in range(2)]
    wait_for_either(runs, "epoch 1/4")
    pair[1].kill()
    assert runs[0].end() == 0, runs[0].text()
    assert "2 ranks" in runs[0].text() + runs[1].text()
    assert "1 rank" in runs[0].text()
    assert "resumed after step" in runs[0].text()
    runs[1].end()
    same_weights(tmp_path, alone)


def test_a_machine_that_comes_late_joins_the_running_job(
    pair: list[Node], tmp_path: Path, recipe: Path, alone: Path
) -> None:
    first = start(elastically(pair, 0, last_call=1), tmp_path, recipe)
    first.wait_for("epoch 1/4")
    second = start(elastically(pair, 1), tmp_path, recipe)
    assert (first.end(), second.end()) == (0, 0), first.text() + second.text()
    text = first.text() + second.text()
    assert text.index("1 rank") < text.index("2 ranks")
    same_weights(tmp_path, alone)
