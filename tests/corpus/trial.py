"""One network of the corpus, taken through training, two ranks, an interruption and evaluation.

`python -m tests.corpus.trial [NAME ...]` prints what came of it as a table, for all or for some.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.corpus import recipe
from tests.corpus.classical import CLASSICAL
from tests.support.processes import Run, fingerprint

RECIPE = Path(recipe.__file__)
# Of losses, whose sums 1 rank and 2 round differently: in float64, and in float32 for the networks
# of libraries, since float64 takes them minutes.
CLOSE, CLOSE_SINGLE = 1e-9, 1e-4
STEPS = 3


@dataclass(frozen=True)
class Trial:
    """What one network did."""

    memory: str  # the memory format that was chosen
    losses: dict[int, tuple[float, float]]  # of training and test, by the number of ranks
    images: int  # test images that 2 ranks counted
    resumes: bool  # whether an interrupted run of 2 ranks ended with the same bits


def try_network(name: str, folder: Path) -> Trial:
    """Train on 1 rank and on 2, there once in one piece and once in two."""
    words = [f"model.name={name}", f"model.double={name in CLASSICAL}"]
    words += [f"data.source.size={size_of(name)}"]
    for run, ranks in (("one", 1), ("two", 2)):
        train(folder, ranks, *words, "--name", run)
    train(folder, 2, *words, "--name", "pieces", "--max-steps", str(STEPS - 1))
    train(folder, 2, *words, "--name", "pieces", "--resume")
    runs = folder / "runs"
    one, two = (json.loads((runs / run / "metrics.jsonl").read_text()) for run in ("one", "two"))
    return Trial(
        memory=json.loads((runs / "one" / "run.json").read_text())["memory"],
        losses={1: losses_of(one), 2: losses_of(two)},
        images=two["test/images"],
        resumes=fingerprint(runs / "two") == fingerprint(runs / "pieces"),
    )


def size_of(name: str) -> int:
    """Of the images that it is tried with, in pixels."""
    library, _, own_name = name.partition("/")
    if library == "torchvision":
        from tests.corpus.libraries import TORCHVISION

        return TORCHVISION[own_name][1]
    return 32


def train(folder: Path, ranks: int, *words: str) -> None:
    run = Run(ranks, folder, *words, recipe=RECIPE)
    assert run.end() == 0, run.text()


def losses_of(metrics: dict[str, float]) -> tuple[float, float]:
    return metrics["train/loss"], metrics["test/loss"]


def is_same_on_each_rank(name: str) -> bool:
    """Whether the scores of an image depend on that image alone: neither BatchNorm nor dropout."""
    torch.manual_seed(0)
    network = recipe.network(name, double=True)
    size = size_of(name)
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    network.eval()(images)  # lazy layers find their sizes
    network.train()
    together = network(images)
    try:
        apart = torch.cat([network(images[:1]), network(images[1:])])
    except ValueError:  # BatchNorm of one image with one pixel
        return False
    return torch.allclose(together, apart, rtol=0, atol=CLOSE)


def agrees(name: str, trial: Trial) -> bool:
    """Whether 1 rank and 2 ranks have the same losses."""
    pairs = zip(trial.losses[1], trial.losses[2], strict=True)
    close = CLOSE if name in CLASSICAL else CLOSE_SINGLE
    return all(abs(one - two) < close for one, two in pairs)


def names() -> list[str]:
    """All of them."""
    from tests.corpus.libraries import TIMM, TORCHVISION

    libraries = [f"torchvision/{name}" for name in TORCHVISION] + [f"timm/{name}" for name in TIMM]
    return [*CLASSICAL, *libraries]


def main() -> None:
    print("| network | 1 rank | 2 ranks | resume | memory format |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or names():
        with tempfile.TemporaryDirectory() as folder:
            try:
                trial = try_network(name, Path(folder))
            except AssertionError as error:
                print(f"| {name} | FAILED: {error} |", flush=True)
                continue
        same = "the same" if agrees(name, trial) else "THEY DIFFER"
        if not is_same_on_each_rank(name):
            same = "trains; BatchNorm or dropout"
        resumes = "to the bit" if trial.resumes else "OTHER BITS"
        one = f"{trial.losses[1][0]:.4f}"
        print(f"| {name} | {one} | {same} | {resumes} | {trial.memory} |", flush=True)


if __name__ == "__main__":
    main()
