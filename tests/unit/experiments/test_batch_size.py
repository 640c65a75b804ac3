"""The sizes of a batch: what fits, how fast each is, and that nothing is left of the trial."""

import os
import signal
from pathlib import Path

import pytest
import torch

from launcher.cli import main
from launcher.experiments import batch_size
from launcher.experiments.batch_size import Found, Speed, describe, find_sizes
from launcher.training.accumulation import pass_fits
from launcher.training.state import TrainContext
from tests.support.helpers import context_of, tiny_recipe
from tests.unit.training.test_accumulation import Narrow


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file, alone in the folder that is the present one."""
    monkeypatch.chdir(tmp_path)
    text = "from tests.support.helpers import tiny_recipe\nrecipe = tiny_recipe()\n"
    Path("mine.py").write_text(text)
    return "mine.py"


def test_memory_ends_it_and_the_state_is_put_back() -> None:
    ctx = context_of(tiny_recipe())
    narrow = context_of(tiny_recipe(model=Narrow))
    assert isinstance(narrow.state.network, Narrow)
    narrow.state.network.limit = 16
    before = [v.clone() for v in narrow.state.network.state_dict().values()]
    found = find_sizes(narrow)
    assert [speed.size for speed in found.speeds] == [8, 16]
    assert found.ended_by == "memory"
    assert all(speed.images_per_second > 0 for speed in found.speeds)
    assert all(map(torch.equal, before, narrow.state.network.state_dict().values()))
    assert not narrow.state.optimizer.state
    assert find_sizes(ctx).ended_by in ("images", "speed")


def test_a_signal_ends_it(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(ctx: TrainContext, size: int) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return pass_fits(ctx, size)

    monkeypatch.setattr(batch_size, "pass_fits", slow)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        assert main(["tune", recipe, "--batch"]) == 75
    finally:  # after a stop they are ignored
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "launcher: stopped by SIGTERM: no size was found" in capsys.readouterr().err


def test_the_smallest_that_is_fast_enough_is_named() -> None:
    speeds = tuple(Speed(size, rate) for size, rate in ((8, 50.0), (16, 96.0), (32, 100.0)))
    found = Found(speeds, "memory")
    assert found.enough.size == 16
    said = "\n".join(describe(found, 2))
    assert "64 do not fit into memory" in said
    assert "data.batch_size=32 on 2 ranks" in said
    assert "not even 8 images" in describe(Found((), "memory"), 1)[0]


def test_the_command(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", recipe, "--batch"]) == 0
    assert "images per device" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == [recipe]
