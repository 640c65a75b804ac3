"""Every command of docs/results.md, in its order, made short."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from launcher.cli import main
from tests.integration.test_readme import PAGES, ROOT, offline

COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGES["results.md"], re.DOTALL)
    for line in block.strip().splitlines()
]
SHORT = ["--max-steps", "2", "data.batch_size=16", "--wandb", "off"]


def test_the_commands_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    for folder in ("recipes", "photos"):
        Path(folder).mkdir()
    recipe = (ROOT / "recipes" / "simplecnn.py").read_text(encoding="utf-8")
    Path("recipes/simplecnn.py").write_text(offline(recipe))
    Image.new("RGB", (48, 32), "red").save("photos/red.png")
    for command in COMMANDS:
        python, *module, first = shlex.split(command)[:4]
        assert [python, *module] == ["python", "-m", "launcher"]
        words = [first, *shlex.split(command)[4:]]
        assert main([*words, *(SHORT if first.startswith("recipes/") else [])]) == 0, command
    output = capsys.readouterr().out
    for part in (
        "test accuracy, last epoch",
        "photos/red.png",
        "proved on all",
        "reports/second.html",
    ):
        assert part in output, part
    for path in ("runs/first/report/index.html", "reports/index.html", "predictions.csv"):
        assert Path(path).is_file()
