"""Settings that gpu.py measures beside recipes/speedrun94.py: a recipe of its own until it wins.

    python benchmarks/gpu.py --root FOLDER --parts candidate --seeds 10

They are those of recipes/speedrun94_cpu.py, most of which follow hiverge/cifar10-speedrun (94.01 %
in 2.0 s on an A100, as reported there), at the full resolution. Neither the accuracy nor the time
of this has been measured on a GPU: nothing of it is in speedrun94.
"""

from dataclasses import replace

from recipes.speedrun94 import recipe as speedrun94
from recipes.speedrun94_cpu import recipe as speedrun94_cpu

recipe = replace(
    speedrun94_cpu,
    data=replace(speedrun94_cpu.data, train_resolution=None),
    epochs=speedrun94.epochs,
    precision=speedrun94.precision,
    compile=speedrun94.compile,
    claims=(),
)
