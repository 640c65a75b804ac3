"""What W&B gets at the end of a run, by its real client: to a local server, and offline."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import load_run
from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.errors import EXIT_FAULT, EXIT_SAVED
from launcher.loggers import report, wandb_end
from launcher.loggers.report import write
from launcher.loggers.wandb import WandbRun, start
from tests.support.helpers import RECIPES
from tests.support.reported import HOSTILE, outcomes_of, write_reported
from tests.support.wandb_server import API_KEY
from tests.unit.loggers.test_wandb import images, inspect, own_world, serving

SHORT = ("data.fallback.count=60", "data.batch_size=20", "epochs=1", "data.root=nowhere")
SECRET = "planted-secret-of-the-test"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    with own_world(tmp_path) as patch:
        patch.setenv("STORAGE_API_KEY", SECRET)
        yield patch


def train(*words: str) -> Path:
    text = (RECIPES / "pictures64.py").read_text().replace('"""A small', f'"""{SECRET}: a small', 1)
    assert SECRET in text
    Path("mine.py").write_text(text)
    assert main(["mine.py", *SHORT, "--name", "own", *words]) == 0
    return Path("runs/own")


def table(content: bytes) -> list[dict[str, Any]]:
    found = json.loads(content)
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@pytest.mark.slow
def test_a_server_gets_mistakes_classes_page_and_weights(world: pytest.MonkeyPatch) -> None:
    world.setattr(report, "write", write)
    with serving(world) as server:
        path = train("--wandb", "online", "--wandb-model")
        got = server.received
    best = RunFiles(path).best
    assert best is not None
    its = {name: content for name, content in got.uploads.items() if "media" not in name}

    def uploaded(ending: str) -> bytes:
        (found,) = [content for name, content in its.items() if name.endswith(ending)]
        return found

    identity = json.loads((path / "run.json").read_text())["wandb_id"]
    rows = table(uploaded("/worst_mistakes.table.json"))
    assert [row["loss"] for row in rows] == pytest.approx(best.loss[best.mistakes].tolist())
    pictures = [f"run-{identity}-worst_mistakes/{row['image']['path']}" for row in rows]
    assert set(pictures) <= set(got.uploads)
    classes = table(uploaded("/class_accuracy.table.json"))
    assert sum(row["images"] for row in classes) == 12
    right = sum(round(row["accuracy"] * row["images"]) for row in classes)
    assert right == sum(best.truth == best.predicted)
    assert {f"report-{identity}", f"model-{identity}"} <= set(got.artifacts)
    page = uploaded(f"report-{identity}/index.html")
    assert b"done, exit code" in page
    assert page == (path / "report/index.html").read_bytes(), "not written a second time"
    assert uploaded(f"report-{identity}/plotly.min.js").startswith(b"/**")
    copy = Path("copy")
    copy.mkdir()
    for name, content in its.items():
        if name.startswith(f"model-{identity}/") and not name.endswith("/manifest"):
            (copy / name.partition("/")[2]).write_bytes(content)
    assert sorted(os.listdir(copy)) == ["best.safetensors", "config.json", "recipe.py", "run.json"]
    own, other = load_run(path), load_run(copy)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(own.model(images), other.model(images), rtol=0, atol=0)
    for name, content in got.uploads.items():
        assert SECRET.encode() not in content, name
        assert API_KEY.encode() not in content, name
    assert got.exit_code == 0


@pytest.mark.slow
def test_offline_keeps_them_for_a_later_upload(world: pytest.MonkeyPatch) -> None:
    world.setattr(report, "write", write)
    path = train("--wandb", "offline")
    (folder,) = path.glob("wandb/offline-run-*")
    records = [r["artifact"] for r in inspect(folder) if r["type"] == "artifact"]
    made = {record["name"]: record for record in records}
    identity = json.loads((path / "run.json").read_text())["wandb_id"]
    assert f"model-{identity}" not in made, "only when asked"
    entries = made[f"report-{identity}"]["manifest"]["contents"]
    assert sorted(entry["path"] for entry in entries) == ["index.html", "plotly.min.js"]
    assert all(Path(entry["local_path"]).is_relative_to(path.absolute()) for entry in entries)
    files = [e["path"] for record in records for e in record["manifest"]["contents"]]
    assert "worst_mistakes.table.json" in files
    assert "class_accuracy.table.json" in files
    for file in path.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("exit_code", [0, EXIT_SAVED, EXIT_FAULT])
def test_only_what_has_come_to_its_end_is_sent(exit_code: int, world: pytest.MonkeyPatch) -> None:
    path = write_reported(Path("runs"))
    described = WandbRun(path, "pictures", "own", {}, has_model=True)
    logger = start("offline", described, images())
    logger.finish(exit_code)
    names = [r["artifact"]["type"] for r in inspect(Path(logger.where)) if r["type"] == "artifact"]
    assert ("model" in names) == (len(names) > 1) == (exit_code == 0)


@pytest.mark.slow
def test_a_page_that_cannot_be_made_costs_a_warning(
    world: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.setattr(report, "write", lambda folder: "the disk is full")
    path = train("--wandb", "offline", "--wandb-model")
    (warning,) = [r.getMessage() for r in caplog.records if "misses something" in r.getMessage()]
    assert "the disk is full" in warning
    assert RunFiles(path).state == "done"


def test_tables_say_what_the_run_kept(world: pytest.MonkeyPatch) -> None:
    files = [f"{n}.png" for n in range(40)]
    path = write_reported(Path("runs"), classes=HOSTILE, files=files)
    best = outcomes_of(4)
    found = wandb_end.tables(path)
    rows = found["worst_mistakes"].data
    places = best.mistakes.tolist()
    assert [row[-1] for row in rows] == [files[place] for place in places]
    assert [row[1] for row in rows] == [HOSTILE[best.truth[place]] for place in places]
    image = rows[0][0].image
    assert image.getpixel((0, 0)) == tuple(best.pictures[places[0]][0, 0].tolist())
    assert [row[0] for row in found["class_accuracy"].data] == list(HOSTILE)
    assert sum(row[2] for row in found["class_accuracy"].data) == 40
    (path / "best.npz").unlink()
    assert wandb_end.tables(path) == {}


def test_a_page_written_since_the_end_is_not_written_again(
    world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_reported(Path("runs"))
    assert main(["report", "own"]) == 0
    world.setattr("sys.executable", str(tmp_path / "absent"))
    assert write(path) == ""
    os.utime(path / "end.json")
    assert "No such file" in write(path)
