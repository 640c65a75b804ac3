"""ResNet-18 on ImageNet in 16 epochs, of which the first twelve train on smaller images.

    accelerate launch -m launcher recipes/imagenet_resnet18_16.py data.root=FOLDER

FOLDER has train/CLASS/*.JPEG and val/CLASS/*.JPEG, as ImageNet's archives unpack. Training crops
have 160 x 160 pixels, and 192 x 192 from epoch 13 on. The evaluation takes the middle of each
picture, 7/8 of its shorter side, at 256 x 256; a second accuracy averages it with its mirror image.

After rn18_configs/rn18_16_epochs.yaml of FFCV (https://github.com/libffcv/ffcv-imagenet; Leclerc et
al., 2022): same batch, rate, decay, smoothing and resolutions. Differences: no blurring before
convolutions with a stride (`use_blurpool`), which is another network; no decay on the last layer's
biases and on the norms of the shortcuts; the last, smaller batch of an epoch is trained; bf16 in
place of fp16; and pictures in their original size, where FFCV stores smaller ones. This recipe has
not been trained to its end: it states no accuracy.
"""

from functools import partial

from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torchvision.models import resnet18

from launcher import (
    Folder,
    Images,
    Recipe,
    Synthetic,
    flip,
    growing,
    linear,
    mirrored,
    no_decay,
    random_resized_crop,
)

recipe = Recipe(
    model=partial(resnet18, num_classes=1000),
    data=Images(
        partial(Folder, size=256, scaled_to=293),
        batch_size=1024,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment=(random_resized_crop, flip),
        train_resolution=partial(
            growing, first=160, last=192, start=11 / 15, end=13 / 15, multiple=32
        ),
        fallback=partial(Synthetic, size=256, classes=1000, count=2000),
    ),
    optimizer=no_decay(SGD, lr=0.5, momentum=0.9, weight_decay=5e-5),
    epochs=16,
    schedule=partial(linear, warmup=2 / 16),
    loss=partial(cross_entropy, label_smoothing=0.1),
    views=mirrored,
    precision="bf16",
    memory_format="channels_last",
)
