"""`launcher check`: verdict lines, a table, JSON, and exit code 0 or 2."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from tests.support.helpers import RECIPES

SIMPLECNN = str(RECIPES / "simplecnn.py")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["simplecnn", "pictures64", "resnet18"])
def test_a_good_recipe_shows_its_layers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(RECIPES / f"{name}.py")]) == 0
    output = capsys.readouterr().out
    assert "Conv2d" in output
    assert "\x1b" not in output
    assert "network     good" in output
    assert "functions   good" in output
    assert list(Path().iterdir()) == []


def test_the_numbers_are_those_of_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SIMPLECNN, "--json", "model.width=4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["good"]
    first, *_, last = report["layers"]
    assert (first["name"], first["kind"]) == ("layers.0", "Conv2d")
    assert first["made"] == [2, 4, 32, 32]
    assert first["parameters"] == 4 * 3 * 9 + 4
    assert first["flops"] == 2 * 4 * 3 * 9 * 32 * 32
    assert first["activations"] == 4 * 32 * 32 * 4
    assert last["flops"] == 2 * 8 * 8 * 8 * 10


def test_a_wrong_network_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SIMPLECNN, "model.classes=7"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "network     wrong     it ends in 7 scores for 10 classes" in lines
    assert lines[-2].strip() == "write layers.7 = nn.Linear(2048, 10)"


def test_what_a_run_would_refuse_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(SIMPLECNN).read_text().replace("epochs=10", "epochs=10, loss=wrong")
    Path("mine.py").write_text(f"def wrong(scores, labels):\n    return scores.sum()\n{source}")
    assert main(["check", "mine.py"]) == 2
    assert "recipe      wrong" in capsys.readouterr().out


def test_a_model_that_cannot_be_built_is_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SIMPLECNN, "model.width=-1"]) == 2
    output = capsys.readouterr().out
    assert "recipe      wrong" in output
    assert "cannot be built" in output


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "no recipe is named"),
        (["--jsn"], "unrecognized arguments: --jsn"),
        (["nowhere.py"], "no such file"),
        ([SIMPLECNN, "optimizer.lrr=1"], "did you mean optimizer.lr?"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert part in errors
