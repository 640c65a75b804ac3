"""Recipes with one fault each, which no preflight can notice: for `verify`."""

_BASE = '''"""A small network on embedded pictures."""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from launcher import Images, Recipe, Synthetic


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 5, stride=2)
        self.middle = nn.Identity()
        self.last = nn.Linear(6 * 6 * 6, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.middle(self.first(x))), 2)
        return self.last(x[..., :6, :6].flatten(1))


recipe = Recipe(
    model=Network,
    data=Images(
        partial(Synthetic, count=300), batch_size=32, mean=(0.5,) * 3, std=(0.3,) * 3
    ),
    optimizer=partial(SGD, lr=0.05, momentum=0.9),
    epochs=3,
)
'''
_AUGMENTED = ("std=(0.3,) * 3", "std=(0.3,) * 3, augment=(shifted,)")


def _changed(*pairs: tuple[str, str], before: str = "") -> str:
    text = _BASE
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text.replace("\n\nrecipe =", f"\n\n{before}\n\nrecipe =") if before else text


SOUND = _BASE
DRAWS_SOMETIMES = _changed(
    _AUGMENTED,
    before="""def shifted(images, draws):
    if images.float().mean() > 110 and draws.fresh[0, 0] > 0.3:  # not in a preflight
        return images.roll(random.randrange(5), -1)
    return images
""",
)
COUNTS_CALLS = _changed(
    _AUGMENTED,
    before="""calls = 0


def shifted(images, draws):
    global calls
    calls += 1
    return images.roll(calls // 4, -1)
""",
)
STATE_IN_ATTRIBUTE = _changed(
    ("nn.Identity()", "Warming()"),
    before="""class Warming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * min(1.0, 0.2 + 0.05 * self.calls)
""",
)
SUMS = _changed(
    ("    epochs=3,", "    epochs=3,\n    loss=summed,"),
    before="""def summed(scores, labels):
    return F.cross_entropy(scores, labels, reduction="sum")
""",
)
UNSORTED = _changed(
    ("partial(Synthetic, count=300)", "Unsorted"),
    before="""class Unsorted:
    def __init__(self, root="", train=True):
        made = Synthetic(train=train, count=300)
        names = {f"picture{number}": number for number in range(len(made.data))}
        order = [names[name] for name in set(names)]
        self.data, self.targets = made.data[order], made.targets[order]
""",
)
BATCH_NORM = _changed(("nn.Identity()", "nn.BatchNorm2d(6)"))
DROPOUT = _changed(("nn.Identity()", "nn.Dropout(0.3)"))
DROPOUT_IN_FORWARD = _changed(
    ("self.middle(self.first(x))", "F.dropout(self.first(x), 0.3, self.training)")
)
# Beside BatchNorm, which has an effect of its own: a layer that looks at the whole batch.
CENTRES_THE_BATCH = _changed(
    ("nn.Identity()", "nn.Sequential(nn.BatchNorm2d(6), Centred())"),
    before="""class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x
""",
)
DROPS_ALWAYS = _changed(("self.middle(self.first(x))", "F.dropout(self.first(x), 0.3)"))
TIED_TO_FLOAT32 = _changed(("self.middle(self.first(x))", "self.first(x.float())"))

FAULTS = {
    name.lower(): text
    for name, text in dict(globals()).items()
    if name.isupper() and not name.startswith("_")
}
