"""A search proposes settings, judges by validation images, and goes on where it was ended."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.config.loader import load
from launcher.config.options import RunOptions
from launcher.experiments import search
from launcher.experiments.search import Range, parse_range
from tests.support.helpers import alike, complaint, refused
from tests.support.processes import PYTHON, RESUMABLE, ROOT, Run

TINY = """
from tests.support.helpers import tiny_recipe
recipe = tiny_recipe(epochs=3, data={"batch_size": 20, "validation": 0.2})
"""
LR = "optimizer.lr=log:1e-4..1e-1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TINY)


def searched(*words: str, trials: int = 3) -> int:
    options = ("--trials", str(trials), "--wandb", "off", *words)
    return main(["tune", "mine.py", *options])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("optimizer.lr=log:1e-4..1e-1", Range("optimizer.lr", 1e-4, 1e-1, is_log=True)),
        ("a=-0.5..0.5", Range("a", -0.5, 0.5)),
        ("--epochs=1..9", Range("epochs", 1, 9, is_whole=True)),
        ("w=16|32", Range("w", words=("16", "32"))),
        ("epochs=3", None),
    ],
)
def test_ranges_are_typed(text: str, found: Range | None) -> None:
    assert parse_range(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *("lr", "=1..2", "a=2..1", "a=1..1", "a=x..2", "a=log:0..1", "a=1..nan", "a=1..inf"),
        *("a=1..2..3", "a=|b", "a=b|b", "a=log:-1..1"),
    ],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with refused("--search", "log:1e-4..1e-1"):
        parse_range(text)


def test_each_trial_is_a_run_and_the_best_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert searched("--search", LR, "model.width=2|4", "data.batch_size=10") == 0
    said = capsys.readouterr().out
    assert "chosen by the validation images" in said
    assert "the search did not look at" in said
    names = [f"mine-search-trial{number}" for number in range(3)]
    runs = [RunFiles(Path("runs") / name) for name in names]
    assert all(run.config["data"]["batch_size"] == 10 for run in runs)
    assert {run.config["model"]["width"] for run in runs} <= {2, 4}
    assert all(1e-4 <= run.config["optimizer"]["lr"] <= 1e-1 for run in runs)
    assert len({run.config["optimizer"]["lr"] for run in runs}) == 3
    before = Path("runs", names[0], "final.safetensors").stat().st_mtime_ns
    assert searched("--search", LR, "model.width=2|4", "data.batch_size=10") == 0
    assert "=== mine-search-trial" not in capsys.readouterr().out, "nothing is left to try"
    assert searched("--search", LR, "model.width=2|4", "data.batch_size=10", trials=4) == 0
    assert Path("runs/mine-search-trial3").is_dir()
    assert Path("runs", names[0], "final.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("data.validation=0.2", "--search", LR), "data.validation (None -> 0.2)"),
        (("--on-test", "--search", "model.width=2|4"), "model.width (None -> 2|4)"),
        (("--on-test", "--search", "optimizer.lr=1e-4..1e-1"), "(log:0.0001..0.1 -> 0.0001..0.1)"),
    ],
)
def test_a_search_of_another_name_is_asked_for_where_anything_else_is_searched(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(TINY.replace(', "validation": 0.2', ""))
    command = ("tune", "mine.py", "--trials", "2", "--wandb", "off", "--name", "o")
    assert main([*command[:3], "1", *command[4:], "--on-test", "--search", LR]) == 0
    for more in ((), ("--table",), ("--jobs", "2")):
        said = complaint(capsys, *command, *words, *more)
        assert "the search o with other settings" in said
        assert part in said
        assert "another --name" in said
    assert not Path("runs/o-trial1").exists()


def test_the_best_is_measured_by_exactly_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("model.width=2", "seed=5", "data.mean=0.5,0.5,0.25")
    assert main(["tune", "mine.py", *fixed, "--trials=1", "--search", LR, "epochs=2"]) == 0
    advice = capsys.readouterr().out.splitlines()[-1]
    rate = RunFiles(Path("runs/mine-search-trial0")).config["optimizer"]["lr"]
    words = f"model.width=2 data.mean=0.5,0.5,0.25 epochs=2 optimizer.lr={rate}"
    assert advice == f"measure it: launcher repeat RECIPE {words} --seeds 0-4"


def test_a_search_that_goes_on_proposes_what_it_has_not_yet() -> None:
    rates = set()
    for trials in (1, 2, 3):
        assert searched("--search", LR, trials=trials) == 0
        config = RunFiles(Path(f"runs/mine-search-trial{trials - 1}")).config
        rates.add(config["optimizer"]["lr"])
    assert len(rates) == 3


@pytest.mark.slow
def test_a_lagging_trial_is_ended_early(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(PLANTED)
    assert searched("--search", "model.quality=0|1", trials=16) == 0
    said = capsys.readouterr().out
    pruned = [line.split() for line in said.splitlines() if " pruned " in line]
    assert pruned, said
    for name, _, epochs, *_, quality in pruned:
        assert (epochs, quality) == ("2", "0")
        assert RunFiles(Path("runs") / name).state == "stopped"
    assert "best of" in said
    assert said.splitlines()[-1].startswith("measure it: launcher repeat RECIPE model.quality=1")


PLANTED = """
import torch
from tests.support.helpers import Tiny, tiny_recipe

class Planted(Tiny):
    \"\"\"Knows the class of a third of the images, or of none: Synthetic's first ones are 0.\"\"\"

    def __init__(self, quality=0):
        super().__init__()
        self.quality = quality

    def forward(self, images):
        bias = torch.zeros(10)
        bias[0] = 1e6 if self.quality else 0.0
        scores = super().forward(images)
        return scores if self.training else scores * 1e-6 + bias

class Zeros:
    classes = tuple("abcdefghij")

    def __init__(self, root, train):
        self.data = torch.randint(256, (60, 4, 4, 3), dtype=torch.uint8)
        self.targets = torch.arange(60) % 10 * (torch.arange(60) % 2)

recipe = tiny_recipe(epochs=4, model=Planted, data={"source": Zeros, "validation": 0.5})
"""


def test_without_validation_images_a_search_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tune", "mine.py", "data.validation=none", "--trials", "1", "--wandb", "off")
    said = complaint(capsys, *words, "--search", LR)
    assert "without validation images" in said
    assert "data.validation=0.1" in said
    assert not Path("runs").exists()
    assert main([*words, "--on-test", "--search", LR]) == 0
    said = capsys.readouterr().out
    assert "test accuracy" in said
    assert "CHOSEN ON THE TEST IMAGES" in said


def test_a_combination_that_fails_is_a_trial_that_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert searched("--search", "data.validation=0.2|159", trials=2) == 0
    ended = capsys.readouterr()
    assert "data.validation=159" in ended.err or " fail " not in ended.out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--search", "epochs=3"), "without a range"),
        (("--search", "optimizer.lrr=1..2"), "optimizer.lr"),
        (("--search", "epochs=0.5..2.5"), "epochs"),
        (("--search", "model.width=a|b"), "model.width"),
        (("--search", LR, "--lr"), "one of --lr, --batch and --search"),
        (("--search", LR, "--jobs", "0"), "--jobs"),
    ],
)
def test_bad_words_are_answered_in_a_line(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, "tune", "mine.py", *words)
    assert not Path("runs").exists()


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install optuna" in complaint(capsys, "tune", "mine.py", "--search", LR)


def test_a_table_of_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert searched("--search", LR, "--table") == 0
    assert "no trial of mine-search in runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1", "2", "0"]),
        ("5,GPU-7", ["5", "GPU-7", "5", "GPU-7"]),
        ("", [None] * 4),
    ],
)
def test_each_process_has_its_part_of_the_machine(
    visible: str | None, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(search, "usable_cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shares = [search.share_of(job, 4) for job in range(4)]
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in shares] == expected
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, alike(signal.SIGTERM)], ids=["killed", "stopped"])
def test_what_was_ended_goes_on(how: signal.Signals, tmp_path: Path) -> None:
    words = ("--trials", "4", "--jobs", "2", "--name", "own", "data.validation=0.2", "epochs=12")
    command = (*PYTHON, "-m", "launcher", "tune", str(RESUMABLE), "--wandb", "off", *words)
    launch = (*command, "--search", LR)
    run = Search(launch, tmp_path)
    run.wait_for("epoch  3/12")
    children = psutil.Process(run.process.pid).children()
    if how == signal.SIGKILL:
        for child in children:
            child.kill()
        run.process.kill()
    else:
        run.process.send_signal(how)
    assert run.end() in (75, -9)
    unfinished = [path.parent for path in Path("runs").glob("*/run.json")]
    assert unfinished
    again = Search(launch, tmp_path)
    assert again.end() == 0, again.text()
    assert "resumed after step" in again.text() or how == signal.SIGKILL
    states = [RunFiles(Path(f"runs/own-trial{number}")).state for number in range(4)]
    assert set(states) <= {"done", "stopped"}
    assert "best of" in again.text()
    assert " running " not in again.text()


class Search(Run):
    """A command with processes of its own below it."""

    def __init__(self, command: tuple[str, ...], folder: Path) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        self._is_agent = True
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        with self.output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=file, stderr=file
            )
        self.processes = [process]
        self.process = process


def test_a_trial_that_another_process_trains_is_left_to_it() -> None:
    recipe = load(Path("mine.py"))
    options = RunOptions(runs=Path("runs"), wandb="off")
    own = search.prepare(recipe, [LR], 2, options, on_test=False)
    study = search._study(own)
    study.ask({"optimizer.lr": own.ranges[0].distribution()})
    with FileLock(own.folder / "trial0.lock", is_singleton=False):
        assert search.work(own) == 0
    states = [trial.state.name for trial in study.get_trials()]
    assert states == ["RUNNING", "COMPLETE"]
    assert search.work(own) == 0
    assert [trial.state.name for trial in study.get_trials()] == ["COMPLETE"] * 2


def test_an_exception_ends_a_trial_and_the_next_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(search, "train_loaded", exhausted)
        assert searched("--search", LR, trials=2) == 1
    assert searched("--search", LR, trials=2) == 0
    said = capsys.readouterr().out
    assert re.search("mine-search-trial0 +fail", said)
    assert re.search("mine-search-trial1 +complete", said)


def test_a_trial_of_which_only_a_part_was_proposed_has_failed() -> None:
    options = RunOptions(runs=Path("runs"), wandb="off")
    own = search.prepare(load(Path("mine.py")), [LR, "epochs=1..2"], 2, options, on_test=False)
    study = search._study(own)
    study.ask({"optimizer.lr": own.ranges[0].distribution()})  # killed before the second one
    assert search.work(own) == 0
    assert [trial.state.name for trial in study.get_trials()] == ["FAIL", "COMPLETE"]


def test_a_shorter_trial_is_another_search_and_another_text_of_the_recipe_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert searched("--search", LR, "epochs=1", trials=1) == 0
    words = ("tune", "mine.py", "--search", LR, "epochs=1", "--trials", "2", "--wandb", "off")
    assert "--max-steps (None -> 2)" in complaint(capsys, *words, "--max-steps", "2")
    Path("mine.py").write_text(TINY + "# another network, say\n")
    capsys.readouterr()
    assert main(words) == 0
    assert "the recipe file has changed since the search began" in capsys.readouterr().out


def test_the_best_trial_is_the_best_as_the_search_left_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not one whose run was trained on by hand, nor only one of those that are still there."""
    assert searched("--search", LR, trials=2) == 0
    said = capsys.readouterr().out
    names = ["mine-search-trial0", "mine-search-trial1"]
    runs = [Path("runs", name) for name in names]
    accuracies = [RunFiles(run).best_accuracy or 0.0 for run in runs]
    worse, better = sorted(runs, key=lambda run: accuracies[runs.index(run)])
    row = json.dumps({"epoch": 9, "val/accuracy": 1.0, "best": True})
    with (worse / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    shutil.rmtree(better)
    assert searched("--search", LR, "--table", trials=2) == 0
    table = capsys.readouterr().out
    assert "100.00%" not in table
    changed = table.partition("but other runs by now: ")[2].splitlines()[0]
    assert sorted(changed.split(", ")) == names
    assert table.split("best of 2")[1].splitlines()[0] in said
    about = worse / "run.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data_digest": "beef"}))
    assert searched("--search", LR, trials=3) == 0
    assert "the images have changed since the search began" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["no JSON\n", '{"op_code": 99}\n', "[]\n"])
def test_a_damaged_journal_is_answered_in_a_line(
    content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("runs/mine-search.files/journal")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    words = ("tune", "mine.py", "--search", LR)
    assert f"{path}, which is damaged" in complaint(capsys, *words)
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    assert "--runs FOLDER" in complaint(capsys, *words)


def test_a_job_is_a_number_from_0(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tune", "mine.py", "--search", LR, "--trials", "1", "--wandb", "off")
    assert "'-1' is no whole number from 0" in complaint(capsys, *words, "--job", "-1")
    assert main([*words, "--job", "0"]) == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--lr", "--trials", "3"), "--trials goes with --search"),
        (("--batch", "--table"), "--table goes with --search"),
        (("--batch", "--save", "x"), "--save goes with --lr"),
        (("--lr", "--max-steps", "30"), "--max-steps goes with --search"),
        (("--search", LR, "--steps", "30"), "--steps goes with --lr"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, "tune", "mine.py", *words)


def test_a_secret_among_the_settings_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2secret")
    roots = "data.root=hunter2secret|hunter2secret/x"
    assert searched("--search", roots, trials=1) == 0
    assert searched("data.root=hunter2secret", "--name", "b", "--search", LR, trials=1) == 0
    said = capsys.readouterr().out
    assert "measure it: launcher repeat RECIPE data.root=*** " in said
    assert "hunter2secret" not in said
