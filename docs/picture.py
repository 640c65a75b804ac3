"""Draw docs/run.svg, the README's picture: a real run, as a terminal of 112 columns shows it.

python docs/picture.py data.root=FOLDER
"""

import io
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console as RichConsole

from launcher.cli import main
from launcher.config.plan import Plan
from launcher.loggers.console import LiveConsole
from launcher.run import train
from launcher.training.metrics import StepReport

ROOT = Path(__file__).parents[1]


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
    command = "accelerate launch -m launcher recipes/simplecnn.py"
    rich.save_svg(str(ROOT / "docs" / "run.svg"), title=command)


if __name__ == "__main__":
    draw(sys.argv[1:])
