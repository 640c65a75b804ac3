"""`launcher repeat RECIPE --seeds 0-9`: the same training with several seeds, and their mean.

Each is an ordinary run, `NAME-seed0` and so on. The same command continues one that was
interrupted, and leaves alone one that has ended.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from launcher.checkpoint.resume import FILE, described_changes, initial_weights
from launcher.checkpoint.run_files import RunFiles
from launcher.checkpoint.weights import digest_of_file
from launcher.config import imports
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.data.sources import open_on_disk
from launcher.distributed.accelerator import reset_accelerator
from launcher.distributed.world import World
from launcher.errors import EXIT_FAULT, EXIT_SAVED, TrainingError, UserError
from launcher.results.compare import compared, experiment, grouped, sentence
from launcher.results.figures import number
from launcher.results.quoted import headline, quoted
from launcher.results.statistics import Spread, describe, summary
from launcher.run.train import train_loaded
from launcher.utils.json_text import differing, flatten
from launcher.utils.redaction import redacted
from launcher.utils.terminal import make_console
from launcher.utils.text import duration, printable, run_of_seed, some

# Settings that leave a choice to the run, which records its choice.
_LEFT_OPEN = {"precision": None, "memory_format": "auto", "accumulate": "auto", "compile": True}


@dataclass(frozen=True)
class Repeats:
    """A recipe and its seeds; the names of its runs begin with `base`.

    Whoever only shows a table does not look for the images, of which there may be millions.
    """

    loaded: LoadedRecipe
    seeds: tuple[int, ...]
    base: str
    looks_for_images: bool = True

    def of_seed(self, seed: int) -> LoadedRecipe:
        """The recipe with that seed."""
        return replace(self.loaded, recipe=replace(self.loaded.recipe, seed=seed))

    @cached_property
    def images(self) -> str:
        """The digest of the recipe's images as they are now; empty where they are not here."""
        if not self.looks_for_images:
            return ""
        recipe = self.loaded.recipe
        try:
            found = open_on_disk(recipe.data, recipe.seed)
        except UserError:  # which concerns a run that is still to be made
            return ""
        return found.digest if found else ""


def plan(
    recipes: Sequence[LoadedRecipe], seeds: tuple[int, ...], options: RunOptions
) -> list[Repeats]:
    """The runs to be made. Raises `UserError` for recipes of the same name."""
    repeats = []
    for loaded in recipes:
        base = loaded.name
        if options.name:
            base = options.name if len(recipes) == 1 else f"{options.name}-{loaded.name}"
        repeats.append(Repeats(loaded, seeds, base))
        for seed in seeds:
            replace(options, name=run_of_seed(base, seed))  # refuses what is no name of a folder
    if len({one.base for one in repeats}) < len(repeats):
        raise UserError(
            f"two recipes that are called {repeats[0].base}",
            expected="recipe files with different names, after which their runs are named",
            instead="copy one of them to another name, or repeat each alone with its own --name",
        )
    return repeats


def run(
    repeats: Sequence[Repeats],
    options: RunOptions,
    world: World,
    *,
    table: bool = False,
    as_json: bool = False,
) -> int:
    """Train the runs that have not ended, unless only the `table` is wanted, and show the results.

    Every rank calls this; returns the exit code.
    """
    repeats = [replace(one, looks_for_images=not table) for one in repeats]
    code = 0 if table else train(repeats, options, world)
    if world.is_main:
        _report(repeats, options, as_json)
    return code


def train(repeats: Sequence[Repeats], options: RunOptions, world: World) -> int:
    """Train the runs that have not ended; returns the exit code.

    A run that fails ends the others on several ranks; alone, the others follow, and the exit code
    says that one failed.
    """
    code = 0
    pairs = [(one, seed) for one in repeats for seed in one.seeds]
    for place, (one, seed) in enumerate(pairs):
        group = options.group or one.base
        own = replace(options, name=run_of_seed(one.base, seed), resume=True, group=group)
        loaded = one.of_seed(seed)
        if world.is_main:
            folder = redacted(str(own.runs / str(own.name)))
            sys.stdout.write(f"=== run {place + 1} of {len(pairs)}: {folder}\n")
            sys.stdout.flush()
        run = RunFiles(own.runs / str(own.name))
        if world.size == 1 and has_ended(run, one, seed):
            differ = changes(run, one) + ["the first weights"] * (not began_so(run, own))
            anew = f"; trained anew, it would differ in {some(differ)}" if differ else ""
            sys.stdout.write(f"has ended already{anew}\n")
            continue
        try:
            result = train_loaded(loaded, own, replace(world, run=place))
        except TrainingError as error:
            if world.size > 1:
                raise
            sys.stderr.write(redacted(f"launcher: {own.name}: {error}\n"))
            code = EXIT_FAULT
        else:
            if result.stopped:
                code = EXIT_SAVED
                break
        finally:
            reset_accelerator()
    return code


def has_ended(run: RunFiles, repeats: Repeats, seed: int) -> bool:
    """Whether a run of this very recipe and seed has ended, and on no stand-ins for its images."""
    loaded = repeats.of_seed(seed)
    before, now = flatten(run.config), flatten(json.loads(json.dumps(loaded.config)))
    now = {n: v for n, v in now.items() if n not in _LEFT_OPEN or v != _LEFT_OPEN[n]}
    is_this = now == {n: v for n, v in before.items() if n in now or n not in _LEFT_OPEN}
    is_whole = run.epoch == loaded.recipe.epochs or loaded.recipe.patience is not None
    has_weights = (run.path / "final.safetensors").is_file()
    has_ended = is_this and is_whole and has_weights and run.state == "done"
    return has_ended and not run.cut and not ("fallback" in run.about and repeats.images)


def changes(run: RunFiles, repeats: Repeats) -> list[str]:
    """What a run lacks of the recipe and its images as they are now, whatever its seed, in words.

    Also where it had some of them from the beginning, and others later.
    """
    loaded = repeats.loaded
    now = json.loads(json.dumps(loaded.config))
    free = {"seed", *(n for n, v in _LEFT_OPEN.items() if flatten(now).get(n) == v)}
    found = described_changes(run.config or now, now)
    settings = [change for name, change in found.items() if name not in free]
    is_other = run.source != redacted(loaded.source)
    known = run.about.get("data_digest") if "fallback" not in run.about else None
    has_other_images = bool(known and repeats.images not in ("", known))
    return (
        settings
        + [FILE] * is_other
        + imports.changed(run.about.get("neighbours"), loaded.neighbours)
        + ["the images"] * has_other_images
        + [f"what was changed on the way ({change})" for change in run.changes]
        + ["their length (without --max-steps)"] * bool(run.cut)
    )


def began_so(run: RunFiles, options: RunOptions) -> bool:
    """Whether a run began with the weights of --init-from, or without any where none are named."""
    began, _ = run.first_weights
    if options.init_from is None:
        return not began
    given = initial_weights(options.runs, options.init_from)
    return began in (f"from {given}", digest_of_file(given)[:12])


# What is shown


def runs_of(repeats: Repeats, options: RunOptions) -> list[RunFiles]:
    """The runs that have begun."""
    places = (options.runs / run_of_seed(repeats.base, seed) for seed in repeats.seeds)
    return [RunFiles(path) for path in places if (path / "run.json").is_file()]


def as_dict(repeats: Repeats, options: RunOptions) -> dict[str, object]:
    """The repeats of one recipe, for JSON."""
    runs = runs_of(repeats, options)
    rows = [
        {
            "run": run.name,
            "seed": run.config.get("seed"),
            "state": run.state,
            "seconds": seconds_of(run),
            **quoted(run),
        }
        for run in runs
    ]
    return {
        "recipe": repeats.loaded.name,
        "runs": rows,
        "differ_in": (differ := differences(runs, repeats.loaded)),
        "changed_since": _changed_since(repeats, runs),
        "summary": {} if differ else {name: vars(s) for name, s in summaries(runs).items()},
    }


def seconds_of(run: RunFiles) -> float:
    """The seconds of training and evaluating all epochs."""
    return sum(number(row.get("seconds")) or 0.0 for row in run.epochs)


def differences(runs: Sequence[RunFiles], loaded: LoadedRecipe) -> list[str]:
    """How the runs that have ended differ, apart from the seed: then they have no mean.

    Choices that the recipe leaves to the run may differ.
    """
    now = flatten(loaded.config)
    names = differing([experiment(run) for run in runs if run.state == "done"])
    return [n for n in names if n not in _LEFT_OPEN or now.get(n) != _LEFT_OPEN[n]]


def summaries(runs: Sequence[RunFiles]) -> dict[str, Spread]:
    """The summary of each metric, over the runs that have ended."""
    rows = [quoted(run) for run in runs if run.state == "done"]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: summary([row[name] for row in rows if name in row]) for name in names}


def _report(repeats: Sequence[Repeats], options: RunOptions, as_json: bool) -> None:
    if as_json:
        said = json.dumps([as_dict(one, options) for one in repeats], indent=2)
        sys.stdout.write(redacted(said) + "\n")
        return
    console = make_console()
    for one in repeats:
        runs = runs_of(one, options)
        if not runs:
            console.print(f"{one.base}: no run has begun in {options.runs}", markup=False)
            continue
        console.print(_table(one, runs))
        if changed := _changed_since(one, runs):
            text = f"trained anew, these runs would differ in {some(changed)}"
            console.print(printable(text), markup=False, soft_wrap=True, highlight=False)
        if differ := differences(runs, one.loaded):
            text = f"no mean: these runs differ in {', '.join(differ)}; see launcher compare"
            console.print(printable(text), markup=False, soft_wrap=True, highlight=False)
            continue
        for name, found in summaries(runs).items():
            console.print(f"{name}: {describe(found)}", markup=False, highlight=False)
        console.print(_extremes(runs), markup=False, highlight=False)
    if len(repeats) > 1:
        every = [run for one in repeats for run in runs_of(one, options) if run.state == "done"]
        groups = grouped(every)
        for first, second in pairwise(groups):
            if test := compared(first, second):
                text = sentence(first, second, test)
                console.print(text, markup=False, soft_wrap=True, highlight=False)


def _changed_since(repeats: Repeats, runs: Sequence[RunFiles]) -> list[str]:
    """What of the recipe, or of the words typed behind it, these runs or some of them had not."""
    return list(dict.fromkeys(c for run in runs for c in changes(run, repeats)))


def _extremes(runs: Sequence[RunFiles]) -> str:
    """The best and the worst seed, by the quoted metric."""
    name = headline(runs[0])
    values = {run: quoted(run)[name] for run in runs if run.state == "done" and name in quoted(run)}
    if len(values) < 2:
        return f"{len(values)} of {len(runs)} runs have ended"
    best, worst = max(values, key=lambda r: values[r]), min(values, key=lambda r: values[r])
    return (
        f"best seed {best.config.get('seed')} ({values[best]:.2%}), worst "
        f"{worst.config.get('seed')} ({values[worst]:.2%}), by {name}"
    )


def _table(repeats: Repeats, runs: Sequence[RunFiles]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in quoted(run)))
    table = Table(box=None, pad_edge=False, title=Text(printable(repeats.base)))
    table.add_column("seed", justify="right")
    table.add_column("state")
    for name in ("epochs", *names, "time"):
        table.add_column(name, justify="right")
    for run in runs:
        figures = quoted(run)
        cells = (
            str(run.config.get("seed")),
            run.state,
            f"{run.epoch}/{run.planned_epochs}",
            *(f"{figures[name]:.2%}" if name in figures else "-" for name in names),
            duration(seconds_of(run)),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
