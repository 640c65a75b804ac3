"""What W&B gets at the end of a run: its worst mistakes, its classes, its page, its weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint.outcomes import WORST, Outcomes, as_picture, class_accuracies
from launcher.checkpoint.run_files import RunFiles
from launcher.loggers import report

if TYPE_CHECKING:
    import wandb

MODEL_FILES = ("config.json", "run.json", "recipe.py")  # by which load_run builds the network


def tables(folder: Path) -> "dict[str, wandb.Table]":
    """Of the best epoch: its worst mistakes with their pictures, and the accuracy of each class."""
    files = RunFiles(folder)
    best = files.best
    if best is None:
        return {}
    return {
        "worst_mistakes": _worst_mistakes(files, best),
        "class_accuracy": _class_accuracy(files, best),
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


def _worst_mistakes(files: RunFiles, best: Outcomes) -> "wandb.Table":
    import wandb

    columns: list[str | int] = ["image", "truth", "prediction", "confidence"]
    columns += ["of the truth", "loss", "file"]
    pictures = dict(zip(best.pictured.tolist(), best.pictures, strict=True))
    rows = []
    for place in best.mistakes[:WORST].tolist():
        numbers = (best.probability[place], best.probability_of_truth[place], best.loss[place])
        rows.append(
            [
                wandb.Image(as_picture(pictures[place])) if place in pictures else None,
                files.class_name(int(best.truth[place])),
                files.class_name(int(best.predicted[place])),
                *map(float, numbers),
                files.image_name(place),
            ]
        )
    return wandb.Table(columns=columns, data=rows)


def _class_accuracy(files: RunFiles, best: Outcomes) -> "wandb.Table":
    import wandb

    found = class_accuracies(best.confusion)
    rows = [[files.class_name(number), *found[number]] for number in sorted(found)]
    return wandb.Table(columns=["class", "accuracy", "images"], data=rows)
