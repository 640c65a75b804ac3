"""Each wrong network is explained by its layer, and works when what is advised is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.checks.check.layers import walk
from launcher.checks.check.mistakes import Mistake, find_mistake

NETWORK = """
import torch
import torch.nn as nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv1(x))))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x
"""
FLATTEN = "x = x.flatten(1)"
FC1 = "self.fc1 = nn.Linear(16 * 6 * 6, 50)"

# what is written wrongly, of pixels; what is said; what to write, and instead of what
WRONG = [
    ("16 * 6 * 6", "16 * 16 * 16", 32, "fc1 = Linear(in_features=4096", "nn.Linear(576, 50)"),
    ("", "", 64, "gets 3136 numbers for each image", "images of 32 x 32 pixels"),
    ("kernel_size", "", 28, "gets 400 numbers", "nn.Linear(400, 50)"),
    ("Conv2d(8, 16, 3)", "Conv2d(16, 8, 3)", 32, "are exchanged", "nn.Conv2d(8, 16, 3)"),
    ("Conv2d(8, 16, 3)", "Conv2d(3, 16, 3)", 32, "gets 8 channels", "nn.Conv2d(8, 16, 3)"),
    (
        *("Conv2d(8, 16, 3)", "Conv2d(3, 16, 5, padding=1, groups=1, bias=False)", 32),
        *("gets 8 channels", "nn.Conv2d(8, 16, 5, padding=1, bias=False)"),
    ),
    (
        *("Conv2d(8, 16, 3)", "Conv1d(8, 16, 2, stride=2, padding='valid')", 40),
        *("conv2 = Conv1d", "nn.Conv2d(8, 16, 2, stride=2, padding='valid'): pictures"),
    ),
    ("Conv2d(8, 16, 3)", "Conv2d(15, 15, 3, groups=3)", 32, "gets 8", "nn.Conv2d(8, 15, 3)"),
    ("nn.Conv2d(8,", "nn.Conv1d(8,", 32, "conv2 = Conv1d", "nn.Conv2d(8, 16, 3): pictures"),
    ("BatchNorm2d(8)", "BatchNorm2d(16)", 32, "norm = BatchNorm2d", "nn.BatchNorm2d(8)"),
    ("import torch.nn.functional as F", "", 32, "NameError", "import torch.nn.functional as F"),
    ("MaxPool2d(2)", "MaxPool2d(16)", 32, "gets pictures of 1 x 1 pixels", "leave out a pooling"),
    ("Conv2d(8, 16, 3)", "Conv2d(8, 16, 17)", 32, "15 x 15 pixels", "write padding=1"),
    (FLATTEN, "x = x.view(-1, 144)", 32, "gets 8 rows of 2 images", "nn.Linear(576, 50)"),
    (FLATTEN, "x = x.view(-1, 500)", 32, "does not fit the 576 numbers", "x.flatten(1)"),
    (FLATTEN, "x = x.view(-1, 500)", 64, "the 3136 numbers", "there and nn.Linear(3136, ...)"),
    (FLATTEN, "pass", 32, "gets pictures, 16 x 6 x 6", "nn.Linear(576, 50)"),
    (FLATTEN, "x = x.transpose(1, 3).view(2, -1)", 32, "view size", "x.reshape(...)"),
    ("Linear(50, 10)", "Linear(50, 7)", 32, "7 scores for 10 classes", "nn.Linear(50, 10)"),
    ("return x", "pass", 32, "returns nothing", "`return x`"),
    ("return x", "return x, x", 32, "returns a tuple", "return x[0]"),
    ("return x", "return x.view(-1, 5)", 32, "4 rows of scores of 2 images", "x.flatten(1)"),
    (FLATTEN, "x = x.flatten(1).double()", 32, "numbers of another type", "leave out what"),
    ("self.conv2(x)", "self.conv2(x.double())", 32, "conv2 = Conv2d", "leave out what"),
    ("self.fc2(x)", "self.fc3(x)", 32, "has no attribute 'fc3'", "correct that line"),
]


def network_of(source: str, folder: Path) -> nn.Module:
    path = folder / "net.py"
    path.write_text(source)
    names: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), names)
    network: nn.Module = names["Net"]()
    return network


def mistake_of(source: str, folder: Path, pixels: int = 32) -> Mistake | None:
    walked = walk(network_of(source, folder), torch.rand(2, 3, pixels, pixels))
    return find_mistake(walked, classes=10)


@pytest.mark.parametrize(("right", "wrong", "pixels", "what", "instead"), WRONG)
def test_a_wrong_network_is_explained(
    right: str, wrong: str, pixels: int, what: str, instead: str, tmp_path: Path
) -> None:
    found = mistake_of(NETWORK.replace(right, wrong) if right else NETWORK, tmp_path, pixels)
    assert found is not None
    assert what in found.what
    assert instead in found.instead
    assert f"({tmp_path / 'net.py'}, line" in found.what
    if found.what.split()[1] == "=" and found.what[0] != "`":  # of a layer: where it is made
        name = found.what.partition(" ")[0]
        source = (tmp_path / "net.py").read_text().splitlines()
        number = next(n for n, line in enumerate(source, 1) if f"self.{name} = " in line)
        assert f"({tmp_path / 'net.py'}, line {number}) gets" in found.what


@pytest.mark.parametrize("case", [case for case in WRONG if case[4].startswith("nn.")])
def test_what_is_advised_works(case: tuple[str, str, int, str, str], tmp_path: Path) -> None:
    right, wrong, pixels, _, _ = case
    source = NETWORK.replace(right, wrong)
    found = mistake_of(source, tmp_path, pixels)
    assert found is not None
    for _ in range(2):  # a second layer may not fit what the first one makes now
        advised = "nn." + found.instead.partition("nn.")[2].partition(")")[0] + ")"
        name = found.what.partition(" ")[0] if " = " in found.what else "fc1"
        name = "fc2" if "scores for" in found.what else name
        lines = [
            f"        self.{name} = {advised}" if f"self.{name} =" in line else line
            for line in source.splitlines()
        ]
        source = "\n".join(lines)
        if "x.flatten(1)" in found.instead:
            source = source.replace(wrong, FLATTEN)
        found = mistake_of(source, tmp_path, pixels)
        if found is None:
            break
    assert found is None


def test_a_right_network_has_no_mistake_and_is_left_as_it_was(tmp_path: Path) -> None:
    network = network_of(NETWORK, tmp_path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert find_mistake(walk(network, torch.rand(2, 3, 32, 32)), classes=10) is None
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
