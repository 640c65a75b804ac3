"""The options of one run."""

import pytest

from launcher.config.options import MOST_BYTES, RunOptions
from tests.support.helpers import refused


@pytest.mark.parametrize(
    "name",
    [
        *("../up", "a/b", "", " ", ".hidden", "/root"),
        *("a\0b", "a\nb", "a\x1b[31mb", "\udc80", "x" * (MOST_BYTES + 1), "\u00e9" * MOST_BYTES),
    ],
)
def test_a_name_that_is_no_plain_name_is_refused(name: str) -> None:
    with refused("--name ", "a plain name", "type --name my-run"):
        RunOptions(name=name)


@pytest.mark.parametrize("name", ["first", "lr 0.1", "\u00e9t\u00e9", "x" * MOST_BYTES])
def test_other_names_are_taken(name: str) -> None:
    assert RunOptions(name=name).name == name


@pytest.mark.parametrize("steps", [0, -5])
def test_a_run_has_at_least_one_step(steps: int) -> None:
    with refused(f"max_steps={steps}", "at least 1"):
        RunOptions(max_steps=steps)
