"""A finished run as a model: its network with its weights, its classes, its input."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from launcher.checkpoint.run_files import RunFiles
from launcher.checkpoint.weights import load_weights
from launcher.config import annotations, imports, loader
from launcher.config.imports import neighbours_of
from launcher.config.loader import LoadedRecipe
from launcher.config.overrides import override
from launcher.config.recipe import Recipe
from launcher.config.settings import walk
from launcher.data.batches import Normalize
from launcher.data.decoding import fitted, open_picture
from launcher.data.image_folder import margin_of_source
from launcher.data.images import ImageSet
from launcher.errors import UserError
from launcher.training.model import build_network
from launcher.training.network import first_parameter, upcast
from launcher.utils import json_text
from launcher.utils.json_text import flatten
from launcher.utils.text import some

Picture = str | Path | Image.Image | Tensor
MOST_COMPARED = 64  # pictures of a run, the answers to which are compared when it is loaded
OTHER_ANSWERS = 0.1  # of a probability: half precision, and a GPU, round otherwise than this CPU
# Settings of the network, and those that are needed to find the evaluated images again.
_OF_THE_MODEL = ("model", "data", "seed")


@dataclass(frozen=True)
class TrainedRun:
    """What a run has trained: `model` in evaluation mode, on the CPU, and its `classes`."""

    model: nn.Module
    classes: tuple[str, ...]
    recipe: Recipe
    image_shape: tuple[int, int, int]  # height, width, channels

    def prepare(self, pictures: Picture | list[Picture] | tuple[Picture, ...]) -> Tensor:
        """From pictures to the model's input: normalized images `(n, c, h, w)`.

        A picture is a path, a PIL image, or a uint8 tensor `(c, h, w)`. Paths and PIL images are
        scaled and cropped as the run's own were. Raises `UserError` for tensors of another shape,
        and for files that are no whole picture.
        """
        several = pictures if isinstance(pictures, list | tuple) else [pictures]
        if not several:
            raise UserError(
                "no pictures", expected="one at least", instead='write run.prepare("picture.png")'
            )
        return self.normalize(torch.stack([self.pixels(picture) for picture in several]))

    def normalize(self, pixels: Tensor) -> Tensor:
        """From uint8 `(n, h, w, c)` to the model's input, on its device."""
        like, shape = first_parameter(self.model), torch.Size(self.image_shape)
        return Normalize(self.recipe.data, shape, like, contiguous=True)(pixels.to(like.device))

    def pixels(self, picture: Picture) -> Tensor:
        """A picture as uint8 `(h, w, c)` of the run's size."""
        height, width, channels = self.image_shape
        if isinstance(picture, Tensor):
            wanted = (channels, height, width)
            if picture.dtype != torch.uint8 or tuple(picture.shape) != wanted:
                raise UserError(
                    f"a picture of {picture.dtype} {tuple(picture.shape)}",
                    expected=f"torch.uint8 {wanted}",
                    instead="give its path or a PIL image, which are scaled",
                )
            return picture.permute(1, 2, 0)
        if not isinstance(picture, str | Path | Image.Image):
            raise UserError(
                f"a picture that is a {type(picture).__name__}",
                expected="a path, a PIL image, or a uint8 tensor (c, h, w)",
                instead="write PIL.Image.fromarray(array) for an array (h, w, c) of uint8",
            )
        if not isinstance(picture, Image.Image) and not Path(picture).is_file():
            raise UserError(
                f"{picture}: no such file", expected="a picture", instead="check the path"
            )
        mode = "L" if channels == 1 else "RGB"
        margin = margin_of_source(self.recipe.data.source, height)
        if isinstance(picture, Image.Image):
            pixels = fitted(picture, (width, height), mode, margin)
        else:
            with open_picture(Path(picture)) as opened:
                pixels = fitted(opened, (width, height), mode, margin)
        return torch.from_numpy(numpy.array(pixels)).reshape(self.image_shape)


def load_run(
    folder: str | Path,
    *,
    weights: Literal["best", "final"] = "best",
    recipe: Recipe | None = None,
) -> TrainedRun:
    """The model of a run folder such as `runs/first`, with its best or its final weights.

    The network is built by the copy of the recipe file in the folder, with the settings that the
    run had; a run of a `Recipe` value needs that `recipe` again. Runs the recipe's code: load only
    runs that you trust. Raises `UserError` for a folder without a run or its weights, and where the
    network gives other answers than the run wrote down, as with code that was edited since.
    """
    given = ((folder, str | Path), (recipe, Recipe | None))
    if not all(isinstance(value, kind) for value, kind in given):
        raise UserError(
            f"load_run({type(folder).__name__}, recipe={type(recipe).__name__})",
            expected="the folder of a run, and a Recipe where that has no recipe file",
            instead='write load_run("runs/first"), for example',
        )
    path = Path(folder)
    config = _read(path / "config.json", model=dict, data=dict)
    about = _read(path / "run.json", image_shape=tuple[int, int, int], classes=tuple[str, ...])
    if recipe is None:
        recipe = _recipe_of(path, config, about)
    shape, classes = tuple(about["image_shape"]), tuple(about["classes"])
    run = run_of(recipe, _weights_of(path, weights), blank_images(shape, classes))
    _refuse_other_answers(run, RunFiles(path), weights)
    return run


def _refuse_other_answers(run: TrainedRun, files: RunFiles, weights: str) -> None:
    """Compare the answers to the pictures that the run kept with those that it wrote down.

    Where it kept them in their own size, and the network answers the same each time; not while it
    writes weights and answers, one after the other.
    """
    kept = files.best if weights == "best" else files.last
    if kept is None or kept.pictures.shape[1:] != run.image_shape or files.state == "running":
        return
    if weights == "final" and files.epochs and kept.epoch != files.epochs[-1]["epoch"]:
        return
    places = kept.pictured[:MOST_COMPARED]
    labels = torch.from_numpy(kept.truth[places].astype("int64"))
    images = run.normalize(torch.from_numpy(kept.pictures[:MOST_COMPARED]))
    with torch.inference_mode():
        found, again = (upcast(run.model(images)).softmax(1) for _ in range(2))
    recorded = torch.from_numpy(kept.probability_of_truth[places])
    gap = float((found.gather(1, labels[:, None])[:, 0] - recorded).abs().max())
    if torch.equal(found, again) and gap > OTHER_ANSWERS:
        folder = Path(str(files.about.get("recipe_folder") or files.path))
        edited = imports.changed(files.about.get("neighbours"), neighbours_of(files.source, folder))
        what = f"{some(edited)} of {folder}" if edited else "its files, and what they import,"
        raise UserError(
            f"{files.path}, whose network gives other answers than the run wrote down: a "
            f"probability is {gap:.2g} beside it",
            expected="the code and the weights with which the run was evaluated",
            instead=f"put {what} back as before",
        )


def run_of(recipe: Recipe, weights: Path, images: ImageSet) -> TrainedRun:
    """The recipe's network with the weights of a file; for images such as these."""
    network = build_network(recipe, images)
    load_weights(network, weights)
    return TrainedRun(network.eval(), images.classes, recipe, images.shape)


def blank_images(shape: tuple[int, int, int], classes: tuple[str, ...]) -> ImageSet:
    """One black image of the run's shape."""
    return ImageSet(torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(1).long(), classes)


def _recipe_of(path: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> Recipe:
    """The recipe in the folder, with the run's settings of the model and of its images."""
    source = path / "recipe.py"
    if not source.is_file() or not source.read_bytes().strip():
        raise UserError(
            f"{path}, a run without a recipe file",
            expected="the recipe that was trained",
            instead="write load_run(FOLDER, recipe=THE_RECIPE)",
        )
    loaded = _loaded(source, Path(str(about.get("recipe_folder") or path)))
    # Only for training, and refused without validation images.
    recipe = replace(loaded.recipe, patience=None)
    before, now = (_typed(own) for own in (config, json.loads(json.dumps(loaded.config))))
    names = {part.name for part in walk(recipe)}
    # Values that differ from the recipe were typed, so they can be parsed; others need not be.
    changed = {n: word for n, word in before.items() if n in names and word != now.get(n)}
    return override(
        recipe,
        [
            f"{name}={word}"
            for name, word in changed.items()
            if name.partition(".")[0] in _OF_THE_MODEL
            and " at 0x" not in word  # an address in memory, different in each process
        ],
    )


def _loaded(source: Path, folder: Path) -> LoadedRecipe:
    """Load the recipe of a run; the modules beside it are still in its original folder."""
    try:
        return loader.load(source, folder if folder.is_dir() else None)
    except UserError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        name = error.__cause__.name or "?"
        raise UserError(
            f"{source} imports {name}, which is neither installed nor in {folder}",
            expected="what the recipe imported when it was trained",
            instead=f"put {name.replace('.', '/')}.py into {folder} again or install {name}; in "
            "Python, write load_run(FOLDER, recipe=THE_RECIPE)",
        ) from None


def _typed(config: Any) -> dict[str, str]:
    """The values of a config as on the command line, by name."""
    return {name: _as_word(value) for name, value in flatten(_by_name(config)).items()}


def _by_name(value: Any) -> Any:
    """Code in a tuple under its name, by which an override finds it, and not under its place."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        named = (item for item in value if isinstance(item, Mapping))
        value = {re.split("[:.]", str(item.get("call")))[-1]: item for item in named}
    if isinstance(value, Mapping):
        return {name: _by_name(item) for name, item in value.items()}
    return value


def _as_word(value: Any) -> str:
    is_dict = isinstance(value, str) and value.startswith("{")  # a dict is recorded as text
    return value if is_dict else repr(value)


def _weights_of(path: Path, which: str) -> Path:
    file = path / f"{which}.safetensors"
    if file.is_file():
        return file
    other = "final" if which == "best" else "best"
    has_other = (path / f"{other}.safetensors").is_file()
    lacks = f"has no {'' if has_other else 'weights yet, and so no '}{file.name}"
    raise UserError(
        f"{path} {lacks}",
        expected="the best weights after the first epoch, the final ones after the last",
        instead=f"type --weights {other}; in Python, weights={other!r}"
        if has_other
        else "wait for the first epoch of the run, or name another folder",
    )


def _read(path: Path, **parts: Any) -> dict[str, Any]:
    """Read a JSON file that has at least these keys with values of these types."""
    try:
        content = json_text.read(path)
        for name, annotation in parts.items():
            if not annotations.convert(content[name], annotation)[0]:
                raise ValueError(f"{name} in {path.name} is no {annotations.describe(annotation)}")
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.parent}, which is no run folder ({error})",
            expected="the folder of a run, such as runs/first",
            instead="see which runs there are: ls runs",
        ) from None
