"""`launcher doctor` as one process: lines, JSON, exit codes, and nothing left behind."""

import json
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from launcher.checks.doctor import command as doctor
from launcher.checks.doctor import products
from launcher.checks.doctor.command import Patient, addresses_of
from launcher.checks.doctor.facts import Facts, Place
from launcher.checks.verdicts import Deadline
from launcher.cli import main
from launcher.distributed.store import in_thread
from launcher.distributed.world import World
from tests.support import forked
from tests.support.helpers import complaint
from tests.support.processes import free_port, places_of


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(products, "_SECONDS", 0.01)


def test_one_process_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("launcher doctor: 1 rank, rank 0 on ")
    assert lines[0].endswith("at most 60 s")
    for question in ("launch", "versions", "GPUs", "cores", "memory", "disk", "product"):
        assert any(line.startswith(f"{question:<12}") for line in lines), lines
    assert "W&B         good      off" in lines
    assert "\x1b" not in "".join(lines)
    assert lines[-1].startswith("in ")
    assert list(Path().iterdir()) == []


def test_machines_get_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--limit", "30"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"]
    assert found["limit"] == 30
    assert found["seconds"] < 30
    (rank,) = found["ranks"]
    assert rank["cores"]["usable"] >= 1
    assert rank["findings"]["product"]["device"] == "CPU"


def test_a_folder_that_cannot_be_written_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--runs", "/proc/self/runs"]) == 2
    assert "disk        wrong     /proc/self" in capsys.readouterr().out


def test_what_a_run_would_be_refused_for_is_a_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert main(["doctor"]) == 2
    output = capsys.readouterr().out
    assert "launch      wrong     ACCELERATE_USE_FSDP=true in the environment" in output
    assert "launch      wrong     a job of 2 nodes in which one process was started" in output


@pytest.mark.parametrize("words", [["--runz", "x"], ["--limit", "0"], ["recipe.py"]])
def test_a_slip_of_the_finger_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint(capsys, "doctor", *words)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err == ""


def test_help_is_printed_once_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    output, error = capsys.readouterr()
    assert "--join-timeout SECONDS" in output
    assert error == ""
    assert doctor.main(["-h"], World(rank=1, size=2), lambda: None) == 0
    assert capsys.readouterr().out == ""


def test_a_rank_that_does_not_find_the_others_says_so_and_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(rank=1, size=2, local_rank=1, local_size=2, address="a..b", port=9)
    assert doctor.main([], world, lambda: None) == 2
    output, error = capsys.readouterr()
    assert "rank 1 of 2 on" in error
    assert "the host name 'a..b' does not resolve" in error
    assert output == ""
    world = World(rank=1, size=2, local_rank=1, local_size=2, address="127.0.0.1", port=9)
    assert doctor.main(["--join-timeout", "1"], world, lambda: None) == 2
    assert "cannot reach rank 0 at 127.0.0.1 port 9 within 1 s" in capsys.readouterr().err


def test_rank_0_without_the_others_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(size=2, local_size=2, address="127.0.0.1", port=free_port())
    began = time.monotonic()
    assert doctor.main(["--limit", "9", "--join-timeout", "1"], world, lambda: None) == 2
    assert time.monotonic() - began < 9
    output = capsys.readouterr().out
    assert "launch      wrong     no answer from rank 1 on " in output
    assert "all-reduce  not asked" in output
    assert "product     good" in output


@pytest.mark.slow
def test_two_ranks_answer_each_other(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "launcher", "doctor", "--json")
    paths = [tmp_path / f"output-{rank}" for rank in range(2)]
    ranks = []
    for place, path in zip(places_of(2), paths, strict=True):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **place}
        with path.open("w") as file:
            ranks.append(
                forked.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
            )
    assert [rank.wait(60) for rank in ranks] == [0, 0], paths[0].read_text() + paths[1].read_text()
    found = json.loads(paths[0].read_text())
    assert found["verdicts"][0]["answer"].startswith("2 ranks on 1 node")
    assert [rank["findings"]["product"]["fault"] for rank in found["ranks"]] == ["", ""]
    assert all(rank["all_reduce"]["seconds"]["1000"] > 0 for rank in found["ranks"])
    assert paths[1].read_text() == ""
    assert sorted(tmp_path.iterdir()) == paths


def test_without_torch_the_other_answers_are_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(world: World) -> dict[str, object]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_ask_torch", broken)
    assert doctor.main([], World(), lambda: None) == 2
    output = capsys.readouterr().out
    assert "torch       wrong     ImportError: libcudart.so.13: cannot open" in output
    assert "disk        good" in output
    assert doctor.main([], World(rank=1, size=2, local_rank=1), lambda: None) == 2
    assert "cannot import torch: ImportError: libcudart" in capsys.readouterr().err


def test_nothing_is_waited_for_longer_than_it_may() -> None:
    patient = Patient(Deadline(10), 5)
    assert patient.result(in_thread(lambda: 3), 1) == 3
    assert not patient.has_left_threads
    own: Future[int] = Future()
    own.set_exception(TimeoutError("of a socket"))
    with pytest.raises(TimeoutError, match="of a socket"):
        patient.result(own, 1)
    assert not patient.has_left_threads
    stuck = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        patient.result(in_thread(stuck.wait), 0.05)
    assert patient.has_left_threads
    stuck.set()


def test_a_product_that_fails_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(world: World) -> products.Product:
        raise RuntimeError("CUDA error: device-side assert\nmore")

    monkeypatch.setattr(products, "multiply", broken)
    assert main(["doctor"]) == 2


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert products.multiply(World(use_cpu=True)).fault == ""
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: real(a, b) + (a.dtype.itemsize == 4)
    )
    assert products.multiply(World(use_cpu=True)).fault.endswith("is wrong")
    nan = float("nan")
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a, b) * nan)
    assert products.multiply(World(use_cpu=True)).fault.endswith("is not finite")


def test_a_loopback_address_is_for_ranks_of_one_host() -> None:
    one = Facts(host="a", place=Place("a", "127.0.0.1"), listens=7)
    two = Facts(host="b", place=Place("b", "10.0.0.2"), listens=8)
    assert addresses_of([one, two]) == [None, ("10.0.0.2", 8)]
    assert addresses_of([one, one]) == [("127.0.0.1", 7)] * 2
    assert addresses_of([Facts(host="b")]) == [None]
