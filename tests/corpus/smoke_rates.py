"""How often `--smoke` is wrong: on sound recipes, and on such with a mistake.

`python -m tests.corpus.smoke_rates [--seeds 20] [--output FILE] [NAME ...]` trains the networks of
the corpus as a smoke test does, by several optimizers, which take turns from seed to seed, and
counts each verdict: on sound recipes, on sound ones that make it hard (strong augmentation, cutmix
and label smoothing), on shuffled labels, on a loss that is cut off from the scores, and on a rate
of 0. What FILE has of other networks stays there: all of it takes hours.

A sound recipe with plain cross entropy and without augmentation cannot fail, whatever its seed: the
control, which decides that, is the same training once more.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from launcher import (
    Draws,
    Images,
    NamedParameters,
    Recipe,
    Synthetic,
    cutmix,
    flip,
    jitter,
    random_resized_crop,
)
from launcher.config.slots import Loss
from launcher.data import sources
from launcher.distributed.process_group import RankGroup
from launcher.distributed.world import ALONE
from launcher.errors import NotFiniteError, TrainingError, UserError
from launcher.training.loop import fit
from launcher.training.preflight import preflight
from launcher.training.smoke import SmokeTest, smoke_version
from tests.corpus.recipe import network
from tests.corpus.trial import names, size_of
from tests.support.helpers import context_of

OPTIMIZERS: dict[str, Callable[[NamedParameters], Optimizer]] = {
    "SGD 0.05": partial(SGD, lr=0.05),
    "SGD 0.01, momentum": partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "Adam 1e-3": partial(Adam, lr=1e-3),
    "AdamW 3e-4": partial(AdamW, lr=3e-4),
}
PASSED, UNTOLD, FAILED = "passed", "too few steps to tell", "failed"
REFUSED, NOT_FINITE = "refused before training", "loss not finite"  # neither by the smoke test
Counts = dict[str, int]  # how often each verdict was reached
KINDS = ("sound", "hard", "shuffled", "detached", "rate 0")


def shuffled(images: Tensor, draws: Draws) -> Tensor:
    """The mistake: each image gets the label of another one."""
    return images.roll(1, 0)


def detached(logits: Tensor, targets: Tensor) -> Tensor:
    """The mistake: no gradient."""
    return cross_entropy(logits.detach(), targets)


def verdict(name: str, optimizer: str, seed: int, kind: str) -> str:
    """That of the launcher's own smoke test, of the kind of recipe."""
    images = Images(
        partial(Synthetic, size=size_of(name)),
        batch_size=64,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment={"shuffled": (shuffled,), "hard": (random_resized_crop, flip, jitter)}.get(
            kind, ()
        ),
        mix=cutmix if kind == "hard" else None,
    )
    losses: dict[str, Loss] = {
        "detached": detached,
        "hard": partial(cross_entropy, label_smoothing=0.2),
    }
    recipe = Recipe(
        model=partial(network, name),
        data=images,
        optimizer=partial(SGD, lr=0.0) if kind == "rate 0" else OPTIMIZERS[optimizer],
        loss=losses.get(kind, cross_entropy),
        epochs=1,
        seed=seed,
    )
    recipe = smoke_version(recipe, RankGroup(ALONE))
    ctx = context_of(recipe, sources.load(recipe.data))
    try:
        preflight(ctx)
    except UserError:
        return REFUSED
    smoke_test = SmokeTest(ctx)
    try:
        for _ in fit(ctx):
            pass
        return UNTOLD if smoke_test.verdict() else PASSED
    except NotFiniteError:
        return NOT_FINITE
    except TrainingError:
        return FAILED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    output: Path | None = arguments.output
    rates: dict[str, dict[str, Counts]] = {}
    if output and output.exists():
        rates = json.loads(output.read_text())["networks"]
    for name in arguments.names or names():
        own = rates.setdefault(name, {})
        for kind in arguments.kinds:
            if sum(own.get(kind, {}).values()) < arguments.seeds:
                own[kind] = counted(name, kind, arguments.seeds)
        print(f"{name:40} {shown(own)}", flush=True)
        if output:
            figures = {"torch": torch.__version__, "all": total(rates), "networks": rates}
            output.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{'all':40} {shown(total(rates))}")


def counted(name: str, kind: str, seeds: int) -> Counts:
    """How often each verdict was reached; seed by seed the next optimizer."""
    optimizers = list(OPTIMIZERS)
    return Counter(
        verdict(name, optimizers[seed % len(optimizers)], seed, kind) for seed in range(seeds)
    )


def total(rates: dict[str, dict[str, Counts]]) -> dict[str, Counts]:
    """Over all networks."""
    whole: dict[str, Counter[str]] = {}
    for own in rates.values():
        for kind, counts in own.items():
            whole.setdefault(kind, Counter()).update(counts)
    return dict(whole)


def shown(rates: dict[str, Counts]) -> str:
    """`sound: 20 passed | shuffled: 19 failed, 1 passed`, in words."""
    return " | ".join(
        f"{kind}: " + ", ".join(f"{count} {what}" for what, count in counts.items())
        for kind, counts in rates.items()
    )


if __name__ == "__main__":
    main()
