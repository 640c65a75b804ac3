"""The speed record's recipe and the slots that it needs: on small sets, on a CPU."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from launcher import Images, Recipe, Synthetic, cutmix
from launcher.config import loader, overrides
from launcher.config.plan import make_plan
from launcher.config.schedules import linear
from launcher.config.serialize import resolve
from launcher.data.batches import Batches, Normalize
from launcher.data.sources import load
from launcher.distributed.accelerator import choose_precision
from launcher.errors import UserError
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport
from launcher.training.model import build_network, initialize
from recipes.speedrun94 import Block
from tests.support.helpers import alike, context_of
from tests.support.world_worker import Small64, plain

RECIPES = Path(__file__).parents[2] / "recipes"


def small(recipe: Recipe, words: tuple[str, ...] = ()) -> Recipe:
    """The recipe on embedded images, uncompiled, in float32 unless `words` say otherwise."""
    data = replace(recipe.data, source=partial(Synthetic, count=400), batch_size=50, fallback=None)
    recipe = replace(recipe, data=data)
    return overrides.override(recipe, ["compile=false", "precision=fp32", *words])


@pytest.fixture
def speedrun() -> Recipe:
    return loader.load(RECIPES / "speedrun94.py").recipe


def trained(recipe: Recipe) -> tuple[nn.Module, list[EpochReport]]:
    ctx = context_of(recipe, accelerator=Accelerator(cpu=True, mixed_precision="no"))
    reports = list(fit(ctx))
    return ctx.state.network, [report for report in reports if isinstance(report, EpochReport)]


def test_the_first_layer_whitens_the_images(speedrun: Recipe) -> None:
    recipe = small(speedrun)
    images = load(recipe.data).train
    network = build_network(recipe, images)
    initialize(network, recipe, images, torch.device("cpu"))
    layer = network.whitening
    assert isinstance(layer, nn.Conv2d)
    normalize = Normalize(recipe.data, images.images.shape[1:], torch.zeros(()), False)
    outputs = nn.functional.conv2d(normalize(images.tensor), layer.weight)
    outputs = outputs.permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(outputs[12:], -outputs[:12])
    moments = (outputs @ outputs.T / outputs.shape[1])[:12, :12]
    powers = moments.diagonal()
    assert (powers <= 1.001).all()  # a little less than one, by the floor under the eigenvalues
    assert (powers > 0.5).all()
    assert (moments - powers.diag()).abs().max() < 0.01


@pytest.mark.parametrize("precision", ["fp32", alike("pure_bf16")])
def test_it_learns(speedrun: Recipe, precision: str) -> None:
    words = (f"precision={precision}", "epochs=3", "model.widths=(16,32,32)")
    network, epochs = trained(small(speedrun, words))
    losses = [report.train_loss for report in epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 2.3
    assert losses[-1] < 1.9
    assert epochs[-1].evaluation.accuracy > 0.3
    assert [report.evaluation_tta is None for report in epochs] == [True, True, False]
    half = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    dtypes = {name: value.dtype for name, value in network.state_dict().items()}
    assert dtypes["head.weight"] == dtypes["blocks.0.convolutions.0.weight"] == half
    norm = [dtypes[f"blocks.0.norms.0.{name}"] for name in ("bias", "running_mean")]
    assert norm == [torch.float32, torch.float32]


def test_every_parameter_has_one_group(speedrun: Recipe) -> None:
    network = speedrun.model()
    named = [pair for pair in network.named_parameters() if pair[1].requires_grad]
    groups = speedrun.optimizer(named).param_groups
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(
        name for name, _ in named
    )


def test_its_settings_can_be_changed_and_written_down(speedrun: Recipe) -> None:
    words = ["optimizer.filter_rate=0.1", "initialize.floor=0.001", "compile=reduce-overhead"]
    changed = resolve(overrides.override(speedrun, words))
    assert changed["optimizer"]["filter_rate"] == 0.1
    assert changed["initialize"]["floor"] == 0.001
    assert changed["compile"] == "reduce-overhead"
    assert changed["views"] == {"call": "launcher.training.tta:mirrored_and_shifted"}
    assert overrides.override(speedrun, ["views=none"]).views is None
    with pytest.raises(UserError):
        overrides.override(speedrun, ["compile=fast"])


def test_sum_loss_multiplies_the_gradients_by_the_images() -> None:
    # 203 images in steps of 29: the sum over each is 29 times the mean.
    even = replace(plain, model=Small64, epochs=1, data=replace(plain.data, batch_size=29))
    one, first = trained(even)
    summed = overrides.override(even, ["sum_loss=true", f"optimizer.lr={0.05 / 29}"])
    other, second = trained(summed)
    assert first[0].train_loss == pytest.approx(second[0].train_loss, abs=1e-12)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_pure_fp16_needs_a_gpu() -> None:
    assert choose_precision("pure_fp16", has_gpu=True) == ("pure_fp16", "recipe")
    with pytest.raises(UserError, match="pure_bf16"):
        choose_precision("pure_fp16", has_gpu=False)


@pytest.mark.parametrize("at_once", [2, 3, 100])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_pictures_made_ahead_are_those_made_step_by_step(
    at_once: int, accumulate: int, mixed: bool
) -> None:
    data: Images = replace(plain.data, mix=cutmix if mixed else None)
    recipe = replace(plain, data=data, accumulate=accumulate)
    images = load(data).train
    plan = make_plan(recipe, world_size=2, train_images=len(images), evaluated_images=1)
    normalize = Normalize(data, images.images.shape[1:], torch.zeros(()), False)

    def steps(at_once: int, epochs: tuple[int, ...]) -> list[tuple[int, list[tuple[float, ...]]]]:
        batches = Batches(images, recipe, plan, normalize, rank=1)
        batches._steps_per_chunk = at_once
        return [
            (step, [(p.images.sum().item(), p.targets.sum().item(), p.weight) for p in pieces])
            for epoch in epochs
            for step, pieces in batches.epoch(epoch)
        ]

    assert steps(at_once, (1, 2)) == steps(1, (1, 2))
    assert steps(at_once, (2,)) == steps(1, (1, 2))[plan.steps_per_epoch :]


def test_a_linear_schedule_can_end_early() -> None:
    assert linear(0.25, until=0.5) == 0.5
    assert linear(0.5, until=0.5) == linear(0.9, until=0.5) == 0.0
    assert linear(0.9, until=0.5, end=0.1) == pytest.approx(0.1)
    assert linear(0.3, warmup=0.1, until=0.5) == pytest.approx(0.5)


def test_the_larger_speedrun_builds_on_the_smaller_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = loader.load(RECIPES / "speedrun96.py").recipe
    words = ("epochs=2", "model.widths=(16,32,32)", "data.augment.cutout.size=4")
    network, epochs = trained(small(recipe, words))
    assert epochs[1].train_loss < epochs[0].train_loss < 2.3
    assert len(network.state_dict()["blocks.2.convolutions.2.weight"]) == 32


def test_the_third_convolution_has_a_shortcut_around_it() -> None:
    block = Block(4, 4, 3, 0.4).eval()
    images = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        whole = block(images)
        block.get_parameter("convolutions.2.weight").zero_()
        shortcut = block(images)
        block.get_parameter("convolutions.0.weight").zero_()
        nothing = block(images)
    assert not torch.equal(whole, shortcut)
    assert shortcut.abs().sum() > 0
    assert nothing.abs().sum() == 0


def test_the_speedrun_for_cpus_sees_smaller_images_first() -> None:
    recipe = loader.load(RECIPES / "speedrun94_cpu.py").recipe
    assert context_of(small(recipe)).plan.resolutions == (24, 24, 28, 28, 28, 32, 32, 32, 32)
    _, epochs = trained(small(recipe, ("epochs=3", "model.widths=(16,32,32)")))
    losses = [report.train_loss for report in epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3
