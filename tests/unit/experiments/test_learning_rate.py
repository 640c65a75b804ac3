"""The rising learning rate: what is read from the curve, and that nothing is left of it."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from launcher import ema
from launcher.cli import main
from launcher.distributed import signals
from launcher.experiments import learning_rate
from launcher.experiments.learning_rate import HIGH, LOW, RateCurve, describe, find_rate, ramp
from launcher.training.loop import fit
from tests.support.helpers import complaint, context_of, tiny_recipe

RECIPE = tiny_recipe(data={"batch_size": 4}, optimizer=partial(SGD, lr=0.1, momentum=0.9))


def own_schedule(parameters: Any) -> SGD:
    return SGD([{"params": list(parameters), "schedule": late}], lr=0.1)


def late(fraction: float) -> float:
    return float(fraction >= 0.5)


def test_the_ramp_rises_by_equal_factors() -> None:
    rates = [ramp(fraction, until=0.5) for fraction in (0.0, 0.125, 0.25, 0.375, 0.5)]
    assert rates[0] == LOW
    assert rates[-1] == pytest.approx(HIGH)
    factors = [b / a for a, b in pairwise(rates)]
    assert factors == pytest.approx([factors[0]] * 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": partial(ema, decay=0.9)},
        {"schedule": partial(OneCycleLR, max_lr=0.1)},
        {"optimizer": own_schedule},
    ],
    ids=["plain", "averaged", "OneCycleLR", "of a group"],
)
def test_everything_is_put_back_bit_for_bit(changes: dict[str, object]) -> None:
    """A training that follows is the one that would have been without it."""
    trained = []
    for finds in (False, True):
        ctx = context_of(tiny_recipe(**{"epochs": 1, **changes}))
        if finds:
            before = [v.clone() for v in ctx.state.network.state_dict().values()]
            curve = find_rate(ctx, 8)
            assert len(curve.rates) == 8
            after = ctx.state.network.state_dict().values()
            assert all(map(torch.equal, before, after))
        for _ in fit(ctx):
            pass
        trained.append(ctx.state)
    for one, two in zip(
        *(state.eval_model.state_dict().values() for state in trained), strict=True
    ):
        assert torch.equal(one, two)
    assert str(trained[0].optimizer.state_dict()) == str(trained[1].optimizer.state_dict())


def test_the_ramp_ends_where_the_loss_does_harm() -> None:
    curve = find_rate(context_of(RECIPE))
    assert 20 < len(curve.rates) <= 25, "an epoch has 25 steps"
    assert curve.rates[0] < 0.1 * LOW * 2
    rising = context_of(tiny_recipe(data={"batch_size": 1}, optimizer=partial(SGD, lr=10.0)))
    curve = find_rate(rising)
    assert len(curve.rates) < 100
    assert curve.losses[-1] > curve.losses[0]


def test_a_group_with_a_schedule_of_its_own_is_ramped_as_well() -> None:
    curve = find_rate(context_of(replace(RECIPE, optimizer=own_schedule)), 8)
    assert curve.rates[0] < 0.1 * LOW * 10
    assert all(low < high for low, high in pairwise(curve.rates))


def test_what_is_read_from_a_curve() -> None:
    """Of a curve that is known: flat to 1e-3, falling to 1e-1, and rising behind."""
    rates = [10 ** (-5 + 6 * i / 399) for i in range(400)]

    def loss(rate: float) -> float:
        if rate < 1e-3:
            return 2.0
        if rate < 1e-1:
            return 2.0 - torch.tensor(rate / 1e-3).log10().item() / 2
        return 1.0 + 10 * rate

    curve = RateCurve(tuple(rates), tuple(map(loss, rates)))
    assert curve.lowest == pytest.approx(0.1, rel=0.5)
    assert 1e-3 < curve.steepest < 1e-1
    assert curve.suggestion == min(curve.steepest, curve.lowest / 2)


def test_a_loss_that_does_not_fall_suggests_nothing() -> None:
    curve = RateCurve(tuple(10.0**i for i in range(-9, 21)), (2.3,) * 29 + (9.0,))
    assert curve.suggestion is None
    said = "\n".join(describe(curve, 0.1))
    assert "does not fall in these 30 steps" in said
    assert "data.batch_size" in said


TINY = (
    "from tests.support.helpers import tiny_recipe\nrecipe = tiny_recipe(data={'batch_size': 2})\n"
)


def test_the_command_shows_and_saves_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TINY)
    assert main(["tune", "mine.py", "--lr", "--steps", "30", "--save", "curve"]) == 0
    said = capsys.readouterr().out
    assert "in 30 steps" in said
    assert "over the learning rate" in said
    content = json.loads(Path("curve/learning_rate.json").read_text())
    assert len(content["rates"]) == len(content["losses"]) == 30
    with Image.open("curve/learning_rate.png") as picture:
        assert picture.size == (800, 400)
    assert sorted(path.name for path in Path().iterdir()) == ["curve", "mine.py"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "one of --lr, --batch and --search"),
        (("--lr", "--smoke"), "--smoke is for one run, not for tune"),
        (("--lr", "--steps", "0"), "--steps"),
        (("--lr", "--steps", "19"), "at least 20 steps"),
        (("--lr", "data.batch_size=20"), "the 5 steps of an epoch"),
        (("--lr", "data.batch_size=20"), "type data.batch_size=5"),
        (("--lr", "--save", "mine.py"), "mine.py is no folder"),
        (("--lr", "--save", "mine.py/curve"), "mine.py is no folder"),
        (("--lr", "optimizer.lrr=3"), "optimizer.lr"),
    ],
)
def test_bad_words_are_answered_in_a_line(
    words: tuple[str, ...],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TINY)
    assert part in complaint(capsys, "tune", "mine.py", *words)


def test_a_signal_ends_the_ramp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(fraction: float, *, until: float) -> float:
        if fraction > until / 4:
            signals.ask_to_stop("SIGTERM")
        return ramp(fraction, until=until)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning_rate, "ramp", signalled)
    Path("mine.py").write_text(TINY)
    try:
        assert main(["tune", "mine.py", "--lr", "--save", "curve"]) == 75
    finally:
        signals.withdraw()
    ended = capsys.readouterr()
    assert ended.err == "launcher: stopped by SIGTERM: nothing of the ramp is kept\n"
    assert not Path("curve").exists()


def test_a_disk_that_is_full_is_answered_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replace(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.utils.atomic_write.replace", replace)
    Path("mine.py").write_text(TINY)
    words = ("tune", "mine.py", "--lr", "--steps", "30", "--save", "curve")
    assert "--save curve (No space left on device)" in complaint(capsys, *words)
