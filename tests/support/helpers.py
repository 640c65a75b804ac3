"""What several test files need: a small recipe, a check of refusals, the shipped recipes."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam

from launcher import Images, Recipe, Synthetic
from launcher.cli import main
from launcher.config.plan import make_plan
from launcher.data import sources
from launcher.data.images import Data
from launcher.distributed.accelerator import create_accelerator
from launcher.errors import UserError
from launcher.training.model import build_network, initialize
from launcher.training.state import TrainContext, make_context

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
HALF = (0.5, 0.5, 0.5)


class Tiny(nn.Module):
    """The smallest network with a setting."""

    def __init__(self, width: int = 4, dropout: float = 0.0, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, width),
            nn.Dropout(dropout),
            nn.Linear(width, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def alike(*values: Any, id: str | None = None) -> Any:
    """A case that is like the others of its test: run before a release, and by nothing else."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.thorough], id=id)


def tiny_recipe(**changes: Any) -> Recipe:
    """A recipe built anew at each call, with some fields changed; `data` takes a dict."""
    data = Images(partial(Synthetic, count=100), batch_size=10, mean=HALF, std=HALF)
    data = replace(data, **changes.pop("data", {}))
    recipe = Recipe(model=Tiny, data=data, optimizer=partial(Adam, lr=1e-3), epochs=2)
    return replace(recipe, **changes)


def context_of(
    recipe: Recipe,
    data: Data | None = None,
    accelerator: Accelerator | None = None,
    **plan: Any,
) -> TrainContext:
    """A training in this process, put together as the launcher does it; `plan` are its options."""
    accelerator = accelerator or create_accelerator("fp32")
    data = data or sources.load(recipe.data)
    plan = {"train_images": len(data.train), "evaluated_images": len(data.evaluated), **plan}
    made = make_plan(recipe, world_size=accelerator.num_processes, **plan)
    network = build_network(recipe, data.train)
    initialize(network, recipe, data.train, accelerator.device)
    return make_context(network, recipe, made, accelerator, data)


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which the command line answers what is typed wrongly."""
    assert main(words) == 2
    errors = capsys.readouterr().err
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("launcher: ")
    return lines[0]


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expect a `UserError` of one line with three parts, in which all of `parts` occur."""
    with pytest.raises(UserError) as caught:
        yield
    error = caught.value
    message = str(error)
    assert message == message.strip()
    assert len(message.splitlines()) == 1, message
    assert error.given, message
    assert error.expected, message
    assert error.instead, message
    for part in parts:
        assert part in message, message


@contextmanager
def without_compiler() -> Iterator[None]:
    """As on a machine on which torch.compile finds no C++ compiler.

    Not by monkeypatch, which cannot put back a setting of torch: it would be gone for good.
    """
    from torch._inductor import config  # which takes seconds to import

    with config.patch({"cpp.cxx": ("/nonexistent",)}):
        yield


def words_to_type(error: UserError) -> list[str]:
    """The `name=value` words that a refusal tells its reader to type, as a shell reads them."""
    return [word.rstrip(",?") for word in shlex.split(error.instead) if "=" in word]
