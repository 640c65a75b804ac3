"""The command line as people type it: what it prints, the exit code, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launcher import Synthetic, __version__
from launcher.cli import main
from launcher.distributed import signals
from tests.support import forked, helpers
from tests.support.parsed import Parsed

ROOT = Path(__file__).parents[2]
SIMPLECNN = str(ROOT / "recipes" / "simplecnn.py")
FEW = "data.fallback.count=300"
COMMANDS = (
    *("check", "compare", "doctor", "export", "pack", "predict", "repeat", "report", "runs"),
    *("submit", "tune", "verify"),
)
TINY = (FEW, "data.batch_size=50", "epochs=2", "--wandb", "off")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder without a network: CIFAR-10 is out of reach at once."""
    from torchvision.datasets import CIFAR10

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that bad input is answered with, and nothing is left."""
    line = helpers.complaint(capsys, *words)
    assert not Path("runs").exists(), "bad input left something behind"
    return line


def test_a_run_leaves_everything_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "first", "optimizer.lr=0.01"]) == 0
    folder = Path("runs/first")
    config = json.loads((folder / "config.json").read_text())
    assert config["optimizer"]["lr"] == 0.01
    assert config["data"]["batch_size"] == 50
    run = json.loads((folder / "run.json").read_text())
    assert "NOT THE REAL DATA" in run["fallback"]
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0] or run["versions"]
    assert (folder / "recipe.py").read_text() == Path(SIMPLECNN).read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [6, 12]
    assert all(0 <= row["test/accuracy"] <= 1 for row in rows)
    assert {row["test/images"] for row in rows} == {60}
    for name in ("best", "final"):
        weights = load_file(folder / f"{name}.safetensors")
        assert sum(tensor.numel() for tensor in weights.values()) == 25_578


def test_a_run_tells_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "told"]) == 0
    printed = capsys.readouterr().out
    assert "SimpleCNN, 25,578 parameters" in printed
    assert "50 = 1 rank x 50 images" in printed
    assert "fp32 (default)" in printed
    assert "!!! NOT THE REAL DATA" in printed
    assert "first step: loss" in printed
    assert "the first five images look like" in printed
    assert "epoch 2/2" in printed
    assert "best epoch" in printed
    assert "runs/told" in printed
    assert "\x1b" not in printed, "escapes in plain output"


def test_weights_of_another_type_stand_beside_the_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(SIMPLECNN).read_text() + (
        "\n\nfrom dataclasses import replace\n"
        "def wide() -> nn.Module:\n    return SimpleCNN().double()\n"
        "recipe = replace(recipe, model=wide)\n"
    )
    (tmp_path / "wide.py").write_text(text)
    assert main(["wide.py", *TINY, "--max-steps", "1"]) == 0
    assert "fp32 (default), weights in float64" in capsys.readouterr().out


def test_the_same_command_trains_to_the_same_weights() -> None:
    for name in ("one", "two"):
        assert main([SIMPLECNN, *TINY, "--name", name]) == 0
    one, two = (load_file(Path(f"runs/{name}/final.safetensors")) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_max_steps_stops_early_and_still_evaluates() -> None:
    assert main([SIMPLECNN, *TINY, "--name", "short", "--max-steps", "8"]) == 0
    rows = Path("runs/short/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [6, 8]


def test_a_taken_name_is_refused_and_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "taken", "--max-steps", "1"]) == 0
    before = Path("runs/taken/metrics.jsonl").read_text()
    capsys.readouterr()
    assert main([SIMPLECNN, *TINY, "--name", "taken"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("runs/taken/metrics.jsonl").read_text() == before


def test_runs_without_a_name_never_share_a_folder() -> None:
    for _ in range(2):
        assert main([SIMPLECNN, *TINY, "--max-steps", "1"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_train_may_stand_before_the_recipe() -> None:
    assert main(["train", SIMPLECNN, *TINY, "--max-steps", "1", "--runs", "elsewhere"]) == 0
    assert len(list(Path("elsewhere").iterdir())) == 1


def test_dry_run_prints_the_resolved_recipe_and_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([SIMPLECNN, "--dry-run", "--epochs=3"]) == 0
    printed = capsys.readouterr().out
    config, end = json.JSONDecoder().raw_decode(printed)
    assert config["epochs"] == 3
    assert "64 = 1 rank x 64 images" in printed[end:]
    assert not Path("runs").exists()


def test_dry_run_tries_what_a_run_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(SIMPLECNN).read_text()
    text += "\n\ndef wrong(logits, targets):\n    return {}['mine']\n"
    text += "\n\nfrom dataclasses import replace\nrecipe = replace(recipe, loss=wrong)\n"
    (tmp_path / "faulty.py").write_text(text)
    assert main(["faulty.py", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "wrong fails: KeyError: 'mine' (faulty.py, line" in printed.err


def test_dry_run_says_what_a_run_says_at_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line = Path(SIMPLECNN).read_text(), "return self.layers(images)"
    assert line in text
    viewed = "x = self.layers[:6](images)\n        return self.layers[7:](x.view(x.size(0), -1))"
    (tmp_path / "viewed.py").write_text(text.replace(line, viewed))
    assert main(["viewed.py", "--dry-run"]) == 0
    assert "refuses channels_last, the faster format; write x.flatten(1)" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("words", [("--dry-run",), ("--help",)])
def test_a_signal_ends_at_once_what_only_shows_something(
    words: tuple[str, ...], number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that came before the recipe was read."""
    signalled = f"import os, signal\nos.kill(os.getpid(), signal.{number})\n"
    Path("signalled.py").write_text(signalled + Path(SIMPLECNN).read_text())
    assert main(["signalled.py", *words]) == 130
    with signals.listening(ends_process=False):
        os.kill(os.getpid(), getattr(signal, number))
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            pytest.fail("it goes on")
    assert capsys.readouterr().out == ""


def test_dry_run_without_a_world_size_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, "--dry-run"]) == 0
    assert "scaling" not in capsys.readouterr().out


def test_help_lists_the_settings_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["epochs", "int", "10"] in lines
    assert ["data.batch_size", "int", "64"] in lines
    assert ["optimizer.lr", "float", "0.001"] in lines
    assert not any(line[:1] == ["optimizer.foreach"] for line in lines)
    assert main([SIMPLECNN, "--help-all"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert max(map(len, everything)) <= 80
    assert any(line.split()[:1] == ["optimizer.foreach"] for line in everything)


def test_smoke_passes_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, "--smoke", "--max-steps", "1"]) == 0  # one step could show nothing
    assert list(Path().iterdir()) == []


def test_a_smoke_test_of_many_passes_has_several_steps_all_the_same() -> None:
    assert main([SIMPLECNN, "--smoke", "accumulate=1024"]) == 0


@pytest.mark.parametrize(
    ("word", "code", "reason"),
    [
        ("optimizer.lr=0", 2, "a learning rate of 0 in all of the training"),
        ("optimizer.lr=1e-30", 1, "no score has changed"),
        ("optimizer.lr=1e30", 1, "not finite"),
    ],
)
def test_smoke_fails_with_a_reason_when_nothing_is_learnt(
    word: str, code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([SIMPLECNN, "--smoke", word]) == code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere.py"], ["nowhere.py", "no such file"]),
        ([SIMPLECNN, "data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
        ([SIMPLECNN, "epochs=none"], ["epochs=none", "int"]),
        ([SIMPLECNN, "optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        ([SIMPLECNN, "precision=fp16"], ["fp16", "without a GPU", "precision=bf16"]),
        ([SIMPLECNN, FEW, "model.classes=7"], ["(2, 7)", "(2, 10)", "type model.classes=10"]),
        ([SIMPLECNN, "data.fallback=none"], ["cannot be downloaded", "data.root=FOLDER"]),
        ([SIMPLECNN, FEW, "data.mean=(0.5,)"], ["data.mean", "3 numbers"]),
        ([SIMPLECNN, FEW, "optimizer.lr=-1"], ["optimizer.lr=-1.0", "-1"]),
        ([SIMPLECNN, FEW, "sync_batch_norm=true"], ["sync_batch_norm", "CPU"]),
        ([SIMPLECNN, FEW, "--name", "a/b"], ["--name 'a/b'", "without slashes"]),
        ([SIMPLECNN, FEW, "--runs", "/proc/nothing"], ["/proc/nothing", "--runs FOLDER"]),
        ([SIMPLECNN, "--num_processes", "2"], ["--num_processes", "before -m launcher"]),
        ([SIMPLECNN, "--max-steps", "0"], ["--max-steps: '0' is no", "number from 1"]),
        ([SIMPLECNN, "--max-steps", "9" * 30], ["--max-steps", "to 999,999,999,999"]),
        ([SIMPLECNN, "--max-steps", "\u0663"], ["--max-steps", "no whole number"]),
        ([SIMPLECNN, "--log-every", "9" * 5000], ["--log-every", "no whole number"]),
        ([SIMPLECNN, "--save-before", "9" * 30], ["--save-before", "no whole number"]),
        ([SIMPLECNN, "--lr", "0.1"], ["the word '--lr'", "type optimizer.lr=0.1, or"]),
        ([SIMPLECNN, "--max-step", "3"], ["no option: did you mean --max-steps?"]),
        (["repeat", SIMPLECNN, "--seed", "0-1"], ["no option: did you mean --seeds?"]),
        ([SIMPLECNN, "epochs", "3"], ["the word 'epochs'", "type epochs=3, or"]),
        ([SIMPLECNN, "--epochs", "seed=3"], ["the word '--epochs'", "type epochs=VALUE, or"]),
        ([SIMPLECNN, "--lr=1"], ["no setting is called 'lr'", "did you mean optimizer.lr?"]),
        ([SIMPLECNN, "wandb=off"], ["an option of the command", "type --wandb off"]),
        ([SIMPLECNN, "max-steps=3"], ["an option of the command", "type --max-steps 3"]),
        ([SIMPLECNN, "report=false"], ["an option of the command", "type --no-report"]),
        ([SIMPLECNN, "wandb=maybe"], ["no setting is called 'wandb'"]),
        ([SIMPLECNN, "host_facts={}"], ["no setting is called 'host_facts'"]),
        ([SIMPLECNN, "epochs=1", "--", "--"], ["the word '--'", "type epochs=2"]),
        ([SIMPLECNN, "--name", "x" * 256], ["--name", "at most 200 bytes"]),
        ([SIMPLECNN, "--dry-run", "--name", "\udc80"], ["--name", "control characters"]),
        ([SIMPLECNN, "data.root=a\0b"], ["data.root=", "no NUL"]),
        ([SIMPLECNN, "--init-from", "x" * 256], ["--init-from x", "a run in runs"]),
        (["\x1b[31m.py"], ["launcher: ?[31m.py: no such file"]),
        ([SIMPLECNN, "--max-steps", "1.5"], ["--max-steps: '1.5' is no whole number from 1 to"]),
        ([SIMPLECNN, "--timeout", "x"], ["--timeout: 'x' is no number of seconds above 0"]),
        ([SIMPLECNN, "--dry-run", "--fold", "1"], ["--fold 1, which is no fold such as 1/5"]),
        ([SIMPLECNN, "--dry-run", "--fold", ""], ["which is no fold such as 1/5"]),
        ([SIMPLECNN, "--wandb", "maybe"], ["--wandb", "online"]),
        (["epochs=3"], ["epochs=3", "before any recipe"]),
        (["chekc", SIMPLECNN], ["chekc, which is no file and no", "mean launcher check?"]),
        (["help"], ["help, which is no file and no command", "see launcher --help"]),
        (["tune", SIMPLECNN], ["exactly one of --lr", "see launcher tune --help"]),
        ([], ["no recipe is named"]),
    ],
)
def test_bad_input_is_answered_in_one_line(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, *words)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("own", [None, "INFO"])
def test_torch_warns_of_its_sockets_only_where_asked_to(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", own or "")
    if own is None:
        monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    assert main(["--help"]) == 0
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == (own or "ERROR")


def test_a_model_that_cannot_take_the_images_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = Path(SIMPLECNN).read_text().replace("* 8 * 8, classes", "* 7 * 7, classes")
    (tmp_path / "wrong.py").write_text(text)
    line = complaint(capsys, "wrong.py", FEW)
    assert "SimpleCNN fails on images of shape (2, 3, 32, 32)" in line


def test_a_fault_of_the_recipes_own_code_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(SIMPLECNN).read_text()
    text += "\n\ndef wrong(progress: float) -> float:\n    if abs(progress - 6.5 / 12) > 1e-3:\n"
    text += "        return 1.0\n    raise KeyError('mine')\n"
    text += "\n\nfrom dataclasses import replace\nrecipe = replace(recipe, schedule=wrong)\n"
    (tmp_path / "faulty.py").write_text(text)
    assert main(["faulty.py", *TINY]) == 1
    errors = capsys.readouterr().err
    assert "in wrong\n    raise KeyError('mine')\n" in errors
    assert "KeyError: 'mine'\nin step 7 (epoch 2)" in errors


def test_resume_without_any_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no run of simplecnn" in complaint(capsys, SIMPLECNN, "--resume")


def test_resume_of_a_name_that_is_new_begins_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = [SIMPLECNN, *TINY, "--name", "new", "--resume"]
    assert main(words) == 0
    assert "no run is called new yet" in capsys.readouterr().out
    assert main(words) == 0  # nothing is left to do
    assert "resumed after step 12" in capsys.readouterr().out


def test_a_changed_recipe_is_not_resumed_by_accident(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "longer"]) == 0
    longer = [SIMPLECNN, *TINY, "--name", "longer", "--resume", "epochs=3"]
    assert main(longer) == 2
    assert "epochs (2 -> 3)" in capsys.readouterr().err
    assert main([*longer, "--resume-changed", "epochs"]) == 0
    rows = Path("runs/longer/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2, 3]


def test_a_recipe_file_whose_code_has_changed_is_resumed_with_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = Path("mine.py")
    mine.write_text(Path(SIMPLECNN).read_text())
    words = [str(mine), *TINY, "--name", "mine", "--resume"]
    assert main(words) == 0
    assert main([*words, "epochs=3", "--resume-changed", "epochs"]) == 0
    assert "has changed since" not in capsys.readouterr().out
    before = mine.read_text()
    mine.write_text(before.replace("nn.ReLU()", "nn.GELU()"))
    assert main([*words, "epochs=4", "--resume-changed", "epochs"]) == 0
    assert "the recipe file has changed since" in capsys.readouterr().out
    kept = sorted(Path("runs/mine/checkpoints").glob("*/state.json"))
    states = [json.loads(path.read_text()) for path in kept]
    assert [state["source"] == before for state in states] == [True, True, False]
    assert [state["config"]["epochs"] for state in states] == [2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "wild", "optimizer.lr=1e30"]) == 1
    error = capsys.readouterr().err
    assert "the loss is not finite at step 2 (epoch 1" in error
    assert "learning rate 1e+30" in error
    assert error.endswith("is kept; try a lower rate or clip_norm=1 or on_nan=skip\n")
    end = json.loads(Path("runs/wild/end.json").read_text())
    assert (end["exit_code"], f"launcher: {end['why']}\n") == (1, error)
    assert main(["report", "wild"]) == 0
    page = Parsed(Path("runs/wild/report/index.html").read_text())
    assert f"failed, exit code 1: {end['why']}" in page.words
    assert not list(Path("runs/wild").glob("checkpoints/*"))


@pytest.mark.parametrize("text", ["0", "e", "1h", "-1", "", "1.5e", "\u0663e", "9" * 5000, "m1"])
def test_a_cadence_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--checkpoint-every" in complaint(capsys, SIMPLECNN, "--checkpoint-every", text)


@pytest.mark.parametrize(("text", "count"), [("never", 0), ("1e", 2), ("5", 3), ("1m", 1)])
def test_checkpoints_come_as_often_as_told(text: str, count: int) -> None:
    assert main([SIMPLECNN, *TINY, "--name", "often", "--checkpoint-every", text]) == 0
    assert len(list(Path("runs/often").glob("checkpoints/step-*"))) == count


@pytest.mark.slow
def test_pictures64_trains_on_folders_of_png_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn pictures of another size and shape than the network wants, in five class folders."""
    drawn = Synthetic(size=80, classes=5, count=300)
    for number, (picture, label) in enumerate(zip(drawn.data, drawn.targets, strict=True)):
        folder = Path("pictures", drawn.classes[label])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:, 4:76]).save(folder / f"{number:03}.png")
    recipe = str(ROOT / "recipes" / "pictures64.py")
    words = ["data.root=pictures", "epochs=8", "data.batch_size=16", "optimizer.lr=0.003"]
    assert main([recipe, *words, "--wandb", "off", "--name", "own"]) == 0
    printed = capsys.readouterr().out
    assert "Folder, 240 training and 60 test images of 64 x 64 pixels, 5 classes" in printed
    assert "NOT THE REAL DATA" not in printed
    rows = [json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines()]
    assert {row["test/images"] for row in rows} == {60}
    assert rows[-1]["test/accuracy"] > 0.5  # chance is 0.2


@pytest.mark.parametrize(
    ("words", "is_full", "code"),
    [
        ([SIMPLECNN, *TINY, "--help-all"], False, 1),
        ([SIMPLECNN, *TINY, "--dry-run"], False, 1),
        (["check", SIMPLECNN], False, 1),
        (["submit", "--help"], True, 1),
        ([SIMPLECNN, *TINY, "--help-all"], True, 1),  # longer than a buffer
        ([SIMPLECNN, *TINY, "--max-steps", "7", "--name", "on"], False, 0),  # a training goes on
        ([SIMPLECNN, *TINY, "--max-steps", "7", "--name", "on"], True, 0),
    ],
)
def test_an_output_that_cannot_be_written_costs_no_traceback(
    words: list[str], is_full: bool, code: int, tmp_path: Path
) -> None:
    """Silence where its reader has ended; one line where the disk behind it is full."""
    if is_full:
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    errors = tmp_path / "errors"
    command = [sys.executable, "-m", "launcher", *words]
    with os.fdopen(output, "wb") as lost, errors.open("wb") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = forked.Popen(command, cwd=tmp_path, env=environment, stdout=lost, stderr=file)
        assert process.wait(60) == code, errors.read_text()
    goes_on = "" if code else "; training goes on"
    line = f"launcher: the output cannot be written (No space left on device){goes_on}\n"
    assert errors.read_text() == (line if is_full else "")
    if code == 0:
        assert Path("runs/on/final.safetensors").is_file()


def test_an_exit_code_outlives_the_place_where_the_complaint_goes(tmp_path: Path) -> None:
    """As that of a job whose log is on a full disk: its requeue goes by the code."""
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "launcher", "nowhere.py"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = forked.Popen(command, cwd=tmp_path, env=environment, stdout=full, stderr=full)
        assert process.wait(60) == 2


@pytest.mark.parametrize("words", [("runs",), (SIMPLECNN,)])
def test_outside_of_its_environment_it_says_which_one_is_meant(words: tuple[str, ...]) -> None:
    """As behind `make train` in a shell that has not activated .venv: it was a traceback."""
    command = [sys.executable, "-S", "-m", "launcher", *words]  # -S: without site-packages
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"is not installed for {sys.executable}; expected" in line
    assert "type . .venv/bin/activate, or pip install -e ." in line


def test_without_an_output_a_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python has none where the shell has closed it."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main([SIMPLECNN, *TINY, "--max-steps", "2", "--name", "on", "--no-report"]) == 0
    sys.stdout.close()
    assert Path("runs/on/final.safetensors").is_file()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"launcher {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_listed_and_has_its_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    assert re.search(rf"\b{command}\b", capsys.readouterr().out.partition("other commands")[2])
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: launcher {command} ")
    assert printed.err == ""


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("check",), "check"),
        (("report",), "report"),
        (("--seeds", "0-4"), "repeat"),
        (("--claims",), "repeat"),
        (("--search", "optimizer.lr=0.1..0.2"), "tune"),
    ],
)
def test_a_command_behind_a_recipe_is_told_where_it_goes(
    words: tuple[str, ...], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"type launcher {command} {SIMPLECNN} ..." in complaint(capsys, SIMPLECNN, *words)


def test_a_command_behind_an_option_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    """It was a training of one seed."""
    words = ("--wandb", "off", "repeat", SIMPLECNN, "epochs=1")
    assert f"type launcher repeat {SIMPLECNN} ..." in complaint(capsys, *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["train", "repeat", "tune"])
def test_options_may_stand_before_the_recipe(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--wandb", "off", SIMPLECNN, "--help"]) == 0
    assert f"settings of {SIMPLECNN}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--epochs=3", "epochs=4"), ("epochs=3", "--epochs=4")])
def test_of_two_for_one_setting_the_one_that_is_typed_last_counts(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([SIMPLECNN, "--dry-run", *words]) == 0
    assert '"epochs": 4,' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--fold", "1/2", "data.validation=0.5"), "--fold 1/2 beside data.validation"),
        (("--smoke", "--resume"), "--smoke cannot be combined with --resume"),
        (("other.py",), "name a recipe before all settings"),
        (("--dry-run", "--init-from", "nowhere"), "--init-from nowhere"),
    ],
)
def test_words_that_would_say_nothing_are_refused(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, SIMPLECNN, *words)
