"""`launcher check RECIPE`: mistakes of a recipe, and what it costs, before it is trained.

One verdict line for each question; exit code 0, or 2 where one of them is answered by a mistake.
Nothing is downloaded; where the images are not on the disk, embedded ones of their shape are used.
"""

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launcher.checks.check import behaviour, cost, images, learning, memory
from launcher.checks.check.layers import Layer, Walk, walk
from launcher.checks.check.mistakes import find_mistake
from launcher.checks.verdicts import (
    WIDTH,
    Deadline,
    Verdict,
    add_options,
    answers,
    as_json,
    closing_line,
    exit_code,
    show,
)
from launcher.config.loader import Load, LoadedRecipe
from launcher.config.plan import Plan, make_plan
from launcher.data import sources
from launcher.data.images import Data
from launcher.data.validation import count_held_out
from launcher.errors import UserError
from launcher.run.prepare import dry_context
from launcher.training.model import build_network
from launcher.training.state import TrainContext
from launcher.training.trial_passes import two_images
from launcher.utils.arguments import Parser, positive, refuse_no_folder
from launcher.utils.terminal import COLUMNS, half_blocks, make_console, plot
from launcher.utils.text import count, sizes

IMAGES = 256  # embedded ones, in place of the recipe's own
LIMIT = 60.0  # seconds
_USAGE = "launcher check RECIPE [name=value ...] [options]"
_DESCRIPTION = "Find mistakes of a recipe, and what it costs, in seconds and before it is trained."


@dataclass
class Subject:
    """What is checked, and what the questions have found of it so far.

    `data` are the recipe's own images or, with `stands_in`, embedded ones of their shape; `walked`
    are the layers that they passed; `ctx` is a training that has passed the preflight.
    """

    loaded: LoadedRecipe
    world_size: int
    data: Data | None = None
    stands_in: bool = False
    walked: Walk | None = None
    ctx: TrainContext | None = None
    exit_stack: ExitStack = field(default_factory=ExitStack)

    @property
    def layers(self) -> list[Layer]:
        """The layers through which images went."""
        return self.walked.layers if self.walked else []

    def plan(self, data: Data) -> Plan:
        """The plan of a training on `world_size` ranks, on all images if their number is known."""
        numbers, images = (len(data.train), len(data.evaluated)), self.loaded.recipe.data
        if self.stands_in:
            numbers = sources.known_counts(images) or numbers
            if images.validation is not None and (
                n := count_held_out(numbers[0], images.validation)
            ):
                numbers = numbers[0] - n, n
        train, evaluated = numbers
        return make_plan(
            self.loaded.recipe,
            world_size=self.world_size,
            train_images=train,
            evaluated_images=evaluated,
            image_size=data.train.shape[:2],
        )


def main(words: Sequence[str], load: Load) -> int:
    """Run the words behind `launcher check`; `load` makes the recipe of a path and overrides."""
    arguments = _parse(words)
    deadline = Deadline(arguments.limit)
    loaded = load(arguments.words[0], arguments.words[1:])
    subject = Subject(loaded, arguments.world_size or 1)
    console = make_console(WIDTH)
    console.record = bool(arguments.save)
    if arguments.json:
        console.file = io.StringIO()  # `quiet` would record nothing
    console.print(f"launcher check: {loaded.name}", markup=False)
    verdicts: list[Verdict] = []
    with subject.exit_stack:
        for verdict in answers(_questions(subject, arguments), deadline):
            if subject.layers and not any(v.question == "network" for v in verdicts):
                console.print(_table(subject.layers))
            verdicts.append(verdict)
            show(verdict, console)
    if arguments.save:
        _save(subject, arguments.save, console)
    if arguments.json:
        about = {"recipe": loaded.name, "layers": [layer.as_dict() for layer in subject.layers]}
        sys.stdout.write(as_json(about, verdicts, deadline) + "\n")
    console.print(closing_line(deadline))
    return exit_code(verdicts)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="launcher check", usage=_USAGE, description=_DESCRIPTION)
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    ranks = "plan for N ranks, and predict what a step takes on them"
    add("--world-size", type=positive, metavar="N", help=ranks)
    add("--overfit", action="store_true", help="train 32 images for 100 steps: can it learn them?")
    add("--near", action="store_true", help="look for test images nearly equal to training images")
    add("--save", type=Path, metavar="FOLDER", help="write check.txt and samples.png there")
    runs = "where run folders would go: is there room? (default: %(default)s)"
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help=runs)
    add_options(parser, LIMIT)
    arguments = parser.parse_intermixed_args(words)
    if not arguments.words:
        parser.error("no recipe is named")
    if arguments.save:
        refuse_no_folder(arguments.save)
    return arguments


def _questions(
    subject: Subject, arguments: argparse.Namespace
) -> dict[str, Callable[[], Iterator[Verdict]]]:
    """In order: later questions need the results of earlier ones."""
    questions: dict[str, Callable[[], Iterator[Verdict]]] = {
        "data": partial(_data, subject, near=arguments.near),
        "network": partial(_network, subject),
        "functions": partial(_functions, subject),
        "learning": partial(_learning, subject),
        "schedule": partial(_schedule, subject),
        "cost": partial(_cost, subject, arguments.runs),
    }
    if arguments.overfit:
        questions["overfit"] = partial(_overfit, subject)
    if arguments.world_size:
        questions["ranks"] = partial(_ranks, subject)
    return questions


def _data(subject: Subject, *, near: bool) -> Iterator[Verdict]:
    wanted = subject.loaded.recipe.data
    try:
        subject.data = sources.open_on_disk(wanted, subject.loaded.recipe.seed)
    except UserError as error:
        found = [_refused("data", error)]
    else:
        missing = f"the images are not in {wanted.root!r}: embedded ones of their shape are used"
        advice = "type data.root=FOLDER, or train once, which downloads them"
        found = [Verdict("data", missing, "not asked", advice)]
    if subject.data:
        yield from images.describe_images(subject.data, wanted, near=near)
        return
    try:
        subject.data = sources.load(sources.stand_in(wanted, IMAGES))
        subject.stands_in = True
    except UserError:
        if not exit_code(found):
            found = [Verdict("data", "their shape is not known without their files", "not asked")]
    yield from found


def _network(subject: Subject) -> Iterator[Verdict]:
    recipe, data = subject.loaded.recipe, subject.data
    if data is None:
        return
    torch.manual_seed(recipe.seed)
    walked, found = None, list[Verdict]()
    # What the recipe compiles takes no hooks.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        with suppress(Exception):  # build_network below raises it in words
            network = recipe.model()
            walked = walk(network, two_images(network, recipe, data.train, "contiguous"))
        if walked:
            subject.walked = walked
            if mistake := find_mistake(walked, len(data.train.classes)):
                found = [Verdict("network", mistake.what, "wrong", mistake.instead)]
            else:
                found = list(behaviour.find_behaviour(walked, recipe))
    yield from found
    if exit_code(found):
        return
    try:
        plan = subject.plan(data)
        network = build_network(recipe, data.train)
        yield from behaviour.small_batches(network, plan)
        context = dry_context(recipe, plan, network, data)
        subject.ctx = subject.exit_stack.enter_context(context)
    except UserError as error:
        yield _refused("network" if walked is None else "functions", error)
        return
    if walked:
        yield Verdict("network", _describe(_totals(walked)), figures=_totals(walked))
    for note in subject.ctx.notes:
        yield Verdict("network", note, "notice")


def _functions(subject: Subject) -> Iterator[Verdict]:
    if subject.ctx:
        yield Verdict("functions", "optimizer, schedule, augmentation and loss take their inputs")


def _learning(subject: Subject) -> Iterator[Verdict]:
    if subject.ctx:
        yield learning.first_loss(subject.ctx)


def _overfit(subject: Subject) -> Iterator[Verdict]:
    if subject.ctx and subject.data:
        network = build_network(subject.loaded.recipe, subject.data.train)
        yield learning.overfit(subject.ctx, network)


def _schedule(subject: Subject) -> Iterator[Verdict]:
    """Describe the learning rate of the first group over the training."""
    ctx = subject.ctx
    if ctx is None:
        return
    plan, schedule = ctx.plan, ctx.recipe.schedule
    steps = [1 + round(i * (plan.steps - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    rates = [ctx.state.learning_rate_at(plan.fraction(step), schedule) for step in steps]
    highest = max(rates)
    at = steps[rates.index(highest)]
    figures = {"steps": plan.steps, "first": rates[0], "highest": highest, "last": rates[-1]}
    length = f"{count(plan.epochs, 'epoch')} of {count(plan.steps_per_epoch, 'step')}"
    if min(rates) == highest:
        yield Verdict("schedule", f"learning rate {highest:g} in {length}", figures=figures)
        return
    warm_up = f", highest at step {at:,} ({at / plan.steps:.0%})" if rates[0] < highest else ""
    answer = f"learning rate {rates[0]:.3g} at first, {rates[-1]:.3g} at last{warm_up}, in {length}"
    lines = plot(rates, "step 1", f"{plan.steps:,}")
    yield Verdict("schedule", answer, lines=lines, figures=figures)


def _cost(subject: Subject, runs: Path) -> Iterator[Verdict]:
    if subject.ctx:
        ctx, recipe = subject.ctx, subject.loaded.recipe
        yield cost.describe_time(ctx)  # its steps create the optimizer's state
        yield memory.describe_memory(ctx, recipe)
        yield cost.describe_disk(ctx, runs)


def _ranks(subject: Subject) -> Iterator[Verdict]:
    if subject.ctx:
        yield cost.describe_ranks(subject.ctx, subject.loaded.recipe)


def _refused(question: str, error: UserError) -> Verdict:
    known = f"{error.given}; expected {error.expected}"
    return Verdict(question, known, "wrong", error.instead)


# What is shown and saved


def _totals(walked: Walk) -> dict[str, int]:
    return {
        "layers": len(walked.layers),
        "parameters": sum(parameter.numel() for parameter in walked.network.parameters()),
        "flops": walked.flops,
        "activations": sum(layer.activations for layer in walked.layers),
    }


def _describe(totals: dict[str, int]) -> str:
    return (
        f"{count(totals['layers'], 'layer')}, {totals['parameters']:,} parameters; for one image "
        f"{totals['flops'] / 1e6:.1f} MFLOPs forwards and {sizes(totals['activations'])} of "
        "activations"
    )


def _table(layers: list[Layer]) -> Table:
    table = Table()
    for column in ("layer", "kind", "takes", "makes", "parameters", "MFLOPs", "KB"):
        is_number = column in ("parameters", "MFLOPs", "KB")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    for layer in layers:
        table.add_row(
            *(layer.name or "the network", layer.kind, *layer.describe_shapes()),
            *(f"{layer.parameters:,}", f"{layer.flops / 1e6:.2f}"),
            f"{layer.activations / 1000:,.1f}",
        )
    return table


def _save(subject: Subject, folder: Path, console: Console) -> None:
    """Save the text of the screen, and samples of the training images."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.txt").write_text(console.export_text(clear=False), encoding="utf-8")
        if subject.data and subject.ctx:
            pictures = images.samples(subject.loaded.recipe, subject.data.train)
            images.write_samples(pictures, folder / "samples.png")
            if console.color_system == "truecolor":
                console.print(half_blocks(images.joined(pictures[:2])[:, : console.width]))
    except OSError as error:
        raise UserError(
            f"--save {folder} ({error.strerror})",
            expected="a folder that can be written",
            instead="type --save build, for example",
        ) from None
