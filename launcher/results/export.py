"""`launcher export RUN --to FORM FOLDER`: the trained network as a file that runs elsewhere.

Each export is tested: the evaluated images go through the exported form, and its scores are
compared with those of the run's network, and its answers with those that the run recorded.
Where they differ, the export is refused, and nothing is left behind.
"""

import io
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from launcher.checkpoint.run_files import RunFiles, find
from launcher.checkpoint.weights import save_weights
from launcher.config.recipe import Recipe
from launcher.data import sources
from launcher.data.images import ImageSet
from launcher.errors import NotExportableError, UserError
from launcher.results.card import model_card
from launcher.results.hub import push, refuse_unready
from launcher.results.load import TrainedRun, blank_images, load_run, run_of
from launcher.training.network import takes_hooks, upcast
from launcher.utils.arguments import Parser, refuse_no_folder
from launcher.utils.text import count, sizes

FORMS = ("torch", "onnx", "safetensors", "hub")
_OF_WEIGHTS = ("safetensors", "hub")  # forms that need the recipe to build the network
# Largest difference of a score, relative to the largest score: other programs sum in other orders.
TOLERANCE = 1e-4
# Largest difference of a recorded probability: for runs in fp32, and in half precision.
RECORDED, RECORDED_HALF = 1e-3, 0.1
BATCH = 200
_USAGE = (
    "launcher export RUN --to torch|onnx|safetensors|hub FOLDER [--from-pixels] [--push OWNER/NAME]"
)

Answer = Callable[[Tensor], Tensor]  # the exported form: a batch -> scores or probabilities


class Deployed(nn.Module):
    """The network in evaluation mode; with `from_pixels`, also normalization and a softmax.

    So it takes normalized images `(n, c, h, w)` and returns scores, or uint8 ones and returns
    probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, run: TrainedRun, *, from_pixels: bool) -> None:
        """Of a run."""
        super().__init__()
        self.network, self.from_pixels = run.model, from_pixels
        data = run.recipe.data
        for name, values in (("mean", data.mean), ("std", data.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores, or probabilities."""
        if not self.from_pixels:
            return upcast(self.network(images))
        normalized = (images.float() / 255 - self.mean) / self.std
        return upcast(self.network(normalized)).softmax(1)


@dataclass(frozen=True)
class Proof:
    """What was compared: the number of evaluated images, and the largest difference of an output.

    `probabilities` `(images,)` are those that the trained network gives the true classes.
    """

    images: int
    gap: float
    accuracy: float
    probabilities: NDArray[Any]
    whole: bool = True  # all images that the run evaluated, not only the pictures that it kept
    kind: str = "test"  # or validation

    def agreement(self) -> str:
        """How near the outputs are."""
        which = f"{self.images:,} images"
        if self.whole:
            which = f"all {self.images:,} {self.kind} images"
        return (
            f"on {which}, outputs within {self.gap:.1e} of the trained network's and the "
            "same answers"
        )

    def sentence(self) -> str:
        """In words, for the terminal; a model card quotes the run's own accuracy instead."""
        return f"{self.agreement()}; accuracy {self.accuracy:.2%}"


def main(words: Sequence[str]) -> int:
    """Run the words behind `launcher export`."""
    parser = Parser(prog="launcher export", usage=_USAGE, description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder, or the name of a run")
    add("folder", nargs="?", type=Path, help="a new folder for the export")
    add("--to", choices=FORMS, default="torch", help="default: torch (torch.export)")
    add("--from-pixels", action="store_true", help="uint8 pictures in, probabilities out")
    add("--weights", choices=("best", "final"), default="best", help="default: best")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs")
    add("--data", metavar="ROOT", help="where the images are, if no longer in data.root")
    pushes = "upload a proved folder of --to hub, to a private repository if it is a new one"
    add("--push", metavar="OWNER/NAME", help=pushes)
    arguments = parser.parse_intermixed_args(words)
    if arguments.folder is None:
        parser.error("no run or no folder is named")
    if arguments.from_pixels and arguments.to in _OF_WEIGHTS:
        parser.error(f"--from-pixels goes with --to torch or onnx, not with {arguments.to}")
    if arguments.push is not None:
        if arguments.to != "hub":
            parser.error("--push needs --to hub")
        refuse_unready(arguments.push)
    _refuse_taken(arguments.folder)
    files = find(arguments.run, arguments.runs)
    run = load_run(files.path, weights=arguments.weights)
    images, whole = evaluated_images(files, run, arguments.data)
    folder = arguments.folder
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        facts = about(run, files.config, files.about.get("versions", {}))
        answer = write(run, facts, arguments.to, temporary, from_pixels=arguments.from_pixels)
        if files.source and arguments.to in _OF_WEIGHTS:
            (temporary / "recipe.py").write_text(files.source, encoding="utf-8")
        recorded = files.best if arguments.weights == "best" else files.last
        proof = prove(run, answer, images, from_pixels=arguments.from_pixels)
        if whole and recorded is not None:
            refuse_other_answers(proof, recorded.probability_of_truth, files)
        proof = replace(proof, whole=whole, kind=files.images)
        if arguments.to == "hub":
            card = model_card(files, arguments.weights, proof.agreement())
            (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:  # also where another export has come first
        raise UserError(
            f"{folder}, which cannot be written ({error.strerror or error})",
            expected="a new folder for the export, and room for it",
            instead="make room, or name another folder",
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    size = sizes(sum(path.stat().st_size for path in folder.iterdir()))
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    sys.stdout.write(f"{folder}: {names} ({size})\nproved {proof.sentence()}\n")
    if arguments.push is not None:
        sys.stdout.write(f"pushed to {push(folder, arguments.push)}\n")
    return 0


def proved(recipe: Recipe, weights: Path, test: ImageSet, folder: Path) -> str:
    """Export a recipe's network with these weights by torch.export; returns the agreement in words.

    Raises `NotExportableError` where it cannot be exported, and `UserError` where its outputs are
    others.
    """
    run = run_of(recipe, weights, test)
    answer = write(run, {}, "torch", folder, from_pixels=False)
    return replace(prove(run, answer, test, from_pixels=False), whole=False).agreement()


def _refuse_taken(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"{folder}, which exists already",
            expected="a new folder for the export",
            instead=f"type {folder}-2, for example, or remove it",
        )
    refuse_no_folder(folder)


# The images of the proof


def evaluated_images(files: RunFiles, run: TrainedRun, root: str | None) -> tuple[ImageSet, bool]:
    """The images that the run evaluated, and True; else the pictures that it kept, and False.

    Raises `UserError` where there are neither.
    """
    data = run.recipe.data
    root = root or files.config.get("data", {}).get("root")
    data = replace(data, root=root) if isinstance(root, str) else data
    for source in filter(None, (data.source, data.fallback)):
        wanted = replace(data, source=source, fallback=None)
        loaded = sources.open_on_disk(wanted, run.recipe.seed)
        if loaded is not None and loaded.digest == files.about.get("data_digest"):
            return loaded.evaluated, True
    kept = files.best or files.last
    if kept is None or kept.pictures.shape[1:] != run.image_shape:
        raise UserError(
            f"{files.path}, whose images are not on this machine",
            expected="the images that it evaluated, by which the export is proved",
            instead="type --data FOLDER, in which they are",
        )
    labels = torch.from_numpy(kept.truth[kept.pictured].astype("int64"))
    return ImageSet(torch.from_numpy(kept.pictures), labels, run.classes), False


# The forms


def write(
    run: TrainedRun, facts: dict[str, Any], form: str, folder: Path, *, from_pixels: bool
) -> Answer:
    """Write one form and its `facts`; returns a function that reads it back and computes with it.

    Raises `NotExportableError` where the network cannot be exported, and `UserError` where what is
    needed is not installed.
    """
    if form in _OF_WEIGHTS:
        return _write_weights(run, facts, folder)
    deployed = Deployed(run, from_pixels=from_pixels).eval()
    example = _example(run, from_pixels=from_pixels)
    shapes = ({0: Dim("batch", min=1)},)
    try:
        with _without_torchs_words():
            if form == "onnx":
                return _write_onnx(run, deployed, example, folder / "model.onnx")
            program = torch.export.export(deployed, (example,), dynamic_shapes=shapes, strict=False)
    except (UserError, OSError):
        raise
    except Exception as error:
        raise _not_exportable(run.model, form, error) from error
    path = folder / "model.pt2"
    content = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, content, extra_files={"about.json": json.dumps(facts)})
    path.write_bytes(content.getbuffer())
    with warnings.catch_warnings():  # torch before 2.14 reads from a buffer that is not writable
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        module = torch.export.load(path).module()
    return lambda images: module(images)


@contextmanager
def _without_torchs_words() -> Iterator[None]:
    """Where torch cannot export, it prints all that it has traced before the exception."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _not_exportable(network: nn.Module, form: str, error: Exception) -> NotExportableError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # torch puts its own advice around what has happened
        cause = cause.__cause__
    first, *others = str(cause).strip().splitlines() or [type(cause).__name__]
    place = next((line for line in others if line.startswith("Caused by: ")), "")
    expected = "a network whose forward depends on the images alone, in any number"
    instead = "write x.flatten(1) for x.view(...) with numbers, or type --to safetensors"
    if form == "onnx":
        instead = "type --to torch, which has room for more operations, or --to safetensors"
    if not all(map(takes_hooks, network.modules())):
        first, place = "torch.jit has compiled it, or a part of it", ""
        expected = "a network of plain modules"
        instead = "leave out torch.jit.script(...) in the recipe, or type --to safetensors"
    return NotExportableError(
        f"{type(network).__name__}, which cannot be exported as {form}: {first} {place}".rstrip(),
        expected=expected,
        instead=instead,
    )


def _example(run: TrainedRun, *, from_pixels: bool) -> Tensor:
    height, width, channels = run.image_shape
    pixels = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2).contiguous() if from_pixels else run.normalize(pixels)


def _write_onnx(run: TrainedRun, deployed: nn.Module, example: Tensor, path: Path) -> Answer:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 -- which torch's exporter needs
    except ModuleNotFoundError as error:
        raise UserError(
            f"--to onnx needs the module {error.name!r}, which is not installed",
            expected="onnx, onnxscript and onnxruntime",
            instead="type pip install 'launcher[export]'",
        ) from None
    program = torch.onnx.export(
        deployed,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: Dim("batch", min=1)},),
    )
    assert program is not None
    program.save(str(path), external_data=False)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"classes": json.dumps(run.classes)})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> Tensor:
        (scores,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(scores)

    return answer


def _write_weights(run: TrainedRun, facts: dict[str, Any], folder: Path) -> Answer:
    path = folder / "model.safetensors"
    save_weights(run.model, path)
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    network = run_of(run.recipe, path, blank_images(run.image_shape, run.classes)).model
    return lambda images: upcast(network(images))


def about(
    run: TrainedRun, config: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    """What a user of the network needs: its classes, its input, its origin."""
    height, width, channels = run.image_shape
    return {
        "classes": list(run.classes),
        "input": {
            "shape": ["n", channels, height, width],
            "scale": "pixels / 255, minus mean, over std",
            "mean": list(run.recipe.data.mean),
            "std": list(run.recipe.data.std),
        },
        "recipe": config,
        "versions": versions,
    }


# The proof


def prove(run: TrainedRun, answer: Answer, images: ImageSet, *, from_pixels: bool) -> Proof:
    """Compare the exported form with the trained network on these images.

    Raises `UserError` where an output differs by more than the tolerance, or an answer that is not
    a tie within it.
    """
    gaps, largest, right, shares = [0.0], 1.0, 0, []
    for first in range(0, len(images), BATCH):
        part = slice(first, first + BATCH)
        pixels, labels = images.pixels(part), images.labels[part]
        given = pixels.permute(0, 3, 1, 2).contiguous() if from_pixels else run.normalize(pixels)
        with torch.inference_mode():
            expected = upcast(run.model.eval()(run.normalize(pixels)))
        shares.append(expected.softmax(1).gather(1, labels[:, None])[:, 0])
        expected = expected.softmax(1) if from_pixels else expected
        with torch.no_grad():
            found = answer(given)
        if found.shape != expected.shape or not found.isfinite().all():
            raise _refused(f"makes {tuple(found.shape)} of {tuple(given.shape)}, or no numbers")
        gap = float((found - expected).abs().max())
        largest = max(largest, float(expected.abs().max()))
        gaps.append(gap)
        best = expected.topk(2).values
        is_clear = best[:, 0] - best[:, 1] > 2 * TOLERANCE * largest
        differ = (found.argmax(1) != expected.argmax(1)) & is_clear
        if gap > TOLERANCE * largest or bool(differ.any()):
            _refuse_unsteady(run, pixels, largest)
            more = f", and {count(int(differ.sum()), 'answer')} of {len(pixels)} differ"
            raise _refused(f"its outputs are up to {gap:.3g} beside the trained network's{more}")
        right += int((found.argmax(1) == labels).sum())
    return Proof(len(images), max(gaps), right / len(images), torch.cat(shares).numpy())


def _refuse_unsteady(run: TrainedRun, pixels: Tensor, largest: float) -> None:
    """Refuse a network whose own scores of the same images differ: no form of it is the same."""
    with torch.inference_mode():
        one, two = (upcast(run.model(run.normalize(pixels))) for _ in range(2))
    if (one - two).abs().max() > TOLERANCE * largest:
        raise UserError(
            f"{type(run.model).__name__}, whose scores of the same images differ from call to call",
            expected="a network that draws nothing in evaluation, and keeps nothing of a call",
            instead="see which line does so: type launcher check RECIPE",
        )


def refuse_other_answers(proof: Proof, recorded: NDArray[Any], files: RunFiles) -> None:
    """Raise `UserError` where the network's answers are not those that the run recorded.

    This finds weights that were changed since, and other recipe files.
    """
    if len(recorded) != proof.images:
        return
    gap = float(numpy.abs(proof.probabilities - recorded).max())
    is_half = not str(files.about.get("precision", "fp32")).startswith("fp32")
    if gap > (RECORDED_HALF if is_half else RECORDED):
        raise _refused(
            f"{files.path} has other weights than those that it evaluated: a probability is "
            f"{gap:.3g} beside the one that was written down"
        )


def _refused(what: str) -> UserError:
    return UserError(
        f"the export is not the trained network: {what}",
        expected=f"outputs within {TOLERANCE:g} of the largest, and the same answers",
        instead="keep the run as it is, and try another form with --to",
    )
