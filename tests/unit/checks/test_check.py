"""`launcher check`: verdict lines, a table, JSON, files, and exit code 0 or 2."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from launcher.checks.check import command
from launcher.checks.verdicts import Verdict, show
from launcher.cli import main
from tests.support.helpers import RECIPES, complaint

SIMPLECNN = str(RECIPES / "simplecnn.py")
OWN_IMAGES = """

from dataclasses import replace
from functools import partial
from launcher import Synthetic, cosine
from torch.optim.lr_scheduler import OneCycleLR

recipe = replace(
    recipe, data=replace(recipe.data, source=partial(Synthetic, count=640), fallback=None)
)
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_recipe(more: str = "", before: str = "") -> str:
    """SimpleCNN on embedded images, changed by code behind it and before it."""
    Path("mine.py").write_text(f"{before}\n{Path(SIMPLECNN).read_text()}{OWN_IMAGES}{more}\n")
    return "mine.py"


def report_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["check", "--json", *words]) in (0, 2)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def verdict_on(question: str, report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(v for v in report["verdicts"] if v["question"] == question)
    return found


@pytest.mark.parametrize("name", ["simplecnn", "pictures64"])
def test_a_good_recipe_shows_its_layers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(RECIPES / f"{name}.py")]) == 0
    output = capsys.readouterr().out
    assert output.count("Conv2d") == 2
    assert "\x1b" not in output
    assert "data        not asked " in output
    for question in ("network", "functions", "learning", "schedule", "cost"):
        assert f"{question:<12}good      " in output
    assert "of at most 60" in output.splitlines()[-1]
    assert list(Path().iterdir()) == []


def test_the_numbers_are_those_of_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, SIMPLECNN, "model.width=4")
    assert report["good"]
    first, *_, last = report["layers"]
    assert (first["name"], first["kind"]) == ("layers.0", "Conv2d")
    assert first["made"] == [2, 4, 32, 32]
    assert first["parameters"] == 4 * 3 * 9 + 4
    assert first["flops"] == 2 * 4 * 3 * 9 * 32 * 32
    assert first["activations"] == 4 * 32 * 32 * 4
    assert last["flops"] == 2 * 8 * 8 * 8 * 10


OTHERS = """
from torch.nn import functional

class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 3, 4, 4))
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = functional.conv2d(self.conv(self.conv(x)), self.weight, stride=4)
        x = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))

recipe = replace(recipe, model=Others)
"""


def test_work_and_parameters_are_counted_once_wherever_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a layer that is called twice, in a function, in attention."""
    report = report_of(capsys, write_recipe(OTHERS, "import torch"))
    conv = 2 * 3 * 3 * 9 * 32 * 32
    assert [layer["flops"] for layer in report["layers"]] == [conv, conv, 2 * 8 * 10]
    patches, embedded = 2 * 8 * 3 * 32 * 32, 2 * 64 * 8 * (4 * 8)
    attention = 2 * 2 * 64 * 64 * 8
    figures = verdict_on("network", report)["figures"]
    assert figures["flops"] == 2 * conv + patches + embedded + attention + 2 * 8 * 10
    assert figures["parameters"] == 81 + 8 * 3 * 16 + 4 * 64 + 90


def test_layers_that_find_their_size_themselves_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lazy = "nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)"
    made = f"def lazy():\n    return nn.Sequential({lazy})\n"
    path = write_recipe(f"{made}\nrecipe = replace(recipe, model=lazy)")
    report = report_of(capsys, path)
    assert report["good"], report
    assert len(report["layers"]) == 4


def test_a_wrong_network_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SIMPLECNN, "model.classes=7"]) == 2
    lines = capsys.readouterr().out.splitlines()
    said = "network     wrong     it ends in 7 scores for 10 classes ("
    assert any(line.startswith(said) and "simplecnn.py, line " in line for line in lines)
    assert lines[-2].strip() == "write layers.7 = nn.Linear(2048, 10)"


def test_what_a_run_would_refuse_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "def wrong(scores, labels):\n    return scores.sum()\n"
    report = report_of(capsys, write_recipe("recipe = replace(recipe, loss=wrong)", wrong))
    assert verdict_on("functions", report)["standing"] == "wrong"
    assert not report["good"]


def test_a_model_that_cannot_be_built_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verdict_on("network", report_of(capsys, SIMPLECNN, "model.width=-1"))
    assert verdict["standing"] == "wrong"
    assert "cannot be built" in verdict["answer"]


def test_the_recipes_own_images_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, write_recipe())
    assert verdict_on("data", report)["figures"]["train"] == [64] * 10
    assert verdict_on("schedule", report)["figures"]["steps"] == 10 * 10


def test_published_sets_are_counted_without_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict_on("schedule", report_of(capsys, SIMPLECNN))["figures"]["steps"] == 10 * 782


def test_test_images_have_their_place_beside_those_held_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def of_images(*words: str) -> int:
        memories = (
            v["figures"].get("images") for v in report_of(capsys, SIMPLECNN, *words)["verdicts"]
        )
        return next(filter(None, memories))

    assert of_images("data.validation=0.1") == of_images()


def test_labels_that_count_from_1_are_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    own = """
class FromOne(Synthetic):
    def __init__(self, root="", train=True, download=False):
        super().__init__(root, train, download, count=100)
        self.targets = self.targets + 1

recipe = replace(recipe, data=replace(recipe.data, source=FromOne, fallback=None))
"""
    path = write_recipe(own)
    assert main(["check", path]) == 2
    output = capsys.readouterr().out
    assert "labels from 1 to 10 in FromOne" in output
    assert "give it `targets - 1`" in output
    mended = Path(path).read_text().replace("self.targets + 1", "self.targets + 1 - 1")
    Path(path).write_text(mended)
    assert main(["check", path]) == 0


def test_images_of_unknown_shape_leave_the_rest_unasked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = "\nfrom launcher import Folder\nrecipe = replace(recipe, data=replace(recipe.data, "
    report = report_of(capsys, write_recipe(own + "source=Folder, fallback=None, root='no'))"))
    (verdict,) = report["verdicts"]
    assert verdict["standing"] == "not asked"


@pytest.mark.parametrize("slot", ["partial(cosine, warmup=0.25)", "partial(OneCycleLR, max_lr=1)"])
def test_the_schedule_is_drawn(slot: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write_recipe(f"recipe = replace(recipe, schedule={slot})")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("schedule"))
    assert "in 10 epochs of 10 steps" in lines[at]
    assert "highest at step" in lines[at]
    assert "█" in lines[at + 4]
    assert lines[at + 5].split() == ["step", "1", "100"]


def test_ranks_are_planned_and_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write_recipe(), "--world-size", "8"]) == 0
    output = capsys.readouterr().out
    assert "ranks       good      64 = 8 ranks x 8 images" in output
    assert "InfiniBand" in output
    assert main(["check", write_recipe(), "--world-size", "65"]) == 2
    assert "a global batch of 64 images over 65 ranks" in capsys.readouterr().out


def test_ranks_are_predicted_in_the_recipes_precision(capsys: pytest.CaptureFixture[str]) -> None:
    """After all that is asked in fp32: Accelerate has one precision at a time."""
    words = ("precision=bf16", "data.batch_size=16", "--world-size", "8", "--overfit")
    assert main(["check", write_recipe(), *words]) == 0
    assert "in bf16," in capsys.readouterr().out.partition("\noverfit ")[2]


def test_what_is_saved_is_what_was_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", write_recipe(), "--save", "found/here"]) == 0
    shown = capsys.readouterr().out
    text = Path("found/here/check.txt").read_text()
    assert text.strip() in shown
    assert "layers.7" in text
    with Image.open("found/here/samples.png") as image:
        assert image.size == (8 * 64, 6 * 64)


def test_a_place_that_is_no_folder_is_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = complaint(capsys, "check", write_recipe(), "--save", "mine.py/x")
    assert said.endswith(
        "is no folder in which one can write; expected a folder, or a path at "
        "which one can be made; name another one"
    )


def test_json_is_saved_as_text_too_and_knows_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    class_ = "class Endless(SimpleCNN):\n    def forward(self, x):\n"
    path = write_recipe(
        f"{class_}        return super().forward(x) / 0\nrecipe = replace(recipe, model=Endless)"
    )
    assert main(["check", path, "--json", "--save", "found"]) == 2

    def refuse(text: str) -> None:
        raise AssertionError(text)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert verdict_on("learning", report)["figures"]["first_loss"] is None
    assert "the first loss is nan" in Path("found/check.txt").read_text(encoding="utf-8")


def test_a_wrong_network_has_no_pictures_for_a_terminal_of_many_colours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Console(force_terminal=True, color_system="truecolor", width=100)
    monkeypatch.setattr(command, "make_console", lambda _: many)
    assert main(["check", write_recipe(), "model.classes=7", "--save", "found"]) == 2
    assert [path.name for path in Path("found").iterdir()] == ["check.txt"]
    assert capsys.readouterr().err == ""


def test_runs_that_no_folder_can_hold_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, write_recipe(), "--runs", "mine.py/runs")
    assert not report["good"]
    assert "mine.py is no folder in which one can write" in report["verdicts"][-1]["answer"]


def test_overfit_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, write_recipe(), "--overfit")
    assert verdict_on("overfit", report)["figures"]["accuracy"] > 0.9


def test_the_limit_is_kept_and_what_it_cut_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    slow = "\nimport time\n\ndef slow(fraction):\n    time.sleep(0.2)\n    return 1.0\n"
    path = write_recipe(f"{slow}\nrecipe = replace(recipe, schedule=slow)")
    report = report_of(capsys, path, "--limit", "3")
    assert report["limit"] == 3
    assert report["seconds"] < 4
    cut = [v["question"] for v in report["verdicts"] if v["standing"] == "not asked"]
    assert "network" in cut or "cost" in cut
    assert "--limit SECONDS" in report["verdicts"][-1]["answer"]


def test_several_processes_are_refused_by_one_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main(["check", SIMPLECNN]) == 2
    assert "--world-size 2" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["check", SIMPLECNN]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "no recipe is named"),
        (["--jsn"], "unrecognized arguments: --jsn"),
        (["nowhere.py"], "no such file"),
        ([SIMPLECNN, "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        ([SIMPLECNN, "--limit", "no"], "'no' is no number of seconds"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, "check", *words)


def test_a_network_that_the_recipe_compiles_is_asked_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hooks that look at its layers ended in the compiler's own words."""
    compiled = """
import torch
def compiled():
    return torch.compile(SimpleCNN(), backend="eager")
recipe = replace(recipe, model=compiled)
"""
    report = report_of(capsys, write_recipe(compiled))
    assert verdict_on("network", report)["standing"] == "good"


def test_a_long_answer_is_indented_on_a_terminal_and_one_line_in_a_file() -> None:
    verdict = Verdict("cost", "an epoch takes about 10.6 s " * 4, instead="type " + "word " * 20)
    for is_terminal, lines in ((True, 3), (False, 2)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=80, color_system=None)
        show(verdict, console)
        shown = file.getvalue().splitlines()
        assert len(shown) == lines
        assert all(line.startswith(" " * 22) for line in shown[1:])
        assert max(map(len, shown[:-1])) <= (80 if is_terminal else 140)


def test_a_network_that_needs_whole_passes_is_measured_on_those(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ghost BatchNorm: the trials of two images, and of others, failed."""
    grouped = """

class Grouped(SimpleCNN):
    def forward(self, images):
        if self.training and len(images) % 16:
            raise ValueError("not in groups of 16")
        return super().forward(images)


recipe = replace(recipe, model=Grouped)
"""
    recipe = write_recipe(grouped)
    report = report_of(capsys, recipe, "--world-size", "2")
    assert report["good"], report
    asked = {verdict["question"] for verdict in report["verdicts"]}
    assert {"learning", "cost", "ranks"} <= asked
