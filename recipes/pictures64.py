"""A small network for your own pictures: 64x64 pixels, colour, five classes.

Put the pictures into one folder per class, `data/pictures/CLASS/*.png` (or .jpg), and run

    accelerate launch -m launcher recipes/pictures64.py data.root=data/pictures

adding `model.classes=3` for three classes. Every fifth picture of a class is kept for testing; with
`train/` and `test/` above the class folders, those are used instead. Without such a folder the
recipe trains on shapes drawn by code, and says so.
"""

from functools import partial

from torch import Tensor, nn
from torch.optim import Adam

from launcher import Folder, Images, Recipe, Synthetic


class PicturesCNN(nn.Module):
    """Two 5x5 convolutions without padding, each followed by ReLU and pooling; two linear layers.

    Sizes: 64 -> 60 -> 30 -> 26 -> 13 pixels.
    """

    def __init__(self, classes: int = 5) -> None:
        """`classes` is the number of classes."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 10, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(10, 20, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(20 * 13 * 13, 50),
            nn.ReLU(),
            nn.Linear(50, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) -> (n, classes)."""
        return self.layers(images)


recipe = Recipe(
    model=PicturesCNN,
    data=Images(
        partial(Folder, size=64),
        batch_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        root="data/pictures",
        fallback=partial(Synthetic, size=64, classes=5, count=5000),
    ),
    optimizer=partial(Adam, lr=1e-3),
    epochs=10,
)
