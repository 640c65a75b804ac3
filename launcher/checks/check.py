"""`launcher check RECIPE`: the network layer by layer, and the recipe's own functions, untrained.

Where the shape of the images is known without their files, nothing is read. One verdict line for
each question; exit code 0, or 2 where one of them is answered by a mistake.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from launcher import run
from launcher.checks.layers import Layer, walk
from launcher.checks.mistakes import find_mistake
from launcher.checks.verdicts import (
    Deadline,
    Verdict,
    as_json,
    closing_line,
    exit_code,
    make_console,
    show,
)
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.recipe import Recipe
from launcher.data import sources
from launcher.data.sources import Data
from launcher.errors import UserError
from launcher.training.model import build_network, two_images
from launcher.utils.arguments import Parser, seconds
from launcher.utils.text import count

IMAGES = 64  # of the embedded set, in place of the recipe's own
LIMIT = 60.0  # seconds
_USAGE = "launcher check RECIPE [name=value ...] [--json]"
_DESCRIPTION = "Try a recipe's network and functions on two images, in seconds."

Load = Callable[[str, list[str]], LoadedRecipe]


@dataclass(frozen=True)
class Report:
    """What was found: the layers of the network, and an answer to each question."""

    layers: tuple[Layer, ...]
    verdicts: tuple[Verdict, ...]


def main(words: Sequence[str], load: Load) -> int:
    """Run the words behind `launcher check`; `load` makes the recipe of a path and overrides."""
    parser = Parser(prog="launcher check", usage=_USAGE, description=_DESCRIPTION)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="for machines: one JSON object")
    limit = "seconds that it may take (default: %(default)g)"
    parser.add_argument("--limit", type=seconds, default=LIMIT, metavar="SECONDS", help=limit)
    arguments = parser.parse_intermixed_args(words)
    if not arguments.words:
        parser.error("no recipe is named")
    deadline = Deadline(arguments.limit)
    loaded = load(arguments.words[0], arguments.words[1:])
    report = check(loaded)
    if arguments.json:
        about = {"recipe": loaded.name, "layers": [layer.as_dict() for layer in report.layers]}
        sys.stdout.write(as_json(about, report.verdicts, deadline) + "\n")
    else:
        _show(loaded.name, report)
        sys.stdout.write(closing_line(deadline) + "\n")
    return exit_code(report.verdicts)


def check(loaded: LoadedRecipe) -> Report:
    """Answer each question about a recipe, on the CPU."""
    recipe = loaded.recipe
    data = _few_images(recipe)
    torch.manual_seed(recipe.seed)
    layers: tuple[Layer, ...] = ()
    verdicts = []
    try:
        network = recipe.model()
        images = two_images(network, recipe, data.train, "contiguous")
        walked = walk(network, images)
        layers = tuple(walked.layers)
        mistake = find_mistake(walked, len(data.train.classes))
    except Exception:
        mistake = None  # which building it again puts into words
    if mistake:
        verdicts.append(Verdict("network", mistake.what, "wrong", mistake.instead))
    else:
        verdicts.extend(_of_recipe(loaded, data, layers))
    return Report(layers, tuple(verdicts))


def _few_images(recipe: Recipe) -> Data:
    """Embedded ones of the same shape and classes; the recipe's own where these are not known."""
    try:
        images = sources.stand_in(recipe.data, IMAGES)
    except UserError:
        images = recipe.data
    return sources.load(images)


def _of_recipe(loaded: LoadedRecipe, data: Data, layers: tuple[Layer, ...]) -> Iterator[Verdict]:
    recipe = loaded.recipe
    size = min(recipe.data.batch_size, len(data.train))
    recipe = replace(recipe, data=replace(recipe.data, batch_size=size), accumulate=1)
    try:
        network = build_network(recipe, data.train)
        plan = run.plan_for(replace(loaded, recipe=recipe), data, RunOptions(), 1)
        yield Verdict("network", _cost(layers))
        run.preflight_anywhere(recipe, plan, network, data)
        yield Verdict("functions", "optimizer, schedule, augmentation and loss take what they get")
    except UserError as error:
        known = f"{error.given}; expected {error.expected}"
        yield Verdict("recipe", known, "wrong", error.instead)


def _cost(layers: tuple[Layer, ...]) -> str:
    parameters = sum({layer.module: layer.parameters for layer in layers}.values())
    flops = sum(layer.flops for layer in layers)
    activations = sum(layer.activations for layer in layers)
    return (
        f"{count(len(layers), 'layer')}, {parameters:,} parameters in them; for one image "
        f"{flops / 1e6:.1f} MFLOPs forwards and {activations / 1024:,.0f} KiB of activations"
    )


def _show(name: str, report: Report) -> None:
    console = make_console()
    table = Table(title=f"launcher check: {name}", title_justify="left")
    for column in ("layer", "kind", "makes", "parameters", "MFLOPs", "KiB"):
        is_number = column in ("parameters", "MFLOPs", "KiB")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=not is_number)
    for layer in report.layers:
        table.add_row(
            *(layer.name or "the network", layer.kind, layer.describe_made()),
            *(f"{layer.parameters:,}", f"{layer.flops / 1e6:.2f}"),
            f"{layer.activations / 1024:,.1f}",
        )
    if report.layers:
        console.print(table)
    for verdict in report.verdicts:
        show(verdict, console)
