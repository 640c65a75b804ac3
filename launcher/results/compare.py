"""`launcher compare A B ...`: what differs between runs, and whether their accuracy does.

Runs that differ only in their seed are repeats of one experiment: they share one column, with mean
and standard deviation.
"""

import difflib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from launcher.checkpoint.run_files import RunFiles, find
from launcher.results import html
from launcher.results.figures import number
from launcher.results.quoted import LAST, headline, quoted
from launcher.results.statistics import difference
from launcher.utils.arguments import Parser
from launcher.utils.json_text import differing, flatten
from launcher.utils.redaction import redacted
from launcher.utils.terminal import make_console
from launcher.utils.text import count, printable

_USAGE = "launcher compare RUN RUN [RUN ...] [--html FILE] [--json]"
_OTHER_PAGE = "type --html comparison.html, for example"
_OF_A_RUN = ("seed", "data.root")  # settings in which repeats of one experiment may differ
_ALSO = {"last training loss": "train/loss", "images/s": "train/images_per_second"}
_CURVES = {  # of a page: title, figure, and plotly's settings of its axis
    "Loss of the test images": ("test/loss", {"hoverformat": ".4f"}),
    "Accuracy of the test images": (
        "test/accuracy",
        {"tickformat": ".4~%", "hoverformat": ".2%"},
    ),
    "Loss of the validation images": ("val/loss", {"hoverformat": ".4f"}),
    "Accuracy of the validation images": (
        "val/accuracy",
        {"tickformat": ".4~%", "hoverformat": ".2%"},
    ),
    "Loss in training": ("train/loss", {"hoverformat": ".4f"}),
    "Learning rate": ("train/learning_rate", {"hoverformat": ".3~g", "rangemode": "tozero"}),
}


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, and its metrics: a value for each run that has one."""

    runs: tuple[RunFiles, ...]
    figures: Mapping[str, tuple[float, ...]]

    @property
    def name(self) -> str:
        """Of its runs."""
        names = [run.name for run in self.runs]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} runs)"

    @property
    def seeds(self) -> list[Any]:
        """Of its runs; None where it is no number."""
        found = (run.config.get("seed") for run in self.runs)
        return [seed if isinstance(seed, int) else None for seed in found]


@dataclass(frozen=True)
class Comparison:
    """Whether two experiments differ: a two-sided t-test of one metric.

    `effect` is the difference in units of their pooled standard deviation (Cohen's d).
    """

    figure: str
    kind: str  # paired, by seeds, or Welch's
    difference: float
    t: float
    freedom: float
    p: float
    effect: float


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher compare`."""
    parser = Parser(prog="launcher compare", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="a run folder, or the name of a run")
    add("--runs", dest="folder", type=Path, default=Path("runs"), metavar="DIR", help="runs folder")
    add("--html", type=Path, metavar="FILE", help="write a page with the curves, for a browser")
    add("--json", action="store_true", help="for machines: one object")
    arguments = parser.parse_args(words)
    if len(arguments.runs) < 2:
        parser.error("a comparison needs at least two runs")
    runs = [find(word, arguments.folder) for word in arguments.runs]
    if len({run.path.resolve() for run in runs}) < len(runs):
        parser.error("a run is named twice")
    if arguments.html is not None:
        html.refuse_taken(arguments.html, instead=_OTHER_PAGE)
    groups = grouped(runs)
    if arguments.json:
        sys.stdout.write(redacted(json.dumps(as_dict(runs, groups), indent=2)) + "\n")
    else:
        _show(runs, groups)
    if arguments.html is not None:
        html.write(arguments.html, page_of(runs, groups), instead=_OTHER_PAGE)
        html.write_script(arguments.html.parent, instead=_OTHER_PAGE)
    return 0


# What differs


def environment(run: RunFiles) -> dict[str, Any]:
    """Versions, devices, precision, length and data of a run."""
    about = run.about
    facts = ("devices", "precision", "memory", "batch", "steps", "weights", "data")
    named = {name: about.get(name) for name in facts}
    named |= {"state": run.state, "epochs trained": run.epoch}
    named["weights (digest)"] = about.get("weights_digest")
    named["images (digest)"] = about.get("data_digest")
    ranks = dict.fromkeys(str(row.get("ranks", "?")) for row in run.epochs)
    if len(ranks) > 1:  # one by one, as each part of the run had them
        named["ranks"] = ", ".join(ranks)
    named["changed on the way"] = "; ".join(map(str, run.changes)) or None
    named |= {f"{name} (SHA-256)": digest for name, digest in _neighbours(run).items()}
    versions = about.get("versions")
    return {**named, **(versions if isinstance(versions, dict) else {})}


def _neighbours(run: RunFiles) -> dict[str, Any]:
    """The digests of the files that the recipe imported."""
    found = run.about.get("neighbours")
    return found if isinstance(found, dict) else {}


def source_difference(first: RunFiles, second: RunFiles) -> list[str]:
    """The unified diff of the recipe files; empty where they are equal."""
    before, after = (run.source.splitlines() for run in (first, second))
    one, two = (str(run.path / "recipe.py") for run in (first, second))
    return list(difflib.unified_diff(before, after, one, two, lineterm="", n=2))


# The figures


def grouped(runs: Sequence[RunFiles]) -> list[Group]:
    """Group the repeats of each experiment, in the order of their first runs.

    The same seed once more, or a copy of a run, is no second measurement: it is in another group.
    """
    groups: dict[tuple[str, int], list[RunFiles]] = {}
    times: Counter[tuple[str, str]] = Counter()
    for run in runs:
        same = json.dumps(experiment(run), sort_keys=True), json.dumps(run.config.get("seed"))
        groups.setdefault((same[0], times[same]), []).append(run)
        times[same] += 1
    return [Group(tuple(group), _figures(group)) for group in groups.values()]


def experiment(run: RunFiles) -> dict[str, Any]:
    """What all repeats of a run share: settings, recipe file, images, first weights and length.

    A run that has not ended is only like those that stand in the same epoch.
    """
    settings = {n: v for n, v in flatten(run.config).items() if n not in _OF_A_RUN}
    images = [run.about.get(name) for name in ("data_digest", "fallback")]
    length = [run.cut, None if run.state == "done" else run.epoch]
    begin: dict[str, Any] = {"the first weights": run.first_weights, "the length": length}
    begin["what the recipe imports"] = _neighbours(run)
    begin["what was changed on the way"] = list(map(str, run.changes))
    return {**settings, "the recipe file": run.source, "the images": images, **begin}


def _figures(runs: Sequence[RunFiles]) -> dict[str, tuple[float, ...]]:
    """The metric's value of each run that has it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        last = run.last_row or {}
        also = {f"last {run.images} loss": run.key("loss"), **_ALSO}
        numbers = {name: number(last.get(key)) for name, key in also.items()}
        for name, value in {**quoted(run), **numbers}.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in found.items()}


def compared(first: Group, second: Group) -> Comparison | None:
    """A paired test for the same seeds, else Welch's; None with less than two runs each.

    The metric is the one that was not chosen on its own images or, where the two groups differ in
    that, the one of the last epoch.
    """
    figures = {headline(group.runs[0]) for group in (first, second)}
    figure = figures.pop() if len(figures) == 1 else LAST
    one, two = (group.figures.get(figure, ()) for group in (first, second))
    if len(one) < 2 or len(two) < 2:
        return None
    whole = len(one) == len(first.runs) == len(two) == len(second.runs)
    same = whole and None not in first.seeds and len(set(first.seeds)) == len(one)
    if same and sorted(first.seeds) == sorted(second.seeds):
        by_seed = [dict(zip(g.seeds, v, strict=True)) for g, v in ((first, one), (second, two))]
        gaps = [by_seed[1][seed] - by_seed[0][seed] for seed in by_seed[0]]
        kind, means = "paired", [(stdev(gaps) ** 2 / len(gaps), len(gaps))]
    else:
        kind, means = "Welch's", [(stdev(v) ** 2 / len(v), len(v)) for v in (one, two)]
    gap = fmean(two) - fmean(one)
    pooled = math.sqrt(sum(stdev(values) ** 2 for values in (one, two)) / 2)
    effect = gap / pooled if pooled else math.copysign(math.inf, gap) if gap else 0.0
    found = difference(gap, means)
    return Comparison(figure, kind, gap, found.t, found.freedom, found.p, effect)


# What is shown


def as_dict(runs: Sequence[RunFiles], groups: Sequence[Group]) -> dict[str, Any]:
    """The whole comparison, for JSON."""
    tests = [
        {"first": a.name, "second": b.name, **_in_json(test)}
        for a, b in pairwise(groups)
        if (test := compared(a, b))
    ]
    return {
        "runs": [str(run.path) for run in runs],
        "settings": differing([flatten(run.config) for run in runs]),
        "environment": differing([environment(run) for run in runs]),
        "source": [source_difference(runs[0], run) for run in runs[1:]],
        "groups": [{"runs": [r.name for r in g.runs], "figures": g.figures} for g in groups],
        "tests": tests,
    }


def _tables(runs: Sequence[RunFiles]) -> dict[str, dict[str, list[str]]]:
    """What differs in settings and environment: a cell for each run."""
    values = {
        "settings": [flatten(run.config) for run in runs],
        "environment": [environment(run) for run in runs],
    }
    return {
        title: {name: [_cell(value) for value in row] for name, row in differing(own).items()}
        for title, own in values.items()
    }


def _differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The differences of the recipe files; all runs of a group have the same one."""
    first = groups[0].runs[0]
    differences = {g.name: source_difference(first, g.runs[0]) for g in groups[1:]}
    return {name: list(map(redacted, lines)) for name, lines in differences.items() if lines}


def _rows_of_figures(groups: Sequence[Group]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for group in groups for name in group.figures)
    ordered = sorted(names, key=lambda name: "accuracy" not in name)
    return {name: [_mean(g.figures.get(name, ()), name) for g in groups] for name in ordered}


def _in_json(test: Comparison) -> dict[str, Any]:
    """JSON has no infinity, which a test of equal runs may give."""
    values = vars(test).items()
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values}


def _sentences(groups: Sequence[Group]) -> list[str]:
    """The results of the tests of each two neighbouring groups, in words."""
    pairs = ((a, b, compared(a, b)) for a, b in pairwise(groups))
    return [sentence(first, second, test) for first, second, test in pairs if test]


def _show(runs: Sequence[RunFiles], groups: Sequence[Group]) -> None:
    console = make_console()
    for title, rows in _tables(runs).items():
        if rows:
            console.print(_table(title, [run.name for run in runs], rows))
        else:
            console.print(f"{title}: no difference", markup=False)
    for lines in _differences(groups).values():
        for line in lines:
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
            console.print(Text(printable(line), style))
    columns = [group.name for group in groups]
    console.print(_table("figures", columns, _rows_of_figures(groups)))
    for line in _sentences(groups):
        console.print(line, markup=False, soft_wrap=True)


def page_of(runs: Sequence[RunFiles], groups: Sequence[Group]) -> bytes:
    """The comparison as a page, with the curves of all runs in one chart."""
    charts = [
        {"title": title, "axis": axis, "lines": list(_lines(groups, key))}
        for title, (key, axis) in _CURVES.items()
    ]
    return html.render(
        "compare.html",
        title=f"{count(len(runs), 'run')} compared",
        subtitle=", ".join(run.name for run in runs),
        runs=runs,
        groups=groups,
        tables=_tables(runs),
        figures={
            name: [cell.replace("+-", "±") for cell in row]
            for name, row in _rows_of_figures(groups).items()
        },
        sentences=_sentences(groups),
        differences=_differences(groups),
        data={"charts": [chart for chart in charts if chart["lines"]]},
        script=html.SCRIPT,
    )


def _lines(groups: Sequence[Group], key: str) -> Iterator[dict[str, Any]]:
    """A curve for each run that has values; runs of one group have one colour."""
    for place, group in enumerate(groups):
        for run in group.runs:
            values = [number(row.get(key)) for row in run.epochs]
            if any(value is not None for value in values):
                epochs = [row["epoch"] for row in run.epochs]
                yield {"name": run.name, "group": place, "epochs": epochs, "values": values}


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (title, *names):
        table.add_column(Text(printable(name)), overflow="fold")
    for name, cells in rows.items():
        table.add_row(Text(printable(name)), *(Text(printable(cell)) for cell in cells))
    return table


def _cell(value: Any) -> str:
    return (
        "-" if value is None else redacted(value if isinstance(value, str) else json.dumps(value))
    )


def _mean(values: Sequence[float], name: str) -> str:
    form = "{:.2%}" if "accuracy" in name else "{:,.4g}"
    if not values:
        return "-"
    mean = form.format(fmean(values))
    return f"{mean} +- {form.format(stdev(values))} (n={len(values)})" if values[1:] else mean


def sentence(first: Group, second: Group, test: Comparison) -> str:
    """The result of a test, in words."""
    differ = "differ" if test.p < 0.05 else "do not differ for certain"
    n = " and ".join(str(len(group.figures[test.figure])) for group in (first, second))
    return (
        f"{test.figure} of {first.name} and {second.name}: they {differ} ({test.difference:+.2%}, "
        f"{test.kind} t={test.t:.2f}, p={test.p:.3g}, d={test.effect:.2f}, n={n})"
    )
