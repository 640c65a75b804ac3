"""Towards 96 % on CIFAR-10 in little time: the network of speedrun94, wider, deeper and longer.

    accelerate launch -m launcher recipes/speedrun96.py

Not measured at its size: no GPU was at hand when it was written, and on two CPU cores it would take
hours. Scaled down to model.widths=64,192,256 epochs=8 precision=bf16 compile=false (one run, 2
cores of an AMD EPYC, 72 s an epoch): 91.93 %, with test-time augmentation 92.84 %. That shows that
it learns, not that it reaches 96 %.

The sizes, the third convolution with its shortcut, cutout and the larger crops follow the record
airbench96 (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024); the optimizer is that
of speedrun94. On a CPU add precision=bf16 compile=false, and much patience.
"""

from dataclasses import replace
from functools import partial

from launcher import alternating_flip, crop, cutout
from recipes.speedrun94 import SpeedVGG
from recipes.speedrun94 import recipe as speedrun94

recipe = replace(
    speedrun94,
    model=partial(SpeedVGG, widths=(128, 384, 512), convolutions=3),
    data=replace(
        speedrun94.data,
        batch_size=1000,
        augment=(alternating_flip, partial(crop, padding=4), partial(cutout, size=12)),
    ),
    epochs=36,
)
