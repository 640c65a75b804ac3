"""The page of one run: the content of its folder, arranged for the templates.

Everything that is shown is text to Jinja2, which escapes it; what a script reads is JSON whose
`<`, `>` and `&` are escaped as well, so no name ends the element it stands in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from launcher.checkpoint.outcomes import MOST_CLASSES, SUREST, WORST, Outcomes
from launcher.checkpoint.run_files import RunFiles
from launcher.results import figures, html
from launcher.results.figures import Bin, ClassRow, Filters, number
from launcher.results.html import percent
from launcher.results.sprites import Sheet, sheet
from launcher.utils.json_text import flatten
from launcher.utils.redaction import cleaned, redacted
from launcher.utils.text import count, duration, of_uncertain, some, spread

if TYPE_CHECKING:  # torch
    from launcher.results.gradcam import Looks

MOST_EPOCHS = 100  # positions of the slider of the samples
FILTER_PIXELS = 48
_CURVES = {
    "train_loss": "train/loss",
    "evaluated_loss": "{}/loss",
    "accuracy": "{}/accuracy",
    "accuracy_tta": "{}/accuracy_tta",
    "top5": "{}/top5",
    "learning_rate": "train/learning_rate",
    "images_per_second": "train/images_per_second",
}
_NOT_FACTS = (
    *("recipe", "name", "recipe_folder", "fallback", "started", "wandb_id", "data_digest"),
    "weights_digest",
    "evaluated_on",
)


@dataclass(frozen=True)
class Answer:
    """One test image and its prediction; `picture` is its place in the sheet, if kept."""

    name: str
    truth: str
    predicted: str
    probability: str
    probability_of_truth: str
    loss: str
    is_right: bool
    picture: str | None


class Page:
    """The page of one run; each file is read once."""

    def __init__(self, run: RunFiles, looks: "Looks | None" = None) -> None:
        """Nothing is read yet; `looks` are the Grad-CAM maps, if there are some."""
        self.run, self.looks = run, looks

    @property
    def notes(self) -> list[str]:
        """What is missing, and why, as far as that is known."""
        run, notes = self.run, []
        if not run.about:
            notes.append("run.json cannot be read: what was trained, and on what, is unknown.")
        if not run.config:
            notes.append("config.json cannot be read: the settings are unknown.")
        if not run.epochs:
            why = "no epoch has ended yet" if run.state == "running" else "no epoch has ended"
            notes.append(f"metrics.jsonl has no whole line ({why}): there are no curves.")
        if self.outcomes is None:
            files = [f for f in ("best.npz", "last.npz") if (run.path / f).exists()]
            why = f"{' and '.join(files)} cannot be read" if files else "there is no best.npz"
            notes.append(f"{why}: there are no mistakes, no pictures and no calibration.")
        elif run.best is None:
            notes.append("best.npz cannot be read: what follows is of the last epoch.")
        lost = [r["epoch"] for r in run.epochs if number(r.get(run.key("loss"))) is None]
        if run.chosen_after:
            notes.append(
                f"The figures up to epoch {run.chosen_after} are of other images, or of a network "
                "with other answers, than those since."
            )
        if lost:
            notes.append(f"The {run.images} loss is not a finite number in {_epochs(lost)}.")
        if run.epochs and not self.samples["epochs"]:
            notes.append("details.jsonl has no whole line: the fixed samples are not shown.")
        return notes

    @property
    def facts(self) -> dict[str, str]:
        """The facts of the run, in the order of `run.json`."""
        run, about = self.run, self.run.about
        facts = {"run": run.name, "recipe": str(about.get("recipe", run.recipe))}
        facts |= {
            name: value
            for name, value in about.items()
            if isinstance(value, str) and name not in _NOT_FACTS
        }
        versions = about.get("versions")
        if isinstance(versions, Mapping):
            facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
        seconds = [s for row in run.epochs if (s := number(row.get("seconds"))) is not None]
        if seconds:
            facts["time"] = f"{duration(sum(seconds))} in {count(len(seconds), 'epoch')}"
        if run.started:
            facts["began"] = f"{run.started:%Y-%m-%d %H:%M:%S} (the last attempt)"
        if ended := _moment(run.end.get("time")):
            facts["ended"] = f"{ended:%Y-%m-%d %H:%M:%S}"
        if run.changes:
            facts["changed"] = "; ".join(map(str, run.changes))
        code = run.end.get("exit_code")
        known = "" if code is None else f", exit code {code}"
        why = run.end.get("why")
        facts["state"] = f"{run.state}{known}" + (f": {why}" if why else "")
        cleaned_facts: dict[str, str] = cleaned(facts)
        return cleaned_facts

    @property
    def warning(self) -> str:
        """A line where other images than the recipe's were used."""
        return redacted(str(self.run.about.get("fallback", "")))

    @property
    def outcomes(self) -> Outcomes | None:
        """The outcomes of the epoch whose mistakes, pictures and calibration are shown."""
        return self.run.outcomes

    @cached_property
    def classes(self) -> list[str]:
        """Names for all classes that occur."""
        numbers = [n for truth, found, _ in self.cells for n in (truth, found)]
        total = max(len(self.run.classes), max(numbers, default=-1) + 1)
        return [self.run.class_name(n) for n in range(total)]

    @property
    def best_row(self) -> dict[str, Any] | None:
        """The metrics of the epoch whose outcomes are shown, or of the best one."""
        if self.outcomes is not None:
            for row in self.run.epochs:
                if row["epoch"] == self.outcomes.epoch:
                    return row
        return self.run.best_row

    @cached_property
    def cells(self) -> list[tuple[int, int, int]]:
        """Of the confusion matrix: truth, prediction, images."""
        if self.outcomes is not None:
            return self.outcomes.confusion
        best = self.best_row
        details = [d for d in self.run.details if best and d["epoch"] == best["epoch"]]
        cells = details[-1].get("confusion") if details else None
        if not isinstance(cells, list) or not all(map(_is_cell, cells)):
            return []
        return [(truth, found, images) for truth, found, images in cells]

    @property
    def confusions(self) -> list[dict[str, str]]:
        """The largest confusions, in words."""
        return figures.largest_confusions(self.cells, self.classes)

    @property
    def class_rows(self) -> list[ClassRow]:
        """The accuracy of each class; of very many, the lowest."""
        return figures.class_rows(self.cells, self.classes)

    # Pictures

    @cached_property
    def sheet(self) -> Sheet | None:
        """All pictures that are kept."""
        found = self.outcomes
        return sheet(found.pictures) if found is not None and len(found.pictures) else None

    @cached_property
    def _numbers(self) -> dict[int, int]:
        """Of a test image, the number of its picture in the sheet."""
        if self.outcomes is None:
            return {}
        return {place: n for n, place in enumerate(self.outcomes.pictured.tolist())}

    def _answers(self, places: NDArray[Any]) -> list[Answer]:
        return [self._answer(place) for place in places.tolist()]

    def _answer(self, place: int) -> Answer:
        found, picture = self.outcomes, self._numbers.get(place)
        assert found is not None
        truth, predicted = int(found.truth[place]), int(found.predicted[place])
        return Answer(
            self.run.image_name(place),
            self.classes[truth],
            self.classes[predicted],
            percent(float(found.probability[place])),
            percent(float(found.probability_of_truth[place])),
            f"{found.loss[place]:.2f}",
            truth == predicted,
            self.sheet.position(picture) if picture is not None and self.sheet else None,
        )

    @property
    def worst(self) -> list[Answer]:
        """The mistakes of the highest loss."""
        return self._answers(self.outcomes.mistakes[:WORST]) if self.outcomes else []

    @cached_property
    def looks_sheet(self) -> Sheet | None:
        """The worst mistakes under the maps of where the network looked."""
        return sheet(self.looks.pictures) if self.looks else None

    @property
    def surest(self) -> list[Answer]:
        """The right answers of the highest probability."""
        return self._answers(self.outcomes.surest[:SUREST]) if self.outcomes else []

    @cached_property
    def filters(self) -> Filters | None:
        """Of the first convolution of the best weights."""
        shape = self.run.about.get("image_shape")
        channels = shape[-1] if isinstance(shape, list) and shape else None
        return figures.first_filters(self.run.path / "best.safetensors", channels)

    @cached_property
    def filter_sheet(self) -> Sheet | None:
        """The filters as pictures."""
        return sheet(self.filters.pictures, FILTER_PIXELS) if self.filters else None

    # For the script of the page

    @cached_property
    def samples(self) -> dict[str, Any]:
        """The predictions for the fixed test images in each epoch; probabilities in thousandths."""
        indices = self.run.about.get("samples")
        places = [n for n in indices if isinstance(n, int)] if isinstance(indices, list) else []
        rows = {row["epoch"]: row["samples"] for row in self.run.details if _has_samples(row)}
        epochs = spread([e for e in sorted(rows) if e > self.run.chosen_after], MOST_EPOCHS)
        return {
            "epochs": epochs if places else [],
            "best": [[_scores(scores) for scores in rows[e][: len(places)]] for e in epochs],
            "names": [self.run.image_name(place) for place in places],
            "truth": [self._truth(place) for place in places],
            "pictures": [self._numbers.get(place) for place in places],
        }

    def _truth(self, place: int) -> int | None:
        found = self.outcomes
        return int(found.truth[place]) if found and 0 <= place < len(found.truth) else None

    @cached_property
    def data(self) -> dict[str, Any]:
        """The data of the charts, without NaN, which JSON does not have."""
        curves = {
            name: [number(row.get(key.format(self.run.evaluated_on))) for row in self.run.epochs]
            for name, key in _CURVES.items()
        }
        bins, _ = self._reliability
        sheet = self.sheet
        return {
            "classes": self.classes,
            "epochs": [row["epoch"] for row in self.run.epochs],
            "curves": curves,
            "images": self.run.images,
            "tta": f"with TTA{of_uncertain(self.run.uncertain)}",
            "matrix": self.cells if len(self.classes) <= figures.MATRIX_CLASSES else [],
            "pictures": list(self._pictures()),
            "columns": sheet.columns if sheet else 0,
            "size": [sheet.width, sheet.height] if sheet else [0, 0],
            "samples": self.samples,
            "bins": [[b.images, round(b.probability, 4), round(b.accuracy, 4)] for b in bins],
        }

    def _pictures(self) -> Iterator[list[Any]]:
        """Of each kept picture: name, truth, prediction, the two probabilities and the loss."""
        found = self.outcomes
        if found is None:
            return
        columns = (found.probability, found.probability_of_truth, found.loss)
        for place in found.pictured.tolist():
            values = [number(round(float(column[place]), 4)) for column in columns]
            classes = int(found.truth[place]), int(found.predicted[place])
            yield [self.run.image_name(place), *classes, *values]

    @property
    def shown_epoch(self) -> int | None:
        """The epoch whose answers are shown."""
        if self.outcomes is not None:
            return self.outcomes.epoch
        return self.best_row["epoch"] if self.best_row else None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings under dotted names."""
        settings: dict[str, Any] = cleaned(flatten(self.run.config)) if self.run.config else {}
        return settings

    @property
    def source(self) -> str:
        """The recipe file."""
        return redacted(self.run.source)

    @cached_property
    def _reliability(self) -> tuple[list[Bin], float | None]:
        return figures.reliability(self.outcomes) if self.outcomes else ([], None)

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error of the epoch whose answers are shown."""
        return self._reliability[1]


def render(
    run: RunFiles, script: str, reload_seconds: int = 0, looks: "Looks | None" = None
) -> bytes:
    """Render the page; `script` is the relative path of plotly's. 0 seconds: no reload."""
    page = Page(run, looks)
    return html.render(
        "report.html",
        title=run.name,
        subtitle=page.facts["recipe"],
        data=page.data,
        page=page,
        script=script,
        reload_seconds=reload_seconds,
    )


def _epochs(numbers: list[int]) -> str:
    return f"epoch{'s' if numbers[1:] else ''} {some(list(map(str, numbers)), 5)}"


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return None


def _is_cell(cell: Any) -> bool:
    are_numbers = isinstance(cell, list) and all(type(part) is int for part in cell)
    return are_numbers and len(cell) == 3 and all(0 <= p < MOST_CLASSES for p in cell[:2])


def _has_samples(row: Mapping[str, Any]) -> bool:
    samples = row.get("samples")
    return isinstance(samples, list) and all(isinstance(scores, list) for scores in samples)


def _scores(scores: list[Any]) -> list[list[int]]:
    """The best classes of an image, in thousandths; invalid entries are left out."""
    pairs = (pair for pair in scores if isinstance(pair, list) and len(pair) == 2)
    return [
        [place, round(1000 * share)]
        for place, value in pairs
        if type(place) is int and (share := number(value)) is not None
    ]
