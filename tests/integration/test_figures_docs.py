"""Every command of docs/figures.md, in its order, made short."""

import re
import shlex
from pathlib import Path

import pytest

from launcher.cli import main
from tests.integration.test_readme import PAGES, ROOT, offline

COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGES["figures.md"], re.DOTALL)
    for line in block.strip().splitlines()
]
SHORT = ["--max-steps", "3", "data.batch_size=16", "--wandb", "off", "--no-report"]
RAMP = ["--wandb", "off", "data.batch_size=4"]


@pytest.mark.slow
def test_the_commands_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    recipe = (ROOT / "recipes" / "simplecnn.py").read_text(encoding="utf-8")
    Path("recipes/simplecnn.py").write_text(offline(recipe))
    for command in COMMANDS:
        python, *module, first = shlex.split(command)[:4]
        assert [python, *module] == ["python", "-m", "launcher"]
        words = [first, *shlex.split(command)[4:]]
        short = RAMP if {"--lr", "--batch"} & {*words} else SHORT
        at = words.index("--search") if "--search" in words else len(words)
        assert main([*words[:at], *short, *words[at:]]) == 0, command
    output = capsys.readouterr().out
    for part in ("n=3", "best seed", "chosen by the validation images", "over the learning rate"):
        assert part in output, part
    for path in ("runs/held/test.json", "runs/simplecnn-seed2", "curve/learning_rate.png"):
        assert Path(path).exists(), path
