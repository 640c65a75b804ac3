"""`launcher doctor` on several processes and machines: each planted fault is a line, in time."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.helpers import alike
from tests.support.node_network import NETWORKS, Node, needs_networks, network
from tests.support.processes import ACCELERATE_2, PYTHON, ROOT, TORCHRUN, free_port, places_of
from tests.support.slurm_cluster import Slurm

pytestmark = pytest.mark.slow

LIMIT = 40.0  # seconds, for faults of which a part is waited for
STARTING = 15.0  # seconds for Python itself to start and end, on a busy machine
QUOTAS = Path("/sys/fs/cgroup/cpu")


class Doctor:
    """Running ranks; `wait` gives the exit codes, and what each of them said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._began = folder, time.monotonic()
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, command: tuple[str, ...], place: dict[str, str]) -> "Doctor":
        fixed = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **fixed, **place}
        self.processes.append(
            subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self

    def wait(self, place: int = 0, limit: float = 60.0) -> str:
        """The output of a process, which ends within the limit."""
        left = limit + STARTING - (time.monotonic() - self._began)
        return self.processes[place].communicate(timeout=left)[0]

    def codes(self) -> list[int]:
        return [process.wait(timeout=30) for process in self.processes]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Doctor]:
    doctor = Doctor(tmp_path)
    yield doctor
    for process in doctor.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    if not NETWORKS:
        pytest.skip("needs root and the command ip")
    with network(2) as nodes:
        yield nodes


def on_this_machine(ranks: Doctor, *words: str) -> None:
    """Two ranks that are told their places, as by srun."""
    for place in places_of(2):
        ranks.start((*PYTHON, "-m", "launcher", "doctor", *words), place)


def on_nodes(ranks: Doctor, nodes: list[Node], *words: str, address: str = "") -> None:
    """One rank on each machine."""
    port = str(free_port())
    for rank, node in enumerate(nodes):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0"}
        place |= {"MASTER_ADDR": address or nodes[0].address, "MASTER_PORT": port}
        command = node.on(*PYTHON, "-m", "launcher", "doctor", *words)
        ranks.start(command, {**place, "LOCAL_WORLD_SIZE": "1"})


def line_of(output: str, question: str, standing: str) -> str:
    """The answer of that standing to a question, with what to do about it."""
    found = re.search(rf"^{question:<12}{standing:<10}(.*\n {{22}}.*|.*)", output, re.MULTILINE)
    assert found, output
    return found.group(1)


def seconds_in(output: str) -> float:
    found = re.search(r"^in ([\d.]+) s, of at most", output, re.MULTILINE)
    assert found, output
    return float(found.group(1))


# Where all is well


@pytest.mark.parametrize("launch", [TORCHRUN, alike(ACCELERATE_2)], ids=["torchrun", "accelerate"])
def test_two_processes_are_well(launch: tuple[str, ...], ranks: Doctor) -> None:
    ranks.start((*launch, "-m", "launcher", "doctor", "--json"), {"HF_HOME": str(ranks.folder)})
    output = ranks.wait()
    assert ranks.codes() == [0], output
    found = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    assert found["good"]
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert all(rank["findings"]["product"]["speed"] > 0 for rank in found["ranks"])
    sizes = [rank["all_reduce"]["seconds"] for rank in found["ranks"]]
    assert list(sizes[0])[:3] == list(sizes[1])[:3] == ["1000", "64000", "1000000"]


def test_two_machines_are_well(ranks: Doctor, pair: list[Node]) -> None:
    on_nodes(ranks, pair)
    output = ranks.wait()
    assert ranks.codes() == [0, 0], output
    assert "both ways" in line_of(output, "links", "good")
    assert "apart" in line_of(output, "clocks", "good")
    assert "all nodes see the same folder of runs" in output
    assert re.search(r"gloo, 2 ranks: 1\.0 KB in ", output)
    assert [line.split()[0] for line in output.splitlines()[1:4]] == ["node", "node1", "node2"]
    assert ranks.wait(1) == ""
    assert list(ranks.folder.iterdir()) == []


@pytest.mark.slurm
def test_the_tasks_of_a_job_are_well(slurm: Slurm, tmp_path: Path) -> None:
    """Two nodes of Slurm, which are this machine both."""
    command = ("srun", "-N2", "--time=1", "python", "-m", "launcher", "doctor", "--json")
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**slurm.environment, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [rank["node"] for rank in found["ranks"]] == [0, 1]
    assert found["verdicts"][0]["answer"] == "2 ranks on 2 nodes, started by srun"
    assert found["ranks"][1]["findings"]["links"]["0"]["bandwidth"] > 0


@pytest.mark.thorough
def test_processes_that_accelerate_does_not_start_are_missed(ranks: Doctor) -> None:
    launch = (*ACCELERATE_2[:4], "--cpu", "--num_processes", "2")
    ranks.start((*launch, "-m", "launcher", "doctor"), {"HF_HOME": str(ranks.folder)})
    output = ranks.wait()
    line = line_of(output, "launch", "wrong")
    assert "2 processes were asked for, but accelerate launch started 1" in line
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in line


# Folders


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own at a folder, which needs root."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(folder)], check=False)
    if done.returncode:
        pytest.skip("may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_wrong(ranks: Doctor, tmp_path: Path) -> None:
    with mounted(tmp_path / "full", "-o", "size=64k") as folder:
        with suppress(OSError):
            (folder / "file").write_bytes(bytes(2**20))
        on_this_machine(ranks, "--runs", str(folder))
        output = ranks.wait()
        assert ranks.codes() == [2, 2], output
    line = line_of(output, "disk", "wrong")
    assert "cannot be written: No space left on device; 0 bytes of 65.5 KB free" in line
    assert "product     good" in output


@pytest.mark.thorough
def test_a_read_only_folder_is_wrong(ranks: Doctor, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "-o", "ro") as folder:
        ranks.start((*PYTHON, "-m", "launcher", "doctor", "--runs", str(folder / "runs")), {})
        output = ranks.wait()
    assert ranks.codes() == [2], output
    assert "cannot be written: Read-only file system" in line_of(output, "disk", "wrong")


@pytest.mark.thorough
@needs_networks
def test_a_folder_that_the_nodes_do_not_share_is_a_notice(
    ranks: Doctor, pair: list[Node], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    on = pair[1].on

    def elsewhere(*command: str) -> tuple[str, ...]:
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        return on("unshare", "--mount", "sh", "-c", mount, str(runs), *command)

    pair[1].on = elsewhere  # type: ignore[method-assign]
    on_nodes(ranks, pair, "--runs", str(runs))
    output = ranks.wait()
    assert ranks.codes() == [0, 0], output
    line = line_of(output, "disk", "notice")
    assert "rank 1 on node2 and rank 0 see different folders of runs" in line
    assert "--resume" in line
    assert list(runs.iterdir()) == []


# Ranks that do not meet


def test_a_taken_port_and_who_has_it(ranks: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = {"MASTER_PORT": str(server.getsockname()[1])}
        for place in places_of(2):
            command = (*PYTHON, "-m", "launcher", "doctor", "--limit", str(LIMIT))
            ranks.start(command, {**place, **taken})
        output, other = ranks.wait(0, LIMIT), ranks.wait(1, LIMIT)
    assert ranks.codes() == [2, 2], output
    assert f"is taken by process {os.getpid()} (" in line_of(output, "port", "wrong")
    assert f"port {taken['MASTER_PORT']} within" in other
    assert "what listens there is no store" in other


@pytest.mark.thorough
@needs_networks
def test_a_wrong_name_of_the_first_machine(ranks: Doctor, pair: list[Node]) -> None:
    on_nodes(ranks, pair, address="nosuchhost")
    output, other = ranks.wait(0), ranks.wait(1)
    assert ranks.codes() == [2, 2], output
    assert "the host name 'nosuchhost' does not resolve" in line_of(output, "launch", "wrong")
    assert "rank 1 of 2 on node2 does not meet the others at nosuchhost" in other
    assert seconds_in(output) < 25


@pytest.mark.thorough
@needs_networks
def test_a_host_name_that_is_a_loopback_address(ranks: Doctor, pair: list[Node]) -> None:
    for node in pair:
        node.write_hosts("127.0.0.1 localhost node1 node2\n")
    on_nodes(ranks, pair, "--limit", str(LIMIT))
    output = ranks.wait(0, LIMIT)
    assert ranks.codes() == [2, 2], output
    line = line_of(output, "host name", "wrong")
    assert "the host name node1 resolves to 127.0.0.1: other machines cannot reach it" in line
    assert "type export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in line
    assert "not over in time" in line_of(output, "all-reduce", "wrong")
    assert seconds_in(output) < LIMIT


@pytest.mark.thorough
@needs_networks
def test_a_link_that_is_cut_from_the_beginning(ranks: Doctor, pair: list[Node]) -> None:
    pair[1].cut()
    on_nodes(ranks, pair, "--limit", str(LIMIT))
    output, other = ranks.wait(0, LIMIT), ranks.wait(1, LIMIT)
    assert ranks.codes() == [2, 2], output
    assert "no answer from rank 1" in line_of(output, "launch", "wrong")
    assert "rank 1 on node2 cannot reach rank 0 at 10.0.0.1" in other
    assert "product     good" in output


# Ranks that stop answering, and slow ones


def stopped(ranks: Doctor, pids: Callable[[], list[int]], seconds: float) -> str:
    """What rank 0 says of a second rank that is stopped after so many seconds."""
    time.sleep(seconds)
    stopped = pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    output = ranks.wait(0, LIMIT)
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert ranks.codes() == [2, 2], output
    assert seconds_in(output) < LIMIT
    assert "disk        good" in output
    return output


@pytest.mark.thorough
def test_a_rank_that_is_stopped_before_the_ranks_meet_is_named(ranks: Doctor) -> None:
    on_this_machine(ranks, "--limit", str(LIMIT))
    output = stopped(ranks, lambda: [ranks.processes[1].pid], 1.0)
    assert f"no answer from rank 1 on {socket.gethostname()}" in output


@needs_networks
def test_a_rank_that_is_stopped_after_the_ranks_met_is_named(
    ranks: Doctor, pair: list[Node]
) -> None:
    for node in pair:  # or all is over too soon
        node.slow("2mbit")
    on_nodes(ranks, pair, "--limit", str(LIMIT))
    output = stopped(ranks, pair[1].pids, 9.0)
    assert re.search(r"no answer( any more)? from rank 1", output), output


@needs_networks
@pytest.mark.thorough
def test_a_link_that_is_cut_in_between_is_named(ranks: Doctor, pair: list[Node]) -> None:
    for node in pair:
        node.slow("2mbit")
    on_nodes(ranks, pair, "--limit", str(LIMIT))
    time.sleep(9.0)
    pair[1].cut()
    output, other = ranks.wait(0, LIMIT), ranks.wait(1, LIMIT)
    assert ranks.codes() == [2, 2], output
    assert re.search(r"no answer( any more)? from rank 1", output), output
    assert "rank 0" in other
    assert seconds_in(output) < LIMIT


@needs_networks
def test_a_slow_link_is_named_with_its_speed(ranks: Doctor, pair: list[Node]) -> None:
    for node in pair:
        node.slow("20mbit")
    on_nodes(ranks, pair)
    output = ranks.wait()
    assert ranks.codes() == [0, 0], output
    line = line_of(output, "links", "notice")
    found = re.findall(r"([\d.]+) Mb/s of 10 Gb/s from rank (\d)", line)
    assert {rank for _, rank in found} == {"0", "1"}, line
    assert all(5 < float(speed) < 25 for speed, _ in found), line
    assert "of 10 Gb/s" in line_of(output, "all-reduce", "notice")
    assert seconds_in(output) < 60


@pytest.mark.thorough  # its peer has to be faster, which on a busy machine it is not
@pytest.mark.skipif(
    os.getuid() != 0 or not (QUOTAS / "cpu.cfs_quota_us").is_file(),
    reason="needs root and control groups of version 1",
)
def test_a_rank_with_a_quota_is_slow_and_is_told_of_it(ranks: Doctor) -> None:
    group = QUOTAS / f"launcher{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("20000")  # a fifth of a core
        on_this_machine(ranks)
        (group / "cgroup.procs").write_text(str(ranks.processes[1].pid))
        output = ranks.wait()
        assert ranks.codes() == [0, 0], output
        assert "rank 1 on" in line_of(output, "product", "notice")
    finally:
        until = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        group.rmdir()


def test_a_slip_of_the_finger_is_said_once_for_all_ranks(ranks: Doctor) -> None:
    ranks.start((*TORCHRUN, "-m", "launcher", "doctor", "--runz"), {})
    output = ranks.wait()
    assert output.count("launcher: unrecognized arguments: --runz") == 1
