"""The processes of a node read the images once, whatever happens to one of them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.data import cache, sources
from tests.support import forked
from tests.unit.cluster.test_slurm_env import TASK
from tests.unit.data.test_sources import Cifar, images_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small CIFAR-10, and an empty folder for the node's own files beside it."""
    Cifar().write(tmp_path / "data")
    (tmp_path / "node").mkdir()
    return tmp_path / "data"


def crowd(root: Path, processes: int, *words: str) -> dict[str, Any]:
    """What tests/support/crowd.py says of that many processes."""
    environment = os.environ | {"TMPDIR": str(root.parent / "node"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.crowd", str(root), str(processes), *words]
    done = forked.run(command, cwd=root.parent, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "errors": done.stderr}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process reads."""
    folder = tmp_path_factory.mktemp("alone")
    Cifar().write(folder / "data")
    return crowd(folder / "data", 1)


def left_in(root: Path) -> list[Path]:
    return list((root.parent / "node").glob("launcher-*/*"))


@pytest.mark.slow
def test_32_processes_open_each_file_as_often_as_one_does(
    root: Path, alone: dict[str, Any]
) -> None:
    many = crowd(root, 32)
    assert alone["opens"].keys() == {"first", "second", "test", "names"}
    assert many["opens"] == alone["opens"]
    assert many["results"] == alone["results"]
    assert many["codes"] == [0] * 32
    assert many["errors"] == ""
    assert left_in(root) == []


@pytest.mark.slow
def test_a_reader_that_is_killed_halfway_is_replaced_by_one_other(
    root: Path, alone: dict[str, Any]
) -> None:
    many = crowd(root, 8, "--kill-first")
    assert many["codes"] == [-9, *[0] * 7]
    assert many["results"] == alone["results"]
    assert many["opens"] == {name: 2 * count for name, count in alone["opens"].items()}
    assert len(left_in(root)) == 1, "a process was killed, so nobody was the last"
    crowd(root, 2)
    assert left_in(root) == [], "the next run cleans up"


@pytest.mark.slow
def test_a_refusal_reaches_all_processes_from_one_reading(root: Path) -> None:
    (root / "cifar-10-batches-py" / "second").write_bytes(b"cut")
    alone, many = crowd(root, 1), crowd(root, 8)
    assert many["codes"] == [2] * 8
    assert many["results"] == alone["results"]
    assert "second is damaged" in many["results"][0]
    del many["opens"][".download.lock"], alone["opens"][".download.lock"]
    assert many["opens"] == alone["opens"]
    assert left_in(root) == []


@pytest.fixture
def read_only(root: Path) -> Iterator[Path]:
    """The same folder, mounted so that nobody can write, root neither."""
    if os.getuid() != 0:
        pytest.skip("needs root, to mount a folder read-only")
    subprocess.run(["mount", "--bind", root, root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_shared_root_that_is_read_only_works_and_stays_as_it_was(read_only: Path) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "probe").touch()
    before = sorted(read_only.rglob("*"))
    many = crowd(read_only, 8)
    assert many["codes"] == [0] * 8
    assert many["errors"] == ""
    assert sorted(read_only.rglob("*")) == before


@pytest.mark.slow
def test_without_room_for_a_copy_each_process_reads_and_one_says_so(
    root: Path, alone: dict[str, Any]
) -> None:
    (root.parent / "node" / f"launcher-{os.getuid()}").touch()  # nothing fits into a file
    many = crowd(root, 4)
    assert many["codes"] == [0] * 4
    assert many["results"] == alone["results"]
    assert many["opens"] == {name: 4 * count for name, count in alone["opens"].items()}
    assert many["errors"].count("no copy of the images for this node") == 1


def test_a_folder_that_others_can_write_to_is_not_trusted(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = root.parent / "node"
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    (node / f"launcher-{os.getuid()}").mkdir()
    (node / f"launcher-{os.getuid()}").chmod(0o777)
    data = images_of(Cifar().source(), root)
    environment = {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert len(cache.load(data, environment).train) == len(sources.load(data).train)
    assert "is not a folder of this user alone" in caplog.text
    assert left_in(root) == []


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        (TASK | {"LOCAL_WORLD_SIZE": "1"}, 2),  # srun, each task with a GPU of its own
        (TASK | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, 4),
    ],
)
def test_the_processes_of_a_node_are_counted_under_every_launcher(
    environment: dict[str, str], processes: int
) -> None:
    assert cache._processes_here(environment) == processes
