"""Disk and time that are predicted, against what the files and a training take."""

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from launcher import ema, growing
from launcher.checkpoint import checkpoint
from launcher.checks.check import cost
from launcher.config.plan import START
from launcher.training.loop import fit
from tests.support.helpers import context_of, tiny_recipe


def wide() -> nn.Module:
    """Mostly numbers: the names of a checkpoint are small beside them."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 100), nn.Linear(100, 10))


@pytest.mark.parametrize("average", [None, partial(ema, decay=0.9)])
def test_a_checkpoint_has_the_size_that_is_told(average: None, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        model=wide,
        optimizer=partial(Adam, lr=1e-3),
        average=average,
        epochs=1,
    )
    ctx = context_of(recipe)
    for _ in fit(ctx, START):
        pass
    told = cost.describe_disk(ctx, tmp_path / "not" / "there")
    folder = checkpoint.write(
        checkpoint.capture(ctx, {"progress": {"step": 10, "epochs": 1}}), tmp_path
    )
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert told.figures["checkpoint"] == pytest.approx(written, rel=0.05)
    assert told.standing == "good"
    assert str(tmp_path) in told.answer


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ctx = context_of(tiny_recipe())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    told = cost.describe_disk(ctx, tmp_path)
    assert told.standing == "wrong"
    assert "0 bytes are free" in told.answer


class Slow(nn.Module):
    """10 ms for each call, whatever the images; and 2 ms for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.01 + 0.002 * len(images))
        return self.layer(images.mean((2, 3)))


def test_an_epoch_takes_about_what_its_steps_take() -> None:
    recipe = tiny_recipe(model=Slow, optimizer=partial(SGD, lr=0.1), epochs=3)
    told = cost.describe_time(context_of(recipe))
    # 100 images in batches of 10, each of them 30 ms; and 20 in one pass of evaluation
    assert told.figures["epoch_seconds"] == pytest.approx(10 * 0.03 + 0.05, rel=0.5)
    assert told.figures["seconds"] == 3 * told.figures["epoch_seconds"]


def test_an_epoch_of_smaller_images_takes_less() -> None:
    recipe = tiny_recipe(model=Slow, optimizer=partial(SGD, lr=0.1), epochs=3)
    growth = partial(growing, first=8, last=32)  # 8, 24 and 32: of the pixels 1/16, 9/16 and all
    recipe = replace(recipe, data=replace(recipe.data, train_resolution=growth))
    told = cost.describe_time(context_of(recipe))
    steps = 10 * 0.03
    assert told.figures["epoch_seconds"] == pytest.approx(steps + 0.05, rel=0.5)
    parts = (1 + 9 + 16) / 16
    assert told.figures["seconds"] == pytest.approx(parts * steps + 3 * 0.05, rel=0.4)
    assert told.figures["seconds"] < 2.4 * told.figures["epoch_seconds"]
    assert " to " in told.answer


def test_the_ranks_are_those_of_the_plan() -> None:
    recipe = tiny_recipe()
    ctx = context_of(recipe)
    verdict = cost.describe_ranks(replace(ctx, plan=replace(ctx.plan, world_size=5)), recipe)
    assert verdict.answer == "10 = 5 ranks x 2 images"
    assert any(line.split()[:1] == ["5"] for line in verdict.lines)
    assert torch.is_grad_enabled()
