"""`--profile`: the split adds up, the trace is one, and training is what it was without."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from torch.optim import SGD

from launcher.cli import main
from launcher.config.plan import SaveInterval, make_plan
from launcher.loggers.profiler import (
    Profiler,
    Split,
    advice,
    saves_per_epoch,
    split_of,
    windows_for,
    with_communication,
)
from launcher.training.loop import fit
from tests.support.helpers import context_of, tiny_recipe
from tests.support.processes import RESUMABLE, Run, fingerprint

COMPUTE = {"forward": 0.3, "backward": 0.6, "update": 0.1}
STEPS = 38  # warm-up, free, split, trace


def shares(output: str) -> dict[str, float]:
    """The closing table's shares, in percent."""
    rows = re.findall(r"^  (\w+) +(\d+\.\d)%  +\d", output, re.MULTILINE)
    return {name: float(share) for name, share in rows}


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, set()), (2, {"communication"})],
    ids=["one", "two"],
)
@pytest.mark.slow
def test_the_real_command_splits_an_epoch(ranks: int, extra: set[str], tmp_path: Path) -> None:
    run = Run(ranks, tmp_path, "--profile", "--name", "split", "accumulate=2")
    assert run.end() == 0, run.text()
    split = shares(run.text())
    phases = {"data", "forward", "backward", "update", "evaluation", "logging", "checkpoints"}
    assert set(split) == phases | extra
    assert sum(split.values()) == pytest.approx(100, abs=0.5)
    assert min(split[name] for name in phases - {"logging", "checkpoints"}) > 0
    assert list(split.values()) == sorted(split.values(), reverse=True)
    assert re.search(r"^  a step +\d+\.\d+ ms", run.text(), re.MULTILINE)
    assert re.search(r"^  advice +\w+", run.text(), re.MULTILINE)
    assert "split/trace.json: open it at https://ui.perfetto.dev" in run.text()
    assert torch.cuda.is_available() or "gpuGetDeviceCount failed" not in run.text()
    check_trace(tmp_path / "runs" / "split" / "trace.json")


def check_trace(path: Path) -> None:
    """Chrome's format, with the phases of three steps and torch's operators in it."""
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("data", "forward", "backward", "update")} == {
        "data": 3,
        "forward": 6,  # two micro-batches a step
        "backward": 6,
        "update": 3,
    }
    assert any(event["name"].startswith("aten::conv") for event in events)
    end = max(e["ts"] + e["dur"] for e in events if e.get("cat") == "user_annotation")
    late = [e for e in events if e.get("cat") == "cpu_op" and e["ts"] > end]
    assert not late, "what follows the steps is in the trace"


@pytest.mark.slow
def test_a_profiled_run_trains_as_a_short_one_does(tmp_path: Path) -> None:
    for name, word in (("profiled", "--profile"), ("short", f"--max-steps={STEPS}")):
        run = Run(1, tmp_path, "--name", name, word)
        assert run.end() == 0, run.text()
    profiled, short = (tmp_path / "runs" / name for name in ("profiled", "short"))
    assert fingerprint(profiled) == fingerprint(short)
    checkpoints = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (profiled, short)]
    assert checkpoints[0] == checkpoints[1]
    assert not (short / "trace.json").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--profile", "--max-steps", "20"], "--profile of a training of 20 steps"),
        (["--profile", "epochs=1"], "type epochs=2, without --max-steps"),
        (["--profile", "--smoke"], "--profile cannot be combined with --smoke or --resume"),
        (["--profile", "--resume"], "--profile cannot be combined with --smoke or --resume"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_line(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(RESUMABLE), "--wandb", "off", *words]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1
    assert not Path("runs").exists()


def profiled(folder: Path, code: str, slots: str, changed: str) -> Run:
    """A profile of the resumable recipe with code of its own, and slots that use it."""
    text = RESUMABLE.read_text().replace(slots, changed)
    text = text.replace("class Network", f"{code}\n\nclass Network")
    (folder / "changed.py").write_text(text)
    run = Run(1, folder, "--profile", recipe=folder / "changed.py")
    assert run.end() == 0, run.text()
    return run


def test_patience_does_not_end_a_profile() -> None:
    recipe = tiny_recipe(
        data={"validation": 0.2}, epochs=9, patience=1, optimizer=partial(SGD, lr=0.0)
    )
    profiler = Profiler(context_of(recipe))
    for _ in profiler.through(None)(fit(profiler.ctx)):
        pass
    assert "data" in split_of(profiler._timer).seconds


@pytest.mark.slow
def test_slow_augmentation_is_seen_as_data(tmp_path: Path) -> None:
    """A recipe whose augmentation sleeps is data-bound, and the advice says so."""
    run = profiled(tmp_path, SLEEPY, "augment=(flip, crop)", "augment=(flip, sleepy)")
    split = shares(run.text())
    assert next(iter(split)) == "data"
    assert "advice" in run.text()
    assert re.search(r"advice +data takes \d+%: try fewer or simpler augm", run.text())


def test_views_are_no_part_of_an_epochs_evaluation(tmp_path: Path) -> None:
    """A run tries them before training, and takes them once after its last epoch.

    Here all test images are one batch.
    """
    profiled(tmp_path, COUNTED, "    epochs=40,", "    epochs=40,\n    views=counted,")
    assert (tmp_path / "calls").read_text() == "xx"


COUNTED = """
from pathlib import Path


def counted(score: object, images: Tensor) -> Tensor:
    with Path("calls").open("a") as file:
        file.write("x")
    return score(images)
"""


SLEEPY = """
from time import sleep

from launcher import Draws


def sleepy(images: Tensor, draws: Draws) -> Tensor:
    sleep(0.1)
    return images
"""


@pytest.mark.parametrize(
    ("seconds", "busy", "precision", "part"),
    [
        (COMPUTE | {"data": 0.5}, None, "fp32", "data takes 33%: try fewer or simpler augm"),
        (COMPUTE | {"data": 0.05}, None, "fp32 (default)", "backward take 86%"),
        (COMPUTE, None, "fp32 (default)", "as they should: try precision=bf16"),
        (COMPUTE, None, "bf16 (recipe)", "only a smaller model or a faster device"),
        (COMPUTE, 0.95, "bf16 (recipe)", "only a smaller model or a faster device"),
        (COMPUTE, 0.2, "bf16 (recipe)", "the GPU waits for the CPU"),
        (COMPUTE | {"communication": 1.0}, 0.2, "fp32", "communication takes 50%: try a larger"),
        (COMPUTE | {"update": 1.0}, None, "fp32", "update takes 53%"),
        (COMPUTE | {"evaluation": 1.0}, None, "fp32", "evaluation takes 50%"),
        (COMPUTE | {"logging": 0.1}, None, "fp32", "logging takes 9%"),
        (COMPUTE | {"checkpoints": 0.1}, None, "fp32", "checkpoints takes 9%"),
        (COMPUTE | {"logging": 0.1, "data": 10.0}, None, "fp32", "data takes 90%"),
    ],
)
def test_advice_names_what_is_furthest_over_its_limit(
    seconds: dict[str, float], busy: float | None, precision: str, part: str
) -> None:
    split = Split(seconds, steps=10, step=0.1, busy=busy)
    assert part in advice(split.shares(), busy, precision)
    assert len(advice(split.shares(), busy, precision).splitlines()) == 1


def test_the_table_is_in_percent_seconds_and_milliseconds() -> None:
    rows = Split({"data": 0.5, "forward": 1.5}, steps=100, step=0.021).rows("fp32")
    assert list(rows) == ["forward", "data", "a step", "advice"]
    assert rows["data"].split() == [
        "25.0%",
        "0.500",
        "s",
        "an",
        "epoch",
        "5.000",
        "ms",
        "a",
        "step",
    ]
    assert rows["a step"] == "21.000 ms without the clock"
    assert "the GPU" in Split({"data": 1.0}, 1, 1.0, busy=0.5).rows("fp32")


def test_checkpoints_are_counted_in_any_unit() -> None:
    recipe = tiny_recipe()

    def saves(save: SaveInterval) -> float:
        plan = make_plan(recipe, world_size=1, train_images=1000, evaluated_images=1, save=save)
        assert plan.steps_per_epoch == 100
        return saves_per_epoch(plan, seconds=600.0)

    assert saves(SaveInterval(steps=20)) == 5
    assert saves(SaveInterval(epochs=2)) == 0.5
    assert saves(SaveInterval(minutes=4)) == 2.5
    assert saves(SaveInterval()) == 0


@pytest.mark.parametrize(("alone", "waited"), [(2.0, 1.0), (3.0, 0.0), (4.0, 0.0)])
def test_communication_is_what_the_backward_pass_waits_for(alone: float, waited: float) -> None:
    split = with_communication({"forward": 1.0, "backward": 3.0}, alone)
    assert split == {"forward": 1.0, "backward": 3.0 - waited, "communication": waited}


def test_steps_that_share_their_pictures_are_measured_together() -> None:
    """On a GPU one step pays for the pictures of many: see `Batches`."""
    recipe = tiny_recipe(data={"batch_size": 2**9}, epochs=100)
    group = 2**27 // (2**9 * 3 * 32 * 32 * 4)
    assert group == 21
    ctx = context_of(recipe)
    for device, size, steps in (("cuda", 50_000, 21), ("cuda", 2**11, 16), ("cpu", 50_000, 15)):
        plan = make_plan(recipe, world_size=1, train_images=size, evaluated_images=1)
        here = cast(Accelerator, SimpleNamespace(device=torch.device(device)))
        windows = windows_for(replace(ctx, plan=plan, accelerator=here))
        assert windows["free"] == windows["split"] == steps
