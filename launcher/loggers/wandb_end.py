"""What W&B gets at the end of a run: its worst mistakes, its classes, its page, its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from launcher.checkpoint.outcomes import WORST, Outcomes
from launcher.checkpoint.run_files import RunFiles
from launcher.loggers import report
from launcher.utils.redaction import redacted

if TYPE_CHECKING:
    import wandb

MODEL_FILES = ("config.json", "run.json", "recipe.py")  # by which load_run builds the network


def tables(folder: Path) -> "dict[str, wandb.Table]":
    """Of the best epoch: its worst mistakes with their pictures, and the accuracy of each class."""
    files = RunFiles(folder)
    best = files.best
    if best is None:
        return {}
    names = files.about.get("classes")
    classes = [str(name) for name in names] if isinstance(names, list) else []
    return {
        "worst_mistakes": _worst_mistakes(files, best, classes),
        "class_accuracy": _class_accuracy(best, classes),
    }


def artifacts(
    folder: Path, run_id: str, *, has_report: bool, has_model: bool
) -> "Iterator[wandb.Artifact]":
    """The page with the script that draws its charts, and the weights; each if it is wanted.

    Raises `OSError` where the page could not be made.
    """
    import wandb

    if has_report:
        complaint = report.write(folder)
        page = report.page_of(folder)
        if not page.is_file():
            raise FileNotFoundError(complaint or "there is no page of the run")
        made = wandb.Artifact(f"report-{run_id}", "report")
        for path in sorted(page.parent.iterdir()):
            if not path.name.startswith("."):
                made.add_file(str(path), path.name, skip_cache=True)
        yield made
    if has_model:
        kept = [folder / f"{name}.safetensors" for name in ("best", "final")]
        weights = [path for path in kept if path.is_file()]
        best = RunFiles(folder).best
        about = {"epoch": best.epoch} if best else {}
        made = wandb.Artifact(f"model-{run_id}", "model", metadata=about)
        for path in (*weights[:1], *(folder / name for name in MODEL_FILES)):
            if path.is_file():  # not copied: nothing changes it after the end
                made.add_file(str(path), path.name, skip_cache=True, policy="immutable")
        yield made


def _worst_mistakes(files: RunFiles, best: Outcomes, classes: list[str]) -> "wandb.Table":
    import wandb

    columns: list[str | int] = ["image", "truth", "prediction", "confidence"]
    columns += ["of the truth", "loss", "file"]
    pictures = dict(zip(best.pictured.tolist(), best.pictures, strict=True))
    rows = []
    for place in best.mistakes[:WORST].tolist():
        has_file = best.files.shape == best.truth.shape
        numbers = (best.probability[place], best.probability_of_truth[place], best.loss[place])
        rows.append(
            [
                wandb.Image(_picture(pictures[place])) if place in pictures else None,
                _name(classes, int(best.truth[place])),
                _name(classes, int(best.predicted[place])),
                *map(float, numbers),
                redacted(str(best.files[place])) if has_file else files.image_name(place),
            ]
        )
    return wandb.Table(columns=columns, data=rows)


def _class_accuracy(best: Outcomes, classes: list[str]) -> "wandb.Table":
    import wandb

    images: dict[int, int] = {}
    right: dict[int, int] = {}
    for truth, found, number in best.confusion:
        images[truth] = images.get(truth, 0) + number
        right[truth] = right.get(truth, 0) + (number if truth == found else 0)
    rows = [[_name(classes, c), right[c] / images[c], images[c]] for c in sorted(images)]
    return wandb.Table(columns=["class", "accuracy", "images"], data=rows)


def _name(classes: list[str], number: int) -> str:
    return redacted(classes[number]) if number < len(classes) else f"class {number}"


def _picture(pixels: Any) -> Image.Image:
    """As in the page: of an image that is not RGB or RGBA, the first channel as grey."""
    return Image.fromarray(pixels if pixels.shape[-1] in (3, 4) else pixels[..., 0])
