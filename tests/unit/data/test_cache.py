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
from launcher.distributed.process_group import RankGroup
from launcher.distributed.world import World
from tests.support import forked
from tests.support.helpers import ROOT, alike
from tests.unit.data.test_sources import Cifar, images_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small CIFAR-10, and an empty folder for the node's own files beside it."""
    Cifar().write(tmp_path / "data")
    (tmp_path / "node").mkdir()
    return tmp_path / "data"


def crowd(root: Path, processes: int, *words: str) -> dict[str, Any]:
    """What tests/support/crowd.py says of that many processes on each node."""
    environment = os.environ | {"TMPDIR": str(root.parent / "node"), "PYTHONPATH": str(ROOT)}
    words = (str(root), "--processes", str(processes), *words)
    command = [sys.executable, "-m", "tests.support.crowd", *words]
    done = forked.run(command, cwd=root.parent, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert list((root.parent / "node").glob("*")) == [], "nothing may be left"
    return {**json.loads(done.stdout), "errors": done.stderr}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process reads."""
    folder = tmp_path_factory.mktemp("alone")
    Cifar().write(folder / "data")
    (folder / "node").mkdir()
    return crowd(folder / "data", 1)


def images_and_memory(many: dict[str, Any]) -> tuple[set[str], set[str]]:
    """What the processes loaded, and which file their memory maps."""
    parts = [result.rpartition(" maps ") for result in many["results"]]
    return {images for images, _, _ in parts}, {file for _, _, file in parts}


@pytest.mark.slow
def test_32_processes_open_each_file_as_often_as_one_does(
    root: Path, alone: dict[str, Any]
) -> None:
    many = crowd(root, 32)
    assert alone["opens"].keys() == {"first", "second", "test", "names"}
    assert many["opens"] == alone["opens"]
    images, memory = images_and_memory(many)
    assert [f"{one} own memory" for one in images] == alone["results"]
    assert len(memory) == 1, "in memory once"
    assert many["codes"] == [0] * 32
    assert many["errors"] == ""


@pytest.mark.slow
def test_each_of_two_nodes_reads_once(root: Path, alone: dict[str, Any]) -> None:
    many = crowd(root, 2, "--nodes", "2")
    assert many["opens"] == {name: 2 * count for name, count in alone["opens"].items()}
    images, memory = images_and_memory(many)
    assert [f"{one} own memory" for one in images] == alone["results"]
    assert len(memory) == 2
    assert many["codes"] == [0] * 4


@pytest.mark.slow
def test_a_reader_that_is_killed_halfway_is_named_and_ends_the_run(root: Path) -> None:
    """Rank 2 reads for rank 3, on the second node."""
    many = crowd(root, 2, "--nodes", "2", "--kill", "2")
    assert many["codes"] == [1, 1, -9, 1]
    (line,) = many["results"]
    assert line.startswith("rank 2 on ")
    assert " does not answer: killed, stopped or cut off (rank 0 of 4 on " in line


@pytest.mark.slow
def test_a_reader_that_hosts_the_store_and_is_killed_is_named_by_the_others(root: Path) -> None:
    many = crowd(root, 3, "--kill", "0")
    assert many["codes"] == [-9, 1, 1]
    assert [line.split(" on ")[0] for line in many["results"]] == ["rank 0", "rank 0"]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [alike(1), 2])
def test_a_refusal_reaches_all_processes_in_the_same_words(nodes: int, root: Path) -> None:
    (root / "cifar-10-batches-py" / "second").write_bytes(b"cut")
    alone, many = crowd(root, 1), crowd(root, 4, "--nodes", str(nodes))
    assert many["codes"] == [2] * 4 * nodes
    assert len(set(many["results"])) == 1
    assert len(many["results"]) == 4 * nodes
    assert "second is damaged" in many["results"][0]
    if nodes == 1:  # else the refusal may be one of rank 4, which its line then names
        assert many["results"][0] == alone["results"][0]
        del many["opens"][".download.lock"], alone["opens"][".download.lock"]
        assert many["opens"] == alone["opens"]


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
    many = crowd(root, 4, "--no-room")
    assert many["codes"] == [0] * 4
    assert many["results"] == alone["results"] * 4
    assert many["opens"] == {name: 4 * count for name, count in alone["opens"].items()}
    assert many["errors"].count("no copy of the images for this node") == 1


def test_a_process_alone_on_its_node_reads_by_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images_of(Cifar().source(), root)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    group = RankGroup(World(rank=1, size=2, node=1))
    assert len(cache.load(data, group).train) == len(sources.load(data).train)


def test_another_file_in_the_place_of_the_copy_is_not_read(tmp_path: Path) -> None:
    """As in a container of its own, where the number of the process is another's."""
    path = tmp_path / "file"
    path.write_bytes(b"of another process")
    place = json.dumps([str(path), *cache._identity(str(path))])
    assert cache._map(place.replace("file", "gone")) is None
    device, inode = cache._identity(str(path))
    assert cache._map(json.dumps([str(path), device, inode + 1])) is None
    assert cache._map(place) is None
