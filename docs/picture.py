"""Draw the README's pictures from one real run: docs/run.svg and docs/report.png.

The one is a terminal of 112 columns, the other two sections of the page of the run, in Chromium.

    python docs/picture.py data.root=FOLDER
"""

import io
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console as RichConsole

from launcher.cli import main
from launcher.config.plan import Plan
from launcher.loggers.console import LiveConsole
from launcher.run import train
from launcher.training.metrics import StepReport

ROOT = Path(__file__).parents[1]
WIDTH, MARGIN = 1100, 12  # pixels
SECTIONS = ("The worst mistakes", "What is taken for what")


class Photograph(LiveConsole):
    """The live console, whose moving bar is drawn once: in the middle of the last epoch."""

    def __init__(self, rich: RichConsole) -> None:
        """Keep the bar still."""
        super().__init__(rich)
        self._bar.disable = True
        self._drawn = False

    def step(self, report: StepReport, plan: Plan) -> None:
        """Draw the bar at the right moment."""
        super().step(report, plan)
        if not self._drawn and report.step > plan.steps - plan.steps_per_epoch / 2:
            self._drawn = True
            self._rich.print(self._bar.get_renderable())


def draw(overrides: list[str]) -> None:
    """Run SimpleCNN with a console that records what it draws."""
    rich = RichConsole(record=True, width=112, force_terminal=True, file=io.StringIO())
    train.make_console = lambda is_main: Photograph(rich)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        words = [str(ROOT / "recipes" / "simplecnn.py"), "--name", "simplecnn"]
        assert main([*words, *overrides]) == 0
        photograph(Path(folder, "runs", "simplecnn", "report", "index.html"))
    command = "accelerate launch -m launcher recipes/simplecnn.py"
    rich.save_svg(str(ROOT / "docs" / "run.svg"), title=command)


def photograph(page_file: Path) -> None:
    """Of the page of a run, the two `SECTIONS`, which stand one below the other."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(page_file.as_uri())
        page.wait_for_selector("#matrix .main-svg")
        boxes = [page.locator("section", has_text=title).first.bounding_box() for title in SECTIONS]
        first, last = (box for box in boxes if box)
        top = first["y"] - MARGIN
        height = last["y"] + last["height"] + MARGIN - top
        clip = {"x": 0, "y": top, "width": WIDTH, "height": height}
        image = page.screenshot(full_page=True, clip=clip)
        browser.close()
    colours = Image.open(io.BytesIO(image)).convert("RGB").quantize(256)
    colours.save(ROOT / "docs" / "report.png", optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1:])
