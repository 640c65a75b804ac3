"""`launcher repeat RECIPE --claims`: does this machine reach what a recipe says it reaches?"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Literal

from launcher.checkpoint.resume import FILE
from launcher.checkpoint.run_files import RunFiles
from launcher.config.claims import Claim
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.overrides import override
from launcher.distributed.world import World
from launcher.errors import EXIT_USER, UserError
from launcher.experiments import repeat
from launcher.experiments.repeat import Repeats
from launcher.results.quoted import LAST, LAST_TTA, quoted
from launcher.results.statistics import describe, difference, summary

SEEDS_OF_ONE = 3  # seeds for a claim of a single run
FIGURES = {"test/accuracy": LAST, "test/accuracy_tta": LAST_TTA}
SURE = 0.05  # below this probability, a difference is significant


@dataclass(frozen=True)
class Judgement:
    """Whether a claim holds, and why; `p` is the probability of such a difference by chance."""

    verdict: Literal["holds", "does not hold", "undecided"]
    p: float | None
    answer: str


def run(
    loaded: LoadedRecipe,
    seeds: tuple[int, ...] | None,
    options: RunOptions,
    world: World,
    *,
    table: bool = False,
) -> int:
    """Train with as many seeds as a claim has, or with `seeds`, and judge; returns the exit code.

    It is 2 where a claim does not hold. Claims of the same settings share their runs.
    """
    if not loaded.recipe.claims:
        raise UserError(
            f"{loaded.name}, which claims nothing",
            expected="a recipe that says what it reaches",
            instead='write claims=(Claim("test/accuracy", 0.95, std=0.001, runs=3),) into it',
        )
    repeats = of_claims(loaded, seeds, options)
    code = 0 if table else repeat.train(list(repeats.values()), options, world)
    if code or not world.is_main:
        return code
    for claim in loaded.recipe.claims:
        runs = repeat.runs_of(repeats[claim.settings], options)
        name = FIGURES[claim.metric]
        figures = [(run, figure_of(run, name)) for run in runs if run.state == "done"]
        ended = [run for run, figure in figures if figure is not None]
        found = judge(claim, [figure for _, figure in figures if figure is not None])
        if objection := objection_to(ended, repeats[claim.settings]):
            found = Judgement("undecided", None, f"{name}: claimed {claim.value:.2%}; {objection}")
        sys.stdout.write(f"{found.verdict}: {found.answer}\n{_hardware(claim, ended)}\n")
        code = EXIT_USER if found.verdict == "does not hold" else code
    return code


def objection_to(runs: Sequence[RunFiles], repeats: Repeats) -> str:
    """Why nothing follows from the results of these runs; empty where something does."""
    for run in runs:
        if "fallback" in run.about:
            return f"{run.name}: {run.about['fallback']}"
    if differ := repeat.differences(runs, repeats.loaded):
        return f"the runs here differ in {', '.join(differ)}"
    found = (change for run in runs for change in repeat.changes(run, repeats))
    changed = dict.fromkeys(change for change in found if change != FILE)
    return f"trained anew, the runs would differ in {', '.join(changed)}" if changed else ""


def figure_of(run: RunFiles, name: str) -> float | None:
    """The metric of that name, or its variant with TTA of the uncertain images."""
    return next((v for quote, v in quoted(run).items() if quote.startswith(name)), None)


def of_claims(
    loaded: LoadedRecipe, seeds: tuple[int, ...] | None, options: RunOptions
) -> dict[tuple[str, ...], Repeats]:
    """The runs for each set of settings among the claims."""
    found: dict[tuple[str, ...], Repeats] = {}
    base = options.name or loaded.name
    for claim in loaded.recipe.claims:
        recipe = override(loaded.recipe, claim.settings)
        number = len(found) + 1
        own = found.get(claim.settings) or Repeats(
            replace(loaded, recipe=recipe), (), f"{base}-claim{number}"
        )
        runs = max(len(own.seeds), claim.runs if claim.runs > 1 else SEEDS_OF_ONE)
        found[claim.settings] = replace(own, seeds=seeds or tuple(range(runs)))
    return found


def _hardware(claim: Claim, runs: Sequence[RunFiles]) -> str:
    """The hardware of the claim and of the measurement, with the seconds."""
    there = claim.hardware or "unknown hardware"
    if claim.seconds is not None:
        there += f" in {claim.seconds:g} s"
    here = ", ".join(dict.fromkeys(str(run.about.get("devices", "?")) for run in runs))
    seconds = list(map(repeat.seconds_of, runs))
    return f"  claimed on {there}; here on {here or '-'}" + (
        f" in {fmean(seconds):.3g} s" if seconds else ""
    )


def judge(claim: Claim, values: Sequence[float]) -> Judgement:
    """Judge a claim by the same metric, measured here with different seeds.

    By Welch's t-test, or against the claimed value itself if it is of one run. A claim does
    not hold where the result here is significantly lower; a higher one is no objection.
    """
    name = FIGURES[claim.metric]
    claimed = f"claimed {claim.value:.2%}"
    if claim.std is not None:
        claimed += f" +- {100 * claim.std:.2f}"
    claimed += f" (n={claim.runs})"
    if not values:
        return Judgement("undecided", None, f"{name}: {claimed}; no run has ended here")
    here = f"{name}: {claimed}, here {describe(summary(values))}"
    if len(values) < 2:
        return Judgement("undecided", None, f"{here}: type --seeds 0-4, or at least two seeds")
    p = probability(claim, values)
    lower = fmean(values) < claim.value and p < SURE
    return Judgement("does not hold" if lower else "holds", p, f"{here}, p={p:.2g}")


def probability(claim: Claim, values: Sequence[float]) -> float:
    """The two-sided probability of a difference at least this large, if there is none."""
    means = [(stdev(values) ** 2 / len(values), len(values))]
    if claim.std and claim.runs > 1:
        means.append((claim.std**2 / claim.runs, claim.runs))
    return difference(fmean(values) - claim.value, means).p
