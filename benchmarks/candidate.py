"""Settings that gpu.py measures beside recipes/speedrun94.py: a recipe of its own until it wins.

    python benchmarks/gpu.py --root FOLDER --parts candidate --seeds 10

What of it follows from hiverge/cifar10-speedrun (94.01 % in 2.0 s on an A100, as reported there):
SiLU, a smaller batch with rates, momenta and smoothing to it, jitter of brightness and contrast,
and views of the uncertain quarter of the images only. Neither its accuracy nor its time has been
measured here: nothing of it is in the recipe.
"""

from dataclasses import replace
from functools import partial

from torch.nn.functional import cross_entropy

from launcher import alternating_flip, crop, jitter
from recipes.speedrun94 import SpeedVGG, muon_and_sgd
from recipes.speedrun94 import recipe as speedrun94

BATCH = 1536
recipe = replace(
    speedrun94,
    model=partial(SpeedVGG, activation="silu", momentum=0.44),
    data=replace(
        speedrun94.data,
        batch_size=BATCH,
        augment=(
            alternating_flip,
            partial(crop, padding=2),
            # There in units of the standard deviation of the pixels, 0.14: here parts of white.
            partial(jitter, brightness=0.035, contrast=0.13),
        ),
    ),
    optimizer=partial(
        muon_and_sgd,
        filter_rate=0.205,
        bias_rate=0.057,
        head_rate=0.54,
        decay=1.04e-6 * BATCH,
        bias_epochs=0.19 / 8,  # a fifth of the first epoch
        filter_momentum=0.655,
        momentum=0.825,
    ),
    loss=partial(cross_entropy, label_smoothing=0.09),
    uncertain=0.25,
    claims=(),
)
