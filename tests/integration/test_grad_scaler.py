"""With fp16 and its gradient scaler, a run that is cut goes on with the same bits.

The launcher refuses fp16 on a CPU, where Accelerate ignores it. torch's autocast and its scaler
work there all the same, so these tests switch both on in an Accelerator of the CPU.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from launcher.checkpoint.checkpoint import capture, restore, write
from launcher.config.plan import START, Progress, SaveInterval
from launcher.data import sources
from launcher.errors import NotFiniteError
from launcher.training.loop import SavePoint, fit
from launcher.training.state import TrainContext
from tests.support.helpers import context_of
from tests.support.resumable import recipe as resumable

RECIPE = replace(resumable, epochs=2, precision="fp16")
DATA = sources.load(RECIPE.data)
FIRST_SCALE, STEPS_TO_GROW, OVERFLOWING = 2.0**15, 4, 2.0**60


def prepared(seed: int = 0) -> tuple[TrainContext, GradScaler]:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    scaler = GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=STEPS_TO_GROW)
    accelerator.native_amp, accelerator.scaler = True, scaler
    ctx = context_of(replace(RECIPE, seed=seed), DATA, accelerator, save=SaveInterval(steps=13))
    return replace(ctx, recipe=replace(ctx.recipe, seed=0)), scaler  # other weights, same order


def train(ctx: TrainContext, start: Progress = START, until: int | None = None) -> None:
    """Up to a step at which the plan saves, or to the end."""
    for event in fit(ctx, start):
        if isinstance(event, SavePoint) and event.progress.step == until:
            return


def weights_of(ctx: TrainContext) -> dict[str, Tensor]:
    assert ctx.state.ema_model is not None
    return ctx.state.ema_model.state_dict() | ctx.state.network.state_dict()


@pytest.mark.slow
def test_a_resumed_run_has_the_scale_and_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, scaler = prepared()
    train(whole)
    expected, scale = weights_of(whole), scaler.state_dict()

    cut, scaler = prepared()
    train(cut, until=26)
    progress = Progress(26, 1)
    folder = write(capture(cut, {"progress": vars(progress)}), tmp_path)
    assert scaler.get_scale() != FIRST_SCALE
    assert scaler.state_dict()["_growth_tracker"] > 0  # else a scaler that forgot it would pass

    resumed, scaler = prepared(seed=1)
    restore(folder, resumed)
    train(resumed, start=progress)
    assert scaler.state_dict() == scale
    found = weights_of(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_that_overflows_changes_neither_weights_nor_average() -> None:
    ctx, scaler = prepared()
    scaler.load_state_dict(scaler.state_dict() | {"scale": OVERFLOWING})
    average = ctx.state.ema_model
    assert average is not None
    watched = [*ctx.state.network.parameters(), *average.parameters(), *average.buffers()]
    before = [tensor.clone() for tensor in watched]
    train(ctx, until=13)
    assert scaler.get_scale() == OVERFLOWING / 2**13
    assert all(map(torch.equal, watched, before))


def test_a_step_to_be_skipped_is_skipped_by_the_scaler_too() -> None:
    """After a rollback; its gradient may be finite all the same."""
    ctx, scaler = prepared()
    before = weights_of(ctx)
    before = {name: value.clone() for name, value in before.items()}
    train(replace(ctx, skip_steps=frozenset(range(1, 14))), until=13)
    after = weights_of(ctx)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert scaler.get_scale() > 0


def test_a_scale_that_never_fits_stops_the_run() -> None:
    ctx, scaler = prepared()
    scaler.load_state_dict(scaler.state_dict() | {"scale": OVERFLOWING})
    with pytest.raises(NotFiniteError, match="not finite in each of the"):
        train(ctx)
