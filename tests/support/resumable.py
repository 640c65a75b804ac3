"""A recipe in which everything is random that can be, for tests that interrupt and resume it.

Dropout, BatchNorm, augmentation, CutMix, clipping, an average of the weights, a schedule; 25 steps
an epoch, the last of them smaller.
"""

from functools import partial

from torch import Tensor, nn
from torch.optim import AdamW

from launcher import Images, Recipe, Synthetic, cosine, crop, cutmix, ema, flip


class Network(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(width * 8 * 8, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


recipe = Recipe(
    model=Network,
    data=Images(
        partial(Synthetic, count=1_230),
        batch_size=50,
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        augment=(flip, crop),
        mix=cutmix,
    ),
    optimizer=partial(AdamW, lr=1e-3),
    schedule=partial(cosine, warmup=0.1),
    clip_norm=1.0,
    average=partial(ema, decay=0.95),
    epochs=40,
)
