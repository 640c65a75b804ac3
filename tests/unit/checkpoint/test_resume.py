"""Where a resumed run begins, and what it refuses: in one line, with nothing overwritten."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from launcher import train
from launcher.checkpoint.run_files import RunFiles
from launcher.checkpoint.saver import Saver
from launcher.cli import main
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.distributed import signals
from launcher.distributed.accelerator import reset_accelerator
from launcher.results.compare import experiment
from launcher.results.page import Page
from launcher.results.quoted import quoted
from launcher.run.train import train_loaded
from launcher.training.metrics import Best
from tests.support import helpers
from tests.support.processes import RESUMABLE, fingerprint

RUN = Path("runs", "mine")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str, recipe: Path = RESUMABLE) -> int:
    return main([str(recipe), "--wandb", "off", "--name", "mine", *words])


def contents() -> dict[str, bytes]:
    files = (path for path in RUN.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *words: str, recipe: Path = RESUMABLE) -> str:
    """The one line, after which every file is as it was."""
    before = contents()
    capsys.readouterr()
    assert run("--resume", *words, recipe=recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert contents() == before
    return line


def step_of_newest() -> int:
    return int(sorted(RUN.glob("checkpoints/step-*"))[-1].name[5:])


@pytest.mark.parametrize("cadence", ["2m", "20"])
def test_every_cadence_saves_the_end_so_that_more_epochs_can_follow(cadence: str) -> None:
    assert run("epochs=1", "--checkpoint-every", cadence) == 0
    assert step_of_newest() == 25
    assert run("epochs=2", "--resume", "--resume-changed", "epochs") == 0
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


def test_an_ended_run_without_a_checkpoint_is_not_trained_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("epochs=1", "--checkpoint-every", "never") == 0
    line = refused(capsys, "epochs=1")
    assert "has ended and has no whole checkpoint" in line
    assert "--init-from runs/mine" in line


def test_one_that_was_killed_before_its_end_begins_anew() -> None:
    """It may not have looked at the test images yet."""
    words = ("epochs=1", "--checkpoint-every", "never", "data.validation=0.2")
    assert run(*words) == 0
    tested = (RUN / "test.json").read_bytes()
    for written_at_the_end in ("test.json", "end.json"):
        (RUN / written_at_the_end).unlink()
    assert run("--resume", *words) == 0
    assert (RUN / "test.json").read_bytes() == tested


def die(*_: Any) -> str:
    raise KeyboardInterrupt


def test_a_run_that_is_killed_behind_its_last_checkpoint_has_all_outcomes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is resumed with nothing to evaluate, and in an older last.npz other images are wrong."""

    words = ("epochs=2", "--checkpoint-every", "1e")
    assert run(*words, "--max-steps", "25") == 0
    with monkeypatch.context() as context:
        context.setattr(Saver, "weights", lambda *a: die() if a[2] == "final" else "")
        run("--resume", *words)
    assert run("--resume", *words) == 0
    with numpy.load(RUN / "last.npz") as last:
        assert last["epoch"] == 2


def test_a_word_that_names_no_setting_is_refused_before_a_run_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "epochs=1", "--resume-changed", "optimiser.lr")
    assert "--resume-changed optimiser.lr, which names no setting" in line
    assert not RUN.exists()


def test_settings_are_compared_where_no_checkpoint_was_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("epochs=1", "--checkpoint-every", "never") == 0
    (RUN / "final.safetensors").unlink()
    assert "optimizer.lr (0.001 -> 0.5)" in refused(capsys, "epochs=1", "optimizer.lr=0.5")
    assert run("epochs=1", "--resume") == 0


def test_another_batch_size_goes_on_after_a_whole_epoch_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = ("data.batch_size=100", "--resume-changed", "data.batch_size")
    assert run("epochs=2", "--max-steps", "30") == 0
    line = refused(capsys, "epochs=2", *changed)
    assert "13 steps per epoch, where the run stands within an epoch of 25" in line
    shutil.rmtree(RUN / "checkpoints" / "step-000000030")
    assert run("epochs=2", "--resume", *changed) == 0
    last = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["epoch"], last["step"]) == (2, 26)
    assert step_of_newest() == 26


@pytest.mark.parametrize("word", ["data.batch_size=51", "seed=1"])
def test_the_images_of_an_epoch_stay_in_its_batches_and_order(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the epoch has as many steps as before."""
    few = ("data.source.count=150", "epochs=2")
    assert run(*few, "--max-steps", "4") == 0
    name = word.partition("=")[0]
    line = refused(capsys, *few, word, "--resume-changed", name)
    assert f"{word} after step 4, where the run stands within an epoch" in line
    (kept,) = [part for part in line.split() if part.startswith(f"{name}=")][1:]
    assert run(*few, kept, "--resume") == 0
    assert run("data.source.count=150", "epochs=3", word, "--resume-changed", f"epochs,{name}") == 0


def test_a_run_is_not_cut_short_after_the_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data.source.count=100", "epochs=3", "--max-steps", "5") == 0
    fewer = ("data.source.count=100", "--resume-changed", "epochs")
    assert "type epochs=3 or more" in refused(capsys, *fewer, "epochs=2")
    assert run(*fewer, "epochs=3") == 0


def test_a_network_that_has_changed_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("epochs=1") == 0
    words = ("epochs=2", "model.width=16", "--resume-changed", "epochs,model")
    assert "the model (16, 3, 3, 3)" in refused(capsys, *words)
    edited = tmp_path / "resumable.py"
    edited.write_text(
        RESUMABLE.read_text().replace("width * 8 * 8, 10)", "width * 8 * 8, 10, False)")
    )
    line = refused(capsys, "epochs=2", "--resume-changed", "epochs", recipe=edited)
    assert "layers.6.bias" in line


def test_an_average_may_begin_with_a_resume() -> None:
    assert run("epochs=1", "average=none") == 0
    words = ("epochs=2", "--resume", "--resume-changed", "epochs,average")
    assert run(*words) == 0
    assert (RUN / "checkpoints" / "step-000000050" / "average.safetensors").is_file()


def test_a_run_that_was_killed_before_it_was_described_begins_again() -> None:
    RUN.mkdir(parents=True)
    (RUN / ".lock").touch()
    (RUN / "config.json").write_text("{")
    assert run("epochs=1", "--resume") == 0
    assert step_of_newest() == 25


def test_a_run_without_its_description_goes_on_from_its_checkpoint_and_is_the_same_to_wandb() -> (
    None
):
    assert run("epochs=1") == 0
    known = json.loads((RUN / "run.json").read_text())["wandb_id"]
    (RUN / "run.json").unlink()
    before = fingerprint(RUN)
    assert run("epochs=1", "--resume") == 0
    assert fingerprint(RUN) == before
    assert json.loads((RUN / "run.json").read_text())["wandb_id"] == known


def test_a_damaged_description_of_another_run_is_passed_over() -> None:
    assert run("epochs=1") == 0
    for name, text in (("cut", '{"na'), ("list", "[]")):
        Path("runs", name).mkdir()
        Path("runs", name, "run.json").write_text(text)
    assert main([str(RESUMABLE), "--wandb", "off", "epochs=1", "--resume"]) == 0


@pytest.mark.parametrize("name", ["../runs/mine", "x" * 300])
def test_a_name_that_is_no_name_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("epochs=1") == 0
    assert main([str(RESUMABLE), "--wandb", "off", "--resume", "--name", name]) == 2
    assert "expected a plain name" in capsys.readouterr().err


def test_nothing_of_wandb_goes_through_a_link(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("epochs=1") == 0
    (RUN / "wandb").symlink_to(tmp_path)
    assert "is a link to" in refused(capsys, "epochs=1")


def test_another_optimizer_is_refused_even_where_the_change_is_intended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its state is not that of the one before."""
    assert run("epochs=1") == 0
    text = RESUMABLE.read_text()
    words = ("epochs=2", "--resume-changed", "epochs,optimizer")
    other = tmp_path / "resumable.py"
    other.write_text(text.replace("AdamW", "SGD"))
    line = refused(capsys, *words, recipe=other)
    assert "the optimizer torch.optim.sgd:SGD, but the run began with torch.optim.adamw" in line


def test_an_optimizer_whose_groups_have_changed_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("epochs=1", recipe=with_groups(tmp_path / "one", "named")) == 0
    two = with_groups(tmp_path / "two", "[{'params': named[:2]}, {'params': named[2:]}]")
    line = refused(capsys, "epochs=2", "--resume-changed", "epochs", recipe=two)
    assert "an optimizer with other parameter groups than the checkpoint's" in line


def with_groups(folder: Path, groups: str) -> Path:
    """The recipe with a function for its optimizer, of these groups."""
    folder.mkdir()
    function = f"def grouped(parameters):\n    named = list(parameters)\n    return AdamW({groups})"
    text = RESUMABLE.read_text().replace("partial(AdamW, lr=1e-3)", "grouped")
    recipe = folder / "resumable.py"
    recipe.write_text(text.replace("\nrecipe =", f"\n{function}\n\n\nrecipe ="))
    return recipe


def test_a_precision_of_accelerates_config_is_kept_like_one_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = helpers.tiny_recipe()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(recipe, runs=tmp_path, name="run", wandb="off", max_steps=1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with helpers.refused("precision (bf16 -> fp32)", "--resume-changed precision"):
        train(recipe, runs=tmp_path, name="run", wandb="off", resume=True)
    train(recipe, "precision=bf16", runs=tmp_path, name="run", wandb="off", resume=True)


class Pictures:
    """Ten images that follow from the folder's name, and ten more in a folder called more."""

    classes = tuple("abcdefghij")

    def __init__(self, root: str, train: bool) -> None:
        generator = torch.Generator().manual_seed(len(root))
        count = 20 if root == "more" else 10
        shape = (count, 8, 8, 3)
        self.data = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.targets = torch.arange(count) % 10


PICTURES = helpers.tiny_recipe(data={"source": Pictures, "root": "one", "batch_size": 5}, epochs=2)


@pytest.mark.parametrize("root", ["another", "more"])
def test_other_images_are_refused_within_an_epoch(root: str) -> None:
    train(PICTURES, name="mine", wandb="off", max_steps=3)
    before = contents()
    with helpers.refused("other images of Pictures", "within an epoch", "put them back"):
        train(PICTURES, f"data.root={root}", name="mine", wandb="off", resume=True)
    assert contents() == before
    assert train(PICTURES, name="mine", wandb="off", resume=True).last


def test_after_an_epoch_other_images_need_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("pictures.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import PICTURES as recipe\n")
    assert run("epochs=1", recipe=recipe) == 0
    line = refused(capsys, "data.root=more", "--resume-changed", "epochs", recipe=recipe)
    assert "--resume-changed data.root" in line
    changed = ("data.root=more", "--resume", "--resume-changed", "epochs,data.root")
    assert run(*changed, recipe=recipe) == 0


class Same(helpers.Tiny):
    """Says the same class of all images, so that no epoch is better than the first."""

    def __init__(self, said: int = 0) -> None:
        super().__init__()
        self.said = said

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        return scores if self.training else scores * 0 + torch.eye(10)[self.said]


SAME = replace(PICTURES, model=Same)


def resumed(*words: str, recipe: Path) -> str:
    """The note of a resumed run about its best epoch."""
    changed = ",".join(word.partition("=")[0] for word in words)
    assert run("--resume", "--resume-changed", changed, *words, recipe=recipe) == 0
    (found,) = (c for c in RunFiles(RUN).changes if c.epochs == 2)
    return str(found)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.root=more", "the images"),
        ("data.mean=0,0,0", "data.mean ([0.5, 0.5, 0.5] -> [0.0, 0.0, 0.0])"),
        ("model.said=1", "model.said (0 -> 1)"),
    ],
)
def test_the_best_epoch_is_one_of_those_with_the_present_images_and_answers(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path("same.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import SAME as recipe\n")
    assert run(recipe=recipe) == 0
    assert RunFiles(RUN).best_row == RunFiles(RUN).epochs[0]
    shutil.copytree(RUN, "runs/before")
    capsys.readouterr()
    assert resumed("epochs=4", word, recipe=recipe).startswith("after 2 epochs: ")
    assert "the best epoch is one of those to come" in capsys.readouterr().out
    found = RunFiles(RUN)
    assert said in str(found.changes)
    assert found.best_row == found.epochs[2]
    assert found.best is not None
    assert found.best.epoch == 3
    assert any("up to epoch 2" in note for note in Page(found).notes)
    assert Page(found).samples["epochs"] == [3, 4]
    assert experiment(found) != experiment(RunFiles(Path("runs/before")))
    # Resumed once more from before, and as it was, nothing has changed on the way.
    shutil.rmtree(RUN / "checkpoints")
    shutil.copytree("runs/before/checkpoints", RUN / "checkpoints")
    assert run("--resume", "--resume-changed", "epochs", "epochs=3", recipe=recipe) == 0
    assert [str(change) for change in RunFiles(RUN).changes] == ["after 2 epochs: epochs (2 -> 3)"]
    assert "not kept" in capsys.readouterr().out  # of epoch 1, whose weights were replaced
    assert RunFiles(RUN).best_row == RunFiles(RUN).epochs[2]


def test_what_is_left_of_the_best_epoch_is_of_those_images_that_the_run_has_now() -> None:
    """Also until the first of them is evaluated."""
    recipe = Path("same.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import SAME as recipe\n")
    assert run(recipe=recipe) == 0
    failing = "epochs=3", "data.root=more", "--resume-changed", "epochs,data.root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "stop_reason", lambda: "a test")
        assert run("--resume", *failing, recipe=recipe) == 75
    found = RunFiles(RUN)
    assert (found.best_row, found.best, found.last) == (None, None, None)
    assert quoted(found) == {}
    assert not (RUN / "best.safetensors").exists()
    assert run("--resume", *failing[:2], recipe=recipe) == 0
    assert RunFiles(RUN).chosen_after == 2


class Split(Pictures):
    """The same with images for validation, which are others in each folder."""

    def __init__(self, root: str, split: str) -> None:
        super().__init__(root, train=split == "train")


def test_patience_begins_anew_with_other_images() -> None:
    data = replace(SAME.data, source=Split, validation="val")
    recipe = replace(SAME, data=data, patience=2, epochs=9)
    assert train(recipe, name="mine", wandb="off").last == Best(3, 0.1)
    loaded = LoadedRecipe(recipe, "same", "", "")
    other = replace(loaded, recipe=replace(recipe, data=replace(data, root="two!")))
    options = RunOptions(name="mine", wandb="off", resume=True, resume_changed=("data.root",))
    result = train_loaded(other, options)
    assert result.best == Best(4, 0.1)
    assert result.last == Best(6, 0.1)


def test_where_images_are_drawn_to_validate_the_others_stay_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = Path("drawn.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import PICTURES as recipe\n")
    drawn = ("data.root=one", "data.validation=5")
    assert run(*drawn, recipe=recipe) == 0
    words = (*drawn, "data.root=another", "epochs=3", "--resume-changed", "epochs,data.root")
    assert "of which others may validate now" in refused(capsys, *words, recipe=recipe)


def test_what_changes_after_the_end_is_without_effect(capsys: pytest.CaptureFixture[str]) -> None:
    """And so the folder does not say that the run had it; other answers are refused."""
    recipe = Path("same.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import SAME as recipe\n")
    assert run(recipe=recipe) == 0
    before = contents()
    recipe.write_text(recipe.read_text() + "# edited\n")
    words = ("--resume", "--resume-changed", "optimizer.lr", "optimizer.lr=0.5")
    assert run(*words, recipe=recipe) == 0
    said = "without effect: optimizer.lr (0.001 -> 0.5), the recipe file"
    assert said in capsys.readouterr().out
    for name in ("config.json", "run.json", "recipe.py", "metrics.jsonl", "final.safetensors"):
        assert contents()[str(RUN / name)] == before[str(RUN / name)]
    line = refused(capsys, "data.mean=0,0,0", "--resume-changed", "data.mean", recipe=recipe)
    assert "type more epochs" in line


def test_the_test_images_are_not_evaluated_by_code_that_was_edited_after_the_end() -> None:
    recipe, words = Path("answers.py"), ("data.source.count=100", "data.validation=0.2", "epochs=1")
    recipe.write_text(RESUMABLE.read_text())
    assert run(*words, recipe=recipe) == 0
    before = (RUN / "test.json").read_bytes()
    recipe.write_text(RESUMABLE.read_text().replace("self.layers(images)", "self.layers(-images)"))
    assert run(*words, "--resume", recipe=recipe) == 0
    assert (RUN / "test.json").read_bytes() == before


def test_weights_that_are_gone_are_not_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("same.py")
    recipe.write_text("from tests.unit.checkpoint.test_resume import SAME as recipe\n")
    assert run(recipe=recipe) == 0
    (RUN / "best.safetensors").unlink()
    resumed("epochs=3", recipe=recipe)
    said = capsys.readouterr().out
    assert "best epoch  3, " in said
    assert (RUN / "best.safetensors").is_file()


def test_images_are_drawn_in_another_way_after_an_epoch_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--max-steps", "30") == 0
    line = refused(capsys, "data.sampling=balanced", "--resume-changed", "data.sampling")
    assert "data.sampling=balanced after step 30" in line


def test_a_run_is_not_cut_before_the_step_at_which_it_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--max-steps", "30") == 0
    line = refused(capsys, "--max-steps", "28")
    assert "stands at step 30" in line
    assert run("--resume", "--max-steps", "31") == 0


class Counting(helpers.Tiny):
    """Says the same class of all images, by the number of steps that it has been trained for."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        scores = super().forward(images)
        said = {10: 1, 26: 0}.get(int(self.steps), 2)
        return scores if self.training else scores * 0 + torch.eye(10)[said]


class Uneven(Pictures):
    """100 images: 50 of class 0, 30 of class 1, 20 of class 2."""

    def __init__(self, root: str, train: bool) -> None:
        self.data = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1).expand(-1, 8, 8, 3)
        self.targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)


def test_the_best_weights_are_of_an_epoch_that_the_run_has() -> None:
    """Not of a part of one, which was better than the whole of it."""
    recipe = helpers.tiny_recipe(model=Counting, epochs=3, data={"source": Uneven})
    whole = train(recipe, name="whole", wandb="off")
    assert whole.best == Best(1, 0.3)
    cut = train(recipe, name="cut", wandb="off", max_steps=26)
    assert cut.last == Best(3, 0.5)
    assert cut.best == cut.highest == whole.best
    assert RunFiles(Path("runs", "cut")).best_accuracy == 0.3
    resumed = train(recipe, name="cut", wandb="off", resume=True)
    assert resumed.best == whole.best
    files = [Path("runs", name, "best.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


class Said(helpers.Tiny):
    """Says one class of all images."""

    said = 1

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        return scores if self.training else scores * 0 + torch.eye(10)[Said.said]


@pytest.mark.parametrize("step", ["outcomes", "weights"])
def test_the_best_weights_are_none_that_were_given_up(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an epoch in which the run was killed as they were written, and which is worse now."""
    recipe = helpers.tiny_recipe(model=Said, epochs=1, data={"source": Uneven})
    train(recipe, name="mine", wandb="off")
    shutil.copy(RUN / "best.safetensors", "first")
    more = LoadedRecipe(replace(recipe, epochs=2), "said", "", "")
    options = RunOptions(name="mine", wandb="off", resume=True, resume_changed=("epochs",))
    with monkeypatch.context() as context:
        context.setattr(Said, "said", 0)
        context.setattr(Saver, step, die)
        with pytest.raises(KeyboardInterrupt):
            train_loaded(more, options)
    monkeypatch.setattr(Said, "said", 2)
    reset_accelerator()
    best = train_loaded(more, options).best
    assert best == (Best(1, 0.3) if step == "outcomes" else Best(2, 0.2))
    is_first = (RUN / "best.safetensors").read_bytes() == Path("first").read_bytes()
    assert is_first == (best.epoch == 1)


class Embedding(helpers.Tiny):
    """Looks its brightness up in a table, of whose rows a step changes the few that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 10, sparse=True)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.table((images.mean((1, 2, 3)) * 2).long().clamp(0, 7))


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="torch before 2.14 has no norm of sparse gradients"
)
def test_sparse_gradients_are_resumed_to_the_bit() -> None:
    optimizer = partial(SGD, lr=0.1, momentum=0.9)
    recipe = helpers.tiny_recipe(model=Embedding, optimizer=optimizer, epochs=2)
    train(recipe, name="whole", wandb="off")
    train(recipe, name="cut", wandb="off", max_steps=13)
    train(recipe, name="cut", wandb="off", resume=True)
    files = [Path("runs", name, "final.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        ((), ("data.validation=0.2",)),
        (("data.validation=0.2",), ()),
        (("data.validation=0.2",), ("data.validation=0.2", "seed=1")),
    ],
)
def test_the_validation_images_stay_those_that_the_run_began_with(
    begun: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best epoch is one of theirs; and of others the run may have trained on some."""
    few = ("data.source.count=100", "epochs=1")
    assert run(*few, *begun) == 0
    changed = ("epochs=2", "--resume-changed", "epochs,data.validation,seed")
    line = refused(capsys, few[0], *words, *changed)
    assert "the same validation images in every part of a run" in line
    assert "--init-from runs/mine" in line


def test_a_run_keeps_what_it_began_with_whatever_a_resume_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its checkpoint takes the place of other weights, which the header and run.json would name."""
    few = ("data.source.count=100", "epochs=1")

    def begun() -> Any:
        return json.loads((RUN / "run.json").read_text()).get("weights")

    assert run(*few) == 0
    shutil.copytree(RUN, "runs/other")
    more = ("data.source.count=100", "--resume-changed", "epochs")
    assert run(*more, "epochs=2", "--init-from", "other") == 0
    assert "from runs/other" not in capsys.readouterr().out
    assert begun() is None
    shutil.rmtree(RUN)
    assert run(*few, "--init-from", "other") == 0
    assert run(*more, "epochs=2") == 0
    assert begun() == "from runs/other/final.safetensors"
    shutil.rmtree(RUN / "checkpoints")  # as where it was killed before the first one
    (RUN / "final.safetensors").unlink()
    assert "which began with weights from runs/other" in refused(capsys, few[0], "epochs=2")
    assert run(few[0], "epochs=2", "--resume", "--init-from", "other") == 0


@pytest.mark.parametrize("word", ["data.validation=2/4", "optimizer.weight_decay=0.5", "epochs=1"])
def test_nobody_is_told_to_type_what_is_refused_then(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of two folds under one name: the second would go on with what the first has trained."""
    few = ("data.source.count=100", "epochs=2", "data.validation=1/4")
    assert run(*few) == 0
    line = refused(capsys, *few, word)
    assert ("--resume-changed" in line) == word.startswith("optimizer")
    if not word.startswith("optimizer"):
        assert "another --name" in line
