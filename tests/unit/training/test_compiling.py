"""`compile=true` on a CPU: the faster way is found, agreed, kept, and without a trace."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD

from launcher import ChainedOptimizer, Muon, NamedParameters, growing, train
from launcher.config.slots import CompileMode
from launcher.training.compiling import choose_compiling, is_to_be_tried
from launcher.training.loop import fit
from tests.support.helpers import Tiny, context_of, tiny_recipe, without_compiler
from tests.support.processes import Run, fingerprint

COMPILED_WAITS, SECONDS = True, 0.05  # more than a step takes


@torch.compiler.disable  # type: ignore[untyped-decorator]
def wait() -> None:
    time.sleep(SECONDS)


class Uneven(Tiny):
    """Waits when it is compiled, or else when it is not; with a state and with random numbers."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and torch.compiler.is_compiling() == COMPILED_WAITS:
            wait()
        return super().forward(self.norm(images))


def muon_and_sgd(parameters: NamedParameters, *, lr: float = 0.1) -> ChainedOptimizer:
    named = list(parameters)
    matrices = [pair for pair in named if pair[1].ndim == 2]
    others = [pair for pair in named if pair[1].ndim != 2]
    return ChainedOptimizer(Muon(matrices, lr=lr), SGD(others, lr=lr, momentum=0.9))


RECIPE = tiny_recipe(model=Uneven, compile=True, optimizer=muon_and_sgd, epochs=1)


def let_wait(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr("tests.unit.training.test_compiling.COMPILED_WAITS", compiled)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, "force"])
def test_the_faster_one_is_kept_and_nothing_is_left(
    kept: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_wait(monkeypatch, compiled=not kept)
    ctx = context_of(RECIPE)
    assert is_to_be_tried(ctx)
    before = [value.clone() for value in ctx.state.network.state_dict().values()]
    numbers = torch.default_generator.get_state()
    chosen, said = choose_compiling(ctx)
    assert chosen.recipe.compile == kept
    first, second = ("compiled", "eager") if kept else ("eager", "compiled")
    assert said.startswith(f"{first}: ")
    assert f" ms {second}" in said
    assert ("compile=force" in said) == (not kept)
    assert (ctx.state.network._compiled_call_impl is None) == (not kept)
    assert all(map(torch.equal, before, ctx.state.network.state_dict().values()))
    assert torch.equal(numbers, torch.default_generator.get_state())
    assert not ctx.state.optimizer.state
    assert all(p.grad is None for p in ctx.state.network.parameters())


@pytest.mark.parametrize("compiles", [False, "force", "reduce-overhead"])
def test_every_other_word_settles_it(compiles: bool | CompileMode) -> None:
    assert not is_to_be_tried(context_of(replace(RECIPE, compile=compiles)))


@pytest.mark.slow
@pytest.mark.parametrize("typed", [False, "force"])
def test_it_trains_as_if_told_so_and_keeps_to_it(
    typed: bool | CompileMode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where a key is made
    let_wait(monkeypatch, compiled=not typed)
    train(RECIPE, name="tried", wandb="off")
    config, about = (
        json.loads(Path("runs/tried", name).read_text()) for name in ("config.json", "run.json")
    )
    assert config["compile"] == typed
    assert about["compile"] in " ".join(capsys.readouterr().out.split())
    train(replace(RECIPE, compile=typed), name="typed", wandb="off")
    assert "  compile  " not in capsys.readouterr().out
    train(RECIPE, name="cut", wandb="off", max_steps=3)
    let_wait(monkeypatch, compiled=bool(typed))  # now the other one would be faster
    capsys.readouterr()
    train(RECIPE, name="cut", wandb="off", resume=True)
    kept = f"{'compiled' if typed else 'eager'}, as when the run began"
    assert kept in " ".join(capsys.readouterr().out.split())
    assert len({fingerprint(Path("runs", name)) for name in ("tried", "typed", "cut")}) == 1


def test_what_cannot_be_compiled_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    with without_compiler():
        chosen, said = choose_compiling(context_of(RECIPE))
    assert chosen.recipe.compile is False
    assert said.startswith("eager: torch.compile fails here: ")
    assert "\n" not in said


@pytest.mark.slow
def test_each_resolution_is_compiled_for_itself_and_none_trains_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has a limit, beyond which it goes on eager."""
    from torch._dynamo import config  # which takes seconds to import

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    counters.clear()
    sizes = {"train_resolution": partial(growing, first=8, last=24)}
    recipe = tiny_recipe(compile="force", epochs=3, data=sizes)
    with config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in fit(context_of(recipe)):
            pass
    # Three sizes, none of them of any size, and the batches of an evaluation.
    assert counters["stats"]["unique_graphs"] == 3 + 1


ON_TWO_RANKS = """
import os
from dataclasses import replace
from tests.unit.training import test_compiling

# On rank 1, compiled steps take little more time; on rank 0, eager ones take much more.
test_compiling.COMPILED_WAITS = os.environ.get("RANK", "0") == "1"
test_compiling.SECONDS = 0.01 if test_compiling.COMPILED_WAITS else 0.1
recipe = test_compiling.RECIPE
"""


def ended(run: Run) -> str:
    assert run.end() == 0, run.text()
    return run.text()


@pytest.mark.slow
def test_all_ranks_choose_alike(tmp_path: Path) -> None:
    recipe = tmp_path / "uneven.py"
    recipe.write_text(ON_TWO_RANKS)
    tried, typed = (
        ended(Run(2, tmp_path, "--name", name, *words, recipe=recipe))
        for name, words in (("tried", []), ("typed", ["compile=force"]))
    )
    assert tried.count("  compile     compiled: ") == 1, tried
    assert "  compile  " not in typed, typed
    assert fingerprint(tmp_path / "runs/tried") == fingerprint(tmp_path / "runs/typed")
