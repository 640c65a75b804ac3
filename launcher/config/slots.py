"""The types of a recipe's slots: what the launcher calls each of them with, and what comes back.

Every slot is a callable of one of these signatures; `functools.partial` fills in its settings.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

DRAWS_PER_AUGMENTATION = 4


@dataclass(frozen=True)
class Draws:
    """Random numbers for n images: `fresh` is drawn anew each epoch, `fixed` once per training.

    Both are uniform in [0, 1), of shape (n, 4).
    """

    fresh: Tensor
    fixed: Tensor
    epoch: int


Source = Callable[..., Any]
Augmentation = Callable[[Tensor, Draws], Tensor]
Mixing = Callable[[Tensor, Tensor, numpy.random.Generator], tuple[Tensor, float]]
NamedParameters = Iterable[tuple[str, nn.Parameter]]
Schedule = Callable[[float], float]
Resolution = Callable[[float], int]  # progress of the training -> pixels a side
TorchSchedule = Callable[..., LRScheduler]  # optimizer -> scheduler
# logits, targets, and where the third argument is called `images` the normalized images
Loss = Callable[[Tensor, Tensor], Tensor] | Callable[[Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor], Tensor]  # images (n, c, h, w) -> logits (n, classes)
Views = Callable[[Score, Tensor], Tensor]
Precision = Literal["fp32", "bf16", "fp16", "pure_bf16", "pure_fp16"]
# force compiles on a CPU, too, where true tries first whether that is faster
CompileMode = Literal["force", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
