"""A copy of a pack on the node's own disk: made once, checked, kept, and refused in one line."""

import multiprocessing
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from launcher import Folder, Images, Packed, Synthetic
from launcher.cli import main
from launcher.data import sources, tiers
from launcher.data.local_copy import on_this_node
from launcher.distributed.signals import listening
from launcher.errors import StoppedBeforeTrainingError
from tests.support.helpers import HALF, refused

IMAGES = Images(partial(Packed), 4, HALF, HALF, root="pack", local_copy=True)
SIZES = {"pixels": ("--size", "8"), "encoded": ("--encoded",)}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack in the working folder, and a disk of the node's own beside it."""
    monkeypatch.chdir(tmp_path)
    random = numpy.random.default_rng(0)
    for half, number in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            Path("pets", half, name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (9, 14, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(f"pets/{half}/{name}/{index}.png")
    assert main(["pack", "pets", "pack", "--size", "8"]) == 0
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    return own / f"launcher-{os.getuid()}"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", SIZES)
def test_a_copy_is_the_pack_and_is_made_once(how: str, place: Path) -> None:
    assert main(["pack", "pets", how, *SIZES[how]]) == 0
    wanted = replace(IMAGES, root=how, source=partial(Packed, size=8))
    copied = on_this_node(wanted)
    assert content(Path(copied.root)) == content(Path(how))
    assert Path(copied.root).parent == place
    first = sources.load(wanted)
    shutil.rmtree(Path(how))
    Path(how).mkdir()
    shutil.copy(Path(copied.root, "pack.json"), how)  # of the others no more than the size is read
    for file in Path(copied.root).glob("t*"):
        Path(how, file.name).touch()
        os.truncate(Path(how, file.name), file.stat().st_size)
    second = sources.load(on_this_node(wanted))
    assert second.train.tensor.equal(first.train.tensor)
    assert str(place) in tiers.describe(second) or how == "encoded"  # which fit into memory
    assert str(place) not in tiers.describe(first)


@pytest.mark.parametrize("thinned", ["train.labels", "pack.json", "all", "cut"])
def test_a_copy_that_lost_files_is_made_again(thinned: str, place: Path) -> None:
    copy = Path(on_this_node(IMAGES).root)
    in_use = Packed(str(copy)).data  # by another process, say
    before = in_use.clone()
    match thinned:
        case "all":
            for file in copy.iterdir():
                file.unlink()
        case "cut":
            os.truncate(copy / "test.images", 5)
        case name:
            (copy / name).unlink()
    assert on_this_node(IMAGES).root == str(copy)
    assert content(copy) == content(Path("pack"))
    assert in_use.equal(before)


def copy_in_turn(root: str, turn: Any) -> None:
    turn.wait()
    on_this_node(replace(IMAGES, root=root))


def test_several_processes_make_one_copy(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    turn = context.Barrier(3)
    processes = [context.Process(target=copy_in_turn, args=("pack", turn)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (copy,) = (path for path in place.iterdir() if path.is_dir())
    assert content(copy) == content(Path("pack"))


def test_what_was_begun_by_a_killed_process_is_begun_again(place: Path) -> None:
    copy = Path(on_this_node(IMAGES).root)
    begun = copy.with_suffix(".partial")
    copy.rename(begun)
    (begun / "train.images").write_bytes(b"half of it")
    assert content(Path(on_this_node(IMAGES).root)) == content(Path("pack"))
    assert not begun.exists()


def test_a_signal_ends_it_and_leaves_no_part(place: Path) -> None:
    with listening(ends_process=False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedBeforeTrainingError, match="SIGTERM"):
            on_this_node(IMAGES)
    assert [path.suffix for path in place.iterdir()] == [".lock"]


def test_a_file_that_has_changed_is_refused(place: Path) -> None:
    pixels = Path("pack/train.images")
    pixels.write_bytes(bytes(len(pixels.read_bytes())))
    with refused("pack/train.images, whose digest is not", "the same launcher pack command"):
        on_this_node(IMAGES)
    assert [path.suffix for path in place.iterdir()] == [".lock"]


def test_too_little_room_is_refused_before_anything_is_copied(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused("data.local_copy=true needs 3.2 KB", "1.0 KB are free", "set TMPDIR"):
        on_this_node(IMAGES)
    assert [path.suffix for path in place.iterdir()] == [".lock"]


@pytest.mark.parametrize("odd", ["link", "open to all", "file"])
def test_a_folder_that_another_user_could_fill_is_refused(odd: str, place: Path) -> None:
    match odd:
        case "link":
            place.symlink_to(place.parent)
        case "open to all":
            place.mkdir()
            place.chmod(0o777)
        case "file":
            place.write_text("")
    with refused("data.local_copy=true, which fails in", str(place), "data.local_copy=false"):
        on_this_node(IMAGES)


@pytest.mark.parametrize("source", [partial(Folder, size=8), Synthetic])
def test_only_packs_are_copied(source: Any) -> None:
    with refused("data.local_copy=true of ", "a pack", "data.local_copy=false"):
        on_this_node(replace(IMAGES, source=source))


def test_without_a_pack_its_fallback_is_taken() -> None:
    wanted = replace(IMAGES, root="nowhere", fallback=Synthetic)
    assert sources.load(on_this_node(wanted)).name == "Synthetic"
    with refused("nowhere", "data.root=FOLDER"):
        sources.load(on_this_node(replace(wanted, fallback=None)))
