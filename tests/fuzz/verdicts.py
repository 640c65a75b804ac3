"""What became of a case: accepted, refused or failed in one line, found, the user's, a fault."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from tests.fuzz import children, damages
from tests.fuzz.cases import EVERYTHING, FEW, Case
from tests.fuzz.children import Outcome
from tests.support.helpers import ROOT

# What a refusal may leave: the recipe that was there, and the lock of a folder for images.
_ALLOWED = re.compile(r"recipe\.py|data(/\.download\.lock)?")
_FRAME = re.compile(r'^  File "(.+)", line \d+', re.MULTILINE)
# Python's own words about the recipe, and torch's: each has its line.
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n(  .*\n)?|^RuntimeWarning: .*\n", re.MULTILINE)
# A line of check, verify or doctor, and their JSON.
_WRONG = re.compile(r"^.{12}wrong |^  \"good\": false", re.MULTILINE)
_OURS = str(ROOT / "launcher")


def judged(cases: Sequence[Case], folder: Path, seconds: float = 30.0) -> Iterator[tuple[str, str]]:
    """Run each in a folder of its own; yields the verdict, and what was printed last."""
    children.warm()
    good = _good_run(folder / "good") if any(case.damage for case in cases) else None
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir(parents=True)
        if case.source:
            (place / "recipe.py").write_text(case.source, encoding="utf-8")
        if case.damage and good:
            Image.new("RGB", (8, 8)).save(place / "picture.png")
            run = damages.copied(good, place / "runs" / "case")
            if case.damage[0]:
                damages.damage(run, *case.damage)
        outcome = children.run(case.words, place, seconds)
        shutil.rmtree(place)
        yield verdict(outcome), outcome.err.strip()


def _good_run(folder: Path) -> Path:
    """One that is whole, to be damaged."""
    folder.mkdir(parents=True)
    done = children.run((str(EVERYTHING), *FEW), folder, 60)
    assert done.code == 0, done.err
    return folder / "runs" / "case"


def verdict(outcome: Outcome) -> str:
    """The word for it; all but the first five begin with `fault`."""
    lines = _WARNING.sub("", outcome.err).splitlines()
    is_line = len(lines) == 1 and lines[0].startswith("launcher: ")
    left = [name for name in outcome.left if not _ALLOWED.fullmatch(name)]
    if outcome.code == 0:
        return "accepted" if not lines else "fault: noise"
    if outcome.code == 2 and is_line:
        return f"fault: left {left[:3]}" if left else "refused"
    if outcome.code == 2 and not lines and _WRONG.search(outcome.out):
        return "found"
    if outcome.code == 1 and is_line:
        return "failed"
    if outcome.code == 1 and _is_the_users(outcome.err):
        return "the user's"
    return "fault: too slow" if outcome.code is None else f"fault: exit code {outcome.code}"


def _is_the_users(error: str) -> bool:
    """Whether no line of the launcher is behind the last one of the recipe."""
    files = _FRAME.findall(error)
    own = [n for n, name in enumerate(files) if name.endswith(("recipe.py", "everything.py"))]
    return bool(own) and not any(name.startswith(_OURS) for name in files[own[-1] :])
