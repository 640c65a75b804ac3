"""CIFAR-10 to 94 % on a CPU: the network of speedrun94, whose first epochs see smaller images.

    accelerate launch --cpu -m launcher recipes/speedrun94_cpu.py

After the last epoch, on 2 cores of an AMD EPYC with bf16 instructions (benchmarks/speedrun.py,
torch 2.14, 5 seeds): 94.03 +- 0.09 % with test-time augmentation, 93.28 +- 0.12 % without, in 351
+- 4 s of initialization, training and one evaluation.

On a CPU nearly all of the time is arithmetic, and images of 24 and 28 pixels took 0.55 and 0.75 of
the time of 32 there (images per second of epochs 2, 4 and 8 of one run). That makes room for a
ninth epoch. The smaller batch with its rates and momenta, SiLU, the jitter and the views of the
uncertain quarter of the test images alone are those of hiverge's script
(github.com/hiverge/cifar10-speedrun), which trains 7.59 epochs at 32 pixels.
"""

from dataclasses import replace
from functools import partial

from torch.nn.functional import cross_entropy

from launcher import Claim, alternating_flip, crop, growing, jitter
from recipes.speedrun94 import SpeedVGG, muon_and_sgd
from recipes.speedrun94 import recipe as speedrun94

BATCH = 1536
CPU = "2 cores of an AMD EPYC with bf16 instructions"
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
        # 24 pixels for two epochs, 28 for three, 32 for four.
        train_resolution=partial(growing, first=24, last=32, end=0.75, multiple=4),
    ),
    optimizer=partial(
        muon_and_sgd,
        filter_rate=0.205,
        bias_rate=0.057,
        head_rate=0.54,
        decay=1.04e-6 * BATCH,
        bias_epochs=0.024,
        filter_momentum=0.655,
        momentum=0.825,
    ),
    epochs=9,
    loss=partial(cross_entropy, label_smoothing=0.09),
    uncertain=0.25,
    precision="bf16",
    compile=False,
    claims=(
        Claim("test/accuracy_tta", 0.9403, 0.0009, runs=5, hardware=CPU, seconds=351),
        Claim("test/accuracy", 0.9328, 0.0012, runs=5, hardware=CPU, seconds=351),
    ),
)
