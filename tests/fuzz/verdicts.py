"""What became of a case: accepted, refused in one line, failed in one line, the user's, a fault."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.fuzz import children
from tests.fuzz.cases import Case
from tests.fuzz.children import Outcome
from tests.support.helpers import ROOT

# What a refusal may leave: the recipe that was there, and the lock of a folder for images.
_ALLOWED = re.compile(r"recipe\.py|data(/\.download\.lock)?")
_FRAME = re.compile(r'^  File "(.+)", line \d+', re.MULTILINE)
# Python's own words about the recipe, and torch's: each has its line.
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n(  .*\n)?|^RuntimeWarning: .*\n", re.MULTILINE)
_OURS = str(ROOT / "launcher")


def judged(cases: Iterable[Case], folder: Path, seconds: float = 30.0) -> Iterator[tuple[str, str]]:
    """Run each in a folder of its own; yields the verdict, and what was printed last."""
    children.warm()
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir(parents=True)
        if case.source:
            (place / "recipe.py").write_text(case.source, encoding="utf-8")
        outcome = children.run(case.words, place, seconds)
        shutil.rmtree(place)
        yield verdict(outcome), outcome.err.strip()


def verdict(outcome: Outcome) -> str:
    """The word for it; all but the first four begin with `fault`."""
    lines = _WARNING.sub("", outcome.err).splitlines()
    is_line = len(lines) == 1 and lines[0].startswith("launcher: ")
    left = [name for name in outcome.left if not _ALLOWED.fullmatch(name)]
    if outcome.code == 0:
        return "accepted" if not lines else "fault: noise"
    if outcome.code == 2 and is_line:
        return f"fault: left {left[:3]}" if left else "refused"
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
