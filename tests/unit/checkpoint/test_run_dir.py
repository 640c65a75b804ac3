"""The run folder belongs to one run, and its files are whole."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launcher.checkpoint import run_dir
from launcher.checkpoint.weights import save_weights
from launcher.errors import UserError
from tests.support.helpers import refused


def test_names_are_made_from_recipe_and_time_and_never_shared(tmp_path: Path) -> None:
    folders = [run_dir.create(tmp_path / "runs", None, "net").path for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.name.startswith("net-20") for folder in folders)


@pytest.mark.parametrize("runs", ["x" * 256, "a\0b", "file"])
def test_a_place_where_no_folder_can_be_is_refused(runs: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("mine", None):
        assert run_dir.find(tmp_path / runs, name, "net") is None
        with refused(runs.partition("\0")[0], "cannot be written", "type --runs FOLDER"):
            run_dir.create(tmp_path / runs, name, "net")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step-000000001", "notes.txt"])
def test_a_name_whose_run_has_something_to_lose_is_refused(left: str, tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "mine", "net")
    folder.describe({"epochs": 1}, {"name": "net"}, "source")
    (folder.path / left).parent.mkdir(exist_ok=True)
    (folder.path / left).touch()
    with pytest.raises(UserError, match="exists already"):
        run_dir.create(tmp_path, "mine", "net")


def test_a_run_that_failed_before_it_had_anything_does_not_block_its_name(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "mine", "net")
    first = folder.describe({"epochs": 1}, {"name": "net"}, "source")
    (folder.path / "wandb").mkdir()
    folder.checkpoints.mkdir()
    again = run_dir.create(tmp_path, "mine", "net")
    assert again.path == folder.path
    assert again.describe({"epochs": 2}, {"name": "net"}, "new").identity == first.identity


def test_a_lock_that_cannot_be_had_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "mine", "net")
    (folder.path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="cannot be written"):
        folder.lock()
    assert not (tmp_path / "victim").exists()


def test_records_are_one_json_object_a_line(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "mine", "net")
    folder.describe({"epochs": 1}, {"data": "x"}, "source")
    for epoch in (1, 2):
        folder.record({"epoch": epoch, "test/accuracy": 0.5}, {"epoch": epoch})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert json.loads((folder.path / "run.json").read_text())["versions"]["torch"]


def test_weights_come_back_as_they_were_even_if_strided_or_shared(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    network.to(memory_format=torch.channels_last)
    network[0].bias = network[1].bias
    save_weights(network, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_a_failed_save_leaves_the_old_weights_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()
    broken = nn.Linear(2, 2)
    broken.register_buffer("sparse", torch.zeros(2).to_sparse())  # not storable
    with pytest.raises(Exception):  # noqa: B017, PT011 - safetensors' own type varies
        save_weights(broken, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_damaged_lines_of_the_figures_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = run_dir.create(tmp_path, "mine", "net")
    path = folder.path / "metrics.jsonl"
    good = [b'{"epoch": 1}\n', b'{"epoch": 2}\n', b'{"epoch": 3}\n']
    bad = [b"\xff\xfe\n", b"[1]\n", b'{"epoch": "2"}\n', b"\n", b'{"epo\n']
    path.write_bytes(good[0] + b"".join(bad) + good[1] + good[2] + b'{"epoch": 2, "te')
    assert folder.forget_after(2) == len(bad)
    assert path.read_bytes() == good[0] + good[1]
    assert folder.forget_after(2) == 0
