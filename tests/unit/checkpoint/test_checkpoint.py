"""Checkpoints are whole or are not believed; what differs from them is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.optim import SGD, NAdam
from torchvision.models import mnasnet0_5

from launcher.checkpoint import checkpoint, resume
from launcher.checkpoint.checkpoint import CheckpointError, Writer, capture, newest, restore, write
from launcher.checkpoint.held_folder import HeldFolder
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.weights import load_initial_weights, load_weights
from launcher.config import overrides
from launcher.config.plan import Progress
from launcher.config.recipe import Recipe
from launcher.errors import UserError
from launcher.training.state import TrainContext
from tests.support.helpers import context_of, refused
from tests.support.resumable import recipe

STATE: dict[str, Any] = {
    "best": None,
    "data": "Synthetic",
    "data_digest": "",
    "config": {"epochs": 2},
    "source": "",
    "wandb_id": "1",
    "steps_per_epoch": 25,
}


def untrained(seed: int = 0, recipe: Recipe = recipe) -> TrainContext:
    return context_of(replace(recipe, seed=seed))


def trained(seed: int = 0) -> TrainContext:
    """A training whose optimizer and average have a past."""
    result = untrained(seed)
    state = result.state
    state.network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    state.optimizer.step()
    assert state.ema_model is not None
    state.ema_model.update_parameters(state.network)
    return result


def saved(root: Path, step: int) -> Path:
    state = STATE | {"progress": vars(Progress(step, step // 25))}
    return write(capture(trained(step), state), root)


def test_what_was_being_replaced_goes_once_it_is_not_needed(tmp_path: Path) -> None:
    """As after a kill at that very moment; where it is all there is, a run goes on from it."""
    folder = RunDir(tmp_path)
    root = folder.checkpoints
    alone = saved(root, 25).rename(root / "step-000000025.old")
    assert checkpoint.newest(root) == (alone, [])
    folder.tidy(alone)
    written = saved(root, 25)
    assert list(root.iterdir()) == [written]
    shutil.copytree(written, alone)
    folder.tidy(written)
    assert list(root.iterdir()) == [written]


def test_a_restored_training_equals_the_saved_one(tmp_path: Path) -> None:
    old = trained()
    state = STATE | {"progress": vars(Progress(3))}
    folder = write(capture(old, state), tmp_path)
    new = untrained(seed=1)
    restore(folder, new)
    assert old.state.ema_model is not None
    assert new.state.ema_model is not None
    for a, b in (
        (old.state.network.state_dict(), new.state.network.state_dict()),
        (old.state.ema_model.state_dict(), new.state.ema_model.state_dict()),
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)
    before, after = (c.state.optimizer.state_dict()["state"] for c in (old, new))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)


def test_what_an_optimizer_keeps_has_the_type_that_it_had(tmp_path: Path) -> None:
    """torch's own loading rounds it to that of the weights."""
    half = replace(recipe, optimizer=NAdam, precision="pure_bf16", average=None)
    old, new, wide = (untrained(recipe=r) for r in (half, half, replace(half, precision="fp32")))
    images = torch.randn(8, 3, 32, 32, dtype=torch.bfloat16)
    old.state.network(images).square().sum().backward()
    old.state.optimizer.step()
    folder = write(capture(old, STATE | {"progress": vars(Progress(3))}), tmp_path)
    restore(folder, new)
    before, after = (list(c.state.optimizer.state.values()) for c in (old, new))
    assert before[0]["mu_product"].dtype == torch.float32
    for one, other in zip(before, after, strict=True):
        for name, value in one.items():
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name])
    restore(folder, wide)  # where the weights have another type now, so has what goes with them
    for parameter, state in wide.state.optimizer.state.items():
        assert state["exp_avg"].dtype == parameter.dtype == torch.float32


def test_an_average_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    save_file({"x": torch.zeros(1)}, folder / "average.safetensors")
    with refused("average.safetensors has n_averaged", "nothing, the model"):
        restore(folder, untrained())


def test_settings_of_the_optimizer_stay_those_of_the_recipe(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    new = untrained(recipe=overrides.override(recipe, ["optimizer.weight_decay=0.123"]))
    restore(folder, new)
    assert new.state.optimizer.param_groups[0]["weight_decay"] == 0.123


def test_the_last_three_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        saved(tmp_path, step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000000003", "step-000000004", "step-000000005"]


def lose_a_file(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def truncate(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = folder / "average.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_it(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def cut_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    "damage",
    [lose_a_file, truncate, flip_a_bit, empty_it, empty_the_manifest, cut_the_manifest],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    older, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    assert newest(tmp_path) == (newer, [])
    damage(newer)
    found, (complaint,) = newest(tmp_path)
    assert found == older
    assert "step-000000002 is damaged" in complaint
    with pytest.raises(CheckpointError):
        checkpoint.verify(newer)


def test_a_folder_that_was_never_renamed_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    shutil.copytree(folder, tmp_path / ".step-000000002.77")
    assert newest(tmp_path) == (folder, [])


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    assert saved(tmp_path, 1) == saved(tmp_path, 1)
    assert newest(tmp_path)[1] == []


def test_a_disk_that_refuses_costs_a_complaint_and_no_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "good", 1)
    (tmp_path / "checkpoints").write_text("not a folder")
    writer = Writer(HeldFolder(RunDir(tmp_path)))
    state = STATE | {"progress": vars(Progress(2))}
    snapshot = capture(trained(), state)
    assert writer.submit(snapshot) == ""
    assert "could not be written" in writer.wait()
    assert writer.wait() == ""
    assert newest(tmp_path / "good") == (folder, [])


def test_changed_settings_are_named_unless_they_are_intended() -> None:
    before = {"epochs": 2, "optimizer": {"lr": 0.1}, "data": {"root": "a", "augment": [{"p": 1}]}}
    now = {"epochs": 3, "optimizer": {"lr": 0.1}, "data": {"root": "b", "augment": [{"p": 2}]}}
    with pytest.raises(UserError) as caught:
        resume.refuse_changes(before, now, ())
    assert "epochs (2 -> 3)" in str(caught.value)
    assert "data.augment.0.p (1 -> 2)" in str(caught.value)
    assert "--resume-changed data.augment.0.p,epochs" in str(caught.value)
    assert "root" not in str(caught.value)  # the machine's, not the experiment's
    resume.refuse_changes(before, now, ("epochs", "data.augment"))
    with refused("--resume-changed epoch, which names no setting", "leave epoch out"):
        resume.refuse_changes(before, now, ("epochs", "data.augment", "epoch"))


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    lock = folder.lock()
    with pytest.raises(UserError, match="by another process"):
        folder.lock()
    lock.release()
    folder.lock().release()


def test_epochs_that_will_be_repeated_are_forgotten(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.forget_after(0)
    for epoch in (1, 2, 3):
        folder.record({"epoch": epoch}, {"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tes')  # cut off by a kill
    folder.forget_after(2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


class Counting(SGD):
    """An optimizer that keeps a number in its groups, as some do."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1


def test_what_an_optimizer_keeps_in_its_groups_is_restored(tmp_path: Path) -> None:
    counting = replace(recipe, optimizer=partial(Counting, lr=0.1), average=None)
    old = untrained(recipe=counting)
    old.state.network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    old.state.optimizer.step()
    state = STATE | {"progress": vars(Progress(1))}
    folder = write(capture(old, state), tmp_path)
    new = untrained(recipe=replace(counting, optimizer=partial(Counting, lr=0.1, weight_decay=0.5)))
    restore(folder, new)
    (group,) = new.state.optimizer.param_groups
    assert (group["count"], group["weight_decay"]) == (1, 0.5)


def second_half_at_rest(parameters: Any) -> SGD:
    first, *others = parameters
    own = {"params": others, "schedule": lambda fraction: float(fraction < 0.5)}
    return SGD([{"params": [first]}, own], lr=0.1)


def test_a_rollback_while_a_group_is_frozen_finds_its_checkpoint_good(tmp_path: Path) -> None:
    ctx = untrained(recipe=replace(recipe, optimizer=second_half_at_rest, average=None))
    folder = write(capture(ctx, STATE | {"progress": vars(Progress(1))}), tmp_path)
    ctx.state.set_learning_rates(0.75, ctx.recipe.schedule)
    trained = [p.requires_grad for p in ctx.state.network.parameters()]
    assert trained.count(True) == 1
    restore(folder, ctx)
    ctx.state.set_learning_rates(0.75, ctx.recipe.schedule)
    assert [p.requires_grad for p in ctx.state.network.parameters()] == trained


def test_a_kill_while_a_step_is_saved_again_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, 1)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.startswith(".step-"):  # the new one, into its place
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 1)
    monkeypatch.undo()
    found, complaints = newest(tmp_path)
    assert found is not None
    assert complaints == []
    assert saved(tmp_path, 1) == folder
    assert newest(tmp_path) == (folder, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    for step in (50, 75, 100):
        truncate(saved(tmp_path, step))
    folder = saved(tmp_path, 25)
    assert newest(tmp_path) == (folder, [])


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    shutil.copytree(saved(tmp_path, 1), tmp_path / "step-keep")
    folder = saved(tmp_path, 2)
    shutil.copytree(folder, tmp_path / "step-000000009-copy")
    assert saved(tmp_path, 2) == folder
    assert newest(tmp_path) == (folder, [])
    assert (tmp_path / "step-keep").is_dir()


def test_a_network_that_asks_for_the_version_of_its_format_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    old, new = mnasnet0_5(num_classes=10), mnasnet0_5(num_classes=10)
    save_file(old.state_dict(), path)
    load_weights(new, path)
    assert torch.equal(new.classifier[1].weight, old.classifier[1].weight)
    other = mnasnet0_5(num_classes=7)
    assert load_initial_weights(other, path, ["classifier"])
    assert torch.equal(other.layers[0].weight, old.layers[0].weight)
