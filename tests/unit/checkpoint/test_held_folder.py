"""What a run writes lands in its own folder, whatever was done to that meanwhile."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoint import held_folder
from launcher.checkpoint.held_folder import HeldFolder
from launcher.checkpoint.run_dir import RunDir

on_linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux's /proc")


def begun(path: Path, identity: str) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path).describe({}, {"name": "net"}, "source", identity)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldFolder]:
    held = HeldFolder(begun(tmp_path / "mine", "first"))
    yield held
    held.close()


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@on_linux
def test_at_no_instant_is_anything_written_into_the_folder_of_another_run(
    held: HeldFolder, tmp_path: Path
) -> None:
    path = tmp_path / "mine"
    with held.writing() as folder:  # all has been asked for, and then ...
        shutil.rmtree(path)
        others = begun(path, "second")
        before = content(path)
        with pytest.raises(FileNotFoundError):
            folder.end(0)
    assert content(path) == before
    with pytest.raises(OSError, match=f"{path} is another run's now"), held.writing():
        pass
    assert others.is_own


@on_linux
def test_a_folder_of_another_name_is_still_the_run_s(held: HeldFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").rename(tmp_path / "kept")
    begun(tmp_path / "mine", "second")
    with held.writing() as folder:
        folder.end(0)
    assert (tmp_path / "kept" / "end.json").is_file()
    assert not (tmp_path / "mine" / "end.json").exists()


def test_a_folder_that_was_removed_is_made_anew(held: HeldFolder, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "mine")
    for _ in range(2):
        with held.writing() as folder:
            assert not folder.is_described
            folder.end(0)
    assert list(content(tmp_path / "mine")) == ["end.json"]


def test_what_goes_wrong_is_said_of_the_path_that_users_know(
    held: HeldFolder, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "test.json").mkdir()
    with pytest.raises(OSError, match=f"{tmp_path}/mine/test.json"), held.writing() as folder:
        folder.tested({})


def test_without_proc_the_run_of_that_name_is_asked_for_before_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_folder, "_OPEN_FILES", tmp_path / "no-proc")
    held = HeldFolder(begun(tmp_path / "mine", "first"))
    with held.writing() as folder:
        folder.end(0)
    shutil.rmtree(tmp_path / "mine")
    begun(tmp_path / "mine", "second")
    with pytest.raises(OSError, match="another run's now"), held.writing():
        pass
    held.close()
