"""The command line. Nothing heavy is imported before a recipe is named."""

import argparse
import difflib
import json
import logging
import os
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import __version__
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
from launcher.utils.arguments import Parser, Shown, parse_seeds, positive, refuse_no_folder, seconds
from launcher.utils.redaction import redacted
from launcher.utils.text import drop

if TYPE_CHECKING:
    from launcher.config.loader import LoadedRecipe
    from launcher.config.options import RunOptions
    from launcher.config.plan import SaveInterval
    from launcher.config.recipe import Recipe
    from launcher.data.images import ImageSet

DEFAULT_SEEDS = 5  # of repeat
_NEEDED = ("torch", "accelerate", "rich", "numpy")  # one of them comes first in every command
_NOT_INSTALLED = """\
launcher: {} is not installed for {}; expected a Python in which the launcher is installed; type \
. .venv/bin/activate, or pip install -e . in the launcher's folder
"""
TO_SPEAK = 2.0  # seconds, for rank 0 to say what is wrong with what was typed
_USAGE = "launcher [train] RECIPE [name=value ...] [options]"
_REPEAT_USAGE = "launcher repeat RECIPE [RECIPE ...] [name=value ...] --seeds 0-9 [options]"
_REPEAT_DESCRIPTION = """\
Train a recipe with several seeds, one after the other, and show mean and
standard deviation. Typed again, the command continues interrupted runs and
leaves finished ones alone. Several recipes are compared."""
_DESCRIPTION = """\
Train a recipe: a Python file that says what to train. Tell Accelerate how many
processes train it, and on which devices:

  accelerate launch -m launcher recipes/simplecnn.py
  accelerate launch --multi_gpu --num_processes 4 \\
      -m launcher recipes/simplecnn.py epochs=20

Words of the form name=value (or --name=value) change settings of the recipe for
this run; `launcher RECIPE --help` lists them. `launcher submit --help` says how
to train in a Slurm job."""

_TUNE_USAGE = "launcher tune RECIPE [name=value ...] --lr | --batch | --search NAME=RANGE ..."
_TUNE_DESCRIPTION = """\
Find out where to begin: --lr trains the recipe for a part of an epoch with a
rate that rises from a thousandth to a thousand times its own, shows the loss
over it, and suggests one; nothing is evaluated and nothing kept. --batch tries
how many images a device takes at once, and how fast each size is. --search lets
Optuna propose settings, and judges them by validation images:

  launcher tune recipes/simplecnn.py data.validation=0.1 --trials 40 \\
      --search 'optimizer.lr=log:1e-4..1e-1' 'model.width=16|32|64' --jobs 4"""
_ONLY_OF = {"--seeds": "repeat", "--claims": "repeat", "--search": "tune", "--trials": "tune"}
_TUNE_OPTIONS = {
    "lr": ("steps", "save"),
    "search": ("trials", "jobs", "job", "on_test", "table"),
}
_TEXTS = {
    "train": (_USAGE, _DESCRIPTION),
    "repeat": (_REPEAT_USAGE, _REPEAT_DESCRIPTION),
    "tune": (_TUNE_USAGE, _TUNE_DESCRIPTION),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words`; returns the exit code, which errors.py explains."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # the descriptor was closed: >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    logging.basicConfig(format="launcher: %(message)s")
    typed = sys.argv[1:] if words is None else list(words)
    sys.argv[1:] = map(redacted, sys.argv[1:])  # W&B keeps the command line with the run
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each wait of seconds is a warning
    code = _guarded(typed)
    return EXIT_FAULT if _output_is_lost() and code == 0 else code


def _guarded(words: list[str]) -> int:
    world = ALONE  # until it is known; a process that cannot read it prints why
    try:
        if words[:1] and words[0] in _COMMANDS:  # which a signal ends at once: they lose nothing
            return _COMMANDS[words[0]](words[1:])
        with signals.listening():  # before torch is imported: that takes seconds
            world = slurm_env.world_of_this_process()
            if world.is_launched:
                signals.watch_launcher()
            return _run(words, world)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OtherRankError as error:
        return error.exit_code
    except LauncherError as error:
        if world.is_main or isinstance(error, RankError):  # all ranks raise any other one
            _complain(f"launcher: {error}\n")
        return error.exit_code
    except Shown:
        return 0
    except SystemExit as error:  # not argparse's: `Parser.error` raises
        if not isinstance(error.__context__, BrokenPipeError):  # rich's, which drops stdout itself
            _complain(f"launcher: the recipe's code called sys.exit({error.code})\n")
        return EXIT_FAULT
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
            _complain(_NOT_INSTALLED.format(error.name, sys.executable))
            return EXIT_USER
        # The buffer of stdout may be empty though writing failed: only writing again tells.
        if not isinstance(error, OSError) or not _output_is_lost("\n"):
            _complain(traceback.format_exc())
        return EXIT_FAULT


def _output_is_lost(more: str = "") -> bool:
    """Whether stdout cannot be written, as on a full disk: one line, or none for a closed pipe."""
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _complain(f"launcher: the output cannot be written ({error.strerror})\n")
        return True
    return False


def _complain(text: str) -> None:
    try:
        sys.stderr.write(redacted(text))
    except OSError:  # it is on the full disk as well: the exit code still counts
        drop(sys.stderr)


def _parser(command: str = "train") -> argparse.ArgumentParser:
    usage, description = _TEXTS[command]
    parser = Parser(
        prog="launcher" if command == "train" else f"launcher {command}",
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        epilog=_others() if command == "train" else None,
    )
    add = parser.add_argument
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    add("--version", action="version", version=f"launcher {__version__}", help="of the launcher")
    add("--help", "-h", action="store_true", help="this text, and the settings of a named recipe")
    more = "the same with torch's internal settings: foreach, capturable, ..."
    add("--help-all", dest="help", action="store_const", const="all", help=more)
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of runs (default: runs)",
    )
    add("--name", help="name of the run and its folder (default: recipe and time)")
    add("--max-steps", type=positive, metavar="N", help="stop after N steps")
    add("--smoke", action="store_true", help="a few batches of embedded images: does it learn?")
    add("--wandb", choices=("online", "offline", "off"), help="default: online if logged in")
    add("--wandb-model", action="store_true", help="upload the best weights to W&B at the end")
    add("--project", help="project in Weights & Biases")
    add("--group", help="group in Weights & Biases (default with repeat: the name of the runs)")
    add("--log-every", type=positive, metavar="N", help="steps between two readings of the loss")
    add("--resume", action="store_true", help="continue the newest run, or the one of --name")
    add("--init-from", metavar="RUN|FILE", help="begin with the weights of a run or a file")
    add("--skip", metavar="A,B", help="parameters that --init-from does not load")
    add("--resume-changed", metavar="A,B", help="settings that may differ from the checkpoint's")
    every = "20 steps, 2m minutes, 1e epochs (the default) or never"
    add("--checkpoint-every", default="1e", metavar="N", help=every)
    add(
        "--timeout",
        type=seconds,
        metavar="S",
        help="seconds until a silent rank ends the run (default: 60 on CPUs, 600 on GPUs)",
    )
    add(
        "--join-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds to wait for all ranks at the start (default: 300)",
    )
    before = "time before the end of a batch job to save and stop (default: %(default)s)"
    add("--save-before", type=positive, default=120, metavar="SECONDS", help=before)
    add("--profile", action="store_true", help="train some tens of steps: where does the time go?")
    leaves_out = "do not write the page of the run at its end"
    add("--no-report", dest="report", action="store_false", help=leaves_out)
    add("--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop")
    fold = "validate on fold K of N: short for data.validation=K/N"
    add("--fold", metavar="K/N", help=fold)
    if command == "repeat":
        add(
            "--seeds", type=parse_seeds, metavar="A-B,C", help="default: 0-4, or as many as claimed"
        )
        claims = "measure again what the recipe claims: does it hold on this machine?"
        add("--claims", action="store_true", help=claims)
        add("--table", action="store_true", help="train nothing: show the existing runs")
        add("--json", action="store_true", help="print the table as JSON")
    elif command == "tune":
        add(
            "--lr",
            action="store_true",
            help="let the learning rate rise: where does the loss fall?",
        )
        sizes = "how many images does a device take at once, and how fast?"
        add("--batch", action="store_true", help=sizes)
        tries = "try settings: NAME=low..high, NAME=log:low..high or NAME=a|b"
        add("--search", nargs="+", action="extend", metavar="NAME=RANGE", help=tries)
        add("--trials", type=positive, default=20, metavar="N", help="default: %(default)s")
        add("--jobs", type=positive, default=1, metavar="N", help="trials at the same time")
        add(
            "--job",
            type=partial(positive, least=0),
            metavar="N",
            help="number of this process, of several that make the trials of one search",
        )
        looks = "let the search choose by the test images, as every output then says"
        add("--on-test", action="store_true", help=looks)
        add("--table", action="store_true", help="try nothing: show the existing trials")
        most = "with --lr: number of steps (default: 400, and at most an epoch)"
        add("--steps", type=positive, metavar="N", help=most)
        saves = "with --lr: write a picture and the numbers there"
        add("--save", type=Path, metavar="FOLDER", help=saves)
    return parser


def _others() -> str:
    names = ", ".join(sorted({*_COMMANDS, *_TEXTS} - {"train"}))
    return textwrap.fill(f"other commands, each with its own --help: {names}", 80)


def _submit(words: list[str]) -> int:
    from launcher.cluster import submit

    return submit.main(words, _refuse_wrong_words)


def _check(words: list[str]) -> int:
    world = slurm_env.world_of_this_process()
    if not world.is_main:
        raise _left_to_rank_0()
    if world.size > 1:
        raise UserError(
            f"check on {world.size} processes",
            expected="one process, which predicts for others",
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
        raise _left_to_rank_0() from None


@contextmanager
def _rank_0_first(world: World) -> Iterator[None]:
    """Let rank 0 say what is wrong with what was typed, before torchrun ends all as one ends."""
    try:
        yield
    except UserError:
        if not world.is_main:
            time.sleep(TO_SPEAK)
        raise


def _left_to_rank_0() -> OtherRankError:
    """For another rank to raise: torchrun ends all when one has ended, so rank 0 is to be first."""
    time.sleep(TO_SPEAK)
    return OtherRankError(EXIT_USER)


def _verify(words: list[str]) -> int:
    world = slurm_env.world_of_this_process()
    if not world.is_main:
        raise _left_to_rank_0()
    if world.size > 1 or world.is_launched:
        raise UserError(
            "verify behind accelerate launch, torchrun or srun",
            expected="one process, which starts the ranks itself",
            instead=f"type launcher verify RECIPE --ranks {max(2, world.size)}",
        )
    from launcher.checks.verify import ranks

    with ranks.workplace() as folder:  # while this process imports torch, so does another one
        from launcher.checks.verify import command as verify

        return verify.main(words, _load, _export_proved, folder)


def _export_proved(recipe: "Recipe", weights: Path, test: "ImageSet", folder: Path) -> str:
    """What a check asks of the package `results`, which is beside its own."""
    from launcher.results import export

    return export.proved(recipe, weights, test, folder)


def _pack(words: list[str]) -> int:
    from launcher.data import pack_command

    return pack_command.main(words)


def _look_at_runs(command: str, words: list[str]) -> int:
    """Each is a module of the package `results`."""
    module = import_module(f"launcher.results.{command}")
    with signals.interrupting():  # so that what is half written is removed
        code: int = module.main(words)
    return code


# The commands but for those in `_TEXTS`, which take a recipe and its settings as a training does.
_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "submit": _submit,
    "check": _check,
    "verify": _verify,
    "doctor": _doctor,
    "pack": _pack,
    **{
        name: partial(_look_at_runs, name)
        for name in ("runs", "report", "compare", "predict", "export")
    },
}


def _run(words: list[str], world: World) -> int:
    command = words[0] if words and words[0] in _TEXTS else "train"
    parser = _parser(command)
    with _rank_0_first(world):
        arguments, unknown = parser.parse_known_intermixed_args(words)
        if arguments.fold is not None:
            if "/" not in arguments.fold:  # which would be a number of images
                parser.error(f"--fold {arguments.fold}, which is no fold such as 1/5")
            if any("data.validation=" in word for word in words):
                parser.error(f"--fold {arguments.fold} beside data.validation, which it sets")
            unknown.append(f"data.validation={arguments.fold}")
        named = arguments.words[arguments.words[:1] == [command] :]
        if not named:
            if not arguments.help:
                parser.error("no recipe is named")
            sys.stdout.write(parser.format_help())
            return 0
        refuse_misplaced(unknown)
        _refuse_misspelt(unknown, parser)
        _refuse_other_command(words, named, command)
        shows = arguments.help or arguments.dry_run
        save_before = timedelta(seconds=arguments.save_before)
        job = (
            slurm_env.Allocation(world)
            if shows
            else slurm_env.enter(os.environ, world, save_before)
        )
        signals.stop_at(job.stops_at, job.stop_reason)
        if arguments.profile and (arguments.smoke or arguments.resume or arguments.resume_changed):
            parser.error("--profile cannot be combined with --smoke or --resume")
        if arguments.smoke and (arguments.resume or arguments.resume_changed):
            parser.error("--smoke cannot be combined with --resume: it keeps nothing")
        _refuse_useless_skip(arguments, parser)
        recipes = 1
        if command != "train":
            _refuse_no_training(arguments, parser, command)
        if command == "repeat":
            recipes = next((n for n, word in enumerate(named) if "=" in word), len(named)) or 1
            _refuse_unrepeatable([*named[recipes:], *unknown], claims=arguments.claims)
            if arguments.claims and (arguments.max_steps or arguments.init_from):
                parser.error("--claims cannot be combined with --max-steps or --init-from")
    # argparse puts those with dashes last; of two for one setting the one typed last counts.
    places = {word: place for place, word in enumerate(words)}
    settings = sorted([*named[recipes:], *unknown], key=lambda w: places.get(w, len(words)))
    # What only shows something loses nothing where a signal ends it at once.
    only_shows = shows or getattr(arguments, "table", False)
    with signals.interrupting() if only_shows else nullcontext():
        try:
            refuse_unusable(os.environ)
            if command == "tune" and arguments.save is not None and job.world.is_main:
                refuse_no_folder(arguments.save)
            several = [_load(path, settings) for path in named[:recipes]]
        except UserError as error:
            if shows:
                raise
            from launcher.distributed.process_group import Timeouts, raise_on_all_ranks

            raise_on_all_ranks(
                error, job.world, Timeouts(arguments.join_timeout, arguments.timeout)
            )
        if arguments.help:
            from launcher.config.help import describe_settings

            recipe = several[0].recipe
            listed = describe_settings(recipe, with_internals=arguments.help == "all")
            sys.stdout.write(
                redacted(f"{parser.format_help()}\nsettings of {named[0]}:\n\n{listed}")
            )
            return 0
        if command == "repeat":
            return _repeat(several, arguments, job)
        if command == "tune":
            return _tune(several[0], arguments, job, words, settings)
        return _train(several[0], arguments, job)


def _refuse_no_training(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, command: str
) -> None:
    for option in ("smoke", "profile", "dry_run"):
        if getattr(arguments, option):
            parser.error(f"--{option.replace('_', '-')} is for one run, not for {command}")
    if command == "tune" and not arguments.help:
        named = (arguments.lr, arguments.batch, arguments.search)
        if sum(map(bool, named)) != 1:
            parser.error("tune needs exactly one of --lr, --batch and --search")
        if arguments.max_steps and not arguments.search:
            parser.error("--max-steps goes with --search; the ramp of --lr has --steps")
        for what, others in _TUNE_OPTIONS.items():
            for option in others:
                default = parser.get_default(option)
                if not getattr(arguments, what) and getattr(arguments, option) != default:
                    parser.error(f"--{option.replace('_', '-')} goes with --{what}")


def _refuse_other_command(words: Sequence[str], named: Sequence[str], command: str) -> None:
    """Say how a command is typed that does not come first, or of which there is but an option."""
    meant = [word for word in named if word in {**_COMMANDS, **_TEXTS} and not Path(word).exists()]
    if command == "train":
        options = (word.partition("=")[0] for word in words)
        meant += [_ONLY_OF[option] for option in options if option in _ONLY_OF]
    if command == "train" and not meant and _is_no_path(named[0]):
        close = difflib.get_close_matches(named[0], [*_COMMANDS, *_TEXTS], 1)
        raise UserError(
            f"{named[0]}, which is no file and no command",
            expected="a recipe file, or a command",
            instead=f"did you mean launcher {close[0]}?" if close else "see launcher --help",
        )
    if meant:
        rest = next((word for word in named if word != meant[0]), "RECIPE")
        raise UserError(
            shlex.join(words),
            expected=f"the command {meant[0]} before all other words",
            instead=f"type launcher {meant[0]} {shlex.quote(rest)} ...",
        )


def _is_no_path(word: str) -> bool:
    """A name without folder and ending that is no file, nor one in recipes/ without its .py."""
    is_there = Path(word).exists() or Path("recipes", f"{word}.py").exists()
    return word.isidentifier() and not is_there


def _refuse_misspelt(unknown: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Say which option is meant by what is nearly one, and no setting either: that has a `=`."""
    options = [text for action in parser._actions for text in action.option_strings]
    for word in unknown:
        close = difflib.get_close_matches(word, options, 1, cutoff=0.85)
        if word.startswith("--") and "=" not in word and close:
            parser.error(f"{word}, which is no option: did you mean {close[0]}?")


def _refuse_useless_skip(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.skip and arguments.init_from is None:
        parser.error("--skip needs --init-from")


def _refuse_unrepeatable(settings: Sequence[str], *, claims: bool) -> None:
    seeds = [word for word in settings if word.lstrip("-").startswith("seed=")]
    others = [word for word in settings if "data.root=" not in word]
    if seeds:
        raise UserError(
            f"{seeds[0]} with repeat",
            expected="the seeds of all runs in --seeds",
            instead="type --seeds 0-4, for example",
        )
    if claims and others:
        raise UserError(
            f"{others[0]} with --claims",
            expected="the recipe as it is: its claims do not hold for other settings",
            instead="leave it out, or repeat the recipe without --claims",
        )


def _tune(
    loaded: "LoadedRecipe",
    arguments: argparse.Namespace,
    job: slurm_env.Allocation,
    words: list[str],
    settings: list[str],
) -> int:
    from launcher.experiments import batch_size, learning_rate, search

    options, folder = _options(arguments, job), arguments.save
    if arguments.search:
        ranges, trials = arguments.search, arguments.trials
        found = search.prepare(
            loaded, ranges, trials, options, on_test=arguments.on_test, settings=settings
        )
        if arguments.table:
            search.show(found)
            return 0
        if arguments.job is not None:
            return search.work(found, arguments.job)
        return search.run(found, job.world, jobs=arguments.jobs, words=words)
    if arguments.batch:
        return batch_size.run(loaded, options, job.world)
    return learning_rate.run(loaded, options, job.world, steps=arguments.steps, folder=folder)


def _repeat(
    recipes: "list[LoadedRecipe]", arguments: argparse.Namespace, job: slurm_env.Allocation
) -> int:
    from launcher.experiments import claims, repeat

    options, table = _options(arguments, job), arguments.table
    if arguments.claims:
        if len(recipes) > 1 or arguments.json:
            raise UserError(
                f"--claims {'with --json' if arguments.json else 'of several recipes'}",
                expected="one recipe, whose claims are judged in words",
                instead="type launcher repeat RECIPE --claims",
            )
        return claims.run(recipes[0], arguments.seeds, options, job.world, table=table)
    seeds = arguments.seeds or tuple(range(DEFAULT_SEEDS))
    repeats = repeat.plan(recipes, seeds, options)
    return repeat.run(repeats, options, job.world, table=table, as_json=arguments.json)


def _refuse_wrong_words(words: Sequence[str]) -> None:
    """Raise `UserError` for the words of a run that would not begin, before a job waits for it."""
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(words)
    refuse_misplaced(unknown)
    _refuse_useless_skip(arguments, parser)
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
    from launcher.run.train import train_loaded

    options = _options(arguments, job)
    if arguments.dry_run:
        return _dry_run(loaded, options, job.world)
    result = train_loaded(loaded, options, job.world)
    return EXIT_SAVED if result.stopped else 0


def _options(arguments: argparse.Namespace, job: slurm_env.Allocation) -> "RunOptions":
    from launcher.config.options import RunOptions
    from launcher.distributed.process_group import Timeouts

    return RunOptions(
        runs=arguments.runs,
        name=arguments.name,
        max_steps=arguments.max_steps,
        smoke=arguments.smoke,
        wandb=arguments.wandb,
        wandb_model=arguments.wandb_model,
        project=arguments.project,
        group=arguments.group,
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
    from launcher.data import sources
    from launcher.run import prepare
    from launcher.training.model import build_network

    data = sources.load(loaded.recipe.data, seed=loaded.recipe.seed)
    plan = prepare.plan_for(loaded, data, options, world.size)
    network = build_network(loaded.recipe, data.train)
    facts = prepare.describe(loaded, data, plan, network)
    facts |= prepare.begin_with_given(network, loaded, options)
    notes: tuple[str, ...] = ()
    if world.size == 1:  # several would have to meet for it
        with prepare.dry_context(loaded.recipe, plan, network, data) as ctx:
            notes = ctx.notes
    if world.is_main:
        sys.stdout.write(json.dumps(loaded.config, indent=2) + "\n")
        sys.stdout.writelines(f"{label:<8}{redacted(value)}\n" for label, value in facts.items())
        remarks = (prepare.fallback_warning(data), *notes)
        sys.stdout.writelines(f"{redacted(remark)}\n" for remark in remarks if remark)
    return 0
