"""`launcher verify RECIPE`: does this recipe keep the project's promises, on this machine?

Each question is answered by real runs of a few steps, on a few of the recipe's images: ranks that
are processes, a SIGKILL, a resume. A run that two questions need is made once.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from launcher.checks.verdicts import (
    WIDTH,
    Deadline,
    add_options,
    answers,
    as_json,
    closing_line,
    exit_code,
    show,
)
from launcher.checks.verify.promises import Export, Promises
from launcher.checks.verify.trials import Settings, Trials
from launcher.config.loader import Load
from launcher.utils.arguments import Parser, positive
from launcher.utils.terminal import make_console

LIMIT = 300.0  # seconds
LEAST_STEPS = 6  # for three epochs of two steps
LEAST_RANKS = 2
_USAGE = "launcher verify RECIPE [name=value ...] [--ranks 2] [--steps 20] [--json]"
_DESCRIPTION = """\
Train a few steps of a recipe in several ways that must give the same result: on
one rank and on several, killed and resumed, twice, exported and compiled."""


def main(words: Sequence[str], load: Load, export: Export, folder: Path) -> int:
    """Run the words behind `launcher verify`; `load` makes the recipe of a path and overrides.

    `export` is that of `launcher export`, which no check may import. All that is written goes into
    `folder`: see `ranks.workplace`.
    """
    arguments = _parse(words)
    deadline = Deadline(arguments.limit)
    path, *overrides = arguments.words
    console = make_console(WIDTH)
    progress = nullcontext if arguments.json else console.status
    verdicts = []
    loaded = load(path, overrides)
    settings = Settings((path, *overrides), load, arguments.ranks, arguments.steps, folder)
    promises = Promises(loaded.recipe, Trials(settings, progress), deadline, export)
    for verdict in answers(promises.questions(), deadline):
        verdicts.append(verdict)
        if not arguments.json:
            show(verdict, console)
        if verdict.question == "recipe" and verdict.standing == "wrong":
            break  # without a training there is nothing to test
    if arguments.json:
        about = {"recipe": loaded.name, "ranks": arguments.ranks}
        sys.stdout.write(as_json(about, verdicts, deadline) + "\n")
    else:
        sys.stdout.write(closing_line(deadline) + "\n")
    return exit_code(verdicts)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="launcher verify", usage=_USAGE, description=_DESCRIPTION)
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--ranks", type=positive, default=LEAST_RANKS, metavar="N", help="processes (default: 2)")
    steps = "of each run (default: 20, or fewer for a slow network)"
    add("--steps", type=positive, metavar="N", help=steps)
    add_options(parser, LIMIT)
    arguments = parser.parse_intermixed_args(words)
    if not arguments.words:
        parser.error("no recipe is named")
    for name, least in (("ranks", LEAST_RANKS), ("steps", LEAST_STEPS)):
        if (getattr(arguments, name) or least) < least:
            parser.error(f"--{name} {getattr(arguments, name)}, which are fewer than {least}")
    return arguments
