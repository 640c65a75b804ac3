"""The options of one run."""

from typing import Any

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


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ({"max_steps": "3"}, ("max_steps='3'", "a value of type int | None")),
        ({"max_steps": 3.0}, ("max_steps=3.0", "a value of type int | None")),
        ({"name": 3}, ("name=3", "a value of type str | None")),
        ({"wandb": True}, ("wandb=True", "a value of type str | None")),
        ({"wandb": "on"}, ("wandb='on'", "'online' or 'offline' or 'off'")),
    ],
)
def test_an_option_of_another_type_is_refused(
    option: dict[str, Any], parts: tuple[str, ...]
) -> None:
    """As they come from a notebook: the command line has asked before."""
    with refused(*parts):
        RunOptions(**option)
