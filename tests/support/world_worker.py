"""One rank of the equivalence test: train every scenario, write parameters and evaluations.

`world_worker.py FOLDER`, with its place in the environment. Rank 0 writes FOLDER/NAME.pt for each
scenario.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from launcher import (
    ChainedOptimizer,
    Images,
    Muon,
    NamedParameters,
    Recipe,
    Synthetic,
    crop,
    cutmix,
    cutout,
    ema,
    flip,
    linear,
    mirrored,
    mirrored_and_shifted,
    mixup,
)
from launcher.checkpoint.outcomes import of_epoch
from launcher.distributed.accelerator import create_accelerator
from launcher.distributed.world import World
from launcher.training.loop import fit
from launcher.training.metrics import EpochReport, StepReport
from tests.support.helpers import context_of

# 203 = 6 x 32 + 11: the last batch is uneven, and smaller than 4 ranks x 3 passes.
IMAGES, BATCH = 203, 32


class Small(nn.Module):
    """A network without BatchNorm, whose statistics are each rank's own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(8 * 8 * 8, 10),
        ).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Small64(Small):
    def __init__(self) -> None:
        super().__init__(torch.float64)


class Spare64(Small64):
    """With a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3, dtype=torch.float64)


def divided(parameters: NamedParameters, *, lr: float = 0.05) -> Optimizer:
    """Muon for the filters; the bias of the convolution is trained over half of the training."""
    named = list(parameters)
    filters = [pair for pair in named if pair[1].ndim == 4]
    early = [pair for pair in named if pair[0] == "layers.0.bias"]
    others = [pair for pair in named if pair[1].ndim != 4 and pair[0] != "layers.0.bias"]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": early, "schedule": partial(linear, until=0.5)},
    ]
    return ChainedOptimizer(Muon(filters, lr=lr), SGD(groups, lr=lr, momentum=0.9))


def late(progress: float) -> float:
    """At zero in the first half."""
    return float(progress > 0.5)


def with_late_bias(parameters: NamedParameters, *, lr: float = 0.05) -> Optimizer:
    """The bias of the convolution is trained in the second half only."""
    named = list(parameters)
    rested = [pair for pair in named if pair[0] == "layers.0.bias"]
    others = [pair for pair in named if pair[0] != "layers.0.bias"]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": rested, "schedule": late}]
    return SGD(groups, lr=lr, momentum=0.9)


def unit_variance(network: nn.Module, images: Tensor) -> None:
    """Divide the first filters by the standard deviation of what they make of the images."""
    assert isinstance(network, Small)
    filters = network.layers[0].weight
    filters /= network.layers[0](images).std(dim=(0, 2, 3))[:, None, None, None]


plain = Recipe(
    model=Small,
    data=Images(
        partial(Synthetic, count=IMAGES),
        batch_size=BATCH,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        augment=(flip, crop, partial(cutout, size=6)),
    ),
    optimizer=partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    epochs=2,
    schedule=partial(linear, warmup=0.2),
)
SCENARIOS = {
    "float32": plain,
    "float64": replace(plain, model=Small64),
    "accumulated": replace(plain, model=Small64, accumulate=3),
    "clipped_and_averaged": replace(
        plain, model=Small64, clip_norm=0.5, average=partial(ema, decay=0.9)
    ),
    "cutmix_adam": replace(
        plain,
        model=Small64,
        data=replace(plain.data, mix=cutmix),
        optimizer=partial(Adam, lr=1e-3),
    ),
    "mixup_contiguous": replace(
        plain,
        model=Small64,
        data=replace(plain.data, mix=mixup, augment=(partial(crop, fill="zero"),)),
        memory_format="contiguous",
        accumulate=2,
    ),
    "unused_one_cycle_by_class": replace(
        plain,
        model=Spare64,
        unused_parameters="allow",
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
        schedule=partial(OneCycleLR, max_lr=0.5),
        loss=nn.BCEWithLogitsLoss(),
        accumulate=2,
    ),
    "a_frozen_group": replace(
        plain, model=Small64, optimizer=with_late_bias, clip_norm=0.5, accumulate=2
    ),
    "muon_initialized_views": replace(
        plain,
        model=Small64,
        initialize=unit_variance,
        optimizer=partial(divided, lr=0.0003),
        sum_loss=True,
        views=mirrored_and_shifted,
    ),
    "uncertain_views": replace(plain, model=Small64, views=mirrored, uncertain=0.3),
}


def run(recipe: Recipe, world: World) -> dict[str, object]:
    ctx = context_of(recipe, accelerator=create_accelerator("fp32", world), log_every=3)
    reports = list(fit(ctx))
    epochs = [report for report in reports if isinstance(report, EpochReport)]
    return {
        "parameters": ctx.state.eval_model.state_dict(),
        "losses": [report.loss for report in reports if isinstance(report, StepReport)],
        "train_losses": [report.train_loss for report in epochs],
        "test_losses": [report.evaluation.loss for report in epochs],
        "confusions": [report.evaluation.confusion for report in epochs],
        "in_top5": [report.evaluation.in_top5 for report in epochs],
        "worst": [of_epoch(report, ctx.data.test).mistakes.tolist() for report in epochs],
        "outcomes": [torch.from_numpy(report.evaluation.outcomes) for report in epochs],
        "with_views": [
            report.evaluation_tta.confusion for report in epochs if report.evaluation_tta
        ],
    }


def main(folder: Path) -> None:
    world = World.of_this_process()
    for name, recipe in SCENARIOS.items():
        result = run(recipe, world)
        if world.is_main:
            torch.save(result, folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
