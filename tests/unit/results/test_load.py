"""`load_run`: the model of a run folder, which computes what the run computed."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from launcher import Folder, RunResult, Synthetic, load_run, train
from launcher.checkpoint.resume import initial_weights
from launcher.checkpoint.run_dir import RunDir
from launcher.data import sources
from tests.support.helpers import ROOT, Tiny, refused, tiny_recipe

RECIPE = '''
"""A recipe with a setting of its own."""
from functools import partial
from torch import nn
from torch.optim import SGD
from launcher import Images, Recipe, Synthetic, ema

def network(widths: tuple[int, ...] = (4,), act=nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d({channels}, widths[0], 3), nn.BatchNorm2d(widths[0]), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)
    )

recipe = Recipe(
    model=network,
    data=Images(partial(Synthetic, count=60, size=20, channels={channels}), batch_size=20,
                mean=(0.5,) * {channels}, std=(0.25,) * {channels}),
    optimizer=partial(SGD, lr=0.5),
    average=partial(ema, decay=0.5),
    epochs=2,
)
'''


def trained(folder: Path, *overrides: str, channels: int = 3) -> RunResult:
    path = folder / "mine.py"
    path.write_text(RECIPE.replace("{channels}", str(channels)))
    return train(path, *overrides, name="first", runs=folder / "runs", wandb="off")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loaded_model_has_the_accuracy_of_the_run(tmp_path: Path, channels: int) -> None:
    result = trained(
        tmp_path, "model.widths=(6,)", "data.std=" + "0.3," * channels, channels=channels
    )
    assert result.last is not None
    run = load_run(tmp_path / "runs" / "first", weights="final")
    assert not run.model.training
    data = sources.load(run.recipe.data).test
    assert run.classes == data.classes
    with torch.no_grad():
        logits = run.model(run.prepare(list(data.tensor.permute(0, 3, 1, 2))))
    accuracy = (logits.argmax(1) == data.labels).float().mean()
    assert float(accuracy) == pytest.approx(result.last.accuracy)


NESTED = """
from functools import partial
import torch
from torch import nn
from torch.optim import SGD
from launcher import Images, Recipe, Synthetic

class Other:
    pass  # whose text has its address, another one in each process

class Scale(nn.Module):
    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by

    def forward(self, images):
        return self.by * images

def network(
    act=partial(nn.LeakyReLU, negative_slope=0.01),
    norm: type[nn.Module] | None = nn.BatchNorm2d,
    more=(Scale, nn.Tanh),
    kinds: tuple[str, ...] = ("conv", "relu"),
    dtype: torch.dtype = torch.float32,
    other: Other = Other(),
) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, dtype=dtype), act(), *(one() for one in more)]
    layers += [] if norm is None else [norm(8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

recipe = Recipe(
    model=network,
    data=Images(partial(Synthetic, count=60), batch_size=20, mean=(0.5,) * 3, std=(0.5,) * 3,
                validation=0.2),
    optimizer=partial(SGD, lr=0.1),
    epochs=1,
    patience=2,
)
"""


def test_settings_of_any_depth_are_those_of_the_run(tmp_path: Path) -> None:
    """And those that were not typed need not be what can be typed."""
    (tmp_path / "nested.py").write_text(NESTED)
    words = ("act.negative_slope=-3.0", "norm=none", "more.Scale.by=2", "kinds=('conv', 'gelu')")
    own = (*(f"model.{word}" for word in words), "patience=none", "data.validation=none")
    train(tmp_path / "nested.py", *own, name="n", runs=tmp_path / "runs", wandb="off")
    run = load_run(tmp_path / "runs" / "n", weights="final")
    assert isinstance(run.model, nn.Sequential)
    assert isinstance(run.recipe.model, partial)
    assert run.model[1].negative_slope == -3.0
    assert run.model[2].by == 2.0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in run.model)
    assert run.recipe.model.keywords["kinds"] == ("conv", "gelu")
    assert run.recipe.data.validation is None


def test_a_recipe_finds_the_neighbours_that_it_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_widths.py").write_text("WIDTHS = (7,)")
    text = RECIPE.replace("{channels}", "3").replace("(4,)", "WIDTHS")
    text = text.replace(
        "from torch import nn", "from torch import nn\nfrom own_widths import WIDTHS"
    )
    (tmp_path / "mine" / "first.py").write_text(text)
    words = ("first.py", "--runs", "../runs", "--name", "first", "--wandb", "off", "--no-report")
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher", *words]
    subprocess.run(command, cwd=tmp_path / "mine", env=own, check=True, capture_output=True)
    run = load_run(tmp_path / "runs" / "first")
    assert isinstance(run.model, nn.Sequential)
    assert run.model[0].out_channels == 7
    (tmp_path / "mine").rename(tmp_path / "other")
    del sys.modules["own_widths"]
    with refused(
        "imports own_widths, which is neither installed nor",
        f"put own_widths.py into {tmp_path / 'mine'}",
    ):
        load_run(tmp_path / "runs" / "first")


class Noisy(Tiny):
    """As with dropout that stays on: no two answers are the same."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 9 * torch.rand(len(images), 10)


def test_a_network_that_answers_otherwise_than_the_run_did_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path).folder
    assert folder is not None
    source, about = folder / "recipe.py", folder / "run.json"
    text = source.read_text()
    source.write_text(text + "# edited\n")
    load_run(folder)
    source.write_text(text.replace("AdaptiveAvgPool2d", "AdaptiveMaxPool2d"))
    with refused("other answers than the run wrote down", "its files, and what they import,"):
        load_run(folder)
    about.write_text(json.dumps(json.loads(about.read_text()) | {"neighbours": {"net.py": "ab"}}))
    for which in ("best", "final"):
        with refused(f"put net.py of {tmp_path} back"):
            load_run(folder, weights=which)
    drawn = tiny_recipe(model=Noisy)
    train(drawn, name="noisy", runs=tmp_path / "runs", wandb="off")
    load_run(tmp_path / "runs" / "noisy", recipe=drawn)


def test_paths_pictures_and_tensors_are_prepared_alike(tmp_path: Path) -> None:
    trained(tmp_path)
    run = load_run(tmp_path / "runs" / "first")
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=numpy.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    images = run.prepare([tmp_path / "picture.png", str(tmp_path / "picture.png"), picture, tensor])
    assert images.shape == (4, 3, 20, 20)
    expected = (tensor / 255 - 0.5) / 0.25
    for image in images:
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    assert run.prepare(picture.resize((77, 41))).shape == (1, 3, 20, 20)
    assert run.prepare(picture.convert("L")).shape == (1, 3, 20, 20)


def test_a_picture_is_cropped_as_the_run_s_own_were(tmp_path: Path) -> None:
    random = numpy.random.default_rng(0)
    for kind in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        pixels = random.integers(0, 256, (40, 50, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / kind / "a.png")
    source = partial(Folder, size=16, scaled_to=20)
    data = {"source": source, "root": str(tmp_path / "pictures"), "batch_size": 1}
    recipe = tiny_recipe(data=data, model=partial(Tiny, classes=2), epochs=1)
    result = train(recipe, runs=tmp_path / "runs", wandb="off")
    assert result.folder is not None
    run = load_run(result.folder, recipe=recipe)
    evaluated = sources.load(recipe.data).test.tensor
    assert run.pixels(tmp_path / "pictures" / "test" / "cat" / "a.png").equal(evaluated[0])


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 20, 20), torch.zeros(20, 20, 3, dtype=torch.uint8)]
)
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, picture: Tensor) -> None:
    trained(tmp_path)
    run = load_run(tmp_path / "runs" / "first")
    with refused("a picture of torch.", "torch.uint8 (3, 20, 20)"):
        run.prepare(picture)


@pytest.mark.parametrize(
    ("picture", "parts"),
    [
        (numpy.zeros((20, 20, 3), numpy.uint8), ("a picture that is a ndarray", "Image.fromarray")),
        (None, ("a picture that is a NoneType", "a path, a PIL image")),
        ([], ("no pictures", 'run.prepare("picture.png")')),
        ("nowhere.png", ("nowhere.png: no such file", "check the path")),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, picture: Any, parts: list[str]) -> None:
    trained(tmp_path)
    run = load_run(tmp_path / "runs" / "first")
    with refused(*parts):
        run.prepare(picture)
    black = torch.zeros(3, 20, 20, dtype=torch.uint8)
    assert run.prepare((black, black)).shape == (2, 3, 20, 20)


@pytest.mark.parametrize("recipe", [Tiny, Tiny(), None, 3])
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with refused("train(", "a Recipe, or the path of a recipe file"):
        train(recipe)


@pytest.mark.parametrize("words", [{"epochs": 3}, ["epochs=3"], 3])
def test_words_that_are_no_texts_are_refused(words: Any) -> None:
    with refused("the word ", "each a text of its own", 'train(recipe, "epochs=2"'):
        train(tiny_recipe(), words)


def test_a_run_of_a_recipe_value_needs_it_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(data={"source": partial(Synthetic, count=20)})
    result = train(recipe, "model.width=3", runs=tmp_path, wandb="off")
    assert result.folder is not None
    assert result.folder.name.startswith("tiny-")
    with refused("a run without a recipe file", "recipe="):
        load_run(result.folder)
    run = load_run(result.folder, recipe=tiny_recipe(model=partial(Tiny, width=3)))
    assert run.model(run.prepare(Image.new("RGB", (32, 32)))).shape == (1, 10)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with refused("no run folder", "runs/first"):
        load_run(tmp_path)
    trained(tmp_path)
    for name in ("best", "final"):
        (tmp_path / "runs" / "first" / f"{name}.safetensors").unlink()
    with refused("has no weights yet"):
        load_run(tmp_path / "runs" / "first")


@pytest.mark.parametrize(("gone", "other"), [("best", "final"), ("final", "best")])
def test_other_weights_than_those_asked_for_are_not_taken(
    gone: Literal["best", "final"], other: str, tmp_path: Path
) -> None:
    trained(tmp_path)
    (tmp_path / "runs" / "first" / f"{gone}.safetensors").unlink()
    with refused(f"has no {gone}.safetensors", f"--weights {other}; in Python, weights='{other}'"):
        load_run(tmp_path / "runs" / "first", weights=gone)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.json", text) for text in ("[1]", "{}", '{"model": 3, "data": {}}', "[" * 10**5)),
        *(("run.json", text) for text in ("null", '{"image_shape": [1], "classes": []}', "\xff")),
        ("run.json", '{"image_shape": [20, 20, "3"], "classes": ["a"]}'),
    ],
)
def test_a_description_that_says_something_else_is_refused(
    name: str, text: str, tmp_path: Path
) -> None:
    good = {"image_shape": [20, 20, 3], "classes": ["a"], "model": {}, "data": {}}
    for file in ("config.json", "run.json"):
        (tmp_path / file).write_text(json.dumps(good))
    (tmp_path / name).write_text(text, encoding="latin-1")
    with refused("no run folder", "ls runs"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_fifo_is_not_waited_for(name: str, tmp_path: Path) -> None:
    trained(tmp_path)
    folder = tmp_path / "runs" / "first"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with refused("no run folder", f"{name}"):
        load_run(folder)


def test_a_second_training_at_the_same_time_is_refused(tmp_path: Path) -> None:
    """As in another thread: both would draw from one generator, and come out wrong."""
    options: dict[str, Any] = {"runs": tmp_path, "wandb": "off"}

    def initialize(network: nn.Module, images: Tensor) -> None:
        with refused("a second training at the same time", "start a process for each"):
            train(tiny_recipe(epochs=1), name="second", **options)

    train(tiny_recipe(epochs=1, initialize=initialize), name="first", **options)
    assert not (tmp_path / "second").exists()
    train(tiny_recipe(epochs=1), name="second", **options)


def test_paths_and_recipes_of_another_type_are_refused(tmp_path: Path) -> None:
    folder: Any
    with refused("runs=None", "a value of type Path"):
        folder = None
        train(tiny_recipe(), runs=folder)
    recipe: Any
    for folder, recipe in ((None, None), (str(tmp_path), "mine.py")):
        with refused("load_run(", 'write load_run("runs/first")'):
            load_run(folder, recipe=recipe)
    name: Any = Path("first")
    result = train(tiny_recipe(epochs=1), name=name, runs=str(tmp_path), wandb="off")
    assert result.folder == tmp_path / "first"


def test_final_weights_are_not_those_of_a_run_that_has_gone_on(tmp_path: Path) -> None:
    """As when an ended run was resumed for more epochs and stopped: they are of its first end."""
    folder = trained(tmp_path).folder
    assert folder is not None
    run = RunDir(folder)
    run.end(75)
    run.forget_after(2)
    copy = tmp_path / "runs" / "copy"  # whose files may have any times
    for path in (folder, shutil.copytree(folder, copy, copy_function=shutil.copyfile)):
        load_run(path, weights="final")  # where nothing was trained since
        assert initial_weights(tmp_path / "runs", path.name) == path / "final.safetensors"
    run.forget_after(1)  # whose checkpoint is damaged
    RunDir(copy).record({"epoch": 3}, {"epoch": 3})
    for path in (folder, copy):
        with refused("has no final.safetensors", "--weights best"):
            load_run(path, weights="final")
        assert initial_weights(tmp_path / "runs", path.name) == path / "best.safetensors"
