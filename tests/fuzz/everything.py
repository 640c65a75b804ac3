"""A recipe with code of its own in every slot: what `recipes.py` mutates."""

from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from launcher import Draws, Images, NamedParameters, Recipe, ema
from launcher.config.slots import Score


class Source:
    def __init__(self, root: str = "", train: bool = True, count: int = 24) -> None:
        number = count if train else 12
        self.data = numpy.arange(number * 8 * 8 * 3, dtype=numpy.uint8).reshape(number, 8, 8, 3)
        self.targets = [index % 3 for index in range(number)]
        self.classes = ["a", "b", "c"]


class Network(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.body(images)).mean((2, 3))
        return self.head(self.dropout(features))


def initialize(network: nn.Module, images: Tensor) -> None:
    network.get_parameter("body.0.weight").mul_(1 / images.std())


def optimizer(params: NamedParameters, lr: float = 0.1, decay: float = 1e-3) -> Optimizer:
    named = list(params)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": decay},
        {"params": [p for n, p in named if p.ndim <= 1]},
    ]
    return SGD(groups, lr=lr, momentum=0.9)


def schedule(fraction: float, floor: float = 0.1) -> float:
    return max(floor, 1.0 - fraction)


def loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def brighten(images: Tensor, draws: Draws, most: float = 0.2) -> Tensor:
    factor = 1 + most * (draws.fresh[:, 0] - 0.5)
    return (images * factor[:, None, None, None]).clamp(0, 255).to(images.dtype)


def blend(
    images: Tensor, partners: Tensor, random: numpy.random.Generator, alpha: float = 0.2
) -> tuple[Tensor, float]:
    share = float(random.beta(alpha, alpha))
    return share * images + (1 - share) * partners, share


def views(model: Score, images: Tensor) -> Tensor:
    return (model(images) + model(images.flip(-1))) / 2


recipe = Recipe(
    model=partial(Network, width=4),
    data=Images(
        source=Source,
        batch_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment=(partial(brighten, most=0.3),),
        mix=blend,
    ),
    optimizer=partial(optimizer, lr=0.05),
    initialize=initialize,
    schedule=schedule,
    loss=loss,
    clip_norm=1.0,
    average=partial(ema, decay=0.9),
    views=views,
    accumulate=2,
    epochs=1,
    seed=int(torch.tensor(3)),
)
