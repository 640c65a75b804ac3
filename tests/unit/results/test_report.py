"""`launcher report`: one page of each run, whatever the folder holds and however things are named.

What a browser does with a page is tested in tests/integration/test_report_page.py.
"""

import base64
import io
import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.numpy import save_file

from launcher.checkpoint.outcomes import Outcomes
from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.results import html, report
from launcher.results.figures import first_filters, reliability
from launcher.results.html import percent
from launcher.results.page import Page
from launcher.results.sprites import sheet
from tests.support.parsed import Parsed
from tests.support.reported import HOSTILE, IMAGES, outcomes_of, write_reported


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page_of(path: Path) -> Parsed:
    assert main(["report", str(path)]) == 0
    return Parsed((path / "report" / "index.html").read_text(encoding="utf-8"))


def test_the_page_says_what_was_trained_and_what_came_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_reported(Path("runs"))
    page = page_of(path)
    assert capsys.readouterr().out == "runs/own/report/index.html\n"
    for words in (
        "own: <i>The first line</i> of its docstring.",
        "50.0\xa0% test accuracy of epoch 2",
        "2 of 2 epochs",
        "one run (n = 1)",
        "chosen by looking at the test images",
        "devices 1 x CPU",
        "versions torch 2.11",
        "time 3 min 0 s in 2 epochs",
        "began 2026-01-02 03:04:05",
        "ended 2026-01-02 03:14:05",
        "done, exit code 0",
        "The worst mistakes",
        "What is taken for what",
        "Accuracy of each class",
        "The same images over the epochs",
        "Calibration",
        "The most certain right answers",
        "The weights of layers.2.weight",
        "optimizer.call torch.optim:<SGD>",
        '"""<i>The first line</i>."""',
    ):
        assert words.replace("\xa0", " ") in page.words, words
    assert "What is missing" not in page.words
    data = page.data
    assert data["curves"]["evaluated_loss"] == [1.5, 0.75]
    assert data["curves"]["accuracy_tta"] == [None, None]
    assert data["epochs"] == [1, 2]
    assert sum(images for _, _, images in data["matrix"]) == IMAGES
    assert data["samples"]["epochs"] == [1, 2]
    assert data["samples"]["best"][1][0] == [[0, 750], [1, 125]]
    assert data["samples"]["truth"] == [0, 1, 2, 0]
    assert sorted(os.listdir(path / "report")) == ["index.html", "plotly.min.js"]


def test_mistakes_come_by_their_loss_with_both_probabilities() -> None:
    path = write_reported(Path("runs"), files=[f"cat/{n}.png" for n in range(IMAGES)])
    outcomes = outcomes_of(3)
    place = int(outcomes.mistakes[0])
    (first, *_), names = Page(RunFiles(path)).worst, ("cat", "dog", "frog")
    assert first.name == f"cat/{place}.png"
    assert (first.truth, first.predicted) == (names[place % 3], names[(place + 1) % 3])
    assert first.probability == percent(float(outcomes.probability[place]))
    assert first.probability_of_truth == percent(float(outcomes.probability_of_truth[place]))
    assert first.loss == f"{max(outcomes.loss[outcomes.truth != outcomes.predicted]):.2f}"
    assert first.picture is not None
    sure = Page(RunFiles(path)).surest[0]
    assert sure.is_right
    right = outcomes.truth == outcomes.predicted
    assert sure.probability == percent(float(max(outcomes.probability[right])))


def test_the_page_asks_nothing_of_another_machine() -> None:
    path = write_reported(Path("runs"))
    page = page_of(path)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            address = attributes.get(name) or ""
            assert not address or address == "plotly.min.js" or address.startswith("data:"), tag
    style = (path / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!data:)", style)
    policy = [a for t, a in page.elements if t == "meta" and "Content-Security" in str(a)]
    assert "default-src 'none'" in str(policy)


def test_names_are_text_wherever_they_stand() -> None:
    path = write_reported(Path("runs"), "<img src=x>", HOSTILE, files=HOSTILE)
    page = page_of(path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == len(page.scripts) + 1 == 3  # data, plotly, the page's own
    assert not {"img", "a", "i", "br"} & {t for t, a in page.elements if "style" not in a}
    assert not page.comments
    assert page.data["classes"] == list(HOSTILE)
    assert set(page.data["samples"]["names"]) <= set(HOSTILE)
    assert "<" not in page.scripts[0]
    for name in HOSTILE:
        assert " ".join(name.split()) in page.words
    handlers = [name for _, attributes in page.elements for name in attributes if name[:2] == "on"]
    assert not handlers


@pytest.mark.parametrize("what", ["nothing", "described"])
def test_a_run_that_stopped_in_its_first_epoch(what: str) -> None:
    path = write_reported(Path("runs"))
    kept = ("run.json", "config.json") if what == "described" else ("run.json",)
    for file in path.iterdir():
        if file.name not in kept:
            file.unlink()
    if what == "nothing":
        (path / "run.json").write_text("{}")
    page = page_of(path)
    assert "no epoch has ended" in page.words
    assert "there is no best.npz" in page.words
    assert "state failed" in page.words
    assert ("run.json cannot be read" in page.words) == (what == "nothing")
    assert page.data["epochs"] == page.data["matrix"] == page.data["bins"] == []
    assert "What is taken for what" not in page.words


def test_a_run_that_goes_on() -> None:
    path = write_reported(Path("runs"))
    for name in ("metrics.jsonl", "best.npz", "last.npz", "details.jsonl", "end.json"):
        (path / name).unlink()
    with FileLock(path / ".lock"):
        page = page_of(path)
    assert "no epoch has ended yet" in page.words
    assert "state running" in page.words


def test_what_is_damaged_is_said_and_the_rest_shown() -> None:
    path = write_reported(Path("runs"), figures={"test/loss": None})
    (path / "best.npz").write_bytes(b"PK damaged")
    (path / "config.json").write_text("[1]")
    (path / "best.safetensors").write_bytes(b"\xff" * 100)
    (path / "details.jsonl").write_text('{"epoch": 1, "samples": 3}\n{"epoch": 2, "samp')
    about = json.loads((path / "run.json").read_text())
    changed = {"classes": 3, "samples": ["x"], "versions": [], "started": "?", "image_shape": 1}
    (path / "run.json").write_text(json.dumps({**about, **changed}))
    page = page_of(path)
    for words in (
        "best.npz cannot be read: what follows is of the last epoch",
        "config.json cannot be read",
        "The test loss is not a finite number in epochs 1, 2.",
        "details.jsonl has no whole line",
        "class 2",
    ):
        assert words in page.words
    assert page.data["curves"]["evaluated_loss"] == [None, None]
    assert "The first filters" not in page.words
    (path / "last.npz").unlink()
    assert "best.npz cannot be read: there are no mistakes" in page_of(path).words


def test_without_outcomes_the_matrix_is_that_of_the_best_epoch() -> None:
    path = write_reported(Path("runs"))
    for name in ("best.npz", "last.npz"):
        (path / name).unlink()
    page = page_of(path)
    assert page.data["matrix"] == [[0, 0, 3], [0, 1, 2]]
    assert "cat taken for dog : 2 of 5" in page.words
    (path / "details.jsonl").write_text('{"epoch": 2, "confusion": [[0, 0, "x"]], "samples": []}')
    assert page_of(path).data["matrix"] == []


def test_probabilities_that_are_no_numbers() -> None:
    path = write_reported(Path("runs"))
    nothing = numpy.full(IMAGES, numpy.nan, numpy.float32)
    values = {**vars(outcomes_of(3)), "probability": nothing, "loss": nothing}
    Outcomes(**values).write(path / "best.npz")
    page = page_of(path)
    assert page.data["bins"] == []
    assert page.data["pictures"][0][3] is None
    assert "unknown" in page.words


@pytest.mark.parametrize("number", [2, 100, 1000, 3000])
def test_any_number_of_classes(number: int) -> None:
    path = write_reported(Path("runs"), classes=[f"class <{n}>" for n in range(number)])
    outcomes_of(number, images=6000, size=8).write(path / "best.npz")
    page = page_of(path)
    assert (path / "report" / "index.html").stat().st_size < 2_000_000
    assert (page.data["matrix"] == []) == (number == 3000)
    rows = [attributes for _, attributes in page.elements if attributes.get("class") == "class"]
    assert len(rows) == min(number, 1000)
    assert ("The 1000 lowest of 3000 classes" in page.words) == (number == 3000)


def test_a_page_of_cifar10_is_small_and_made_soon_without_torch() -> None:
    path = write_reported(Path("runs"), classes=[f"class {n}" for n in range(10)], epochs=200)
    # Noise, which no format makes smaller: the largest page.
    outcomes_of(10, images=10_000, size=32).write(path / "best.npz")
    code = (
        "import sys; from launcher.cli import main; code = main(['report', 'own']);"
        "assert not {'torch', 'wandb', 'accelerate', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert (path / "report" / "index.html").stat().st_size < 2_000_000
    assert len(Page(RunFiles(path)).samples["epochs"]) == 100


# Figures


def test_calibration_as_counted_by_hand() -> None:
    outcomes = outcomes_of(2, images=4)
    values = {
        "truth": numpy.array([0, 0, 0, 0], numpy.int32),
        "predicted": numpy.array([0, 1, 0, 0], numpy.int32),
        "probability": numpy.array([0.61, 0.63, 0.97, 1.0], numpy.float32),
    }
    bins, error = reliability(Outcomes(**{**vars(outcomes), **values}))
    assert [b.images for b in bins] == [2, 2]  # of [0.6, 0.667) and [0.933, 1]
    assert bins[0].accuracy == 0.5
    assert bins[0].probability == pytest.approx(0.62)
    assert error == pytest.approx((2 * abs(0.5 - 0.62) + 2 * abs(1 - 0.985)) / 4)


def test_filters_are_those_of_the_first_convolution() -> None:
    weights = numpy.zeros((4, 3, 2, 2), numpy.float32)
    weights[1, 0, 0, 0], weights[1, 2, 1, 1] = -3.0, 1.0
    tensors = {
        "layers.10.weight": numpy.ones((8, 3, 3, 3), numpy.float32),
        "layers.9.weight": weights,
        "layers.0.weight": numpy.ones((5, 3, 1, 1), numpy.float32),  # no picture: one pixel
        "grey.weight": numpy.ones((8, 1, 3, 3), numpy.float32),
    }
    save_file(tensors, "weights")
    found = first_filters(Path("weights"), 3)
    assert found is not None
    assert (found.name, found.count, found.pictures.shape) == ("layers.9.weight", 4, (4, 2, 2, 3))
    assert found.pictures[1, 0, 0, 0] == 0
    assert found.pictures[1, 1, 1, 2] == 255
    assert found.pictures[1, 0, 1, 0] == round(255 * 3 / 4)
    assert not found.pictures[0].any()
    grey = first_filters(Path("weights"), 1)
    assert grey is not None
    assert grey.name == "grey.weight"
    save_file({"linear.weight": numpy.ones((4, 3), numpy.float32)}, "weights")
    assert first_filters(Path("weights"), 3) is None
    assert first_filters(Path("absent"), None) is None


@pytest.mark.timeout(20)
def test_weights_that_are_a_pipe_are_not_waited_for() -> None:
    os.mkfifo("weights")
    assert first_filters(Path("weights"), 3) is None


@pytest.mark.parametrize("shape", [(7, 5, 9, 3), (3, 5, 9, 4), (1, 4, 4, 1), (6, 8, 8, 2)])
def test_a_sheet_holds_every_picture_as_it_is(shape: tuple[int, ...]) -> None:
    pictures = numpy.random.default_rng(1).integers(0, 256, shape).astype(numpy.uint8)
    found = sheet(pictures, shown=max(shape[1:3]))  # so that places on the page are pixels
    content = base64.b64decode(found.uri.partition(",")[2])
    whole = numpy.array(Image.open(io.BytesIO(content)).convert("RGB"))
    for number, picture in enumerate(pictures):
        left, top = (-int(part.removesuffix("px")) for part in found.position(number).split())
        cut = whole[top : top + shape[1], left : left + shape[2]]
        expected = picture[..., :3] if shape[3] in (3, 4) else picture[..., :1].repeat(3, axis=2)
        assert numpy.array_equal(cut, expected), number


def test_shares_are_not_rounded_to_all_or_nothing() -> None:
    shares = (None, float("nan"), 0.0, 0.0004, 0.615, 0.9996, 1.0)
    expected = ["unknown", "unknown", "0.0 %", "< 0.1 %", "61.5 %", "> 99.9 %", "100.0 %"]
    assert [percent(share).replace("\xa0", " ") for share in shares] == expected


# Where pages go


def test_several_runs_in_one_folder_have_one_script_and_a_list() -> None:
    write_reported(Path("runs"), "index")
    write_reported(Path("runs"), "100% <b>")
    write_reported(Path("other"), "100% <b>")
    names = ["index", "100% <b>", "other/100% <b>"]
    assert main(["report", *names, "--output", "out"]) == 0
    assert sorted(os.listdir("out")) == [
        *("100% <b>-2.html", "100% <b>.html", "index-2.html", "index.html", "plotly.min.js"),
    ]
    page = Parsed(Path("out/index.html").read_text())
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["index-2.html", "100%25%20%3Cb%3E.html", "100%25%20%3Cb%3E-2.html"]
    assert "100% <b>" in page.words
    assert not any(tag == "b" for tag, _ in page.elements)
    assert main(["report", "index", "--output", "one"]) == 0
    assert sorted(os.listdir("one")) == ["index.html", "plotly.min.js"]


def test_it_is_opened_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    write_reported(Path("runs"))
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", "own"]) == 0
    assert opened == []
    assert main(["report", "own", "--open"]) == 0
    assert opened == [Path("runs/own/report/index.html").absolute().as_uri()]


def test_nothing_of_others_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_reported(Path("runs"))
    Path("site").mkdir()
    Path("site/index.html").write_text("<h1>mine</h1>")
    Path("link").symlink_to("site")
    Path("file").touch()
    Path("folder/index.html").mkdir(parents=True)
    for output in ("site", "link", "file", "folder"):
        assert main(["report", "own", "--output", output]) == 2
        assert f"{output}/index.html" in capsys.readouterr().err
    assert Path("site/index.html").read_text() == "<h1>mine</h1>"
    assert main(["report", "own"]) == main(["report", "own"]) == 0  # its own it does replace
    (path / "report/plotly.min.js").unlink()
    (path / "report/plotly.min.js").mkdir()
    capsys.readouterr()
    assert main(["report", "own"]) == 2
    assert "plotly.min.js, which cannot be written" in capsys.readouterr().err


def test_where_there_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    for words, part in (([], "no run is named"), (["absent"], "absent, which is no run folder")):
        assert main(["report", *words]) == 2
        assert part in capsys.readouterr().err


# --watch


def test_a_watched_page_is_renewed_until_the_run_has_ended(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    path = folder / write_reported(Path("runs"), epochs=1)
    page = path / "report" / "index.html"
    monkeypatch.setattr(report, "SECONDS", 0.05)
    end = (path / "end.json").read_text()
    (path / "end.json").unlink()
    codes: list[int] = []
    with FileLock(path / ".lock"):
        watching = threading.Thread(target=lambda: codes.append(main(["report", "own", "--watch"])))
        watching.start()
        wait_for(lambda: page.exists() and "const reloadSeconds = 0.05" in page.read_text())
        row = (path / "metrics.jsonl").read_text().replace('"epoch": 1', '"epoch": 2')
        with (path / "metrics.jsonl").open("a") as file:
            file.write(row)
        wait_for(lambda: Parsed(page.read_text()).data["epochs"] == [1, 2])
        assert watching.is_alive()
        (path / "end.json").write_text(end)
    watching.join(20)
    assert codes == [0]
    assert "const reloadSeconds = 0;" in page.read_text()
    assert "done, exit code 0" in Parsed(page.read_text()).words


def test_an_ended_run_is_not_watched_and_ctrl_c_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reported(Path("runs"))
    assert main(["report", "own", "--watch"]) == 0

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with FileLock(path / ".lock"):
        assert main(["report", "own", "--watch"]) == 0
    assert capsys.readouterr().err == ""


def wait_for(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(400):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError("it did not come in 20 s")


def test_the_number_in_the_fullest_cell_of_the_matrix_is_read_in_both_themes() -> None:
    """Plotly writes it white or grey; on the bright blue of dark mode it chose grey."""
    css = (Path(html.__file__).parent / "templates" / "report.css").read_text()
    colours = re.findall(r"--cell: #(\w\w)(\w\w)(\w\w)", css)
    assert len(colours) == 3
    for colour in colours:
        parts = [int(part, 16) / 255 for part in colour]
        red, green, blue = (p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert 1.05 / (luminance + 0.05) >= 4.5  # as WCAG wants it
