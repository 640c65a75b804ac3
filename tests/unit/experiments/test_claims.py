"""What recipes claim: with evidence in the repository, and judged against what is measured."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import Claim
from launcher.cli import main
from launcher.config.loader import load
from launcher.experiments.claims import judge, probability
from launcher.results.quoted import LAST
from tests.support.helpers import RECIPES, ROOT, complaint, refused, tiny_recipe

FIGURE = re.compile(r"(\d\d\.\d\d) \+- (\d\.\d\d) %")
SHIPPED = sorted(path for path in RECIPES.glob("*.py") if path.stem != "__init__")


def evidence() -> Iterator[dict[str, Any]]:
    """Committed results of several runs: recipe, settings, figures with their n."""
    benchmarks = ROOT / "benchmarks"
    for call in json.loads((benchmarks / "gpu.json").read_text())["calls"]:
        for name, part in call.items():
            if isinstance(part, dict) and "runs" in part:
                epochs = {f"epochs={part['epochs']}"} if "epochs" in part else set()
                yield {**part, "recipe": name, "set": {*part["settings"], *epochs}}
    for part in json.loads((benchmarks / "repeat.json").read_text())["repeats"]:
        accuracy = part["summary"][LAST]
        yield {"recipe": part["recipe"], "set": set(part["settings"]), "accuracy": accuracy}
    part = json.loads((benchmarks / "speedrun.json").read_text())
    yield {**part, "set": set(part["settings"])}


def figure_of(part: dict[str, Any], claim: Claim) -> dict[str, Any]:
    figure: dict[str, Any] = part[claim.metric.removeprefix("test/")]
    return figure


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_a_recipe_claims_was_measured(path: Path) -> None:
    loaded = load(path)
    for claim in loaded.recipe.claims:
        own = {*claim.settings} or {f"epochs={loaded.recipe.epochs}"}
        found = [
            part
            for part in evidence()
            if part["recipe"] == path.stem
            and (own <= part["set"] or (not claim.settings and not part["set"]))
            and figure_of(part, claim)["n"] == claim.runs
        ]
        assert found, claim
        figures = [figure_of(part, claim) for part in found]
        assert any(
            f["mean"] == pytest.approx(claim.value, abs=6e-5)
            and f["std"] == pytest.approx(claim.std, abs=6e-5)
            for f in figures
        ), (claim, figures)
        seconds = [part["seconds"]["mean"] for part in found if "seconds" in part]
        assert claim.seconds is None or claim.seconds in [
            pytest.approx(s, rel=0.01) for s in seconds
        ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_mean_in_a_recipes_text_is_one_of_its_claims(path: Path) -> None:
    loaded = load(path)
    claims = [(f"{100 * c.value:.2f}", f"{100 * (c.std or 0):.2f}") for c in loaded.recipe.claims]
    for figure in FIGURE.findall(" ".join(loaded.note.split())):
        assert figure in claims, f"{path.stem}: {figure} is not a claim"


def test_claims_are_no_settings() -> None:
    recipe = replace(tiny_recipe(), claims=(Claim("test/accuracy", 0.5),))
    from launcher.config.serialize import resolve

    assert resolve(recipe) == resolve(tiny_recipe())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("test/loss", 0.5), "'test/loss'"),
        (("test/accuracy", 95.2), "95.2"),
        (("test/accuracy", 0.5, None, 0), "0 runs"),
        (("test/accuracy", 0.5, -1.0), "-1.0"),
    ],
)
def test_what_cannot_be_measured_is_no_claim(arguments: tuple[Any, ...], part: str) -> None:
    with refused(part, 'Claim("test/accuracy", 0.95'):
        Claim(*arguments)


def test_a_claim_without_its_comma_is_refused() -> None:
    with refused("with the comma"):
        tiny_recipe(claims=Claim("test/accuracy", 0.5))


CLAIM = Claim("test/accuracy", 0.95, std=0.002, runs=5)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.9501, 0.9489, 0.9505], "holds"),
        ([0.96, 0.961, 0.962], "holds"),  # better is no objection
        ([0.93, 0.931, 0.929], "does not hold"),
        ([0.93, 0.95, 0.91], "holds"),  # lower, but perhaps by chance
        ([0.93], "undecided"),
        ([], "undecided"),
    ],
)
def test_a_claim_is_judged_by_what_chance_explains(values: list[float], verdict: str) -> None:
    assert judge(CLAIM, values).verdict == verdict


def test_the_probability_is_welchs() -> None:
    """By hand: t = -0.02 / sqrt(1e-6/3 + 4e-6/5), 5.95 degrees of freedom; of a table 1.6e-06."""
    assert probability(CLAIM, [0.929, 0.93, 0.931]) == pytest.approx(1.66e-06, rel=0.1)
    alone = Claim("test/accuracy", 0.95)  # a one-sample test: t = -20 / (1 / sqrt(3)), 2 degrees
    assert probability(alone, [0.929, 0.93, 0.931]) == pytest.approx(0.00083, rel=0.01)
    assert probability(alone, [0.95, 0.95]) == 1.0
    assert probability(alone, [0.94, 0.94]) == 0.0


RECIPE = """
from dataclasses import replace
from launcher import Claim
from tests.support.helpers import tiny_recipe

recipe = tiny_recipe(epochs=1, claims=(
    Claim("test/accuracy", {value}, std=0.01, runs=2, hardware="1x H100", seconds=9),
    Claim("test/accuracy", 0.01, settings=("epochs=2",)),
))
"""


@pytest.mark.parametrize(("value", "code"), [(0.02, 0), (0.99, 2)])
def test_a_claim_is_measured_again(
    value: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(RECIPE.format(value=value))
    assert main(["repeat", "mine.py", "--claims", "--wandb", "off", "--no-report"]) == code
    said = capsys.readouterr().out
    assert ("does not hold: " if code else "holds: ") + "test accuracy, last epoch: claimed" in said
    assert "claimed on 1x H100 in 9 s; here on 1 x CPU" in said
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [
        *("mine-claim1-seed0", "mine-claim1-seed1"),
        *("mine-claim2-seed0", "mine-claim2-seed1", "mine-claim2-seed2"),
    ]
    assert complaint(capsys, "repeat", "mine.py", "--claims", "epochs=3").count("epochs=3") == 1
    Path("none.py").write_text(
        "from tests.support.helpers import tiny_recipe\nrecipe = tiny_recipe()"
    )
    assert "claims nothing" in complaint(capsys, "repeat", "none.py", "--claims")


def test_nothing_is_claimed_of_images_that_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = RECIPE.format(value=0.02).replace("epochs=1,", "epochs=1, data=data,")
    data = 'data = {"source": Folder, "fallback": partial(Synthetic, count=60)}'
    text = text.replace("\nrecipe", f"\nfrom functools import partial\n{data}\nrecipe")
    Path("mine.py").write_text(text.replace("import Claim", "import Claim, Folder, Synthetic"))
    assert main(["repeat", "mine.py", "--claims", "--wandb", "off", "--no-report"]) == 0
    said = capsys.readouterr().out
    assert "holds: " not in said
    assert said.count("undecided: test accuracy, last epoch: claimed") == 2
    assert "mine-claim1-seed0: NOT THE REAL DATA: Folder is not in 'data'" in said


def test_a_claim_is_not_judged_by_runs_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a recipe that was edited after them; and what is cut measures nothing of it."""
    monkeypatch.chdir(tmp_path)
    words = ("repeat", "mine.py", "--claims", "--wandb", "off", "--no-report")
    Path("mine.py").write_text(RECIPE.format(value=0.02))
    assert "combined with --max-steps or --init-from" in complaint(
        capsys, *words, "--max-steps", "3"
    )
    assert main(words) == 0
    Path("mine.py").write_text(RECIPE.format(value=0.02).replace("epochs=1", "epochs=3"))
    capsys.readouterr()
    assert main([*words, "--table"]) == 0
    said = capsys.readouterr().out
    assert "undecided: test accuracy, last epoch: claimed 2.00%; trained anew" in said
    assert "epochs (1 -> 3)" in said
