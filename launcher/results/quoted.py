"""The metrics of a run under names that say how the epoch was chosen."""

from typing import Any

from launcher.checkpoint.run_files import RunFiles
from launcher.utils.text import of_uncertain

ON_TEST = "test accuracy, best epoch (chosen on the test images)"
BY_VALIDATION = "test accuracy, best epoch"
LAST = "test accuracy, last epoch"
LAST_TTA = "test accuracy, last epoch, with TTA"
VALIDATION = "validation accuracy, best epoch"


def quoted(run: RunFiles) -> dict[str, float]:
    """The metrics that the run has measured; test images, for example, only at its end."""
    figures, with_tta = {}, LAST_TTA + of_uncertain(run.uncertain)
    if run.evaluated_on == "val":
        figures[VALIDATION] = run.best_accuracy
        figures[BY_VALIDATION] = run.test_accuracy("best")
        figures[LAST] = run.test_accuracy("last")
        figures[with_tta] = _number(run.tested.get("last", {}).get("test/accuracy_tta"))
    elif last := run.last_row:
        figures[ON_TEST] = run.best_accuracy
        figures[LAST] = last["test/accuracy"]
        figures[with_tta] = _number(last.get("test/accuracy_tta"))
    return {name: value for name, value in figures.items() if value is not None}


def headline(run: RunFiles) -> str:
    """The metric whose epoch was not chosen on the same images."""
    return BY_VALIDATION if run.evaluated_on == "val" else LAST


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None
