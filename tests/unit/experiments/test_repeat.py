"""Repeats are ordinary runs of several seeds; together they are resumed, and summed up."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.config.loader import LoadedRecipe, load
from launcher.experiments import repeat
from launcher.results.statistics import quantile, summary
from launcher.utils.arguments import parse_seeds
from tests.support.helpers import complaint, refused, tiny_recipe, without_compiler

TINY = """
from dataclasses import replace
from tests.support.helpers import tiny_recipe

recipe = tiny_recipe(epochs=2, data={"batch_size": 20})
"""


BAD = """
import torch
from tests.support.helpers import Tiny

class Bad(Tiny):
    def __init__(self):
        super().__init__()
        self.is_bad = torch.initial_seed() == 0  # of the recipe

    def forward(self, images):
        scores = super().forward(images)
        return scores * float("inf") if self.is_bad and self.training else scores
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(TINY)
    return "tiny.py"


def repeated(*words: str) -> int:
    return main(["repeat", *words, "--wandb", "off", "--no-report"])


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", (0, 1, 2, 3)), ("7", (7,)), ("0-1,5, 9", (0, 1, 5, 9))]
)
def test_seeds_are_typed_as_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "-1", "0-99999", "1,1", "0-3,2", "1.5", f"{2**64}", "٣"]
)
def test_what_are_no_seeds_is_refused(text: str) -> None:
    with refused("--seeds", "--seeds 0-4"):
        parse_seeds(text)


def test_each_seed_is_an_ordinary_run_and_what_has_ended_is_left_alone(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeated(recipe, "--seeds", "0,3", "data.validation=0.2") == 0
    said = capsys.readouterr().out
    assert "run 2 of 2: runs/tiny-seed3" in said
    assert "n=2" in said
    words = (recipe, "seed=3", "data.validation=0.2", "--name", "own", "--wandb", "off")
    assert main([*words, "--no-report"]) == 0
    weights = [load_file(f"runs/{name}/final.safetensors") for name in ("tiny-seed3", "own")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    times = Path("runs/tiny-seed0/final.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert repeated(recipe, "--seeds", "0,3", "data.validation=0.2") == 0
    assert capsys.readouterr().out.count("has ended already") == 2
    assert Path("runs/tiny-seed0/final.safetensors").stat().st_mtime_ns == times


def test_what_has_chosen_for_itself_has_ended_as_well(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    words = ("--seeds", "0-1", "accumulate=auto", "compile=true")
    with without_compiler():  # so it is eager
        assert repeated(recipe, *words) == 0
    assert "eager: torch.compile fails here" in " ".join(capsys.readouterr().out.split())
    assert repeated(recipe, *words) == 0
    assert capsys.readouterr().out.count("has ended already") == 2


def test_what_was_interrupted_goes_on(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeated(recipe, "--seeds", "0-1", "--name", "whole") == 0
    assert repeated(recipe, "--seeds", "0-1", "--name", "cut", "--max-steps", "3") == 0
    assert repeated(recipe, "--seeds", "0-1", "--name", "cut") == 0
    assert "resumed after step 3" in capsys.readouterr().out
    for seed in (0, 1):
        paths = [Path(f"runs/{name}-seed{seed}/final.safetensors") for name in ("whole", "cut")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_table_is_for_machines_as_well(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeated(recipe, "--seeds", "0-2") == 0
    capsys.readouterr()
    assert repeated(recipe, "--seeds", "0-4", "--table", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    figure = found["summary"]["test accuracy, last epoch"]
    values = [run["test accuracy, last epoch"] for run in found["runs"]]
    assert figure["mean"] == pytest.approx(sum(values) / 3)
    assert figure["n"] == 3
    assert "test accuracy, best epoch (chosen on the test images)" in found["summary"]
    assert repeated(recipe, "--seeds", "0-2", "--table") == 0
    said = capsys.readouterr().out
    assert "best seed" in said
    assert "chosen on the test images" in " ".join(said.split())


def test_a_run_that_fails_does_not_keep_the_others_from_beginning(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(recipe).write_text(BAD + TINY.replace("epochs=2", "epochs=2, model=Bad"))
    assert repeated(recipe, "--seeds", "0-1") == 1
    ended = capsys.readouterr()
    assert "launcher: tiny-seed0: the loss is not finite" in ended.err
    assert "run 2 of 2" in ended.out
    assert "1 of 2 runs have ended" in ended.out


def test_two_recipes_are_compared(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wide.py").write_text(TINY + "recipe = replace(recipe, epochs=3)\n")
    assert repeated(recipe, "wide.py", "--seeds", "0-1", "--name", "two") == 0
    said = capsys.readouterr().out
    assert "run 4 of 4: runs/two-wide-seed1" in said
    assert "n=2 and 2" in said


def test_runs_of_other_settings_have_no_mean(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeated(recipe, "--seeds", "0", "--name", "mix") == 0
    assert repeated(recipe, "epochs=1", "--seeds", "1", "--name", "mix") == 0
    capsys.readouterr()
    words = (recipe, "--seeds", "0-1", "--name", "mix", "--table")
    assert repeated(*words) == 0
    said = capsys.readouterr().out
    assert "no mean: these runs differ in epochs; see launcher compare" in said
    assert "n=2" not in said
    assert repeated(*words, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["differ_in"], found["summary"]) == (["epochs"], {})


def test_runs_of_other_images_are_other_experiments(tmp_path: Path) -> None:
    """But not those that chose for themselves whether to compile."""
    loaded = LoadedRecipe(tiny_recipe(compile=True), "tiny", "", "")
    runs = [RunFiles(tmp_path / str(seed)) for seed in range(2)]

    def found(first: dict[str, str], second: dict[str, str], compile: bool) -> list[str]:
        for run, about, own in zip(runs, (first, second), (True, compile), strict=True):
            run.path.mkdir(exist_ok=True)
            (run.path / "run.json").write_text(json.dumps(about))
            (run.path / "config.json").write_text(json.dumps({"compile": own, "epochs": 1}))
            (run.path / "end.json").write_text('{"exit_code": 0}')
        return repeat.differences([RunFiles(run.path) for run in runs], loaded)

    assert found({"data_digest": "a"}, {"data_digest": "a"}, compile=False) == []
    assert found({"data_digest": "a"}, {"data_digest": "b"}, compile=True) == ["the images"]
    assert found({}, {"fallback": "NOT THE REAL DATA"}, compile=True) == ["the images"]


def test_a_run_of_stand_ins_has_not_ended_once_its_images_are_there(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace(
        "from dataclasses", "from launcher import Folder, Synthetic\nfrom dataclasses"
    )
    own = '"batch_size": 1, "source": Folder, "fallback": Synthetic'
    Path(recipe).write_text(text.replace('"batch_size": 20', own).replace("epochs=2", "epochs=1"))
    words = (recipe, "data.fallback.count=20", "data.fallback.classes=2", "model.classes=2")
    assert repeated(*words, "--seeds", "0") == 0
    capsys.readouterr()
    assert repeated(*words, "--seeds", "0") == 0
    assert "has ended already" in capsys.readouterr().out
    for half in ("train", "test"):
        for kind in ("cat", "dog"):
            Path("data", half, kind).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(Path("data", half, kind, "a.png"))
    assert "but the run began with" in complaint(
        capsys, "repeat", *words, "--seeds", "0", "--wandb", "off", "--no-report"
    )


def test_what_has_ended_on_other_images_than_there_are_now_says_so(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "from launcher import Folder\nfrom dataclasses"
    text = TINY.replace("from dataclasses", folder).replace("20}", '1, "source": Folder}')
    Path(recipe).write_text(text.replace("epochs=2", "epochs=1"))
    for half in ("train", "test"):
        for number, kind in enumerate(("cat", "dog")):
            Path("data", half, kind).mkdir(parents=True)
            picture = Image.new("RGB", (32, 32), (100 * number,) * 3)
            picture.save(Path("data", half, kind, "a.png"))
    words = (recipe, "model.classes=2", "--seeds", "0-1")
    assert repeated(*words) == 0
    capsys.readouterr()
    assert repeated(*words) == 0
    assert capsys.readouterr().out.count("has ended already\n") == 2
    picture.save(Path("data", "test", "dog", "b.png"))
    assert repeated(*words) == 0
    said = capsys.readouterr().out
    assert said.count("has ended already; trained anew, it would differ in the images\n") == 2
    assert "trained anew, these runs would differ in the images\n" in said
    assert repeated(*words, "--table") == 0
    assert "the images" not in capsys.readouterr().out  # nobody has looked
    picture.save(Path("data", "test", "cow.png"))  # damaged: concerns runs that are to be made
    assert repeated(*words) == 0


def test_what_was_changed_on_the_way_is_no_repeat(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repeated(recipe, "--seeds", "0") == 0
    words = ("epochs=3", "--seeds", "0-1", "--resume-changed", "epochs")
    assert repeated(recipe, *words) == 0
    said = capsys.readouterr().out
    assert "no mean: these runs differ in what was changed on the way; see launcher compare" in said
    assert "would differ in what was changed on the way (after 2 epochs: epochs (2 -> 3))" in said


def test_a_single_seed_is_no_repeat(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seeds 0-4" in complaint(capsys, "repeat", recipe, "seed=3")


def test_two_recipes_of_one_name_are_refused(recipe: str) -> None:
    loaded = load(Path(recipe))
    from launcher.config.options import RunOptions

    with refused("two recipes that are called tiny"):
        repeat.plan([loaded, loaded], (0,), RunOptions())


@pytest.mark.parametrize("option", ["--smoke", "--profile", "--dry-run"])
def test_what_is_no_run_is_not_repeated(
    option: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option in complaint(capsys, "repeat", recipe, option)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (100, 1.9840)]
)
def test_the_interval_is_students(freedom: int, t: float) -> None:
    """Against a table of the distribution."""
    assert quantile(0.95, freedom) == pytest.approx(t, abs=1e-4)


def test_one_value_has_no_interval() -> None:
    assert summary([0.5]).std is None
    found = summary([0.4, 0.6])
    assert (found.n, found.mean) == (2, 0.5)
    assert found.high == pytest.approx(0.5 + 12.7062 * math.sqrt(0.02) / math.sqrt(2), abs=1e-4)


def test_what_was_cut_by_max_steps_has_not_ended(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in its last epoch, of which there is a line then."""
    assert repeated(recipe, "epochs=1", "--seeds", "0", "--max-steps", "1") == 0
    assert "these runs would differ in their length" in capsys.readouterr().out
    assert repeated(recipe, "epochs=1", "--seeds", "0") == 0
    said = capsys.readouterr().out
    assert "resumed after step 1" in said
    assert "has ended already" not in said
    assert "trained anew" not in said


def test_runs_of_another_file_that_the_recipe_imports_are_told(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own_width.py").write_text("WIDTH = 20\n")
    Path(recipe).write_text("from own_width import WIDTH\n" + TINY.replace("20}", "WIDTH}"))
    assert repeated(recipe, "--seeds", "0-1", "--max-steps", "4") == 0
    assert repeated(recipe, "--seeds", "0") == 0
    Path("own_width.py").write_text("WIDTH = 20  # as before\n")
    capsys.readouterr()
    assert repeated(recipe, "--seeds", "0-1") == 0
    said = capsys.readouterr().out
    assert "has ended already; trained anew, it would differ in own_width.py\n" in said
    assert "own_width.py has changed since: what is no setting may differ" in said
    differ = "what the recipe imports, what was changed on the way"
    assert f"no mean: these runs differ in {differ}; see" in said
    assert main(["compare", "tiny-seed0", "tiny-seed1"]) == 0
    assert "own_width.py (SHA-256)" in " ".join(capsys.readouterr().out.split())


def test_runs_of_another_recipe_than_the_present_one_are_told(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that have ended are left alone, and their figures pass for those of no other code."""
    assert repeated(recipe, "--seeds", "0-1") == 0
    Path(recipe).write_text(TINY + "# another network, say\n")
    capsys.readouterr()
    assert repeated(recipe, "--seeds", "0-1") == 0
    said = capsys.readouterr().out
    assert said.count("already; trained anew, it would differ in the recipe file") == 2
    Path(recipe).write_text(TINY.replace("epochs=2", "epochs=3"))
    for words in ((), ("--json",)):
        assert repeated(recipe, "--seeds", "0-1", "--table", *words) == 0
        assert "epochs (2 -> 3)" in capsys.readouterr().out


def test_what_has_ended_did_not_begin_with_the_weights_that_are_named_now(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (recipe, "--seeds", "0")
    assert repeated(*words, "--name", "first") == 0
    tuned = (*words, "--name", "tuned", "--init-from", "first-seed0")
    assert repeated(*tuned) == 0
    capsys.readouterr()
    assert repeated(*tuned) == 0
    assert "has ended already\n" in capsys.readouterr().out
    assert repeated(*words, "--name", "first", "--init-from", "tuned-seed0") == 0
    assert "trained anew, it would differ in the first weights" in capsys.readouterr().out
    first = Path("runs/first-seed0/final.safetensors")  # which is trained on, say
    first.write_bytes(Path("runs/tuned-seed0/final.safetensors").read_bytes())
    assert repeated(recipe, "--seeds", "0-1", *tuned[3:]) == 0
    said = capsys.readouterr().out
    assert "trained anew, it would differ in the first weights" in said
    assert "no mean: these runs differ in the first weights" in said
    assert "--init-from nowhere" in complaint(
        capsys, "repeat", *words, "--name", "first", "--init-from", "nowhere"
    )


def test_a_line_without_its_seconds_is_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    rows = [{"epoch": 1, "test/accuracy": 0.5, "seconds": value} for value in (2.5, None, "x")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert repeat.seconds_of(RunFiles(tmp_path)) == 2.5
