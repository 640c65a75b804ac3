"""A fixed part of what `python -m tests.fuzz` tries: no traceback of ours, no hang, no litter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.children import Outcome
from tests.fuzz.mutations import mutations
from tests.fuzz.verdicts import verdict
from tests.support.helpers import ROOT

CASES = 120
LINE = "launcher: x; expected y; type z"


@pytest.mark.slow
def test_nothing_that_is_typed_ends_in_a_fault_of_ours() -> None:
    """In a process of its own: it forks, and this one may have threads."""
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES), "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())  # as `3 the user's`
    counts = {word: int(number) for number, word in lines}
    assert sum(counts.values()) == CASES
    assert counts["refused"] > CASES / 3 > counts["accepted"] > 0


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (Outcome(0, "", "", ("runs",)), "accepted"),
        (Outcome(2, "", f"{LINE}\n", ("recipe.py", "data/.download.lock")), "refused"),
        (Outcome(1, "", f"{LINE}\n", ("runs",)), "failed"),
        (Outcome(1, "", '  File "recipe.py", line 3, in f\nValueError\n', ()), "the user's"),
        (Outcome(2, "", f"{LINE}\n", ("runs",)), "fault: left ['runs']"),
        (Outcome(2, "", f"{LINE}\nmore\n", ()), "fault: exit code 2"),
        (Outcome(0, "", "what is this\n", ()), "fault: noise"),
        (Outcome(None, "", "", ()), "fault: too slow"),
        (Outcome(-11, "", "", ()), "fault: exit code -11"),
    ],
)
def test_an_outcome_is_judged(outcome: Outcome, word: str) -> None:
    assert verdict(outcome) == word


def test_a_traceback_that_ends_in_the_launcher_is_ours() -> None:
    frames = f'  File "recipe.py", line 3, in f\n  File "{ROOT}/launcher/api.py", line 1, in g\n'
    assert verdict(Outcome(1, "", f"{frames}ValueError\n", ())) == "fault: exit code 1"


def test_each_mutation_is_another_program() -> None:
    source = Path(ROOT, "recipes", "simplecnn.py").read_text()
    made = [make() for make in mutations(source)]
    assert len(made) > 200
    assert all(mutation.source != source for mutation in made)
    for kind in ("left out", "swapped", "constant", "renamed", "in a tuple", "yield", "called"):
        assert any(kind in mutation.change for mutation in made)
    for mutation in made:
        ast.parse(mutation.source)
