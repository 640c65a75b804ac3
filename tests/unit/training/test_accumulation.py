"""accumulate=auto: the smallest number of passes that fits, agreed, kept, and without a trace."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from launcher import growing, train
from launcher.training.accumulation import choose_passes, is_out_of_memory, pass_fits, smallest
from tests.support.helpers import Tiny, context_of, refused, tiny_recipe
from tests.support.processes import Run, fingerprint

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"


ROOM = 1


class Narrow(Tiny):
    """Trains on so many images at once; an allocation of more is refused, as torch's own is."""

    def __init__(self, most: int = 3, norm: bool = False) -> None:
        super().__init__()
        self.limit, self.norm = most * ROOM, nn.BatchNorm2d(3) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.limit:
            raise RuntimeError(NO_MEMORY)
        return super().forward(self.norm(images))


AUTO = tiny_recipe(
    model=Narrow, accumulate="auto", optimizer=partial(SGD, lr=0.1, momentum=0.9), epochs=1
)


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_the_smallest_number_is_found(most: int) -> None:
    for answer in range(1, most + 1):
        asked: list[int] = []

        def fits(passes: int, answer: int = answer, asked: list[int] = asked) -> bool:
            asked.append(passes)
            return passes >= answer

        assert smallest(fits, most) == answer
        assert len(asked) == len(set(asked)) <= 14
    assert smallest(lambda passes: False, most) is None


def test_the_passes_are_found_by_trying_and_nothing_is_left() -> None:
    ctx = context_of(AUTO)
    before = [value.clone() for value in ctx.state.network.state_dict().values()]
    chosen = choose_passes(ctx)
    assert chosen.plan.accumulate == chosen.recipe.accumulate == 4  # of 10 images, 3 at most
    assert "accumulate=auto: 4 forward passes" in chosen.notes[-1]
    assert "BatchNorm" not in chosen.notes[-1]
    assert all(map(torch.equal, before, ctx.state.network.state_dict().values()))
    assert not ctx.state.optimizer.state
    assert all(p.grad is None for p in ctx.state.network.parameters())


class Large(Narrow):
    """Trains on so many pixels at once."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and images.shape[2] ** 2 * len(images) > 28**2 * self.limit:
            raise RuntimeError(NO_MEMORY)
        return Tiny.forward(self, images)


def test_the_largest_images_of_the_training_are_tried() -> None:
    for last, passes in ((28, 4), (16, 2)):
        sizes = partial(growing, first=8, last=last, multiple=4)
        data = replace(AUTO.data, train_resolution=sizes)
        ctx = context_of(replace(AUTO, model=Large, data=data, epochs=3))
        assert choose_passes(ctx).plan.accumulate == passes


def test_batch_norm_is_told_that_the_number_matters() -> None:
    model = partial(Narrow, norm=True)
    assert "BatchNorm" in choose_passes(context_of(replace(AUTO, model=model))).notes[-1]
    wide = partial(Narrow, norm=True, most=10)
    assert "BatchNorm" not in choose_passes(context_of(replace(AUTO, model=wide))).notes[-1]


def test_what_cannot_train_on_one_image_is_refused() -> None:
    ctx = context_of(AUTO)
    assert isinstance(ctx.state.network, Narrow)
    ctx.state.network.limit = 0
    with refused("accumulate=auto", "10 passes of one image"):
        choose_passes(ctx)


def test_another_error_is_no_lack_of_memory() -> None:
    ctx = context_of(tiny_recipe())

    def fails(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    ctx.state.network.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="mat1"):
        pass_fits(ctx, 2)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError(NO_MEMORY))


def test_it_trains_as_that_number_typed_would_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(AUTO, name="auto", wandb="off")
    said = capsys.readouterr().out
    assert "10 = 1 rank x 2-3 images x 4 passes" in said
    assert json.loads(Path("runs/auto/config.json").read_text())["accumulate"] == 4
    train(replace(AUTO, accumulate=4), name="typed", wandb="off")
    train(AUTO, name="cut", wandb="off", max_steps=3)
    # What is resumed goes on with the number that it began with, whatever would fit now.
    monkeypatch.setattr("tests.unit.training.test_accumulation.ROOM", 4)
    train(AUTO, name="cut", wandb="off", resume=True)
    weights = [Path(f"runs/{n}/final.safetensors").read_bytes() for n in ("auto", "typed", "cut")]
    assert weights[0] == weights[1] == weights[2]


ON_ONE_RANK = """
import os
from dataclasses import replace
from tests.unit.training.test_accumulation import AUTO, Narrow
from functools import partial

most = 2 if os.environ.get("RANK") == "1" else 10

class Uneven(Narrow):
    def __init__(self):
        super().__init__(most=most)

recipe = replace(AUTO, model=Uneven)
"""


@pytest.mark.slow
def test_a_rank_with_less_memory_decides_for_all(tmp_path: Path) -> None:
    recipe = tmp_path / "uneven.py"
    recipe.write_text(ON_ONE_RANK)
    run = Run(2, tmp_path, "--name", "own", recipe=recipe)
    assert run.end() == 0, run.text()
    assert "10 = 2 ranks x 1-2 images x 3 passes" in run.text()
    assert run.text().count("accumulate=auto: 3 forward passes") == 1


SOMETIMES = """
from dataclasses import replace
from torch import nn
from tests.unit.training.test_accumulation import AUTO
from tests.support.helpers import Tiny

class Sometimes(Tiny):
    \"\"\"Trains a layer on three images, which a tried pass has, and not on two.\"\"\"

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(10, 10)

    def forward(self, images):
        scores = super().forward(images)
        return scores + self.extra(scores) if len(images) > 2 else scores

data = replace(AUTO.data, batch_size=5)
recipe = replace(AUTO, model=Sometimes, data=data, unused_parameters="allow")
"""


@pytest.mark.slow
def test_the_first_step_may_leave_unused_what_a_tried_pass_has_used(tmp_path: Path) -> None:
    """DDP takes passes without communication for parts of the step in which gradients travel."""
    recipe = tmp_path / "sometimes.py"
    recipe.write_text(SOMETIMES)
    weights = []
    for words in ((), ("accumulate=1",)):
        name = f"with{len(words)}"
        run = Run(2, tmp_path, "--name", name, *words, recipe=recipe)
        assert run.end() == 0, run.text()
        weights.append(fingerprint(tmp_path / "runs" / name))
    assert weights[0] == weights[1]
