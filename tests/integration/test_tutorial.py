"""The tutorial's two classes, as they are printed, on 1 and 2 ranks."""

import json
from pathlib import Path

import pytest

from tests.support.processes import Run, fingerprint

CIFAR = """
import torch.nn as nn
import torch.nn.functional as F

class SimpleCNN(nn.Module):
    def __init__(self):
        super(SimpleCNN, self).__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(32 * 8 * 8, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(x.size(0), -1)
        x = self.fc1(x)
        return x
"""
PICTURES = """
import torch.nn as nn
import torch.nn.functional as F

class CNN(nn.Module):
    def __init__(self):
        super(CNN, self).__init__()
        self.conv1 = nn.Conv2d(3, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(20 * 13 * 13, 50)
        self.fc2 = nn.Linear(50, 5)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x
"""
RECIPE = """
from functools import partial

from torch.optim import Adam

from launcher import Images, Recipe, Synthetic

recipe = Recipe(
    model={model},
    data=Images({source}, batch_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    optimizer=partial(Adam, lr=1e-3),
    epochs=1,
)
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("text", "model", "source"),
    [
        (CIFAR, "SimpleCNN", "partial(Synthetic, count=640)"),
        pytest.param(
            *(PICTURES, "CNN", "partial(Synthetic, size=64, classes=5, count=320)"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["CIFAR-10", "own pictures"],
)
def test_the_tutorials_class_trains_and_resumes(
    ranks: int, text: str, model: str, source: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(text + RECIPE.format(model=model, source=source))
    whole = Run(ranks, tmp_path, "--name", "whole", recipe=recipe)
    assert whole.end() == 0, whole.text()
    line = 1 + (text + RECIPE).splitlines().index("        x = x.view(x.size(0), -1)")
    note = f"mine.py, line {line}: `x = x.view(x.size(0), -1)` refuses channels_last"
    assert whole.text().count(note) == 1
    assert "contiguous" in whole.text()
    config = json.loads((tmp_path / "runs" / "whole" / "config.json").read_text())
    assert config["memory_format"] == "contiguous"
    for options in (("--max-steps", "3"), ()):  # cut within the epoch, and resumed
        run = Run(ranks, tmp_path, "--name", "cut", "--resume", *options, recipe=recipe)
        assert run.end() == 0, run.text()
    assert fingerprint(tmp_path / "runs" / "cut") == fingerprint(tmp_path / "runs" / "whole")
