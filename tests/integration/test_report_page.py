"""The pages in a real browser: every control, a phone's width, hostile names, no request.

`pytest -m browser`; skipped where Playwright or Chromium is not installed.
"""

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
from filelock import FileLock
from PIL import Image

from launcher.cli import main
from launcher.results import report
from tests.support.helpers import RECIPES
from tests.support.reported import HOSTILE, outcomes_of, write_reported

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed"),
]
PHONE, DESKTOP = 360, 1280
CLASSES = ("cat", "dog", "frog")


@dataclass
class Shown:
    """A page in the browser, and what it did that it is not to do."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return " ".join(str(self.page.inner_text(selector)).split())

    def background(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def show(browser: Any, folder: Path) -> Iterator[Any]:
    """Open a page; at the end it has complained of nothing and asked nobody for anything."""
    opened: list[Shown] = []

    def open_page(path: Path, width: int = DESKTOP, scheme: str = "light") -> Shown:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=width == PHONE
        )
        shown = Shown(context.new_page())
        opened.append(shown)

        def decide(route: Any) -> None:
            address = route.request.url
            if address.startswith(folder.as_uri()):
                route.continue_()
            else:
                shown.requests.append(address)
                route.abort()

        context.route("**/*", decide)
        shown.page.on("console", lambda message: shown.complaints.append(message.text))
        shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.page.on("dialog", lambda dialog: shown.complaints.append(f"dialog {dialog.message}"))
        shown.page.goto(path.absolute().as_uri())
        return shown

    yield open_page
    for shown in opened:
        assert [r for r in shown.requests if not r.startswith(("data:", "blob:"))] == []
        assert shown.complaints == []
        shown.page.context.close()


def made(name: str = "own", **changes: Any) -> Path:
    path = write_reported(Path("runs"), name, **changes)
    assert main(["report", str(path)]) == 0
    return path / "report" / "index.html"


def cell(shown: Shown, truth: int, found: int, classes: int = 3) -> tuple[float, float]:
    """Where a cell of the matrix is in the window."""
    shown.page.locator("#matrix").scroll_into_view_if_needed()
    box = shown.page.locator("#matrix .nsewdrag").first.bounding_box()
    x = box["x"] + box["width"] * (found + 0.5) / classes
    return x, box["y"] + box["height"] * (truth + 0.5) / classes


def test_curves_are_drawn_and_say_their_values(show: Any) -> None:
    shown = show(made(epochs=4))
    for name, lines in (("loss", 2), ("accuracy", 1), ("rate", 1), ("speed", 1)):
        assert shown.page.locator(f"#chart-{name} .scatterlayer .trace").count() == lines, name
    shown.page.hover("#chart-loss .nsewdrag")
    shown.page.wait_for_selector("#chart-loss .hoverlayer .legendtext")
    texts = shown.page.locator("#chart-loss .hoverlayer .legendtext").all_text_contents()
    assert [text.split(" : ")[0] for text in texts] == ["training", "test"]
    before = shown.page.evaluate("document.getElementById('chart-loss').layout.xaxis.range")
    box = shown.page.locator("#chart-loss .nsewdrag").bounding_box()
    shown.page.mouse.move(box["x"] + 40, box["y"] + 40)  # a drag is a zoom
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + 160, box["y"] + 120, steps=5)
    shown.page.mouse.up()
    after = shown.page.evaluate("document.getElementById('chart-loss').layout.xaxis.range")
    assert after[1] - after[0] < before[1] - before[0]


def test_a_cell_names_itself_and_shows_its_pictures(show: Any) -> None:
    shown = show(made(files=[f"photo {n}.png" for n in range(40)]))
    outcomes = outcomes_of(3)
    where = (outcomes.truth == 1) & (outcomes.predicted == 2)
    images, total = int(where.sum()), int((outcomes.truth == 1).sum())
    shown.page.mouse.move(*cell(shown, 1, 2))
    shown.page.wait_for_selector("#tip:visible")
    expected = f"dog taken for frog: {images} of {total} ({images / total:.1%})".replace("%", " %")
    assert shown.text("#tip") == expected
    shown.page.mouse.click(*cell(shown, 1, 2))
    shown.page.wait_for_selector("#cell .card")
    assert shown.text("#cell h3") == expected
    names = shown.page.locator("#cell .name").all_inner_texts()
    assert names == [f"photo {place}.png" for place in range(40) if where[place]]
    shown.page.mouse.move(2, 2)
    shown.page.wait_for_selector("#tip", state="hidden")
    shown.page.click(".confusions button >> nth=0")
    assert "taken for" in shown.text("#cell h3")
    shown.page.mouse.click(*cell(shown, 0, 2))
    shown.page.wait_for_function("document.querySelector('#cell h3').textContent.includes(': 0')")
    assert "no picture of these is kept" in shown.text("#cell")


def test_pictures_are_those_of_their_images(show: Any) -> None:
    """A picture of one colour each, as it is on the screen."""
    path = write_reported(Path("runs"))
    found = outcomes_of(3)
    colours = [[n * 6 % 256, n * 37 % 256, n * 91 % 256] for n in range(len(found.pictured))]
    found.pictures[:] = [[[colour] * 8] * 8 for colour in colours]
    found.write(path / "best.npz")
    assert main(["report", "own"]) == 0
    shown = show(path / "report" / "index.html")
    first = shown.page.locator("#worst .picture").first
    place = int(re.findall(r"\d+", shown.text("#worst .name >> nth=0"))[0])
    assert place == found.mistakes[0]
    assert middle_of(first) == tuple(colours[place])
    shown.page.locator("#sample-cards .picture").nth(2).scroll_into_view_if_needed()
    assert middle_of(shown.page.locator("#sample-cards .picture").nth(2)) == tuple(colours[20])


def middle_of(locator: Any) -> tuple[int, ...]:
    import io

    image = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    pixel = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(pixel, tuple)
    return tuple(map(int, pixel))


def test_the_slider_goes_through_the_epochs(show: Any) -> None:
    shown = show(made(epochs=3))
    assert shown.text("#epoch-shown") == "3"
    assert shown.page.locator("#sample-cards .card").count() == 4
    assert "dog 8 %" in shown.text("#sample-cards .card >> nth=0")
    shown.page.focus("#epoch")
    shown.page.keyboard.press("Home")
    assert shown.text("#epoch-shown") == "1"
    assert "dog 25 %" in shown.text("#sample-cards .card >> nth=0")
    assert shown.text("#samples-right") == "2 of 4 are right."
    shown.page.keyboard.press("ArrowRight")
    assert shown.text("#epoch-shown") == "2"


def test_more_mistakes_are_shown_on_demand(show: Any) -> None:
    path = write_reported(Path("runs"))
    outcomes_of(3, images=200).write(path / "best.npz")
    assert main(["report", "own"]) == 0
    shown = show(path / "report" / "index.html")
    cards = shown.page.locator("#worst .card:visible")
    assert cards.count() == 12
    shown.page.click("text=show all 48")
    assert cards.count() == 48


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_by_the_browser_and_by_the_switch(show: Any, scheme: str) -> None:
    path = made()
    shown = show(path, scheme=scheme)
    first = shown.background()
    other = "dark" if scheme == "light" else "light"
    assert shown.text("#theme") == other
    ink = "document.querySelector('#chart-loss .xtick text').style.fill"
    before = shown.page.evaluate(ink)
    shown.page.click("#theme")
    assert shown.text("#theme") == scheme
    assert shown.background() != first
    assert shown.page.evaluate(ink) != before
    shown.page.reload()
    assert shown.background() != first, "the choice is kept"
    assert brightness(first) > 128 if scheme == "light" else brightness(first) < 128


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("classes", [CLASSES, HOSTILE, [f"class number {n}" for n in range(100)]])
def test_a_phone_scrolls_in_one_direction(show: Any, classes: list[str]) -> None:
    path = write_reported(Path("runs"), "a-name-without-a-space" * 5, classes, files=["x" * 150])
    assert main(["report", str(path)]) == 0
    shown = show(path / "report" / "index.html", width=PHONE)
    shown.page.click(".confusions button >> nth=0")
    for details in shown.page.locator("summary").all():
        details.click()
    widths = shown.page.evaluate(
        "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    )
    assert max(widths) == PHONE
    shown.page.set_viewport_size({"width": 800, "height": 400})  # turned
    shown.page.wait_for_timeout(400)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == 800


def test_hostile_names_are_text(show: Any) -> None:
    shown = show(made("<script>alert(4)<", classes=HOSTILE, files=HOSTILE))
    for truth in range(4):
        shown.page.mouse.move(*cell(shown, truth, truth, 4))
        shown.page.wait_for_function(
            "name => document.getElementById('tip').textContent.startsWith(name)",
            arg=HOSTILE[truth],
        )
    shown.page.mouse.click(*cell(shown, 0, 1, 4))
    labels = shown.page.locator("#matrix .ytick text").all_text_contents()
    assert labels == [f"{name[:15]}…" if len(name) > 16 else name for name in HOSTILE]
    assert shown.page.locator("a, img, #matrix b").count() == 0
    assert shown.page.evaluate("document.scripts.length") == 3


@pytest.mark.parametrize("number", [100, 1000])
def test_many_classes_can_be_read(show: Any, number: int) -> None:
    path = write_reported(Path("runs"), classes=[f"class {n}" for n in range(number)])
    outcomes_of(number, images=6000).write(path / "best.npz")
    assert main(["report", "own"]) == 0
    shown = show(path / "report" / "index.html")
    shown.page.mouse.move(*cell(shown, number // 2, number // 2, number))
    shown.page.wait_for_selector("#tip:visible")
    assert re.match(r"class \d+ (recognized|taken for class \d+): ", shown.text("#tip"))
    assert shown.page.locator("#matrix .ytick").count() < 50


def test_a_page_of_nothing_and_one_without_its_script(show: Any) -> None:
    path = write_reported(Path("runs"), "nothing")
    for file in path.iterdir():
        if file.name != "run.json":
            file.unlink()
    assert main(["report", "nothing"]) == 0
    shown = show(path / "report" / "index.html")
    assert "no epoch has ended" in shown.text(".notes")
    page = made("alone")
    (page.parent / "plotly.min.js").unlink()
    shown = show(page)
    assert shown.page.locator("#no-script").is_visible()
    assert shown.page.locator("#sample-cards .card").count() == 4
    shown.complaints[:] = [c for c in shown.complaints if "ERR_FILE_NOT_FOUND" not in c]


def test_it_prints(show: Any) -> None:
    shown = show(made(), scheme="dark")
    content = shown.page.pdf(print_background=True)
    assert content.startswith(b"%PDF")
    assert brightness(shown.background()) < 128, "dark again afterwards"


def test_a_list_of_runs_leads_to_their_pages(show: Any) -> None:
    for name in ("first", "100% <b>#?"):
        write_reported(Path("runs"), name)
    assert main(["report", "first", "100% <b>#?", "--output", "out"]) == 0
    shown = show(Path("out/index.html"), width=PHONE)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == PHONE
    shown.page.click("text=100% <b>#?")
    assert shown.text("h1") == "100% <b>#?"
    shown.page.wait_for_selector("#chart-loss .scatterlayer .trace")


def test_a_watched_page_renews_itself_until_the_run_has_ended(
    show: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SECONDS", 0.3)
    path = write_reported(Path("runs"), epochs=1)
    end = (path / "end.json").read_text()
    (path / "end.json").unlink()
    page = folder / path / "report" / "index.html"
    codes: list[int] = []
    with FileLock(path / ".lock"):
        watching = threading.Thread(target=lambda: codes.append(main(["report", "own", "--watch"])))
        watching.start()
        while not page.exists():
            threading.Event().wait(0.05)
        shown = show(page)
        has = """number => {
            const data = JSON.parse(document.getElementById("data")?.textContent || "{}");
            const lines = document.querySelectorAll("#chart-loss .trace").length;
            return data.epochs?.length === number && lines === 2;
        }"""  # which may be asked while a page is being read
        shown.page.wait_for_function(has, arg=1)
        row = (path / "metrics.jsonl").read_text().replace('"epoch": 1', '"epoch": 2')
        with (path / "metrics.jsonl").open("a") as file:
            file.write(row)
        shown.page.wait_for_function(has, arg=2)
        (path / "end.json").write_text(end)
    watching.join(20)
    assert codes == [0]
    shown.page.wait_for_function(
        "() => typeof reloadSeconds !== 'undefined' && reloadSeconds === 0"
    )
    assert "done" in shown.text(".figures")
    shown.page.evaluate("window.isTheSame = true")
    shown.page.wait_for_timeout(1000)
    assert shown.page.evaluate("window.isTheSame"), "the last page stays"


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_runs_that_are_compared_can_be_hidden(show: Any, width: int) -> None:
    for name, classes in (("first", CLASSES), ("x" * 90, HOSTILE)):
        path = write_reported(Path("runs"), name, classes, epochs=3)
        (path / "recipe.py").write_text(f"{name} = {'1' * 200}\n")
    assert main(["compare", "first", "x" * 90, "--html", "out/page.html"]) == 0
    shown = show(Path("out/page.html"), width=width)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    lines = shown.page.locator("#compared-1 .scatterlayer .trace")
    assert lines.count() == 2
    shown.page.click("#legend button >> nth=0")
    assert lines.count() == 1
    shade = "getComputedStyle(document.querySelector('.legend i.series-1')).backgroundColor"
    drawn = "document.querySelector('#compared-1 .js-line').style.stroke"
    assert shown.page.evaluate(drawn) == shown.page.evaluate(shade)
    shown.page.click("#legend button >> nth=0")
    assert lines.count() == 2
    if width == DESKTOP:
        shown.page.hover("#compared-1 .nsewdrag")
        shown.page.wait_for_selector("#compared-1 .hoverlayer .legendtext")
        texts = shown.page.locator("#compared-1 .hoverlayer .legendtext").all_text_contents()
        assert [text.split(" : ")[0] for text in texts] == ["first", "x" * 12 + "…" + "x" * 15]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pictures_of_others_are_shown_by_class(show: Any, width: int) -> None:
    few = ["data.fallback.count=60", "data.batch_size=20", "epochs=1", "data.root=nowhere"]
    words = ["--wandb", "off", "--name", "own", "--no-report"]
    assert main([str(RECIPES / "pictures64.py"), *few, *words]) == 0
    random = numpy.random.default_rng(0)
    for number in range(30):
        place = Path("photos", ("disk", "ring")[number % 2], f"<b>{number}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (80, 90, 3), dtype=numpy.uint8)).save(place)
    assert main(["predict", "own", "photos", "--html", "out/page.html"]) == 0
    shown = show(Path("out/page.html"), width=width)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    matrix = shown.page.evaluate("page.matrix")
    assert sum(images for *_, images in matrix) == 30
    for truth, found, images in matrix:
        shown.page.evaluate(f"showCell({truth}, {found})")
        assert shown.page.locator("#cell .card").count() == images
    if width == DESKTOP:
        truth, found, images = matrix[0]
        shown.page.mouse.click(*cell(shown, truth, found, 5))
        assert f": {images} of 15" in shown.text("#cell h3")
        assert "<b>" in shown.text("#cell .name >> nth=0")
    cards = shown.page.locator("main > section > .few .card")
    assert cards.count() == 30
    hidden = shown.page.locator("main > section > .few .card:not(:visible)").count()
    for button in shown.page.locator(".more").all():
        button.click()
    assert hidden > 0
    assert shown.page.locator("main > section > .few .card:visible").count() == 30
