"""`launcher report --gradcam`: where the network looked in its worst mistakes."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from launcher.checkpoint.run_files import RunFiles
from launcher.cli import main
from launcher.results import gradcam
from launcher.results.gradcam import looked_at, overlaid
from tests.support.helpers import RECIPES, complaint, refused
from tests.support.parsed import Parsed


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Colours(nn.Module):
    """Class 0 is as red as the picture, class 1 as green; `after` changes the map in place."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 2, 1, bias=False)
        self.colours.weight.data = torch.eye(3)[:2, :, None, None]
        self.after = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(2, 2, 1, bias=False)  # of one pixel: nothing to see
        self.head.weight.data = torch.eye(2)[..., None, None]

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.pool(self.after(self.colours(images))))
        return scores.flatten(1)


def test_a_map_is_high_where_the_class_is() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0, :4, :4] = 2.0  # red, above on the left
    images[:, 1, 4:, 4:] = 1.0  # green, below on the right
    layer, maps = looked_at(Colours(), images, torch.tensor([0, 1]))
    assert layer == "colours"
    expected = torch.zeros(2, 8, 8)
    expected[0, :4, :4] = expected[1, 4:, 4:] = 1.0
    torch.testing.assert_close(maps, expected)


def test_what_speaks_against_a_class_is_not_shown() -> None:
    network = Colours()
    network.head.weight.data = torch.tensor([[1.0, -1.0], [0.0, 1.0]])[..., None, None]
    images = torch.zeros(1, 3, 8, 8)
    images[:, 1] = 1.0
    _, maps = looked_at(network, images, torch.tensor([0]))
    assert not maps.any()


def test_a_layer_behind_that_works_in_place_changes_no_map() -> None:
    network = Colours()
    network.head.weight.data *= -1
    images = torch.zeros(1, 3, 8, 8)
    images[:, 1, :, :4], images[:, 1, :, 4:] = -1.0, 1.0  # its ReLU would make the left zero
    _, maps = looked_at(network, images, torch.tensor([1]))
    torch.testing.assert_close(maps[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4))


def test_a_map_is_laid_over_a_grey_picture() -> None:
    pixels = numpy.full((1, 2, 2, 3), (30, 60, 90), numpy.uint8)
    maps = numpy.array([[[0.0, 1.0], [0.0, 0.0]]])
    shown = overlaid(pixels, maps)
    assert shown[0, 0, 0].tolist() == [60, 60, 60]
    assert shown[0, 0, 1].tolist() == [206, 68, 15]
    assert overlaid(pixels[..., :1], maps)[0, 0, 0].tolist() == [30, 30, 30]


def test_a_network_without_a_convolution_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with refused("--gradcam of Sequential", "leave out --gradcam"):
        looked_at(network, torch.zeros(1, 3, 2, 2), torch.tensor([0]))


def test_it_goes_without_watching(capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, "report", "own", "--gradcam", "--watch")
    assert "--gradcam cannot be combined with --watch" in error


def test_a_page_shows_it_for_each_of_the_worst_mistakes() -> None:
    few = ["data.fallback.count=60", "data.batch_size=20", "epochs=1", "data.root=nowhere"]
    words = ["--wandb", "off", "--no-report", "--name", "own"]
    assert main([str(RECIPES / "pictures64.py"), *few, *words]) == 0
    files = RunFiles(Path("runs/own"))
    assert files.best is not None
    found = gradcam.of_mistakes(files)
    assert found is not None
    assert found.pictures.shape == (len(files.best.mistakes), 64, 64, 3)
    assert main(["report", "own", "--gradcam"]) == 0
    page = Parsed(Path("runs/own/report/index.html").read_text(encoding="utf-8"))
    assert f"Grad-CAM of {found.layer} ," in page.words
    cards = [a for tag, a in page.elements if tag == "span" and a.get("class") == "picture look"]
    assert len(cards) == len(files.best.mistakes)
    assert main(["report", "own"]) == 0
    page = Parsed(Path("runs/own/report/index.html").read_text(encoding="utf-8"))
    assert "Where the network looked" not in page.words
    assert "launcher report --gradcam shows where the network looked" in page.words
    for name in ("best", "last"):
        (files.path / f"{name}.npz").unlink()
    assert gradcam.of_mistakes(RunFiles(files.path)) is None
