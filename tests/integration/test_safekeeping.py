"""Nothing good is lost to a disk that refuses, a folder that goes, or a link that leads away.

And no secret is kept.
"""

import math
import os
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import Adam

from launcher import cli
from launcher.checkpoint import resume, run_dir
from launcher.checkpoint.checkpoint import newest
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.weights import load_weights, save_weights
from launcher.config.loader import LoadedRecipe
from launcher.config.plan import Plan, SaveInterval
from launcher.distributed import signals
from launcher.errors import NotFiniteError, UserError
from launcher.loggers.console import Console
from launcher.run.events import ActiveRun, roll_back, run_loop
from launcher.run.train import closing_rows
from launcher.training.metrics import Best, EpochReport
from launcher.utils import atomic_write
from launcher.utils.redaction import cleaned, redacted
from tests.support.helpers import Tiny, alike, context_of, refused, tiny_recipe
from tests.support.processes import RESUMABLE, Run, fingerprint
from tests.support.wandb_server import API_KEY

SHORT = ("epochs=6", "--name", "run", "--checkpoint-every", "7")


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_full_disk_costs_lines_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    """Files that grow beyond a limit are refused by the kernel, as on a full disk."""
    unmeasured = {"COVERAGE_PROCESS_CONFIG": ""}  # coverage would leave a broken file behind
    run = Run(1, tmp_path, *SHORT, environment=unmeasured)
    run.wait_for("epoch 2/6")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run.end() == 1
    text = run.text()
    assert "a checkpoint could not be written" in text
    assert "epoch 6/6" in text
    assert "launcher: the final weights could not be written" in text
    assert "Traceback" not in text
    folder = tmp_path / "runs" / "run"
    names = checkpoints_of(folder)
    assert names
    assert all(name.startswith("step-") for name in names)
    assert Run(1, tmp_path, *SHORT, "--resume").end() == 0
    assert fingerprint(folder) == fingerprint(whole(tmp_path))


@pytest.mark.slow
def test_ranks_agree_which_weights_are_the_best_where_the_disk_has_refused_some(
    tmp_path: Path,
) -> None:
    """Rank 0 alone knows of it, and all evaluate the test images with the same weights."""
    words = ("epochs=5", "--name", "run", "--checkpoint-every", "never", "data.validation=0.2")
    run = Run(2, tmp_path, *words, environment={"COVERAGE_PROCESS_CONFIG": ""})
    run.wait_for("epoch 1/5")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run.end() == 1
    assert "the best weights could not be written" in run.text()
    assert "launcher: the final weights could not be written" in run.text()
    assert "does not answer" not in run.text()
    assert (tmp_path / "runs" / "run" / "test.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("every", ["7", alike("never")])
def test_a_stop_that_could_not_be_saved_says_so_and_is_a_failure(
    every: str, tmp_path: Path
) -> None:
    words = ("epochs=400", "--name", "run", "--checkpoint-every", every)
    run = Run(1, tmp_path, *words, environment={"COVERAGE_PROCESS_CONFIG": ""})
    run.wait_for("epoch   2/400")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    run.wait_for("could not be written")  # of the best weights, if of nothing else
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 1
    assert "goes on from here" not in run.text()
    resumed = Run(1, tmp_path, *words, "--resume", "--max-steps", "300")
    assert resumed.end() == 0, resumed.text()
    found = re.search(r"resumed after (step \d+)|from (the beginning)", resumed.text())
    assert found, resumed.text()
    step = found[1] or found[2]
    assert f"stopped by SIGTERM, not saved: --resume goes on from {step}\n" in run.text()


def test_the_checkpoint_of_a_stop_is_tried_a_second_time(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "run", "tiny")
    folder.checkpoints.write_text("a file where the folder should be")

    class Repairing(Console):
        def say(self, text: str) -> None:
            if "a checkpoint could not be written" in text:
                folder.checkpoints.unlink()

    signals.stop_at(0, "the end of its time")
    try:
        run, _ = watched(folder, Repairing(None))
    finally:
        signals.stop_at(math.inf, "")
    assert run.stopped
    assert newest(folder.checkpoints)[0] == folder.checkpoints / "step-000000001"


def watched(folder: RunDir, console: Console, **changes: Any) -> tuple[ActiveRun, dict[str, str]]:
    """What becomes of a tiny run in this process, and its closing rows."""
    loaded = LoadedRecipe(tiny_recipe(**changes), "tiny", "", "")
    saver = Saver(folder, True, console.say)
    run = ActiveRun(context_of(loaded.recipe), loaded, console, (console,), saver)
    run_loop(run)
    return run, closing_rows(run)


def test_the_best_epoch_is_one_whose_weights_are_there(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "run", "tiny")
    accuracies, marks = [], []

    class Obstructing(Console):
        def epoch(self, report: EpochReport, plan: Plan, best: Best | None) -> None:
            accuracies.append(report.evaluation.accuracy)
            marks.append(best and best.epoch == report.epoch)
            (folder.path / f".best.safetensors.{os.getpid()}").mkdir(exist_ok=True)

    optimizer = partial(Adam, lr=0.1)
    run, shown = watched(folder, Obstructing(None), epochs=8, optimizer=optimizer)
    highest = max(accuracies)
    assert highest > accuracies[0]
    assert marks == [True] + [False] * 7
    assert run.best == Best(1, accuracies[0])
    assert shown["best epoch"] == (
        f"1, test accuracy {accuracies[0]:.2%} (chosen on the test images)"
    )
    epoch = accuracies.index(highest) + 1
    assert shown["not kept"] == (
        f"epoch {epoch}, test accuracy {highest:.2%}: its weights are not in the run folder"
    )


def test_a_rollback_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Stopped before the next evaluation, the run has no last epoch beyond its metrics."""
    folder = run_dir.create(tmp_path, "run", "tiny")
    loaded = LoadedRecipe(tiny_recipe(epochs=3, on_nan="rollback"), "tiny", "", "")
    console = Console(None)
    ctx = context_of(loaded.recipe, save=SaveInterval(epochs=2))
    run = ActiveRun(ctx, loaded, console, (console,), Saver(folder, True, console.say))
    run_loop(run)
    assert run.last is not None
    assert run.last.epoch == 3
    shutil.rmtree(folder.checkpoints / "step-000000030")
    run.ctx.state.skips_in_a_row = 7
    assert roll_back(run, NotFiniteError("the loss is not finite", 27)).epochs == 2
    assert run.last is None
    assert closing_rows(run).keys().isdisjoint({"last epoch"})
    assert run.ctx.state.skips_in_a_row == 0


def whole(folder: Path) -> Path:
    run = Run(1, folder, *SHORT, "--name", "whole")
    assert run.end() == 0, run.text()
    return folder / "runs" / "whole"


@pytest.mark.slow
def test_a_run_folder_that_is_deleted_meanwhile_ends_no_training(tmp_path: Path) -> None:
    run = Run(1, tmp_path, *SHORT)
    run.wait_for("epoch 2/6")
    run.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(tmp_path / "runs")
    run.process.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.text()
    assert "epoch 6/6" in run.text()
    assert "runs/run was removed" in run.text()
    assert (tmp_path / "runs" / "run" / "final.safetensors").is_file()


@pytest.mark.slow
def test_a_file_in_the_place_of_the_checkpoints_costs_lines_only(tmp_path: Path) -> None:
    run = Run(1, tmp_path, *SHORT)
    run.wait_for("epoch 2/6")
    run.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    (tmp_path / "runs" / "run" / "checkpoints").write_text("")
    run.process.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.text()
    assert "a checkpoint could not be written" in run.text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be made"):
        run_dir.create(tmp_path, "mine", "net")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "runs" / "mine"
    outside.mkdir()
    folder.mkdir(parents=True)
    (outside / "file").write_text("precious")
    for name in ("config.json", "recipe.py", "final.safetensors", "metrics.jsonl"):
        (folder / name).symlink_to(outside / "file")
    run = RunDir(folder)
    run.describe({"epochs": 1}, {"name": "net"}, "source")
    save_weights(Tiny(), run.final)
    with pytest.raises(OSError, match="symbolic"):
        run.record({"epoch": 1}, {"epoch": 1})
    assert (outside / "file").read_text() == "precious"
    (folder / "checkpoints").symlink_to(outside)
    with pytest.raises(UserError, match="is a link to"):
        run_dir.find(tmp_path / "runs", "mine", "net")
    (tmp_path / "runs" / "other").symlink_to(folder)
    with pytest.raises(UserError, match="is a link to"):
        run_dir.find(tmp_path / "runs", "other", "net")
    with pytest.raises(UserError, match="exists already"):
        run_dir.create(tmp_path / "runs", "other", "net")


@pytest.mark.slow
def test_a_run_that_was_removed_writes_nothing_into_another_of_its_name(tmp_path: Path) -> None:
    words = ("--name", "mine", "--checkpoint-every", "5")
    old = Run(1, tmp_path, *words, "epochs=2000")
    old.wait_for("epoch    1/2000")
    old.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(tmp_path / "runs" / "mine")
    new = Run(1, tmp_path, *words, "epochs=1")
    assert new.end() == 0, new.text()
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    old.process.send_signal(signal.SIGCONT)
    old.wait_for("metrics.jsonl could not be written (runs/mine is another run's now)")
    old.wait_for("a checkpoint could not be written (runs/mine is another run's now)")
    old.process.send_signal(signal.SIGTERM)
    assert old.end() == 1, old.text()
    assert "not saved: --resume goes on from step 25" in old.text()
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before


def test_half_written_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000000007.99").mkdir(parents=True)
    for name in ("best.safetensors", "last.npz", "config.json"):
        (tmp_path / f".{name}.99").write_text("half")
    RunDir(tmp_path).tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_replaced_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write.replace(path, b"old")
    (tmp_path / f".file.{os.getpid()}").mkdir()  # in the way
    with pytest.raises(OSError, match=r"file"):
        atomic_write.replace(path, b"new")
    assert path.read_bytes() == b"old"


SECRETS = {
    "MY_API_KEY": "k-planted-0123456789",
    "HF_TOKEN": "hf_planted0123456789",
    "DB_PASSWORD": "pw planted 0123456789",
    "WANDB_API_KEY": API_KEY,
    "MYSQL_PWD": "pwd-planted-0123456789",
    "DB_PASS": "pass-planted-0123456789",
    "github_pat": "pat-planted-0123456789",
    "NPM_AUTH": "auth-planted-0123456789",
}
NO_SECRETS = {
    "PWD": "/home/planted",
    "OLDPWD": "/home/planted",
    "PATH": "/usr/planted",
    "TESTS_PASSED": "planted-1",
    "GIT_AUTHOR": "planted-2",
    "GLIBC_COMPAT": "planted-3",
    "SSH_AUTH_SOCK": "/tmp/planted",
}
IN_ADDRESSES = {
    "https://me:planted-login@host/x": "https://***@host/x",
    "s3://planted-user@bucket": "s3://***@bucket",
    "http://h/x?token=planted-parameter&a=1": "http://h/x?token=***&a=1",
    "http://h/x?X-Amz-Signature=planted-parameter": "http://h/x?X-Amz-Signature=***",
    "https://h/c?sv=2&sig=planted%3D&sp=r": "https://h/c?sv=2&sig=***&sp=r",
    "https://h/c?Auth=planted&my_pwd=planted": "https://h/c?Auth=***&my_pwd=***",
    "https://me:planted@login@host/a@b": "https://***@host/a@b",
    "https://me:x@host,https://you:y@other": "https://***@host,https://***@other",
}


def test_secrets_are_hidden_and_the_rest_stays() -> None:
    for secret in SECRETS.values():
        assert redacted(f"before {secret} after", SECRETS) == "before *** after"
    for address, hidden in IN_ADDRESSES.items():
        assert redacted(f"see {address}", {}) == f"see {hidden}"
    plain = "https://pytorch.org/docs?page=1 user@host lr=0.1 a:b@c"
    assert redacted(plain, {"KEYBOARD": "us", "TOKENS": "0.1"}) == plain
    plain = " ".join(NO_SECRETS.values()) + " https://h/x?path=a&design=b&significant=c&author=d"
    assert redacted(plain, NO_SECRETS) == plain
    nested = {"a": [SECRETS["HF_TOKEN"], 1, None], "b": {"c": True}}
    assert cleaned(nested, SECRETS) == {"a": ["***", 1, None], "b": {"c": True}}


@pytest.mark.slow
def test_no_output_of_a_run_holds_a_planted_secret(tmp_path: Path) -> None:
    """In settings, the docstring, the source, exceptions, W&B's files and its command line."""
    source = RESUMABLE.read_text().replace(
        '"""A recipe', f'"""{SECRETS["MY_API_KEY"]} https://me:planted-login@host A recipe', 1
    )
    source = source.replace("width: int = 8", 'width: int = 8, note: str = ""')
    recipe = tmp_path / "secretive.py"
    recipe.write_text(source)
    word = f"model.note=https://h/x?token=planted-parameter&also={SECRETS['HF_TOKEN']}"
    words = ("epochs=1", "--name", "run", "--wandb", "offline", word)
    run = Run(1, tmp_path, *words, recipe=recipe, environment=SECRETS)
    assert run.end() == 0, run.text()
    again = Run(1, tmp_path, *words, "--resume", recipe=recipe, environment=SECRETS)
    assert again.end() == 0, again.text()
    wrong = f"optimizer.lr={SECRETS['DB_PASSWORD']}"
    bad = Run(1, tmp_path, wrong, recipe=recipe, environment=SECRETS)
    assert bad.end() == 2
    for shown in ("--dry-run", "--help"):
        showing = Run(1, tmp_path, *words, shown, recipe=recipe, environment=SECRETS)
        assert showing.end() == 0, showing.text()
    recipe.unlink()
    places = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in places)
    for secret in (*SECRETS.values(), "planted-login", "planted-parameter"):
        for path in places:
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), (path, secret)


@pytest.mark.slow
def test_a_new_run_begins_with_given_weights(tmp_path: Path) -> None:
    first = Run(1, tmp_path, "epochs=1", "--name", "first")
    assert first.end() == 0, first.text()
    words = ("epochs=1", "--name", "second", "--init-from", "first", "--max-steps", "1")
    second = Run(1, tmp_path, *words, "optimizer.lr=1e-30")
    assert second.end() == 0, second.text()
    assert "from runs/first/final.safetensors" in second.text()
    weights = [
        load_file(tmp_path / "runs" / name / "final.safetensors") for name in ("first", "second")
    ]
    key = "layers.6.weight"  # neither decayed nor changed at such a rate
    assert torch.equal(weights[0][key], weights[1][key])
    shutil.rmtree(tmp_path / "runs" / "first")  # from now on the checkpoint has all
    again = ("epochs=1", "--init-from", "first", "--resume", "optimizer.lr=1e-30")
    resumed = Run(1, tmp_path, *again, "--name", "second")
    assert resumed.end() == 0, resumed.text()
    assert Run(1, tmp_path, *again, "--name", "third").end() == 2


def test_weights_that_are_not_there_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    with refused("--init-from nothing", "a run in"):
        resume.initial_weights(tmp_path, "nothing")
    path = tmp_path / "weights.safetensors"
    assert cli.main(["x", "--init-from"]) == 2
    save_weights(Tiny(width=5), path)
    assert resume.initial_weights(tmp_path, str(path)) == path
    with refused("layers.2.weight (5, 3), the model (4, 3)", "same model"):
        load_weights(Tiny(), path)
    path.write_text("no weights")
    with refused("cannot be read"):
        load_weights(Tiny(), path)
