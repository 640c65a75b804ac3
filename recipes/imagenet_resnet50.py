"""ResNet-50 on ImageNet, 90 epochs: pictures that do not fit into memory.

    accelerate launch -m launcher recipes/imagenet_resnet50.py data.root=FOLDER

FOLDER has train/CLASS/*.JPEG and val/CLASS/*.JPEG, as ImageNet's archives unpack. Each rank decodes
its own pictures in each step; docs/data.md says how many per second.

The network is torchvision's; batch, rate, decay and epochs are those of He et al. (2016) as Goyal
et al. ("Accurate, Large Minibatch SGD", 2017) trained it; with no decay on norms and biases, label
smoothing, a cosine schedule and an average of the weights. This recipe has not been trained to its
end: it states no accuracy.
"""

from functools import partial

from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torchvision.models import resnet50

from launcher import (
    Folder,
    Images,
    Recipe,
    Synthetic,
    cosine,
    ema,
    flip,
    no_decay,
    random_resized_crop,
)

recipe = Recipe(
    model=partial(resnet50, num_classes=1000, zero_init_residual=True),
    data=Images(
        partial(Folder, size=224, scaled_to=256),
        batch_size=256,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment=(random_resized_crop, flip),
        fallback=partial(Synthetic, size=224, classes=1000, count=2000),
    ),
    optimizer=no_decay(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    epochs=90,
    schedule=partial(cosine, warmup=5 / 90),
    loss=partial(cross_entropy, label_smoothing=0.1),
    average=partial(ema, decay=0.9999),
    precision="bf16",
    memory_format="channels_last",
)
