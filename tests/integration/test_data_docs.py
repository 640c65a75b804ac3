"""Every command of docs/data.md, in its order."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image

from launcher import Packed
from launcher.cli import main
from tests.integration.test_readme import PAGES, ROOT, offline
from tests.unit.data.test_sources import Cifar

COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGES["data.md"], re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.mark.slow
def test_the_commands_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cifar = Cifar()
    cifar.write(Path("data"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar.source())
    Path("recipes").mkdir()
    recipe = (ROOT / "recipes" / "simplecnn.py").read_text(encoding="utf-8")
    Path("recipes/simplecnn.py").write_text(offline(recipe))
    random = numpy.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for index in range(5):
            pixels = random.integers(0, 256, (80, 100, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(Path("photos", name, f"{index}.jpg"))
    for name in ("pictures64", "imagenet_resnet50", "imagenet_resnet18_16"):
        shutil.copy(ROOT / "recipes" / f"{name}.py", "recipes")
    for half, number in itertools.product(("train", "val"), range(1000)):
        Path("imagenet", half, f"n{number:04}").mkdir(parents=True)
        shutil.copy("photos/cat/0.jpg", Path("imagenet", half, f"n{number:04}", "0.JPEG"))
    for command in COMMANDS:
        python, *module, first = shlex.split(command)[:4]
        assert [python, *module] == ["python", "-m", "launcher"]
        short = [] if first == "pack" else ["--max-steps", "2", "--wandb", "off", "--no-report"]
        short += ["model.classes=2", "data.batch_size=4"] if "photos data.tier" in command else []
        assert main([first, *shlex.split(command)[4:], *short]) == 0, command
    text = capsys.readouterr().out
    assert text.count("decoded from disk for each step") == 4
    assert text.count("trained at 160 to 192 pixels") == 1
    assert text.count("trained at 128 to 192 pixels") == 1
    encoded = Packed("packed_jpeg", size=64).encoded
    assert encoded is not None
    assert encoded.shape == (8, 64, 64, 3)
    assert Packed("packed").data.shape == (8, 64, 64, 3)
    assert Packed("packed_cifar10", "test").data.shape == (6, 32, 32, 3)
