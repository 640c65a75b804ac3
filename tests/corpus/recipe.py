"""Any network of the corpus, on few pictures: `model.name=LeNet`, `model.name=timm/resnet10t`."""

from functools import partial

from torch import nn
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic
from tests.corpus.classical import CLASSICAL


def network(name: str = "LeNet", double: bool = False) -> nn.Module:
    """By its name, which begins with its library where it has one; in float64 if asked for."""
    made = _single(name)
    return made.double() if double else made


def _single(name: str) -> nn.Module:
    if name in CLASSICAL:
        return CLASSICAL[name]()
    from tests.corpus import libraries

    library, _, own_name = name.partition("/")
    of_library = libraries.of_timm if library == "timm" else libraries.of_torchvision
    return of_library(own_name)


recipe = Recipe(
    model=network,
    data=Images(
        partial(Synthetic, size=32, count=22),
        batch_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    ),
    optimizer=partial(SGD, lr=0.01, momentum=0.9),
    epochs=1,
    clip_norm=1.0,  # EfficientNet's gradient has a norm of 30,000 on such small pictures
)
