"""`launcher verify` on whole recipes: sound ones pass, and a planted fault fails at its line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.helpers import RECIPES, ROOT, alike
from tests.support.planted import FAULTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
# What is small enough for two CPU cores, and does not compile for half an hour.
SMALL = {
    "simplecnn": [],
    "pictures64": [],
    "imagenet_resnet50": ["data.source.size=32", "data.fallback.size=32", "data.batch_size=8"],
    "imagenet_resnet18_16": [
        *("data.source.size=32", "data.fallback.size=32", "data.batch_size=8"),
        *("data.train_resolution.first=16", "data.train_resolution.last=32"),
        *("data.train_resolution.multiple=16", "optimizer.base.lr=0.01"),  # or 8 images diverge
    ],
    "resnet18": ["--steps", "6", "compile=false", "precision=fp32"],
    "speedrun94": ["precision=fp32", "compile=false", "model.widths=16,32,32"],
    "speedrun94_cpu": ["precision=fp32", "model.widths=16,32,32"],
    "speedrun96": ["precision=fp32", "compile=false", "model.widths=8,16,16"],
}
TRIED = ("state_in_attribute", "sums")  # simplecnn is that of the README
WITH_BATCH_NORM = tuple(name for name in SMALL if name not in ("simplecnn", "pictures64"))
# What is said of each fault: the lines that are not good, and words of the answer that names it.
SAID: dict[str, tuple[dict[str, str], str]] = {
    "sound": ({}, ""),
    "draws_sometimes": (
        dict.fromkeys(("ranks", "resume", "other ranks", "repeat"), "wrong"),
        "draws_sometimes.py, line 26) draws from a global generator",
    ),
    "counts_calls": (
        {"resume": "wrong", "other ranks": "wrong"},
        "counts_calls.py, line 29) keeps a state between calls",
    ),
    "state_in_attribute": (
        {"resume": "wrong", "other ranks": "wrong", "evaluation": "wrong"},
        "training changes middle.calls, which no checkpoint holds",
    ),
    "sums": ({"recipe": "wrong"}, "the mean over the images, not the sum"),
    "unsorted": ({"repeat": "wrong"}, "Unsorted gives other images"),
    "batch_norm": ({"ranks": "notice"}, "by BatchNorm (1 layer) alone"),
    "dropout": ({"ranks": "notice"}, "by the random numbers of Dropout alone"),
    "dropout_in_forward": ({"ranks": "notice"}, "by the random numbers of Network alone"),
    "centres_the_batch": (
        {"ranks": "wrong", "other ranks": "wrong"},
        "the output of middle.1 (Centred) for an image depends on the others",
    ),
    "drops_always": (
        dict.fromkeys(("ranks", "other ranks", "evaluation", "export"), "wrong"),
        "random numbers are drawn in the forward of Network",
    ),
    "tied_to_float32": (
        {"ranks": "not asked", "other ranks": "not asked"},
        "tested in float64, in which training fails",
    ),
}


def tried(names: Iterable[str]) -> list[Any]:
    """Those of `TRIED`; the others are thorough."""
    marks = pytest.mark.thorough
    return [name if name in TRIED else pytest.param(name, marks=marks) for name in names]


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "launcher", "verify", str(recipe), *words]


def environment(temporary: Path) -> dict[str, str]:
    fixed = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    return {**os.environ, **fixed, "HF_HOME": str(temporary)}


def verify(recipe: Path, folder: Path, *words: str) -> dict[str, Any]:
    """What it says as JSON; nothing is left where it ran, nor for temporary files."""
    work, temporary = folder / "work", folder / "temporary"
    for path in (work, temporary):
        path.mkdir()
    done = subprocess.run(
        command(recipe, *words, "--json", "--limit", "400"),
        cwd=work,
        env=environment(temporary),
        capture_output=True,
        text=True,
        timeout=450,
    )
    assert not done.stderr, done.stderr
    assert list(work.iterdir()) == []
    # torch.compile makes its folder there as well, though it is told of another one.
    left = [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == []
    said: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if said["good"] else 2)
    return said


def standings(said: dict[str, Any]) -> dict[str, str]:
    return {verdict["question"]: verdict["standing"] for verdict in said["verdicts"]}


def test_every_recipe_and_every_fault_is_verified() -> None:
    assert sorted(SMALL) == sorted(path.stem for path in RECIPES.glob("*.py"))
    assert sorted(SAID) == sorted(FAULTS)


@pytest.mark.parametrize("name", tried(SMALL))
def test_a_recipe_of_the_project_keeps_its_promises(name: str, tmp_path: Path) -> None:
    found = standings(verify(RECIPES / f"{name}.py", tmp_path, *SMALL[name]))
    assert found == {
        "recipe": "notice",  # embedded pictures, as nothing is downloaded
        "ranks": "notice" if name in WITH_BATCH_NORM else "good",
        "resume": "good",
        "other ranks": "good",
        "repeat": "good",
        "evaluation": "good",
        "export": "good",
        "compile": "not asked",
    }


@pytest.mark.parametrize("name", tried(SAID))
def test_a_fault_fails_at_its_line(name: str, tmp_path: Path) -> None:
    odd, words = SAID[name]
    recipe = tmp_path / f"{name}.py"
    recipe.write_text(FAULTS[name])
    said = verify(recipe, tmp_path, "--steps", "20")
    expected = {} if "recipe" in odd else {**dict.fromkeys(standings(said), "good")}
    if expected:
        expected["compile"] = "not asked"
    assert standings(said) == {**expected, **odd}
    odd_answers = [v["answer"] for v in said["verdicts"] if v["question"] in odd]
    assert all(words in answer for answer in odd_answers[:1]), odd_answers


@pytest.mark.thorough
def test_what_is_compiled_trains_as_what_is_not(tmp_path: Path) -> None:
    recipe = tmp_path / "compiled.py"
    recipe.write_text(FAULTS["dropout"])
    said = verify(recipe, tmp_path, "compile=true", "--steps", "6")
    assert standings(said)["compile"] == "good", said


def test_the_time_is_kept(tmp_path: Path) -> None:
    """Where a run hangs, the line says which and where, and nothing is left behind."""
    recipe = tmp_path / "hangs.py"
    waits = "time.sleep(60 * (len(x) > 4 and os.environ.get('RANK') == '1'))\n        x = F.max"
    text = FAULTS["sound"].replace("import random", "import os\nimport random\nimport time")
    recipe.write_text(text.replace("x = F.max", waits))
    done = subprocess.run(
        [*command(recipe), "--limit", "35"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,  # seconds: a busy machine takes long to start and to end what it watches
    )
    where = "a run on 2 ranks, rank 1 in step 1 (forward) for "
    assert f"recipe      wrong     did not end within the 35 s: {where}" in done.stdout
    assert "the run hangs there" in done.stdout
    assert done.returncode == 2
    assert not list(tmp_path.glob("launcher-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, alike(signal.SIGTERM)])
def test_an_interruption_leaves_nothing_behind(number: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(RECIPES / "simplecnn.py"),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("recipe")
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert not list(tmp_path.glob("launcher-*"))
