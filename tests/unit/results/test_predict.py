"""`launcher predict`: what a run says of pictures of any kind and size, in any number."""

import base64
import csv
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from launcher import load_run
from launcher.cli import main
from launcher.results import gallery, predictions
from tests.support.helpers import RECIPES, complaint
from tests.support.parsed import Parsed

CLASSES = ("disk", "ring", "square", "frame", "cross")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run called `own` has been trained, on embedded images."""
    folder = tmp_path_factory.mktemp("predict")
    recipe = str(RECIPES / "pictures64.py")
    few = ["data.fallback.count=60", "data.batch_size=20", "epochs=1", "data.root=nowhere"]
    words = [recipe, *few, "--wandb", "off", "--runs", str(folder / "runs"), "--name", "own"]
    assert main(words) == 0
    return folder


@pytest.fixture(autouse=True)
def pictures(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each class three pictures, of another mode and size each, and two that are none."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(trained / "runs")
    random = numpy.random.default_rng(0)
    for name in CLASSES:
        Path("photos", name).mkdir(parents=True)
        for number, mode in enumerate(("RGB", "L", "RGBA")):
            pixels = random.integers(0, 256, (70 + 9 * number, 90, 3), dtype=numpy.uint8)
            image = Image.fromarray(pixels).convert(mode)
            image.save(Path("photos", name, f"{number}.png"))
    Path("photos/disk/broken.png").write_bytes(b"no picture")
    Path("photos/disk/.hidden.png").write_bytes(b"no picture")
    Path("photos/disk/notes.txt").write_text("no picture")


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["predict", "own", "--json", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_probabilities_are_those_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "photos/ring/0.png", "photos/ring/2.png")
    run = load_run("runs/own")
    pictures: list[Any] = [row["file"] for row in rows]
    with torch.no_grad():
        shares = run.model(run.prepare(pictures)).softmax(1)
    for row, share in zip(rows, shares, strict=True):
        found = {best["class"]: best["probability"] for best in row["best"]}
        assert list(found) == [run.classes[i] for i in share.argsort(descending=True)]
        assert list(found.values()) == pytest.approx(sorted(share.tolist())[::-1], abs=1e-5)
        assert "truth" not in row  # a file that is named says nothing of its class


def test_a_folder_is_read_whole_and_its_names_are_the_truth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "BATCH", 4)  # several batches, the last of another size
    assert main(["predict", "own", "photos", "--csv", "out.csv"]) == 0
    printed = capsys.readouterr()
    assert "photos/disk/broken.png cannot be read as a picture" in printed.err
    lines = printed.out.splitlines()
    assert "15 pictures, 1 could not be read" in lines
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [
        f"photos/{name}/{number}.png" for name in sorted(CLASSES) for number in range(3)
    ]
    right = sum(row["truth"] == row["class1"] for row in rows)
    assert f"accuracy {right / 15:.2%} of 15 in a folder with the name of a class" in lines
    assert all(row["truth"] == Path(row["file"]).parent.name for row in rows)


@pytest.mark.parametrize("ending", ["gif", "tga", "jp2", "tif", "webp", "BMP"])
def test_pictures_of_other_formats_are_found(
    ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd").mkdir()
    Image.new("RGB", (30, 40), "red").save(f"odd/one.{ending}")
    assert [row["file"] for row in rows_of(capsys, "odd")] == [f"odd/one.{ending}"]


def test_patterns_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, "photos/*/1.png", "--weights", "final")
    assert len(rows) == 5
    assert {row["truth"] for row in rows} == set(CLASSES)


def test_scores_that_are_no_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lost"
    shutil.copytree("runs/own", folder)
    weights = load_file(folder / "best.safetensors")
    lost = {name: torch.full_like(tensor, math.nan) for name, tensor in weights.items()}
    save_file(lost, folder / "best.safetensors")
    line = complaint(capsys, "predict", str(folder), "photos/ring", "--json")
    assert "scores are not finite" in line


def test_names_are_no_markup_and_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("[red]\x1b[31m.png").write_bytes(Path("photos/disk/0.png").read_bytes())
    assert main(["predict", "own", "[[]red*"]) == 0
    output = capsys.readouterr().out
    assert "[red]?[31m.png  " in output


def test_only_broken_pictures_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "own", "photos/disk/broken.png"]) == 2
    printed = capsys.readouterr()
    assert "0 pictures, 1 could not be read" in printed.out
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["own"], "no run or no picture is named"),
        (["own", "nothing"], "in which no picture is found"),
        (["own", "photos/disk/notes"], "in which no picture is found"),
        (["other", "photos"], "there is own"),
        (["own", "photos", "--csv", "photos"], "expected a file that can be written"),
        (["own", "photos", "--html", "photos"], "which is not a page of launcher report"),
        (["own", "photos", "--weights", "first"], "invalid choice: 'first'"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in complaint(capsys, "predict", *words)


def page_of(*words: str) -> Parsed:
    assert main(["predict", "own", *words, "--html", "out/page.html"]) == 0
    return Parsed(Path("out/page.html").read_text(encoding="utf-8"))


def test_a_page_shows_the_pictures_with_their_best_classes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = page_of("photos")
    summary = capsys.readouterr().out.splitlines()[-4:]
    right = round(float(re.findall(r"accuracy (.*)%", " ".join(summary))[0]) * 15 / 100)
    assert f"{right / 15:.1%}".replace("%", " %") + " accuracy, of 15 in a folder" in page.words
    assert "1 could not be read" in page.words
    assert "photos/disk/broken.png" in page.words
    assert sum(images for _, _, images in page.data["matrix"]) == 15
    assert sum(n for truth, found, n in page.data["matrix"] if truth == found) == right
    pictures = page.data["pictures"]
    wrong = [truth != found for _, truth, found, *_ in pictures]
    assert wrong == sorted(wrong, reverse=True), "mistakes come first"
    sure = [share for _, truth, found, share, _ in pictures if truth != found]
    assert sure == sorted(sure, reverse=True)
    rest = [share for _, truth, found, share, _ in pictures if truth == found]
    assert rest == sorted(rest)
    cards = [a for tag, a in page.elements if tag == "figure"]
    assert len(cards) == 15
    assert sorted(os.listdir("out")) == ["page.html", "plotly.min.js"]
    run = load_run("runs/own")
    with torch.no_grad():
        shares = run.model(run.prepare([Path(row[0]) for row in pictures])).softmax(1)
    for (_, truth, found, share, of_truth), row in zip(pictures, shares, strict=True):
        assert (share, of_truth) == (
            pytest.approx(float(row[found]), abs=1e-4),
            pytest.approx(float(row[truth]), abs=1e-4),
        )


def test_a_picture_of_the_page_is_the_file_s_own() -> None:
    for name, colour in (("red", (200, 30, 30)), ("blue", (20, 40, 220))):
        Image.new("RGB", (300, 200), colour).save(f"{name}.jpg")
    page = page_of("red.jpg", "blue.jpg")
    assert "is not known here" in page.words
    assert page.data["matrix"] == []
    assert os.listdir("out") == ["page.html"], "no chart, no script"
    style = Path("out/page.html").read_text()
    uri = re.findall(r"url\(data:image/webp;base64,([^)]*)\)", style)[0]
    whole = Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")
    for number, (file, *_) in enumerate(page.data["pictures"]):
        pixel = whole.getpixel((48 + 96 * number, 48))
        assert isinstance(pixel, tuple)
        assert (pixel[0] > 150) == (file == "red.jpg")


def test_a_page_keeps_some_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MOST", 2)
    monkeypatch.setattr(predictions, "MOST_NAMED", 1)
    Path("photos/ring/broken.png").write_bytes(b"no picture")
    whole = page_of("photos").data
    assert len(whole["pictures"]) <= 4
    assert sum(images for _, _, images in whole["matrix"]) == 15
    text = Path("out/page.html").read_text()
    assert "and 1 more" in text


def test_names_are_text_on_the_page() -> None:
    name = "<script>alert(1)<b>.png"
    Path(name).write_bytes(Path("photos/disk/0.png").read_bytes())
    page = page_of(name)
    assert [tag for tag, _ in page.elements].count("script") == len(page.scripts) == 2
    assert name in page.words


def test_what_is_no_file_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("photos/disk/\x1bpipe.png")
    assert main(["predict", "own", "photos/disk"]) == 0
    errors = capsys.readouterr().err
    assert "photos/disk/?pipe.png cannot be read as a picture (it is no file)" in errors


def test_a_truecolor_terminal_shows_the_first_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["predict", "own", "photos/disk/0.png"]) == 0
    output = capsys.readouterr().out
    assert output.count("▀") > 100
    assert "photos/disk/0.png  " in output
    first = output.partition("photos")[0]
    with Image.open("photos/disk/0.png") as picture:  # as a camera that was held upside down
        turned = picture.transpose(Image.Transpose.ROTATE_180)
        exif = turned.getexif()
        exif[ExifTags.Base.Orientation] = 3
        turned.save("turned.png", exif=exif)
    assert main(["predict", "own", "turned.png"]) == 0
    assert capsys.readouterr().out.partition("turned")[0] == first


def test_a_table_is_written_over_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """Which a pattern of the shell puts behind --csv."""
    pictures = sorted(map(str, Path("photos").rglob("*.png")))
    before = Path(pictures[0]).read_bytes()
    said = complaint(capsys, "predict", "own", "--csv", *pictures)
    assert f"--csv {pictures[0]}, which is there and no table" in said
    assert Path(pictures[0]).read_bytes() == before
    for _ in range(2):
        assert main(["predict", "own", pictures[0], "--csv", "out.csv"]) == 0


def test_a_name_that_is_no_utf_8_is_in_the_table(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    os.rename("plain.png", os.fsdecode(b"\xff.png"))
    assert main(["predict", "own", os.fsdecode(b"\xff.png"), "--csv", "out.csv"]) == 0
    assert "\\udcff.png,," in Path("out.csv").read_text(encoding="utf-8")


def test_a_disk_that_is_full_is_answered_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "predict", "own", "photos/disk/0.png", "--csv", "/dev/full")
    assert "--csv /dev/full (No space left on device)" in said
