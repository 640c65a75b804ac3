"""The Makefile makes the environment once, and pre-commit and CI say the same as it does.

`.ci/run` installs for real, and runs the tests; here the programs only write down their words.
"""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.processes import ROOT

PROGRAMS = ("pip", "python", "accelerate", "pytest", "ruff", "mypy")
PYTHON = """#!/bin/sh
echo "python3 $*" >>said
mkdir -p .venv/bin
for name in {programs}; do
  printf '#!/bin/sh\\necho "%s $*" >>said\\n' "$name" >.venv/bin/$name
  chmod +x .venv/bin/$name
done
"""
INSTALLED = ["python3 -m venv .venv", "pip install -e .[dev]"]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Makefile, and a python3 that makes an environment of such programs."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python3").write_text(PYTHON.format(programs=" ".join(PROGRAMS)))
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str) -> list[str]:
    """What `make` ran."""
    (folder / "said").write_text("")
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(("make", *words), cwd=folder, env=environment, check=True, capture_output=True)
    return (folder / "said").read_text().splitlines()


def test_the_environment_is_made_once_and_again_when_the_dependencies_change(folder: Path) -> None:
    trained = ["accelerate launch -m launcher recipes/simplecnn.py"]
    assert [line.strip() for line in make(folder, "train")] == INSTALLED + trained
    assert make(folder, "test") == ["pytest "]
    later = (folder / ".venv" / "installed").stat().st_mtime + 9
    os.utime(folder / "pyproject.toml", (later, later))
    assert make(folder, "test") == [*INSTALLED, "pytest "]


def test_an_installation_that_failed_is_made_again(folder: Path) -> None:
    script = (folder / "python3").read_text()
    (folder / "python3").write_text(script + "printf '#!/bin/sh\\nexit 1\\n' >.venv/bin/pip\n")
    with pytest.raises(subprocess.CalledProcessError):
        make(folder, "test")
    (folder / "python3").write_text(script)
    assert make(folder, "test") == [*INSTALLED, "pytest "]


def test_a_recipe_and_settings_may_be_named(folder: Path) -> None:
    *_, line = make(folder, "train", "RECIPE=recipes/mine.py", "SETTINGS=epochs=2 lr=0.1")
    assert line == "accelerate launch -m launcher recipes/mine.py epochs=2 lr=0.1"


def test_the_benchmark_takes_cifar10_where_it_is(folder: Path) -> None:
    drawn, named = make(folder, "bench")[-1], make(folder, "bench", "CIFAR10=there")[-1]
    assert drawn == "python benchmarks/epoch.py --root  --output build/epoch.json"
    assert "--root there " in named
    (folder / "data" / "cifar-10-batches-py").mkdir(parents=True)
    assert "--root data " in make(folder, "bench")[-1]


def test_help_names_every_command() -> None:
    shown = subprocess.run(("make", "help"), cwd=ROOT, capture_output=True, text=True).stdout
    commands = {line.split()[1] for line in shown.splitlines()}
    (phony,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY: ")
    ]
    assert commands == set(phony.split()[1:]) - {"help"}


def test_pre_commit_runs_what_make_check_runs(folder: Path) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [
        line.strip() for line in make(folder, "check")[len(INSTALLED) :]
    ]


def test_github_runs_what_decides_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step.get("run", "") for step in workflow["jobs"]["ci"]["steps"]]
    assert commands[-1] == "bash .ci/run"
    assert (ROOT / ".ci" / "run").is_file()


def test_github_tries_the_oldest_versions_that_are_allowed(tmp_path: Path) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (command,) = [
        step["run"]
        for step in workflow["jobs"]["versions"]["steps"]
        if "oldest versions" in step.get("name", "")
    ]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = [words.replace(">=", "==") for words in project["dependencies"]]
    assert (tmp_path / "oldest.txt").read_text().splitlines() == oldest
