"""Check and measure the launcher on a GPU machine, in calls of less than ten minutes.

These four, in this order, on a machine that keeps its files between them; PEERS is a folder with
the records' scripts (see record.py), FOLDER holds torchvision's cifar-10-batches-py:

    python benchmarks/gpu.py --root FOLDER --parts speedrun94 --beside candidate --warm-up
        --peer PEERS/cifar10_speedrun.py PEERS/airbench94_muon.py --output build/warm.json
    python benchmarks/gpu.py --root FOLDER --parts speedrun94 --beside candidate --seeds 10
        --peer PEERS/cifar10_speedrun.py PEERS/airbench94_muon.py --output build/94.json
    python benchmarks/gpu.py --root FOLDER --parts checks,simplecnn,resnet18
        --output build/rest.json
    python benchmarks/gpu.py --root FOLDER --parts speedrun96 --seeds 10
        --peer PEERS/airbench96_faster.py --output build/96.json

The first compiles everything, for up to 570 s, into torch's cache, which the second then finds:
that takes 3 to 5 minutes, the third 6, the last 9. Before a GPU is at hand, each of them with
`--preflight --count 2000` on a CPU: tiny and not compiled. What compiling costs at a second start
is measured by compiling.py. Without `--root` the images are embedded ones, whose accuracies mean
nothing.

`--parts` chooses among, and runs in this order:

    checks       half precision learns, compiling and CUDA graphs change no loss, equal runs are
                 equal bit by bit, resume is exact, two ranks on one card with SyncBatchNorm are
                 one; all on embedded images (checks.py; `pytest -m gpu` runs the same)
    simplecnn    images per second of recipes/simplecnn.py beside a bare loop (competitors.py) and
                 one whose steps are CUDA graphs (graphs.py)
    speedrun94   seconds and accuracy of recipes/speedrun94.py over seeds; use of the device; where
                 the time goes
    resnet18     images per second and use of the device of recipes/resnet18.py, beside a bare loop
                 and by itself, accuracies over seeds
    speedrun96   as speedrun94; only on demand, in a call of its own

In speedrun94 and speedrun96 the recipes that `--beside` names (candidate.py is one) and the
records' scripts that `--peer` names (those with 96 in their names in speedrun96) take turns with
the recipe: one run of each, and again in another order, each round with another seed.

The clock is the records': it runs over the data-dependent initialization, all training steps and
one evaluation with test-time augmentation, and not over the compilation (a whole training comes
first, thrown away), the loading of the images, or evaluations between epochs. The seconds of the
training alone are given as well. Like the records' scripts, all seeds use one compiled network,
which gets fresh weights.

Use of the device (MFU) is the arithmetic of the training step, as torch counts it, over the time of
a step and the rate of a large matrix product in half precision, measured here.

`--seconds PART=N ...` limits parts, `--set NAME=VALUE ...` changes settings of the recipes that are
trained over seeds: choose one of them by `--parts`. The results are written to `--output` after
each part, and those of a race after each round.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
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
from benchmarks.graphs import OneGraph, largest_difference
from benchmarks.record import Peer
from benchmarks.trainer import Trainer, fresh_accelerator, profiled, spread, timed, use_of_device
from benchmarks.turns import ratio, rotated, whole_epochs
from launcher import Recipe, Synthetic
from launcher.config import loader
from launcher.config.overrides import override
from launcher.config.slots import CompileMode
from launcher.data import sources
from launcher.data.images import Data

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SECONDS = {"checks": 70, "simplecnn": 80, "speedrun94": 570, "resnet18": 300, "speedrun96": 570}
GRAPH = "the step as one CUDA graph"  # see graphs.py
REST = 60  # seconds that a race leaves for the profile of the recipe

Figures = dict[str, Any]
Turn = Callable[[int, float], Figures]  # of a seed, within so many seconds


def load(name: str, words: argparse.Namespace, *overrides: str) -> tuple[Recipe, Data]:
    """A recipe of this repository and its images; all of it small in a rehearsal."""
    path = RECIPES / f"{name}.py"
    path = path if path.is_file() else Path(__file__).with_name(f"{name}.py")
    recipe = override(loader.load(path).recipe, overrides)
    source = CIFAR10 if words.root else partial(Synthetic, count=words.count)
    images = replace(recipe.data, source=source, root=words.root, fallback=None)
    if words.preflight:
        images = replace(images, batch_size=min(images.batch_size, 100))
        slim = (
            ("model.widths=(16,32,32)", "precision=bf16")
            if name not in ("simplecnn", "resnet18")
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
    if words.preflight:
        data = replace(data, train=first_steps(data.train, recipe, 2))
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
    few = first_steps(images, recipe, 50)

    def warm_up(racer: Bare | Launched) -> None:
        racer.epoch(few)
        racer.epoch(images)  # also the shape of the last batch

    for racer in racers.values():
        warm_up(racer)
    try:
        warm_up(graph := OneGraph(recipe, data, accelerator))
        racers[GRAPH] = graph
        apart = largest_difference(recipe, data, accelerator, few)
        about_graph: Figures = {f"{GRAPH}: largest difference of the first losses": apart}
    except RuntimeError as error:  # it has not run on a GPU yet
        about_graph = {f"{GRAPH}: failed": str(error)}
    runs = {name: partial(racer.epoch, images) for name, racer in racers.items()}
    return whole_epochs(runs, len(images), words.rounds) | about_graph


def speedrun94(words: argparse.Namespace, deadline: float) -> Figures:
    """See `race`; then where the time goes."""
    figures, trainer = race("speedrun94", words, deadline)
    if not words.warm_up and time.perf_counter() < deadline - REST / 2:
        figures["logging_every_step"] = once(trainer, seed=1, log_every=1)
        figures["profile"] = profiled(trainer)
    return figures


def race(name: str, words: argparse.Namespace, deadline: float) -> tuple[Figures, Trainer]:
    """Trainings of a recipe over seeds, in turns with those beside it; and its trainer."""
    trainers = {each: trainer_of(each, words) for each in (name, *words.beside)}
    data = load(name, words, *words.set)[1]
    peers: list[Peer] = []
    turns: dict[str, Turn] = {}
    figures: Figures = {"settings": words.set, "compile_seconds": {}}

    def warm_up(racer: str, turn: Turn) -> None:
        seconds, first = timed(lambda: turn(10_000, deadline - time.perf_counter()))
        figures["compile_seconds"][racer] = round(seconds, 1)
        if "failed" in first:
            figures[f"{racer} failed"] = first["failed"]
        else:
            turns[racer] = turn
        words.keep(name, figures)

    try:
        for each, trainer in trainers.items():
            if each == name or time.perf_counter() < deadline:
                warm_up(each, turn_of(trainer))
        for script in words.peer:
            if ("96" in script.stem) == ("96" in name) and time.perf_counter() < deadline:
                peer = Peer(script, data, cpu_epochs=1 if words.preflight else None)
                peers.append(peer)
                warm_up(peer.name, partial(turn_of_peer, peer))
        if not words.warm_up:
            figures |= rounds(name, turns, words, deadline - REST)
            seconds = figures["train_seconds"]["mean"]
            figures["use_of_device"] = use_of_device(trainers[name], seconds)
    finally:
        for peer in peers:
            peer.end()
    return figures, trainers[name]


def trainer_of(name: str, words: argparse.Namespace) -> Trainer:
    """Of a recipe; in a rehearsal for a few steps."""
    recipe, data = load(name, words, *words.set)
    if words.preflight:
        data = replace(data, train=first_steps(data.train, recipe, 2))
    return Trainer(recipe, data)


def turn_of(trainer: Trainer) -> Turn:
    """Of a recipe of ours, which takes the time that it takes."""
    return lambda seed, seconds: once(trainer, seed)


def turn_of_peer(peer: Peer, seed: int, seconds: float) -> Figures:
    """Of a script, which chooses its own seeds."""
    return peer.turn(seconds)


def rounds(name: str, turns: dict[str, Turn], words: argparse.Namespace, until: float) -> Figures:
    """A run of each in each round, as far as a round as long as the last one fits."""
    runs: dict[str, list[Figures]] = {racer: [] for racer in turns}
    figures: Figures = {}
    last = 0.0
    for seed in range(words.seeds):
        if seed and time.perf_counter() + last > until:
            break
        started = time.perf_counter()
        order, end = rotated(list(turns), seed), until + REST
        made = {racer: turns[racer](seed, end - time.perf_counter()) for racer in order}
        last = time.perf_counter() - started
        failed = [racer for racer, run in made.items() if "failed" in run]
        for racer in failed:
            figures[f"{racer} failed"] = made[racer]["failed"]
            del turns[racer]
        for racer in turns:
            runs[racer].append(made[racer])
        figures |= raced(name, runs)
        words.keep(name, figures)
    return figures


def raced(name: str, runs: dict[str, list[Figures]]) -> Figures:
    """The figures of the recipe, and of those beside it with the ratio of the times."""
    beside: Figures = {}
    seconds = [run["seconds"] for run in runs[name]]
    for racer, own in runs.items():
        if racer != name and own:
            theirs = [run["seconds"] for run in own]
            beside[racer] = {"runs": own, **summary(own)}
            beside[racer][f"seconds of {name} / {racer}"] = ratio(seconds[: len(theirs)], theirs)
    return {"runs": runs[name], **summary(runs[name]), "beside": beside}


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
    """See `beside_bare` and `trainings`; the use of the device follows from both."""
    compared = beside_bare(*load("resnet18", words, *words.set), words)
    figures = {"beside_bare": compared, **trainings("resnet18", words, deadline)}
    device = figures["use_of_device"]
    figures["mfu"] = {
        racer: images * device["flops_per_image"] / device["matmul_tflops"] / 1e12
        for racer, images in compared["median"].items()
    }
    return figures


def speedrun96(words: argparse.Namespace, deadline: float) -> Figures:
    """See `race`."""
    figures, trainer = race("speedrun96", words, deadline)
    return figures | {"epochs": trainer.recipe.epochs}


def trainings(name: str, words: argparse.Namespace, deadline: float) -> Figures:
    """Images per second after compilation; then as many whole trainings as there is time for."""
    trainer = trainer_of(name, words)
    recipe = trainer.recipe
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
    add("--beside", nargs="*", default=[], metavar="RECIPE", help="recipes that take turns")
    add("--peer", nargs="*", type=Path, default=[], help="the records' scripts, which take turns")
    add("--warm-up", action="store_true", help="only compile what takes turns")
    add("--count", type=int, default=50_000, help="embedded images")
    add("--preflight", action="store_true", help="tiny and uncompiled, for a machine without GPU")
    add("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    if unknown := set(words.parts) - set(PARTS):
        parser.error(f"--parts {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    if missing := [str(script) for script in words.peer if not script.is_file()]:
        parser.error(f"--peer {' '.join(missing)}: no such file")
    return words


def main() -> None:
    """Run the parts; a part that fails leaves its error in the results and the next one runs."""
    words = parse_words()
    limits = SECONDS | {name: int(n) for name, _, n in (w.partition("=") for w in words.seconds)}
    figures: Figures = {"command": " ".join(["python", *sys.argv])}
    figures["machine"] = machine(fresh_accelerator("fp32"))

    def keep(name: str, part: Figures) -> None:
        figures[name] = figures.get(name, {}) | part
        words.output.parent.mkdir(parents=True, exist_ok=True)
        words.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    words.keep = keep
    for name in [part for part in PARTS if part in words.parts]:
        started = time.perf_counter()
        try:
            made = PARTS[name](words, started + limits[name])
        except Exception as error:
            import traceback

            traceback.print_exc()
            made = {"failed": f"{type(error).__name__}: {error}"}
        keep(name, made | {"part_seconds": round(time.perf_counter() - started, 1)})
        print(name, json.dumps(figures[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
