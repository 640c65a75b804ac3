"""What torch has compiled goes with the run; what this user has not signed is passed over."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from launcher.checkpoint import compiled
from launcher.checkpoint.compiled import NAME, CompiledCode, key_path, own_key
from launcher.distributed.accelerator import create_accelerator
from tests.support.helpers import alike
from tests.support.processes import Run, fingerprint

pytestmark = pytest.mark.slow
IMAGES = torch.ones(2, 3)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file, and the cache folder in which its key lies."""
    folder = tmp_path_factory.mktemp("signed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "first"))
        torch.compiler.reset()
        layer()(IMAGES)
        CompiledCode(folder, create_accelerator("fp32")).save(folder)
    return folder


@pytest.fixture
def code(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[CompiledCode, Path]:
    """The code in a copy of that folder, on a node that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    torch.compiler.reset()
    path = tmp_path / NAME
    path.write_bytes((signed / NAME).read_bytes())
    key_path().parent.mkdir(parents=True)
    key_path().write_bytes((signed / "cache/launcher/key").read_bytes())
    key_path().chmod(0o600)
    return CompiledCode(tmp_path, create_accelerator("fp32")), path


def layer() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    network.compile(dynamic=False)
    return network


def test_another_node_takes_it_over(code: tuple[CompiledCode, Path]) -> None:
    assert code[0].load() == f"what was compiled before is taken from {NAME}"
    counters.clear()
    layer()(IMAGES)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_a_folder_without_it_says_nothing(tmp_path: Path) -> None:
    assert CompiledCode(tmp_path, create_accelerator("fp32")).load() == ""


def write_key(content: bytes, mode: int = 0o600) -> None:
    key_path().unlink()
    key_path().write_bytes(content)
    key_path().chmod(mode)


def change(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "its signature": (lambda path: change(path, 3), "damaged, or another user's"),
    "its code": (lambda path: change(path, -3), "damaged, or another user's"),
    "cut off": (lambda path: os.truncate(path, 20), "damaged, or another user's"),
    "empty": (lambda path: os.truncate(path, 0), "damaged, or another user's"),
    "another's key": (lambda path: write_key(bytes(32)), "damaged, or another user's"),
    "no key": (lambda path: key_path().unlink(), "its key is not in this user's cache folder"),
    "half a key": (lambda path: write_key(bytes(8)), "is no key"),
    "a key for all to read": (lambda path: key_path().chmod(0o644), "is not this user's alone"),
    "a link": (link, "cannot be opened"),
    "a FIFO": (fifo, "is no plain file"),
    "a folder": (folder, "is no plain file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_damaged_or_foreign_is_passed_over(
    name: str, code: tuple[CompiledCode, Path]
) -> None:
    craft, why = OTHERS[name]
    craft(code[1])
    said = code[0].load()
    assert said.startswith(f"{NAME} is passed over, and all is compiled anew: ")
    assert why in said
    assert len(said.splitlines()) == 1
    assert not any(code[1].with_name("second").rglob("*.bin"))
    assert not any(code[1].with_name("second").rglob("*.py"))


def test_code_for_another_version_or_device_is_passed_over(
    code: tuple[CompiledCode, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.__version__", "9.9")
    here = CompiledCode(code[1].parent, create_accelerator("fp32"))
    assert f"it was made for torch {torch.version.__version__}, and here is 9.9" in here.load()


def test_what_is_too_large_is_neither_written_nor_read(
    code: tuple[CompiledCode, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer()(IMAGES)
    monkeypatch.setattr(compiled, "MOST_BYTES", 100)
    assert "more than 100 bytes" in code[0].load()
    before = code[1].read_bytes()
    with pytest.raises(OSError, match="MiB"):
        code[0].save(code[1].parent)
    code[0].save(code[1].parent)  # which has been said already
    assert code[1].read_bytes() == before


def test_the_key_is_made_once_and_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = own_key(key_path())
    assert own_key(key_path()) == key
    assert len(set(key)) > 8
    assert key_path().stat().st_mode & 0o077 == 0
    assert [path.name for path in key_path().parent.iterdir()] == ["key"]
    key_path().chmod(0o644)
    with pytest.raises(OSError, match="this user's alone"):
        own_key(key_path())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [alike(1), 2])
def test_a_requeue_on_another_node_goes_on_with_it(ranks: int, tmp_path: Path) -> None:
    # No last batch of another size, which would be compiled for itself.
    words = ("compile=force", "epochs=2", "model.width=4", "data.source.count=1200")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def end(name: str, node: str, *more: str) -> str:
        inductor = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / node)}
        run = Run(
            ranks, tmp_path, "--name", name, *words, *more, environment=environment | inductor
        )
        assert run.end() == 0, run.text()
        return run.text()

    end("whole", "one")
    end("cut", "one", "--max-steps", "30")
    said = end("cut", "two", "--resume")
    assert said.count(f"what was compiled before is taken from {NAME}") == 1, said
    assert fingerprint(tmp_path / "runs/whole") == fingerprint(tmp_path / "runs/cut")
