"""The command line. Nothing heavy is imported before a recipe is named."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cluster import slurm_env
from launcher.distributed import signals
from launcher.distributed.environment import refuse_unusable
from launcher.distributed.world import ALONE, World, refuse_misplaced
from launcher.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_SAVED,
    EXIT_USER,
    LauncherError,
    OtherRankError,
    RankError,
    UserError,
)
from launcher.utils.arguments import Parser, Shown, positive, seconds
from launcher.utils.redaction import redacted
from launcher.utils.text import drop_stdout

if TYPE_CHECKING:
    from launcher.config.loader import LoadedRecipe
    from launcher.config.options import RunOptions
    from launcher.config.plan import SaveInterval

_USAGE = "launcher [train] RECIPE [name=value ...] [options]"
_DESCRIPTION = """\
Train a recipe: a Python file that says what to train. How many processes train
it, and on which devices, is Accelerate's to say:

  accelerate launch -m launcher recipes/simplecnn.py
  accelerate launch --multi_gpu --num_processes 4 \\
      -m launcher recipes/simplecnn.py epochs=20

Words of the form name=value (or --name=value) change settings of the recipe for
this run; `launcher RECIPE --help` lists them. `launcher submit --help` says how
to train in a Slurm job."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words`; returns the exit code, which errors.py explains."""
    logging.basicConfig(format="launcher: %(message)s")
    words = sys.argv[1:] if words is None else list(words)
    sys.argv[1:] = map(redacted, sys.argv[1:])  # W&B keeps the command line with the run
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each wait of seconds is a warning
    world = ALONE  # until it is known; a process that cannot read it prints why
    try:
        if words[:1] and words[0] in _COMMANDS:  # which a signal ends at once: they lose nothing
            code = _COMMANDS[words[0]](words[1:])
        else:
            with signals.listening():  # before torch is imported: that takes seconds
                world = slurm_env.world_of_this_process()
                if world.is_launched:
                    signals.watch_launcher()
                code = _run(words, world)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OtherRankError as error:
        return error.exit_code
    except LauncherError as error:
        if world.is_main or isinstance(error, RankError):  # all ranks raise any other one
            sys.stderr.write(redacted(f"launcher: {error}\n"))
        return error.exit_code
    except BrokenPipeError:
        drop_stdout()
        return EXIT_FAULT
    except Shown:
        return 0
    except SystemExit as error:  # not argparse's: `Parser.error` raises
        if isinstance(error.__context__, BrokenPipeError):  # rich's, which drops stdout itself
            return EXIT_FAULT
        sys.stderr.write(redacted(f"launcher: the recipe's code called sys.exit({error.code})\n"))
        return EXIT_FAULT
    except Exception:
        sys.stderr.write(redacted(traceback.format_exc()))
        return EXIT_FAULT


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launcher",
        usage=_USAGE,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    add("--help", "-h", action="store_true", help="this text, and a named recipe's settings")
    more = "... and what torch calls internal: foreach, capturable, ..."
    add("--help-all", dest="help", action="store_const", const="all", help=more)
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go")
    add("--name", help="the name of the run and its folder")
    add("--max-steps", type=positive, metavar="N", help="stop after N steps")
    add("--smoke", action="store_true", help="a few batches of embedded images: does it learn?")
    add("--wandb", choices=("online", "offline", "off"), help="default: online if logged in")
    add("--wandb-model", action="store_true", help="W&B also gets the best weights, at the end")
    add("--project", help="the project in Weights & Biases")
    add("--log-every", type=positive, metavar="N", help="steps between two readings of the loss")
    add("--resume", action="store_true", help="continue the newest run, or the one of --name")
    add("--init-from", metavar="RUN|FILE", help="begin with the weights of a run or a file")
    add("--skip", metavar="A,B", help="weights that --init-from leaves as the model makes them")
    add("--resume-changed", metavar="A,B", help="settings that may differ from the checkpoint's")
    every = "20 steps, 2m minutes, 1e epochs (the default) or never"
    add("--checkpoint-every", default="1e", metavar="N", help=every)
    add(
        "--timeout",
        type=seconds,
        metavar="S",
        help="seconds until a rank that does not answer ends the run",
    )
    add(
        "--join-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="... to wait for all ranks",
    )
    before = "save and stop so long before the end of a batch job (default: %(default)s)"
    add("--save-before", type=positive, default=120, metavar="SECONDS", help=before)
    add("--profile", action="store_true", help="train some tens of steps: where does the time go?")
    leaves_out = "write no page of the run at its end (launcher report does so later)"
    add("--no-report", dest="report", action="store_false", help=leaves_out)
    add("--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop")
    return parser


def _submit(words: list[str]) -> int:
    from launcher.cluster import submit

    return submit.main(words, _refuse_wrong_words)


def _check(words: list[str]) -> int:
    world = slurm_env.world_of_this_process()
    if not world.is_main:
        return EXIT_USER
    if world.size > 1:
        raise UserError(
            f"check on {world.size} processes",
            expected="1, which plans for others",
            instead=f"type python -m launcher check RECIPE --world-size {world.size}",
        )
    from launcher.checks.check import command as check

    return check.main(words, _load)


def _doctor(words: list[str]) -> int:
    from launcher.checks.doctor import command as doctor

    world = slurm_env.world_of_this_process()
    world = slurm_env.with_known_address(os.environ, world)

    def refuse() -> None:
        if "SLURM_JOB_ID" in os.environ:
            slurm_env.check(os.environ, world)

    try:
        return doctor.main(words, world, refuse)
    except UserError:  # what was typed was typed for all ranks
        if world.is_main:
            raise
        raise OtherRankError(EXIT_USER) from None


def _verify(words: list[str]) -> int:
    from launcher.checks.verify import ranks

    with ranks.workplace() as folder:  # while this process imports torch, so does another one
        from launcher.checks.verify import command as verify

        return verify.main(words, _load, folder)


def _look_at_runs(command: str, words: list[str]) -> int:
    """Each is a module of the room `results`."""
    code: int = import_module(f"launcher.results.{command}").main(words)
    return code


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "submit": _submit,
    "check": _check,
    "verify": _verify,
    "doctor": _doctor,
    **{
        name: partial(_look_at_runs, name)
        for name in ("runs", "report", "compare", "predict", "export")
    },
}


def _run(words: list[str], world: World) -> int:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(words)
    named = arguments.words[1:] if arguments.words[:1] == ["train"] else arguments.words
    if not named:
        if not arguments.help:
            parser.error("no recipe is named")
        sys.stdout.write(parser.format_help())
        return 0
    refuse_misplaced(unknown)
    shows = arguments.help or arguments.dry_run
    save_before = timedelta(seconds=arguments.save_before)
    job = slurm_env.Allocation(world) if shows else slurm_env.enter(os.environ, world, save_before)
    signals.stop_at(job.stops_at, job.stop_reason)
    if arguments.profile and (arguments.smoke or arguments.resume or arguments.resume_changed):
        parser.error("--profile goes with neither --smoke nor --resume")
    if arguments.skip and arguments.init_from is None:
        parser.error("--skip goes with --init-from")
    try:
        refuse_unusable(os.environ)
        loaded = _load(named[0], [*named[1:], *unknown])
    except UserError as error:
        if shows:
            raise
        from launcher.distributed.process_group import Timeouts, raise_on_all_ranks

        raise_on_all_ranks(error, job.world, Timeouts(arguments.join_timeout, arguments.timeout))
    if arguments.help:
        from launcher.config.help import describe_settings

        settings = describe_settings(loaded.recipe, with_internals=arguments.help == "all")
        sys.stdout.write(redacted(f"{parser.format_help()}\nsettings of {named[0]}:\n\n{settings}"))
        return 0
    return _train(loaded, arguments, job)


def _refuse_wrong_words(words: Sequence[str]) -> None:
    """Raise `UserError` for the words of a run that would not begin, before a job waits for it."""
    arguments, unknown = _parser().parse_known_args(words)
    refuse_misplaced(unknown)
    _cadence(arguments.checkpoint_every)
    _load(arguments.words[1], [*arguments.words[2:], *unknown])


def _load(path: str, words: list[str]) -> "LoadedRecipe":
    from dataclasses import replace

    from launcher.config import loader
    from launcher.config.overrides import override

    if "=" in path or path.startswith("-"):
        raise UserError(
            f"{path!r} before any recipe",
            expected=_USAGE,
            instead="name the recipe file first",
        )
    loaded = loader.load(Path(path))
    return replace(loaded, recipe=override(loaded.recipe, words))


def _train(loaded: "LoadedRecipe", arguments: argparse.Namespace, job: slurm_env.Allocation) -> int:
    from launcher import run
    from launcher.config.options import RunOptions
    from launcher.distributed.process_group import Timeouts

    options = RunOptions(
        runs=arguments.runs,
        name=arguments.name,
        max_steps=arguments.max_steps,
        smoke=arguments.smoke,
        wandb=arguments.wandb,
        wandb_model=arguments.wandb_model,
        project=arguments.project,
        log_every=arguments.log_every,
        resume=arguments.resume or arguments.resume_changed is not None,
        resume_changed=tuple((arguments.resume_changed or "").split(",")),
        init_from=arguments.init_from,
        skip=tuple(filter(None, (arguments.skip or "").split(","))),
        checkpoint_every=_cadence(arguments.checkpoint_every),
        profile=arguments.profile,
        report=arguments.report,
        timeouts=Timeouts(arguments.join_timeout, arguments.timeout),
        host_facts=job.facts,
    )
    if arguments.dry_run:
        return _dry_run(loaded, options, job.world)
    result = run.train_loaded(loaded, options, job.world)
    return EXIT_SAVED if result.stopped else 0


def _cadence(text: str) -> "SaveInterval":
    """`20` steps, `2m` minutes, `1e` epochs, or `never`."""
    from launcher.config.plan import SaveInterval

    if text == "never":
        return SaveInterval()
    unit = text[-1:] if text[-1:] in ("m", "e") else ""
    try:
        number = positive(text.removesuffix(unit))
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--checkpoint-every {text:.40}",
            expected="a number of steps, minutes (2m) or epochs (1e), or never",
            instead="type --checkpoint-every 1e, for example",
        ) from None
    if unit == "m":
        return SaveInterval(minutes=number)
    return SaveInterval(epochs=number) if unit == "e" else SaveInterval(steps=number)


def _dry_run(loaded: "LoadedRecipe", options: "RunOptions", world: World) -> int:
    """Print the resolved recipe as JSON and the plan in words."""
    from launcher import run
    from launcher.data import sources
    from launcher.training.model import build_network

    data = sources.load(loaded.recipe.data)
    plan = run.plan_for(loaded, data, options, world.size)
    network = build_network(loaded.recipe, data.train)
    facts = run.describe(loaded, data, plan, network)
    if world.size == 1:  # several would have to meet for it
        with run.dry_context(loaded.recipe, plan, network, data):
            pass
    if world.is_main:
        sys.stdout.write(json.dumps(loaded.config, indent=2) + "\n")
        sys.stdout.writelines(f"{label:<8}{redacted(value)}\n" for label, value in facts.items())
        warning = redacted(run.fallback_warning(data))
        sys.stdout.write(f"{warning}\n" if warning else "")
    return 0
