"""With fp16 and its gradient scaler, a run that is cut goes on with the same bits.

The launcher refuses fp16 on a CPU, where Accelerate ignores it. torch's autocast and its scaler
work there all the same, so these tests switch both on in an Accelerator of the CPU.
"""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from launcher.checkpoint.checkpoint import capture, place_of, restore, write
from launcher.config.plan import START, Position, make_plan
from launcher.data import sources
from launcher.training.loop import SavePoint, fit
from launcher.training.state import TrainState, build, prepare
from launcher.training.step import Job
from tests.support.resumable import recipe as resumable

RECIPE = replace(resumable, epochs=2, precision="fp16")
DATA = sources.load(RECIPE.data)
PLAN = make_plan(
    RECIPE, world_size=1, train_images=len(DATA.train), test_images=len(DATA.test), save_steps=13
)
FIRST_SCALE, STEPS_TO_GROW, OVERFLOWING = 2.0**15, 4, 2.0**60


def prepared(seed: int = 0) -> tuple[Job, TrainState, GradScaler]:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    scaler = GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=STEPS_TO_GROW)
    accelerator.native_amp, accelerator.scaler = True, scaler
    learner = prepare(build(replace(RECIPE, seed=seed), DATA.train), RECIPE, accelerator)
    return Job(RECIPE, PLAN, accelerator), learner, scaler


def train(job: Job, learner: TrainState, start: Position = START, until: int = PLAN.steps) -> None:
    """Up to a step at which the plan saves."""
    for event in fit(job, learner, DATA, start):
        if isinstance(event, SavePoint) and event.position.step == until:
            return


def state_of(learner: TrainState) -> dict[str, Tensor]:
    assert learner.average is not None
    return learner.average.state_dict() | learner.network.state_dict()


def test_a_resumed_run_has_the_scale_and_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    job, whole, scaler = prepared()
    train(job, whole)
    expected, scale = state_of(whole), scaler.state_dict()

    job, cut, scaler = prepared()
    train(job, cut, until=26)
    state = {"best": None, "position": vars(Position(26, 1))}
    folder = write(capture(cut, job.accelerator, state), tmp_path)
    assert scaler.get_scale() != FIRST_SCALE
    assert scaler.state_dict()["_growth_tracker"] > 0  # else a scaler that forgot it would pass

    job, resumed, scaler = prepared(seed=1)
    restore(folder, resumed, job.accelerator)
    train(job, resumed, start=place_of(folder)[0])
    assert scaler.state_dict() == scale
    found = state_of(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_that_overflows_changes_neither_weights_nor_average() -> None:
    job, learner, scaler = prepared()
    scaler.load_state_dict(scaler.state_dict() | {"scale": OVERFLOWING})
    average = learner.average
    assert average is not None
    watched = [*learner.network.parameters(), *average.parameters(), *average.buffers()]
    before = [tensor.clone() for tensor in watched]
    train(job, learner, until=13)
    assert scaler.get_scale() == OVERFLOWING / 2**13
    assert all(map(torch.equal, watched, before))
