"""A model card, filled from the files of the run."""

from typing import Any

from launcher.checkpoint.run_files import RunFiles
from launcher.utils.json_text import flatten
from launcher.utils.redaction import redacted

_TEXT = """\
# {name}

{recipe}

| | |
|---|---|
{facts}

## Figures

{figure} {chosen}
The export was proved {proof}.

## How to use

```python
import json
from safetensors.torch import load_file

about = json.load(open("config.json"))   # classes, mean, std, size of the images
weights = load_file("model.safetensors")  # for the network that recipe.py declares
```

With the launcher: `launcher predict` and `load_run` take the run folder itself.

## What it was not tried on

Anything but the test images of {data}: other cameras, sizes, classes and subjects. Its
probabilities are not calibrated by anything.

## How it was trained

```
{settings}
```
"""


def model_card(files: RunFiles, weights: str, proof: str) -> str:
    """The text of a README.md for the Hugging Face Hub, with its metadata in front.

    `weights` are the best or the final ones. The card quotes what the run recorded of its test
    images, and never the accuracy of the proof, whose images may be others.
    """
    from huggingface_hub import EvalResult, ModelCardData

    about = files.about
    data = str(about.get("data", "unknown images"))
    name = f"{files.recipe} ({files.name})"
    tested = _tested(files, weights)
    accuracy, figure = tested.get("test/accuracy"), "The run wrote down no figure of test images."
    results = []
    if isinstance(accuracy, int | float) and 0 <= accuracy <= 1:
        result = EvalResult(
            task_type="image-classification",
            dataset_type=data.partition(",")[0].lower() or "images",
            dataset_name=data.partition(",")[0],
            metric_type="accuracy",
            metric_value=round(accuracy, 6),
        )
        results = [result]
        images = int(tested.get("test/images", 0))
        figure = (
            f"Accuracy {accuracy:.2%} on {images:,} test images, of **one** training run (n = 1)."
        )
    metadata = ModelCardData(
        model_name=name,
        pipeline_tag="image-classification",
        tags=["image-classification", "pytorch"],
        eval_results=results or None,
    )
    rows = ("model", "data", "batch", "steps", "precision", "devices")
    facts = "\n".join(f"| {row} | {_cell(about.get(row, 'unknown'))} |" for row in rows)
    best = files.best
    chosen = ""
    if best is not None and weights == "best":
        these = "these test" if files.evaluated_on == "test" else "other, validation"
        chosen = f"Epoch {best.epoch} was chosen by looking at {these} images. "
    text = _TEXT.format(
        name=_cell(name),
        recipe=_cell(about.get("recipe", "")),
        facts=facts,
        figure=figure,
        chosen=chosen,
        proof=proof,
        data=_cell(data.partition(",")[0]),
        settings=_settings(files.config),
    )
    return redacted(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _tested(files: RunFiles, weights: str) -> dict[str, Any]:
    """The metrics of these weights on the test images; empty where there are none."""
    if files.evaluated_on == "val":
        return files.tested.get("best" if weights == "best" else "last", {})
    kept = files.best if weights == "best" else files.last
    return next((row for row in files.epochs if kept and row["epoch"] == kept.epoch), {})


def _settings(config: dict[str, Any]) -> str:
    lines = [f"{name} = {value}" for name, value in flatten(config).items()]
    return "\n".join(lines).replace("```", "'''")


def _cell(value: Any) -> str:
    """Escape text, so that it is neither a border of the table nor an HTML tag."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
