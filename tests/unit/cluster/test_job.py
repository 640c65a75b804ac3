"""A job for a batch system: what is refused, and the arguments that start each of its runs."""

from datetime import timedelta
from typing import Any

import pytest

from launcher.cluster.job import BatchJob, Sweep, safe_name
from tests.support.helpers import refused


def job(**fields: Any) -> BatchJob:
    return BatchJob(**({"recipe": "recipes/simplecnn.py", "name": "first"} | fields))


def test_a_job_says_how_its_run_is_started_the_same_in_every_attempt() -> None:
    one = job(overrides=("epochs=2", "optimizer.lr=0.1"), options=("--wandb=off",), runs="my runs")
    assert one.arguments() == (
        *("train", "recipes/simplecnn.py", "epochs=2", "optimizer.lr=0.1", "--wandb=off"),
        "--save-before=120",
        *("--runs=my runs", "--name=first", "--resume"),
    )
    assert one.run_names == ("first",)


def test_a_sweep_over_seeds_is_called_as_repeats_are() -> None:
    swept = job(sweep=Sweep("seed", ("3", "5")))
    assert swept.run_names == ("first-seed3", "first-seed5")
    assert {"seed=5", "--name=first-seed5"} < set(swept.arguments(1))


def test_a_sweep_is_one_run_per_value() -> None:
    swept = job(sweep=Sweep("optimizer.lr", ("0.01", "0.1")))
    assert swept.run_names == ("first-0", "first-1")
    assert "optimizer.lr=0.1" in swept.arguments(1)
    assert "--name=first-1" in swept.arguments(1)


def test_a_setting_that_differs_from_run_to_run_has_no_other_value() -> None:
    with refused("seed=5, of which each run of the sweep has its own value", "leave it out"):
        job(sweep=Sweep("seed", ("3", "4")), overrides=("epochs=2", "seed=5"))


def test_a_process_per_gpu_and_on_cpus_as_many_as_asked_for() -> None:
    assert job(gpus=8).processes_per_node == 8
    assert job(gpus=0, processes=3).processes_per_node == 3


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"name": "a b"}, "type --name a-b"),
        ({"name": "-rm"}, "type --name rm"),
        ({"name": "a\nb"}, "type --name a-b"),
        ({"name": "../up"}, "--name '../up'"),
        ({"name": ""}, "type --name run"),
        ({"name": "x" * 64}, "at most 63"),
        ({"name": "jobs"}, "type --name my-run"),
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"gpus": 0, "processes": 0}, "--processes 0"),
        ({"cpus": 0}, "--cpus 0"),
        ({"gpus": 4, "processes": 2}, "one process per GPU"),
        ({"time": timedelta(minutes=4)}, "twice --save-before"),
        ({"save_before": timedelta(seconds=1), "time": timedelta(seconds=61)}, "at least a minute"),
        ({"save_before": timedelta(0)}, "--save-before 0"),
        ({"recipe": "--help"}, "the recipe '--help'"),
        ({"recipe": "a=b"}, "the recipe 'a=b'"),
        ({"recipe": ""}, "the recipe ''"),
        ({"overrides": ("--nodse=2",)}, "settings as name=value"),
        ({"overrides": ("epochs",)}, "'epochs' after the recipe"),
    ],
)
def test_what_no_batch_system_could_start_is_refused(fields: dict[str, Any], part: str) -> None:
    with refused(part):
        job(**fields)


@pytest.mark.parametrize(
    ("setting", "values"),
    [("", ("1",)), ("a b", ("1",)), ("lr", ()), ("lr", ("1", "")), ("lr", ("1", "1"))],
)
def test_a_sweep_needs_a_setting_and_different_values(
    setting: str, values: tuple[str, ...]
) -> None:
    with refused("--sweep", "optimizer.lr=0.01,0.03,0.1"):
        Sweep(setting, values)


@pytest.mark.parametrize(
    ("text", "name"),
    [("my recipe", "my-recipe"), ("$(rm -rf)", "rm--rf"), ("...", "run"), ("a" * 99, "a" * 40)],
)
def test_any_text_has_a_safe_name_near_it(text: str, name: str) -> None:
    assert safe_name(text) == name
    assert job(name=safe_name(text)).name == name
