"""Measure one training epoch of SimpleCNN on CIFAR-10: the launcher against two plain scripts.

    python benchmarks/epoch.py --root FOLDER

FOLDER holds torchvision's cifar-10-batches-py; `--root ""` takes the embedded synthetic set, and
`--steps N` an epoch of N steps. All three train the model of recipes/simplecnn.py with its
optimizer and its batch of 64, in fp32 and in bf16 autocast, evaluation excluded:

    tutorial  torchvision's DataLoader, ToTensor and Normalize, the loop of PyTorch's tutorial
    bare      uint8 images in memory, gathered by index and normalized per batch, channels_last
              memory, no `.item()` in the loop: a fast plain script for this job
    launcher  `train_epoch` of launcher/training/loop.py, as `fit` runs it

They take turns of 39 steps, after which the launcher reports by itself when an epoch has 782: the
noise of a machine outlasts such a turn and meets them alike. A round is one epoch of each; compare
ratios, not images per second of different runs. Each keeps its model over the rounds and is warmed
up before the first. Before that, bare and launcher train from the same weights in the same order,
and their losses are compared. Prints a table and writes all figures to epoch.json beside this file.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.competitors import Bare, Launched, Tutorial
from benchmarks.turns import Figures, Parted, parted_epochs
from launcher import Synthetic
from launcher.config import loader
from launcher.config.overrides import override
from launcher.config.recipe import Recipe
from launcher.config.slots import Precision
from launcher.data import sources
from launcher.data.batches import epoch_order
from launcher.data.images import Data, ImageSet
from launcher.distributed.accelerator import create_accelerator, device_name
from launcher.distributed.world import World
from launcher.errors import UserError

FOLDER = Path(__file__).resolve().parent
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
WARM_UP_STEPS = 50
COMPARED_STEPS = 20
TURN = 39  # steps


def largest_difference(bare: Bare, launched: Launched, images: ImageSet) -> float:
    """Train both from their first weights in the same order; the largest gap between losses."""
    order = epoch_order(launched.ctx.recipe.seed, 1, len(images))
    losses = [float(loss.detach()) for loss in bare.losses(images, order)]
    pairs = zip(losses, launched.reports(images, log_every=1), strict=True)
    return max(abs(loss - report.loss) for loss, report in pairs)


def opened(name: str, root: str, *overrides: str) -> tuple[Recipe, Data]:
    """A recipe of this repository and its images; without a root, the embedded ones."""
    recipe = loader.load(FOLDER.parent / "recipes" / f"{name}.py").recipe
    recipe = override(recipe, overrides)
    source = CIFAR10 if root else Synthetic
    recipe = replace(recipe, data=replace(recipe.data, root=root, source=source, fallback=None))
    try:
        return recipe, sources.load(recipe.data)
    except UserError as error:
        raise SystemExit(str(error)) from None


def first_steps(images: ImageSet, recipe: Recipe, steps: int) -> ImageSet:
    """The images of so many steps: a short epoch of its own."""
    count = steps * recipe.data.batch_size
    return ImageSet(images.tensor[:count], images.labels[:count], images.classes)


def measure(recipe: Recipe, data: Data, rounds: int, accelerator: Accelerator) -> Figures:
    """All figures of one precision."""
    device = accelerator.device
    tutorial, bare = Tutorial(recipe, device), Bare(recipe, device)
    launched = Launched(recipe, data, accelerator)
    compared = first_steps(data.train, recipe, COMPARED_STEPS).to(device)
    difference = largest_difference(bare, launched, compared)

    def competitors(images: ImageSet) -> dict[str, Parted]:
        here = images.to(device)
        return {
            "tutorial": partial(tutorial.parts, images, TURN),
            "bare": partial(bare.parts, here, TURN),
            "launcher": partial(launched.parts, here, TURN),
        }

    parted_epochs(competitors(first_steps(data.train, recipe, WARM_UP_STEPS)), 1, rounds=1)
    figures = parted_epochs(competitors(data.train), len(data.train), rounds)
    return {**figures, "compared_steps": COMPARED_STEPS, "largest_loss_difference": difference}


def measure_all(recipe: Recipe, data: Data, rounds: int) -> Figures:
    """The figures of every precision, and of the machine. Accelerate knows one precision a time."""
    figures: Figures = {}
    for precision in PRECISIONS:
        accelerator = create_accelerator(precision, World.of_this_process())
        chosen = replace(recipe, precision=precision, epochs=rounds + 2)
        figures.setdefault("machine", machine(accelerator))  # before any load of our own
        figures[precision] = measure(chosen, data, rounds, accelerator)
        print_table(precision, figures[precision])
        type(accelerator.state)._reset_state(reset_partial_state=True)
    return figures


def machine(accelerator: Accelerator) -> Figures:
    """What the figures were measured on, without the names that it has for its owner."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device_name(accelerator),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def processor_name() -> str:
    """The processor as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_table(precision: str, figures: Figures) -> None:
    """One line per competitor, then the ratios."""
    print(f"\n{precision:<10}{'images/s':>9}   of each round")
    for name, speeds in figures["images_per_second"].items():
        print(f"{name:<10}{figures['median'][name]:>9,}   {' '.join(f'{v:,}' for v in speeds)}")
    print(f"launcher/bare {figures['launcher/bare']:.3f}", end=", ")
    print(f"launcher/tutorial {figures['launcher/tutorial']:.2f}", end=", ")
    print(f"largest difference of a loss {figures['largest_loss_difference']:.1e}", flush=True)


def parse_words() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", required=True, help="folder of CIFAR-10; empty for Synthetic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of an epoch; all images by default")
    parser.add_argument("--output", type=Path, default=FOLDER / "epoch.json")
    words = parser.parse_args()
    if words.root and not Path(words.root).is_dir():
        parser.error(f"--root {words.root}: no such folder")
    return words


def main() -> None:
    """Measure, print and write."""
    words = parse_words()
    recipe, data = opened("simplecnn", words.root)
    if words.steps:
        data = replace(data, train=first_steps(data.train, recipe, words.steps))
    steps = f" --steps {words.steps}" if words.steps else ""
    figures: Figures = {
        "command": f"python benchmarks/epoch.py --root FOLDER --rounds {words.rounds}{steps}",
        "date": date.today().isoformat(),
        "data": data.name,
        "images": len(data.train),
        "batch_size": recipe.data.batch_size,
        **measure_all(recipe, data, words.rounds),
    }
    words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"\n{words.output}")


if __name__ == "__main__":
    main()
