"""What others have put into a run folder is passed over or refused: not followed, no waiting."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import run_dir
from launcher.checkpoint.checkpoint import capture, newest, write
from launcher.checkpoint.run_dir import RunDir
from launcher.cli import main
from launcher.config.plan import Progress
from tests.support.helpers import context_of, refused, tiny_recipe
from tests.support.processes import RESUMABLE

Craft = Callable[[Path], object]
PROGRESS = vars(Progress(3))
PARTS = ("weights.safetensors", "optimizer.pt", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good ones."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        details = {
            "progress": vars(Progress(step)),
            "best": None,
            "steps_per_epoch": 10,
            "wandb_id": "1",
            "data": "Synthetic",
            "data_digest": "",
            "config": {"epochs": 2},
            "source": "",
        }
        write(capture(context_of(tiny_recipe()), details), root)
    return root


@pytest.fixture
def newer(checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step-000000002"


def passed_over(newer: Path) -> str:
    """Why the newer one is: in one line, with the older one in its place."""
    found, (complaint,) = newest(newer.parent)
    assert found == newer.with_name("step-000000001")
    assert complaint.startswith("checkpoint step-000000002 is damaged (")
    assert len(complaint.splitlines()) == 1
    return complaint


def with_true_checksums(folder: Path) -> None:
    contents = {name: (folder / name).read_bytes() for name in PARTS[:3]}
    _write(
        folder / "manifest.json",
        {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def as_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[1] / "elsewhere"))


def as_link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("craft", [as_link_to_a_device, as_fifo, as_folder])
def test_a_part_that_is_no_file_is_not_read(craft: Craft, part: str, newer: Path) -> None:
    craft(newer / part)
    passed_over(newer)


@pytest.mark.parametrize("part", PARTS[:3])
def test_a_part_that_is_a_link_is_not_followed(part: str, newer: Path) -> None:
    as_link(newer / part)
    assert f"{part} is a link" in passed_over(newer)


def entry_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    "name", ["../" * 30 + "etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "\ud800", "."]
)
def test_a_manifest_names_nothing_of_another_place(name: str, newer: Path) -> None:
    manifest = json.loads((newer / "manifest.json").read_text())
    _write(newer / "manifest.json", manifest | {name: entry_of(Path("/etc/passwd"))})
    assert "names one of another place" in passed_over(newer)


@pytest.mark.parametrize(
    "entry", [{"bytes": 3}, {"bytes": "3", "sha256": 3}, {"bytes": 10**400, "sha256": ""}, 1, None]
)
def test_an_entry_of_a_manifest_is_as_it_was_written(entry: object, newer: Path) -> None:
    manifest = json.loads((newer / "manifest.json").read_text())
    _write(newer / "manifest.json", manifest | {"state.json": entry})
    passed_over(newer)


@pytest.mark.parametrize("text", ["[1]", "null", "3", "", "[" * 100_000, "\ufffd"])
@pytest.mark.parametrize("part", ["manifest.json", "state.json"])
def test_json_that_says_something_else_is_passed_over(part: str, text: str, newer: Path) -> None:
    (newer / part).write_text(text, encoding="utf-16")
    if part == "state.json":
        with_true_checksums(newer)
    passed_over(newer)
    (newer / part).write_text(text)
    if part == "state.json":
        with_true_checksums(newer)
    passed_over(newer)


@pytest.mark.parametrize(
    "changes",
    [
        *({"progress": value} for value in ("x", None, [1], {}, {"step": 3})),
        *({"progress": PROGRESS | {"step": n}} for n in (-5, 11, 10**30, 1.5, "3", None, True)),
        *({"progress": PROGRESS | {"epochs": number}} for number in (-1, 1, 9, "0")),
        {"progress": PROGRESS | {"epoch_images": "a"}},
        {"progress": PROGRESS | {"epoch_loss_sum": 10**400}},
        *({"best": value} for value in ("x", [1], {"epoch": 1}, {"epoch": "a", "accuracy": "b"})),
        *({"config": value} for value in ("x", None, [1])),
        *({"steps_per_epoch": value} for value in ("10", 0, -1, None)),
        *({name: 3} for name in ("data", "source", "wandb_id", "scaler")),
    ],
    ids=str,
)
def test_a_state_of_other_types_or_of_no_step_is_passed_over(
    changes: dict[str, Any], newer: Path
) -> None:
    state = json.loads((newer / "state.json").read_text())
    _write(newer / "state.json", state | changes)
    with_true_checksums(newer)
    passed_over(newer)


@pytest.mark.parametrize("name", ["progress", "best", "config", "data", "scaler", "wandb_id"])
def test_a_state_that_lacks_a_part_is_passed_over(name: str, newer: Path) -> None:
    state = json.loads((newer / "state.json").read_text())
    del state[name]
    _write(newer / "state.json", state)
    with_true_checksums(newer)
    assert "state.json" in passed_over(newer)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["torch", "pickle", "within"])
def test_an_optimizer_that_holds_code_never_runs_it(form: str, newer: Path) -> None:
    harmful, path = Harmful(newer.parents[1] / "harmed"), newer / "optimizer.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(harmful))
    else:
        saved = torch.load(path, weights_only=True)
        torch.save(harmful if form == "torch" else saved | {"more": harmful}, path)
    with_true_checksums(newer)
    assert "weights_only" not in passed_over(newer)  # torch advises to switch it off
    assert not harmful.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"garbage", [1, 2], {}, {"state": {}, "param_groups": []}),
        {"state": {}, "param_groups": [{"params": []}], "initial_options": []},
        {"state": "x", "param_groups": [], "initial_options": []},
        {"state": {0: "x"}, "param_groups": [], "initial_options": []},
        {"state": {}, "param_groups": ["x"], "initial_options": ["x"]},
        {"state": {}, "param_groups": [{"params": ["x"]}], "initial_options": [{}]},
        {"state": {5: {}}, "param_groups": [{"params": [0]}], "initial_options": [{}]},
    ],
    ids=str,
)
def test_an_optimizer_of_another_form_is_passed_over(content: Any, newer: Path) -> None:
    path = newer / "optimizer.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with_true_checksums(newer)
    assert "optimizer.pt" in passed_over(newer)


def of_other_shape(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(7, 7)


def of_other_type(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = torch.tensor([[True]])


def of_no_tensor(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = "text"


def without_a_key(state: dict[str, Any]) -> None:
    del state["state"][0]["exp_avg_sq"]


def with_a_text_as_option(state: dict[str, Any]) -> None:
    state["param_groups"][0]["betas"] = "text"


def without_an_option(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["eps"]


@pytest.mark.parametrize(
    "change",
    [
        *(of_other_shape, of_other_type, of_no_tensor, without_a_key),
        *(with_a_text_as_option, without_an_option),
    ],
)
def test_a_state_with_which_no_step_can_be_made_is_refused(
    change: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(RESUMABLE), "--wandb", "off", "--name", "mine", "data.source.count=50"]
    assert main([*words, "epochs=1"]) == 0
    (folder,) = Path("runs", "mine", "checkpoints").iterdir()
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, folder / "optimizer.pt")
    with_true_checksums(folder)
    metrics = Path("runs", "mine", "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*words, "epochs=2", "--resume-changed", "epochs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "optimizer.pt" in line
    assert f"remove {folder}" in line
    assert Path("runs", "mine", "metrics.jsonl").read_bytes() == metrics


def test_weights_that_are_none_are_passed_over(newer: Path) -> None:
    (newer / "weights.safetensors").write_text("x")
    with_true_checksums(newer)
    assert "weights.safetensors" in passed_over(newer)


# The run folder


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "best.safetensors", ".lock"])
@pytest.mark.parametrize("craft", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_in_a_run_folder_is_named(name: str, craft: Craft, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    RunDir(folder).describe({}, {"name": "net"}, "")
    (folder / name).unlink(missing_ok=True)
    craft(folder / name)
    with refused(f"{name} is no file", f"type mv {folder / name} {folder / name}.old"):
        run_dir.find(tmp_path, "mine", "net")
    (folder / name).rename(folder / f"{name}.old")
    assert run_dir.find(tmp_path, "mine", "net") == RunDir(folder)


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path: Path) -> None:
    RunDir(tmp_path / "mine").describe({}, {"name": "net"}, "")
    (tmp_path / "mine" / "checkpoints").touch()
    with refused("checkpoints is no folder"):
        run_dir.find(tmp_path, "mine", "net")


@pytest.mark.parametrize("craft", [as_fifo, as_folder, as_link_to_a_device])
def test_a_description_that_is_no_file_is_passed_over(craft: Craft, tmp_path: Path) -> None:
    good = RunDir(tmp_path / "good").describe({}, {"name": "net"}, "")
    bad = RunDir(tmp_path / "new").describe({"a": 1}, {"name": "net"}, "")
    for name in ("config.json", "run.json"):
        craft(bad.path / name)
    assert run_dir.find(tmp_path, None, "net") == RunDir(good.path)
    assert bad.config() == {}


def test_figures_are_not_written_into_a_fifo_nor_read_forever(tmp_path: Path) -> None:
    folder, path = RunDir(tmp_path), tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"epoch": 1}\n')
    assert folder.forget_after(1) == 1
    as_fifo(path)
    assert folder.forget_after(1) == 0
    with pytest.raises(OSError, match="metrics"):
        folder.record({"epoch": 1}, {"epoch": 1})
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="no plain file"):
        folder.record({"epoch": 1}, {"epoch": 1})
    os.close(reader)


def test_half_written_files_that_are_links_are_removed_alone(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "mine")
    folder.checkpoints.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder.checkpoints / ".step-000000001.9").symlink_to(tmp_path / "outside")
    folder.tidy()
    assert list(folder.checkpoints.iterdir()) == []
    assert (tmp_path / "outside").is_dir()


def test_runs_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with refused(f"the run folder {tmp_path / name / 'mine'} cannot be written", "--runs"):
            run_dir.create(tmp_path / name, "mine", "net")


def test_a_run_goes_on_where_runs_is_a_link_to_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to("scratch")
    words = [str(RESUMABLE), "--wandb", "off", "--name", "mine", "data.source.count=100"]
    assert main([*words, "epochs=1"]) == 0
    assert main([*words, "epochs=2", "--resume-changed", "epochs"]) == 0
    assert (tmp_path / "scratch" / "mine" / "checkpoints" / "step-000000004").is_dir()
