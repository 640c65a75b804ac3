"""Every command of the README and of docs/ is run, made short; the README's recipe as printed.

docs/slurm.md, docs/nodes.md, docs/results.md, docs/figures.md and docs/data.md have tests of their
own, beside this file.
"""

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from launcher.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = README
ELSEWHERE = {
    "slurm.md": "test_slurm_docs.py",
    "nodes.md": "test_node_docs.py",
    "kubernetes.md": "test_node_docs.py",
    "results.md": "test_results_docs.py",
    "figures.md": "test_figures_docs.py",
    "data.md": "test_data_docs.py",
}
COMMANDS = sorted(
    {
        line
        for name, text in PAGES.items()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.strip().splitlines()
        if name not in ELSEWHERE
    }
)
TRAINS = [line for line in COMMANDS if "-m launcher" in line]
INSTALLS = [line for line in COMMANDS if line.startswith("python3 -m venv")]
TESTS = [line for line in COMMANDS if line == "pytest"]
RECIPE, SCRIPT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAKES = [line for line in COMMANDS if line.startswith("make ")]
# Ways of starting that differ little from others, and take a while.
LONG = ("--config_file", "torchrun", " verify ")
SHORT = ["--max-steps", "2", "data.batch_size=16"]
PROGRAMS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's own recipe, where CIFAR-10 is not and cannot be fetched."""
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        (tmp_path / "recipes" / path.name).write_text(offline(text))
    (tmp_path / "recipes" / "mine.py").write_text(offline(RECIPE))
    (tmp_path / "accelerate_config").symlink_to(ROOT / "accelerate_config")
    return tmp_path


def offline(text: str) -> str:
    """A recipe whose download fails at once instead of asking the network."""
    unreachable = '\nCIFAR10.url = "http://127.0.0.1:9/"\n\n\nrecipe = '
    text = text.replace("\nrecipe = ", unreachable) if "CIFAR10" in text else text
    return text.replace("fallback=Synthetic", "fallback=partial(Synthetic, count=300)")


def start(command: str, folder: Path, extra: list[str]) -> "subprocess.Popen[str]":
    program, *words = shlex.split(command)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*PROGRAMS[program], *words, *extra],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder), "WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_command_belongs_to_a_test() -> None:
    assert COMMANDS
    assert sorted(TRAINS + INSTALLS + TESTS + MAKES) == COMMANDS
    assert len(INSTALLS) == len(TESTS) == 1  # run by .ci/run, and by whoever reads this
    assert MAKES == ["make test", "make train"]  # test_make.py
    assert all((Path(__file__).parent / name).is_file() for name in ELSEWHERE.values())


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str) -> None:
    """Linked files and headings; files of this repository; the options of a benchmark."""
    text, folder = PAGES[name], ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        assert path.startswith("https://") or (folder / path).exists(), link
        if heading:
            page = (folder / path).read_text(encoding="utf-8") if path else text
            titles = re.findall(r"^#+ (.*)$", page, re.M)
            anchors = [re.sub(r"[^\w -]", "", title).lower() for title in titles]
            assert heading in [anchor.replace(" ", "-") for anchor in anchors], link
    for path in re.findall(r"`((?:tests|benchmarks|launcher|recipes|deploy)/[\w/.*-]+)`", text):
        assert list(ROOT.glob(path)) or path == "recipes/mine.py", path
    for benchmark, options in re.findall(r"`python\s(benchmarks/\w+\.py)([^`]*)`", text):
        source = (ROOT / benchmark).read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in source, (benchmark, option)


def run(command: str, folder: Path, extra: list[str]) -> tuple[int, str, str]:
    """Exit code and output; plain `python -m launcher` runs in this process, to save time."""
    program, *words = shlex.split(command)
    if program == "python":
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            code = main([*words[2:], *extra])
        return code, output.getvalue(), errors.getvalue()
    process = start(command, folder, extra)
    output_text, errors_text = process.communicate(timeout=120)
    return process.returncode, output_text, errors_text


def marked(command: str) -> object:
    """The command as a parameter; a slow test where it is a long one."""
    slow = any(word in command for word in LONG)
    return pytest.param(command, marks=pytest.mark.slow) if slow else command


@pytest.mark.parametrize("command", [marked(line) for line in TRAINS])
def test_the_command_trains(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    shows = any(
        word in command
        for word in ("--help", "--dry-run", "--smoke", " check ", " verify ", " doctor")
    )
    if "--init-from" in command:
        (earlier,) = [line for line in TRAINS if line.endswith("--resume")]
        assert run(earlier, folder, SHORT)[0] == 0
    short = ["data.batch_size=16", "epochs=40"] if "--profile" in command else SHORT
    code, output, errors = run(command, folder, [] if shows else short)
    assert code == 0, errors[-3000:]
    if "--help" in command:
        assert "optimizer.lr" in output
    elif " verify " in command:
        assert "resume      good" in output
    elif "check" in command:
        assert "network     good" in output
    elif " doctor" in command:
        assert "product     " in output
    elif "--dry-run" in command:
        assert "256 = 1 rank x 256 images" in output
    else:
        assert "best epoch" in output
        assert ("NOT THE REAL DATA" in output) == ("--smoke" not in command)
        finals = len(list(folder.glob("runs/*/final.safetensors")))
        assert finals == ("--smoke" not in command) + ("--init-from" in command)


def test_the_script_trains_and_uses_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Image.new("RGB", (48, 32), "red").save("picture.png")
    exec(SCRIPT, {})
    shown = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"Best\(epoch=[12], .*\) [a-z]+", shown), shown
