"""torchrun and Accelerate find our rendezvous, and what they give it is checked."""

import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from launcher.cluster import torchrun
from launcher.cluster.rendezvous import BACKEND, handler
from launcher.distributed import store
from launcher.errors import RankError
from tests.support.processes import ACCELERATE, ROOT, Run, free_port


def parameters(**conf: str) -> RendezvousParameters:
    return RendezvousParameters(BACKEND, "127.0.0.1:29500", "none", 2, 2, **conf)


def test_torch_knows_it_by_the_entry_point() -> None:
    with pytest.raises(SystemExit):
        rendezvous_handler_registry.create_handler(parameters())


@pytest.mark.parametrize(
    ("conf", "given"),
    [
        ({}, "without a rank"),
        ({"rank": "2"}, "with rank=2"),
        ({"rank": "-1"}, "with rank=-1"),
        ({"rank": "one"}, "with rank=one"),
    ],
)
def test_a_node_without_its_number_is_refused_in_one_line(
    conf: dict[str, str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        handler()(parameters(**conf))
    assert stop.value.code == 2
    expected = "expected this node's number, 0 to 1; type --rdzv_conf rank=1 on the last node"
    assert capsys.readouterr().err == f"launcher: --rdzv_conf {given}; {expected}\n"


@pytest.mark.parametrize("given", ["soon", "0", "nan", "inf"])
def test_a_time_that_is_no_number_of_seconds_is_refused_in_one_line(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        handler()(parameters(rank="1", timeout=given))
    assert stop.value.code == 2
    expected = "expected a number of seconds above 0; type --rdzv_conf rank=1,timeout=300"
    assert capsys.readouterr().err == f"launcher: --rdzv_conf with timeout={given}; {expected}\n"


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (("--node-rank", "2"), "--node-rank 2 with --nnodes 2; expected this node's number"),
        (("--rdzv-conf", "timeout=soon"), "--rdzv_conf with timeout=soon; expected a number"),
        (("--nnodes", "two"), "--nnodes two; expected a number of nodes"),
        (("--nnodes", "0"), "--nnodes 0; expected a number of nodes"),
        (("--rdzv-conf", "timeout"), "The rendezvous configuration option 'timeout' must have"),
        (("--master-port", "99999"), "The port number of the rendezvous endpoint"),
    ],
)
def test_torchruns_words_are_checked_in_one_line(
    words: tuple[str, ...], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torchrun.main(["--nnodes", "2", *words, "-m", "none"]) == 2
    assert capsys.readouterr().err.startswith(f"launcher: {given}")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("--master-addr", "10.0.0.1"), ("10.0.0.1", 29500)),
        (("--master-addr", "10.0.0.1", "--master-port", "7"), ("10.0.0.1", 7)),
        (("--rdzv-endpoint", "10.0.0.1:8"), ("10.0.0.1", 8)),
    ],
)
def test_node_0_is_where_torchrun_looks_for_it(
    words: tuple[str, ...], place: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(endpoint: tuple[str, int], *others: object) -> None:
        raise RankError(f"{endpoint}")

    said: list[str] = []
    monkeypatch.setattr(torchrun, "wait_for_nodes", wait)
    monkeypatch.setattr(torchrun, "print_line", said.append)
    assert torchrun.main(["--nnodes", "2", *words, "-m", "none"]) == 1
    assert said == [f"{place}"]


def test_a_node_0_that_ends_while_others_are_awaited_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            pass

        def check(self, keys: list[str]) -> bool:
            raise DistNetworkError("Connection was likely closed.")

    monkeypatch.setattr(store, "open_store", lambda *_: Gone())
    assert torchrun.main(["--nnodes", "2", "--node-rank", "1", "-m", "none"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("launcher: node 1 on ")
    assert said.endswith(" has lost node 0 while it waited for the others\n")


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_other_nodes() -> None:
    """In a container it is process 1, for which the system does nothing by itself."""
    port = str(free_port())
    words = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "-m", "none")
    command = (sys.executable, "-m", "launcher.cluster.torchrun", "--master-port", port, *words)
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as waiting:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", int(port)), 1).close()
                break
            time.sleep(0.2)
        waiting.terminate()
        _, errors = waiting.communicate(timeout=60)
    assert (waiting.returncode, errors) == (128 + signal.SIGTERM, b"")


@pytest.mark.slow
def test_accelerate_shows_that_line_and_no_traceback(tmp_path: Path) -> None:
    config = ("--config_file", str(ROOT / "accelerate_config" / "nodes.yaml"))
    where = ("--main_process_ip", "127.0.0.1", "--rdzv_backend", "launcher")
    run = Run((*ACCELERATE, *config, *where), tmp_path)
    assert run.end() == 2
    assert "launcher: --rdzv_conf without a rank; expected this node's number" in run.text()
    assert "Traceback" not in run.text()
