"""Check and measure the launcher on a GPU machine, in one call of less than ten minutes.

    python benchmarks/gpu.py --root FOLDER --seeds 10 --peer airbench94_muon.py

FOLDER holds torchvision's cifar-10-batches-py; without it, embedded images (accuracies then mean
nothing). `--parts` chooses among, and runs in this order:

    checks       half precision learns, compiling and CUDA graphs change no loss, equal runs are
                 equal bit by bit, resume is exact, two ranks on one card with SyncBatchNorm are
                 one; all on embedded images (checks.py; `pytest -m gpu` runs the same)
    simplecnn    images per second of recipes/simplecnn.py beside a bare loop (competitors.py)
    speedrun94   seconds and accuracy of recipes/speedrun94.py over seeds; the same of the record's
                 own script, if `--peer` names it; use of the device; where the time goes
    resnet18     images per second of recipes/resnet18.py, beside a bare loop and by itself, use of
                 the device, accuracies over seeds
    speedrun96   the same of recipes/speedrun96.py; only on demand, in a call of its own

The clock of speedrun94 is the record's: it runs over the data-dependent initialization, all
training steps and one evaluation with test-time augmentation, and not over the compilation (a
whole training comes first, thrown away), the loading of the images, or evaluations between epochs.
The seconds of the training alone are given as well. Like the record's script, all seeds use one
compiled network, which gets fresh weights.

Use of the device (MFU) is the arithmetic of the training step, as torch counts it, over the time
of a step and the rate of a large matrix product in half precision, measured here.

`--seconds PART=N ...` limits parts, `--set NAME=VALUE ...` changes settings of the recipes that
are trained over seeds: choose one of them by `--parts`. The results are written to `--output` after
each part.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.nn.functional import cross_entropy
from torchvision.datasets import CIFAR10

from benchmarks.checks import CHECKS
from benchmarks.competitors import Bare, Launched
from benchmarks.epoch import first_steps, machine
from benchmarks.record import run_peer
from benchmarks.trainer import (
    Trainer,
    fresh_accelerator,
    profiled,
    spread,
    timed,
    use_of_device,
)
from benchmarks.turns import whole_epochs
from launcher import Recipe, Synthetic
from launcher.config import loader
from launcher.config.overrides import override
from launcher.config.slots import CompileMode
from launcher.data import sources
from launcher.data.sources import Data

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SECONDS = {"checks": 70, "simplecnn": 80, "speedrun94": 260, "resnet18": 180, "speedrun96": 560}

Figures = dict[str, Any]


def load(name: str, words: argparse.Namespace, *overrides: str) -> tuple[Recipe, Data]:
    """A recipe of this repository and its images; all of it small in a rehearsal."""
    recipe = override(loader.load(RECIPES / f"{name}.py").recipe, overrides)
    source = CIFAR10 if words.root else partial(Synthetic, count=words.count)
    images = replace(recipe.data, source=source, root=words.root, fallback=None)
    if words.preflight:
        images = replace(images, batch_size=min(images.batch_size, 100))
        slim = (
            ("model.widths=(16,32,32)", "precision=pure_bf16")
            if name.startswith("speedrun")
            else ()
        )
        recipe = override(replace(recipe, compile=False, epochs=2), slim)
    return replace(recipe, data=images), sources.load(images)


def checks(words: argparse.Namespace, deadline: float) -> Figures:
    """Raise nothing: a check that fails is a `false` in the results."""
    return {name: check() for name, check in CHECKS.items()}


def simplecnn(words: argparse.Namespace, deadline: float) -> Figures:
    """See `beside_bare`; in both precisions."""
    figures: Figures = {}
    for precision in ("bf16", "fp32"):
        recipe, data = load("simplecnn", words, f"precision={precision}")
        figures[precision] = beside_bare(recipe, data, words)
    return figures


def beside_bare(recipe: Recipe, data: Data, words: argparse.Namespace) -> Figures:
    """Images per second, evaluation excluded, of what the bare loop does too; they take turns."""
    plain = replace(recipe.data, augment=())
    recipe = replace(recipe, data=plain, loss=cross_entropy, compile=False, epochs=1000)
    accelerator = fresh_accelerator(recipe.precision or "fp32")
    images = data.train.to(accelerator.device)
    racers: dict[str, Bare | Launched] = {"bare": Bare(recipe, accelerator.device)}
    modes: dict[str, bool | CompileMode] = {"launcher": False}
    if not words.preflight:
        modes |= {"launcher compiled": True, "launcher with CUDA graphs": "reduce-overhead"}
    for name, mode in modes.items():
        racers[name] = Launched(replace(recipe, compile=mode), data, accelerator)
    for racer in racers.values():
        racer.epoch(first_steps(images, recipe, 50))
        racer.epoch(images)  # also the shape of the last batch
    runs = {name: partial(racer.epoch, images) for name, racer in racers.items()}
    return whole_epochs(runs, len(images), words.rounds)


def speedrun94(words: argparse.Namespace, deadline: float) -> Figures:
    """Time and accuracy over seeds, then the record's script, then where the time goes."""
    recipe, data = load("speedrun94", words, *words.set)
    trainer = Trainer(recipe, data)
    warm_up = once(trainer, seed=10_000)
    figures: Figures = {"settings": words.set, "compile_seconds": warm_up["seconds"]}
    until = deadline - (deadline - time.perf_counter()) * (0.5 if words.peer else 0.15)
    figures["runs"] = [once(trainer, 0), *seeds_until(until, trainer, range(1, words.seeds))]
    figures |= summary(figures["runs"])
    figures["use_of_device"] = use_of_device(trainer, figures["train_seconds"]["mean"])
    figures["logging_every_step"] = once(trainer, seed=1, log_every=1)
    figures["profile"] = profiled(trainer)
    if words.peer:
        figures["peer"] = run_peer(words.peer, data, deadline - time.perf_counter(), words.seeds)
    return figures


def seeds_until(until: float, trainer: Trainer, seeds: range) -> list[Figures]:
    """A training for each seed, as far as they begin before that time."""
    return [once(trainer, seed) for seed in seeds if time.perf_counter() < until]


def once(trainer: Trainer, seed: int, log_every: int | None = None) -> Figures:
    """One training by the record's clock; the plain accuracy comes after it."""
    trainer.renew(seed)
    train_seconds, reports = timed(lambda: list(trainer.epochs(log_every)))
    tta_seconds, with_tta = timed(lambda: trainer.accuracy(with_views=True))
    return {
        "seed": seed,
        "seconds": train_seconds + tta_seconds,
        "train_seconds": train_seconds,
        "accuracy": trainer.accuracy(with_views=False),
        "accuracy_tta": with_tta,
        "last_train_loss": reports[-1].loss,
    }


def summary(runs: list[Figures]) -> Figures:
    """Mean and standard deviation of every figure."""
    names = [name for name in runs[0] if name != "seed"] if runs else []
    return {name: spread([run[name] for run in runs]) for name in names}


def resnet18(words: argparse.Namespace, deadline: float) -> Figures:
    """See `beside_bare` and `trainings`."""
    compared = beside_bare(*load("resnet18", words, *words.set), words)
    return {"beside_bare": compared, **trainings("resnet18", words, deadline)}


def speedrun96(words: argparse.Namespace, deadline: float) -> Figures:
    """See `trainings`."""
    return trainings("speedrun96", words, deadline)


def trainings(name: str, words: argparse.Namespace, deadline: float) -> Figures:
    """Images per second after compilation; then as many whole trainings as there is time for."""
    recipe, data = load(name, words, *words.set)
    if words.preflight:
        data = replace(data, train=first_steps(data.train, recipe, 1))
    trainer = Trainer(recipe, data)
    trainer.renew(0)
    compile_seconds, _ = timed(lambda: list(trainer.epochs(last=1)))
    seconds, _ = timed(lambda: list(trainer.epochs(last=1)))
    needed = seconds * recipe.epochs * 1.1 + 5
    runs = seeds_until(deadline - needed, trainer, range(words.seeds))
    return {
        "settings": words.set,
        "first_epoch_seconds": compile_seconds,
        "images_per_second": len(trainer.ctx.data.train) / seconds,
        "use_of_device": use_of_device(trainer, seconds * recipe.epochs),
        "epochs": recipe.epochs,
        "runs": runs,
        **summary(runs),
    }


PARTS = {part.__name__: part for part in (checks, simplecnn, speedrun94, resnet18, speedrun96)}


def parse_words() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--root", default="", help="folder of CIFAR-10; embedded images by default")
    add("--parts", type=lambda text: text.split(","), default=list(PARTS)[:4])
    add("--seconds", nargs="*", default=[], metavar="PART=N", help=f"default: {SECONDS}")
    add("--seeds", type=int, default=10)
    add("--rounds", type=int, default=5, help="beside the bare loop")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of recipes")
    add("--peer", type=Path, help="the record's script, airbench94_muon.py")
    add("--count", type=int, default=50_000, help="embedded images")
    add("--preflight", action="store_true", help="tiny and uncompiled, for a machine without GPU")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    if unknown := set(words.parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    return words


def main() -> None:
    """Run the parts; a part that fails leaves its error in the results and the next one runs."""
    words = parse_words()
    limits = SECONDS | {name: int(n) for name, _, n in (w.partition("=") for w in words.seconds)}
    figures: Figures = {"command": " ".join(["python", *sys.argv])}
    figures["machine"] = machine(fresh_accelerator("fp32"))
    for name in [part for part in PARTS if part in words.parts]:
        started = time.perf_counter()
        try:
            figures[name] = PARTS[name](words, started + limits[name])
        except Exception as error:
            import traceback

            traceback.print_exc()
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
        figures[name]["part_seconds"] = round(time.perf_counter() - started, 1)
        words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(figures[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
