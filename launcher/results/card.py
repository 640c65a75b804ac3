"""A model card, filled from what the run wrote down."""

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

Accuracy {accuracy:.2%} on {images:,} test images, of **one** training run (n = 1). {chosen}
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


def model_card(files: RunFiles, weights: str, proof: str, accuracy: float) -> str:
    """The text of a README.md for the Hugging Face Hub, with its metadata in front.

    `weights` are the best or the final ones, `accuracy` that of the images of the proof: what is
    quoted is that of the test images, where they are others.
    """
    from huggingface_hub import EvalResult, ModelCardData

    about = files.about
    data = str(about.get("data", "unknown images"))
    name = f"{files.recipe} ({files.name})"
    result = EvalResult(
        task_type="image-classification",
        dataset_type=data.partition(",")[0].lower() or "images",
        dataset_name=data.partition(",")[0],
        metric_type="accuracy",
        metric_value=round(accuracy, 6),
    )
    metadata = ModelCardData(
        model_name=name,
        pipeline_tag="image-classification",
        tags=["image-classification", "pytorch"],
        eval_results=[result],
    )
    rows = ("model", "data", "batch", "steps", "precision", "devices")
    facts = "\n".join(f"| {row} | {_cell(about.get(row, 'unknown'))} |" for row in rows)
    which = "best" if weights == "best" else "last"
    tested = files.tested.get(which) or (files.epochs[-1] if files.epochs else {})
    accuracy = files.test_accuracy("best" if weights == "best" else "last") or accuracy
    best = files.best
    chosen = ""
    if best is not None and weights == "best":
        these = "these test" if files.evaluated_on == "test" else "other, validation"
        chosen = f"Epoch {best.epoch} was chosen by looking at {these} images. "
    text = _TEXT.format(
        name=_cell(name),
        recipe=_cell(about.get("recipe", "")),
        facts=facts,
        accuracy=accuracy,
        images=int(tested.get("test/images", 0)),
        chosen=chosen,
        proof=proof,
        data=_cell(data.partition(",")[0]),
        settings=_settings(files.config),
    )
    return redacted(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _settings(config: dict[str, Any]) -> str:
    lines = [f"{name} = {value}" for name, value in flatten(config).items()]
    return "\n".join(lines).replace("```", "'''")


def _cell(value: Any) -> str:
    """Text that is neither a table's border nor a tag of HTML."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
