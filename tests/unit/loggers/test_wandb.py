"""Weights & Biases with its real client: offline runs read back, online against a local server."""

import json
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from launcher.cli import main
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import Plan
from launcher.data.images import Data, ImageSet
from launcher.loggers import wandb
from launcher.loggers.logger import Logger
from launcher.loggers.wandb import NullLogger, Samples, WandbLogger, WandbRun, start
from launcher.loggers.wandb_history import epoch_scalars
from launcher.run.train import train_loaded
from launcher.training.metrics import Best, EpochReport, Evaluation, FinalReport, StepReport
from tests.support import forked
from tests.support.helpers import tiny_recipe
from tests.support.wandb_server import API_KEY, WandbServer

ROOT = Path(__file__).parents[3]
PLAN = Plan(100, 50, 1, 10, 1, epochs=10, steps_per_epoch=10, last_step=100, log_every=5)
CLASSES = ("cat", "dog", "bird")
CONFUSION = ((10, 5, 2), (3, 10, 4), (0, 0, 16))


def images(channels: int = 3, classes: tuple[str, ...] = CLASSES) -> Data:
    pixels = torch.arange(50 * 64 * channels).reshape(50, 8, 8, channels).remainder(251)
    test = ImageSet(pixels.to(torch.uint8), torch.arange(50) % 3, classes)
    return Data(test, test, "Synthetic", fallback="no network")


def step_report(epoch: int, step: int) -> StepReport:
    return StepReport(epoch, step, loss=1 / step, learning_rate=0.1, images_per_second=99.0)


def epoch_report(epoch: int, classes: int = 3) -> EpochReport:
    """Every sample is taken for class 1, with 91 % confidence."""
    probabilities = numpy.full((36, classes), 0.09 / (classes - 1))
    probabilities[:, 1] = 0.91
    confusion = CONFUSION if classes == 3 else tuple((1,) * classes for _ in range(classes))
    test = Evaluation(loss=0.4, confusion=confusion, in_top5=50)
    return EpochReport(epoch, epoch * 10, 0.5, 0.1, 100.0, 2.0, test, probabilities)


def begin(mode: str | None, folder: Path, data: Data | None = None) -> Logger:
    run = WandbRun(
        folder=folder,
        project="pictures",
        name="first",
        config={"optimizer": {"lr": 0.1}},
        tags=["synthetic-data"],
        note="a try",
        group="tries",
    )
    return start(mode, run, data or images())


def train(logger: Logger, epochs: range) -> None:
    """Log two steps and an epoch, as often as asked; the first epoch stays the best."""
    for epoch in epochs:
        for step in (epoch * 10 - 5, epoch * 10):
            logger.step(step_report(epoch, step), PLAN)
        logger.epoch(epoch_report(epoch), PLAN, Best.of(epoch_report(1)))


@contextmanager
def own_world(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """No account, no settings and no W&B of an earlier test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            patch.delenv(name, raising=False)
        patch.chdir(home)  # W&B reads settings from a folder `wandb` here
        before = dict(os.environ)
        try:
            yield patch
        finally:
            if "wandb" in sys.modules:
                sys.modules["wandb"].teardown()
            for name in os.environ.keys() - before.keys():
                del os.environ[name]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    with own_world(tmp_path) as patch:
        yield patch


@contextmanager
def serving(world: pytest.MonkeyPatch, refused: str = "") -> Iterator[WandbServer]:
    """A server on loopback, and an account there."""
    server = WandbServer(refused)
    # The client asks it through a process of its own, which takes long to start on a busy machine.
    world.setenv("WANDB_HTTP_TIMEOUT", "60")
    world.setenv("WANDB_BASE_URL", server.url)
    world.setenv("WANDB_API_KEY", API_KEY)
    try:
        yield server
    finally:
        server.stop()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the launcher itself has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "launcher"]


def inspect(folder: Path) -> list[dict[str, Any]]:
    """Every record of a run on disk, read by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Offline:
    """An offline run of two epochs, after its end."""

    folder: Path
    mode: str
    where: Path
    notice: str
    records: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    def table(self, name: str) -> dict[str, Any]:
        """The last table that was logged under a name, with its images."""
        places = [e["local_path"] for e in self.contents() if e["path"] == f"{name}.table.json"]
        return json.loads(Path(places[-1]).read_text())

    def contents(self) -> list[dict[str, Any]]:
        """Every file of every table."""
        return [e for a in self.of("artifact") for e in a["manifest"]["contents"]]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    home = tmp_path_factory.mktemp("home")
    folder = home / "runs" / "first run"
    with own_world(home):
        logger = begin("offline", folder)
        train(logger, range(1, 3))
        logging.getLogger("launcher").warning("the disk is nearly full")
        logger.finish(3)
    where = Path(logger.where)
    return Offline(folder, logger.mode, where, logger.notice, inspect(where))


def test_an_offline_run_lies_in_the_run_folder_with_all_that_a_later_upload_needs(
    offline: Offline,
) -> None:
    assert (offline.mode, offline.notice) == ("offline", "")
    assert offline.where.is_dir()
    assert offline.where.is_relative_to(offline.folder)
    contents = offline.contents()
    assert len(contents) == 2 * (36 + 1 + 1)  # two epochs: images, their table, the confusion
    for entry in contents:
        assert Path(entry["local_path"]).is_relative_to(offline.folder)
        assert Path(entry["local_path"]).is_file()


def test_curves_of_training_go_over_steps_and_curves_of_testing_over_epochs(
    offline: Offline,
) -> None:
    metrics = offline.of("metric")
    axes = {m.get("name", m.get("glob_name")): m.get("step_metric") for m in metrics}
    assert axes["train/*"] == "train/step"
    assert {axes[name] for name in ("train_epoch/*", "test/*", "best/*", "samples")} == {"epoch"}
    rows = [record["item"] for record in offline.of("history")]
    losses = [(r["train/step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert losses == [(step, pytest.approx(1 / step)) for step in (5, 10, 15, 20)]
    accuracies = [(r["epoch"], r["test/accuracy"]) for r in rows if "test/accuracy" in r]
    assert accuracies == [(1, 0.72), (2, 0.72)]


def test_each_epoch_has_its_scalars_and_the_best_so_far(offline: Offline) -> None:
    row = [r["item"] for r in offline.of("history") if "test/accuracy" in r["item"]][-1]
    assert row["train_epoch/loss"] == 0.5
    assert row["train/step"] == 20
    assert row["seconds"] == 2.0
    assert row["test/class_accuracy/dog"] == pytest.approx(10 / 17)
    assert "test/per_class_accuracy" not in row
    assert (row["best/epoch"], row["best/test_accuracy"]) == (1, 0.72)


def test_the_summary_ends_with_the_best_epoch(offline: Offline) -> None:
    summary: dict[str, Any] = {}
    for record in offline.of("summary"):
        summary.update(record["update"])
    assert (summary["best/epoch"], summary["best/test_accuracy"], summary["epoch"]) == (1, 0.72, 2)


def test_36_sample_images_say_what_the_model_takes_them_for(offline: Offline) -> None:
    rows = [r["item"] for r in offline.of("history") if "samples.captions" in r["item"]]
    assert len(rows) == 2
    for row in rows:
        assert len(row["samples.captions"]) == len(row["samples.filenames"]) == 36
        assert row["samples.captions"][:3] == ["dog 91% (is cat)", "dog 91%", "dog 91% (is bird)"]
        for name in row["samples.filenames"]:
            assert (offline.where / "files" / name).is_file()


def test_the_table_of_predictions_has_a_row_per_sample_and_a_score_per_class(
    offline: Offline,
) -> None:
    table = offline.table("predictions")
    scores = ["score cat", "score dog", "score bird"]
    assert table["columns"] == ["image", "truth", "prediction", "confidence", *scores]
    assert len(table["data"]) == 36
    image, *rest = table["data"][0]
    assert image["_type"] == "image-file"
    assert image["path"] in {entry["path"] for entry in offline.contents()}
    assert rest == ["cat", "dog", *(pytest.approx(p) for p in (0.91, 0.045, 0.91, 0.045))]


def test_the_confusion_matrix_is_drawn_from_the_counts(offline: Offline) -> None:
    table = offline.table("confusion_matrix_table")
    counts = {(truth, guess): count for truth, guess, count in table["data"]}
    assert counts["cat", "dog"] == 5
    assert counts["dog", "cat"] == 3
    assert sum(counts.values()) == 50
    config = [record["update"] for record in offline.of("config")]
    charts = [c["_wandb.visualize.confusion_matrix"] for c in config if len(c) == 1]
    assert charts[0]["panel_config"]["panelDefId"] == "wandb/confusion_matrix/v1"


def test_a_run_carries_its_recipe_name_note_tags_log_and_exit_code(offline: Offline) -> None:
    (run,) = offline.of("run")
    assert run["config"]["update"]["optimizer"] == {"lr": 0.1}
    assert run["config"]["update"]["data_fallback"] == "no network"
    assert (run["project"], run["display_name"], run["notes"]) == ("pictures", "first", "a try")
    assert (run["tags"], run["run_group"]) == (["synthetic-data"], "tries")
    assert [record["exit_code"] for record in offline.of("exit")] == [3]
    logged = [record["line"] for record in offline.of("output_logger")]
    assert logged == ["WARNING:launcher:the disk is nearly full\n"]


@pytest.mark.parametrize(("name", "shown"), [(None, "mine"), ("typed", "typed")])
def test_name_tags_and_notes_of_the_environment_are_taken(
    name: str | None, shown: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[WandbRun] = []

    def began(mode: str | None, run: WandbRun, data: Data) -> Logger:
        given.append(run)
        return NullLogger()

    monkeypatch.setattr(wandb, "start", began)
    own = {"WANDB_NAME": "mine", "WANDB_TAGS": "a,b", "WANDB_NOTES": "why"}
    for variable, value in own.items():
        monkeypatch.setenv(variable, value)
    loaded = LoadedRecipe(tiny_recipe(), "tiny", "", "")
    train_loaded(loaded, RunOptions(runs=tmp_path, name=name, max_steps=1))
    (its,) = given
    assert (its.name, its.tags, its.note) == (shown, ["tiny", "a", "b"], "why")
    assert its.group is None


def test_repeats_are_a_group_of_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[WandbRun] = []

    def began(mode: str | None, run: WandbRun, data: Data) -> Logger:
        given.append(run)
        return NullLogger()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "start", began)
    Path("mine.py").write_text(
        "from tests.support.helpers import tiny_recipe\nrecipe = tiny_recipe(epochs=1)\n"
    )
    assert main(["repeat", "mine.py", "--seeds", "0-1", "--name", "own", "--no-report"]) == 0
    assert [(its.group, its.name) for its in given] == [("own", "own-seed0"), ("own", "own-seed1")]


def test_an_online_run_arrives_at_the_server(world: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.setenv("WANDB_MODE", "offline")  # what is asked for comes first
    with serving(world) as server:
        logger = begin("online", tmp_path)
        assert (logger.mode, logger.notice) == ("online", "")
        assert logger.where.startswith(f"{server.url}/someone/pictures/runs/")
        train(logger, range(1, 3))
        logger.finish(3)
        got = server.received
    assert [row["train/loss"] for row in got.history if "train/loss" in row] == [
        pytest.approx(1 / step) for step in (5, 10, 15, 20)
    ]
    assert [row["test/accuracy"] for row in got.history if "test/accuracy" in row] == [0.72, 0.72]
    assert got.summary["best/test_accuracy"] == 0.72
    assert got.config["optimizer"] == {"lr": 0.1}
    assert got.config["data_fallback"] == "no network"
    assert got.run["tags"] == ["synthetic-data"]
    assert got.exit_code == 3
    files = list(got.uploads)
    assert len([name for name in files if name.startswith("media/images/samples")]) == 2 * 36
    assert sorted(name.split("-")[-1] for name in got.artifacts) == [
        *["confusion_matrix_table"] * 2,
        *["predictions"] * 2,
    ]
    tables = [name for name in files if name.endswith("/predictions.table.json")]
    assert len(json.loads(got.uploads[tables[0]])["data"]) == 36
    assert API_KEY not in json.dumps(got.run)


@pytest.mark.slow
def test_a_network_that_goes_away_costs_a_warning_but_no_training(
    world: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.setenv("WANDB_FINISH_TIMEOUT", "3")
    with serving(world) as server:
        logger = begin(None, tmp_path)
        assert logger.mode == "online"
        train(logger, range(1, 2))
        server.stop()
        began = time.monotonic()
        train(logger, range(2, 12))
        assert time.monotonic() - began < 10
        logger.finish(0)
        assert time.monotonic() - began < 30
    assert "wandb sync" in lines(caplog)[-1]
    (folder,) = tmp_path.glob("wandb/run-*")
    assert str(folder) in lines(caplog)[-1]
    rows = [record["history"]["item"] for record in inspect(folder) if record["type"] == "history"]
    assert [row["epoch"] for row in rows if "test/accuracy" in row] == list(range(1, 12))


def test_a_key_that_the_server_refuses_leads_to_an_offline_run(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(world, refused="Viewer"):
        logger = begin(None, tmp_path)
    assert logger.mode == "offline"
    assert "AuthenticationError" in logger.notice
    assert API_KEY not in logger.notice
    logger.finish(0)


def test_a_run_that_cannot_begin_online_begins_offline(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(world, refused="UpsertBucket") as server:
        logger = begin("online", tmp_path)
        assert "UpsertBucket" in server.received.operations
    assert logger.mode == "offline"
    assert "refused" in logger.notice
    train(logger, range(1, 2))
    logger.finish(0)
    assert any(record["type"] == "exit" for record in inspect(Path(logger.where)))


def test_a_mode_that_the_user_has_set_needs_no_notice(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.setenv("WANDB_MODE", "offline")
    logger = begin(None, tmp_path)
    logger.finish(0)
    assert (logger.mode, logger.notice) == ("offline", "")


def test_what_goes_wrong_in_wandb_is_one_warning(
    world: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = begin("offline", tmp_path)
    logger.finish(0)
    assert not lines(caplog)
    train(logger, range(1, 3))  # after its end
    logger.finish(0)
    (line,) = lines(caplog)
    assert "training goes on" in line


def test_a_mode_that_does_not_exist_logs_nothing_and_says_so(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world.setenv("WANDB_MODE", "sometimes")
    logger = begin(None, tmp_path)
    assert logger.mode == "off"
    assert "sometimes" in logger.notice


CHILD = """
import os, sys
from pathlib import Path
from tests.unit.loggers.test_wandb import begin, train

def report(mode):
    logger = begin(mode, Path(sys.argv[1]))
    train(logger, range(1, 2))
    logger.finish(0)
    print(logger.mode, bool(sys.modules.get("wandb")), logger.notice, sep="|")

"""
UNLOGGED = """
report("off")
os.environ["WANDB_MODE"] = "disabled"
report(None)
del os.environ["WANDB_MODE"]
sys.modules["wandb"] = None  # Python's own way to say that it cannot be imported
report(None)
"""


@pytest.fixture(scope="module")
def unlogged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What three runs say: switched off, switched off by WANDB_MODE, and without wandb."""
    folder = tmp_path_factory.mktemp("unlogged")
    with own_world(folder):
        (folder / "unlogged.py").write_text(CHILD + UNLOGGED)
        command = [sys.executable, str(folder / "unlogged.py"), str(folder)]
        done = forked.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wandb_is_not_even_imported_when_it_is_off(unlogged: list[str]) -> None:
    assert unlogged[:2] == ["off|False|", "off|False|"]


def test_without_wandb_installed_training_goes_on_unlogged(unlogged: list[str]) -> None:
    assert unlogged[2].startswith("off|False|W&B is off: ModuleNotFoundError")


@pytest.mark.parametrize("home", [{}, pytest.param({"HOME": "/dev/null"}, marks=pytest.mark.slow)])
def test_without_a_home_the_client_does_not_log_to_the_terminal(
    home: dict[str, str], tmp_path: Path
) -> None:
    """As in a container; its own process did, as soon as it began."""
    script = tmp_path / "offline.py"
    script.write_text(f"{CHILD}report('offline')")
    others = {n: v for n, v in os.environ.items() if not n.startswith(("HOME", "XDG_", "WANDB_"))}
    environment = {**others, **home, "PYTHONPATH": str(ROOT)}
    done = forked.run([sys.executable, str(script), str(tmp_path)], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "offline|True|\n", "")


@pytest.mark.slow
def test_without_an_account_a_terminal_is_not_asked_anything(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, "-c", f"{CHILD}report(None)", str(tmp_path)]
    process = subprocess.Popen(line, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        assert process.wait(timeout=60) == 0
        text = os.read(ours, 10_000).decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert text.startswith("offline|True|W&B keeps the run offline: nobody is logged in")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (5, "L")])
def test_images_of_any_number_of_channels_are_shown(channels: int, mode: str) -> None:
    samples = Samples(images(channels)).captioned(epoch_report(1))
    assert len(samples) == 36
    assert {picture.image.mode for picture in samples if picture.image} == {mode}


def test_many_classes_are_no_flood_of_curves_and_columns() -> None:
    names = tuple(f"class {number}" for number in range(101))
    report = epoch_report(1, classes=101)
    assert not [
        name for name in epoch_scalars(report, Best.of(report), names) if "class_accuracy" in name
    ]
    tables = Samples(images(classes=names)).tables(report)
    assert list(tables) == ["predictions"]
    assert tables["predictions"].columns == ["image", "truth", "prediction", "confidence"]


def test_validation_images_have_curves_and_the_test_images_a_summary(tmp_path: Path) -> None:
    report = replace(epoch_report(1), evaluated_on="val")
    with own_world(tmp_path):
        logger = begin("offline", tmp_path / "run")
        logger.epoch(report, PLAN, Best.of(report))
        logger.tested(FinalReport(report.evaluation, None, report.evaluation))
        logger.finish(0)
        records = inspect(Path(logger.where))
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    names = {name for row in rows if "seconds" in row for name in row}
    assert {"val/accuracy", "val/class_accuracy/dog", "best/val_accuracy"} <= names
    assert not [name for name in names if name.startswith("test/")]
    summary = str([r["summary"] for r in records if r["type"] == "summary"])
    assert "last/test/accuracy" in summary
    assert "best/test/accuracy" in summary


def test_a_class_without_test_images_has_no_curve() -> None:
    test = Evaluation(0.4, ((1, 0), (0, 0)), 1)
    report = EpochReport(1, 1, 0.5, 0.1, 1.0, 1.0, test, numpy.ones((36, 2)))
    names = epoch_scalars(report, Best.of(report), ("cat", "dog"))
    assert "test/class_accuracy/cat" in names
    assert "test/class_accuracy/dog" not in names


def test_the_null_logger_takes_everything() -> None:
    logger = NullLogger()
    train(logger, range(1, 2))
    logger.finish(0)
    assert (logger.mode, logger.where, logger.notice) == ("off", "", "")
    assert not isinstance(logger, WandbLogger)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_thread_of_the_tables_wakes_no_threads_of_torch() -> None:
    """They would let OpenMP's threads of the training sleep between two operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    made, end = threading.Event(), threading.Event()
    samples = Samples(images())

    def make() -> None:
        samples.tables(epoch_report(1))
        made.set()
        end.wait()

    torch.ones(10**6).exp()  # the threads of this one are there
    before = set(os.listdir("/proc/self/task"))
    thread = threading.Thread(target=make)
    thread.start()
    try:
        assert made.wait(30)
        assert len(set(os.listdir("/proc/self/task")) - before) == 1, "the one that was started"
    finally:
        end.set()
        thread.join()
        torch.set_num_threads(threads)
