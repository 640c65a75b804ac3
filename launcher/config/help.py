"""The settings of a recipe for `launcher RECIPE --help`: by slot, in lines of 80 columns."""

import dataclasses
import re
from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from launcher.config.overrides import as_text
from launcher.config.recipe import Recipe
from launcher.config.serialize import short_name
from launcher.config.settings import Setting, children

WIDTH = 80
TYPE_WIDTH = 22  # a longer type goes on in the next line
# How torch's optimizers compute a step, and not what the step is.
_INTERNAL = frozenset(("foreach", "fused", "capturable", "differentiable", "maximize"))
_LINK = re.compile(r"`([^`<]+?)\s*<[^>]*>`_+")  # as reStructuredText writes it


def describe_settings(recipe: Recipe, *, with_internals: bool = False) -> str:
    """One setting a line (name, type, value) below the slot that it belongs to."""
    slots = [s for s in children(recipe) if not s.is_plain]
    groups = [group for slot in slots for group in _groups(slot)]
    groups.append(("training", [s for s in children(recipe) if s.is_plain]))
    shown = [(head, [s for s in own if with_internals or _is_shown(s)]) for head, own in groups]
    width = max(len(setting.name) for _, settings in shown for setting in settings)
    blocks = []
    for head, settings in shown:
        lines = [line for setting in settings for line in _lines(setting, width)]
        blocks.append("\n".join([head, *lines]))
    return "\n\n".join(blocks) + "\n"


def _groups(part: Setting) -> Iterator[tuple[str, list[Setting]]]:
    """The head and the settings of a slot, and of each callable inside of it."""
    parts = list(children(part.value, f"{part.name}."))
    if callable(part.value) or dataclasses.is_dataclass(part.value):
        yield _head(part), [setting for setting in parts if setting.is_plain]
    for inner in parts:
        if not inner.is_plain:
            yield from _groups(inner)


def _head(part: Setting) -> str:
    """`optimizer: Adam - Implements Adam algorithm.`"""
    if not callable(part.value):
        return part.name
    code = short_name(part.value)
    name = part.name if part.name.endswith(f".{code}") else f"{part.name}: {code}"
    return "\n".join(wrap(name + _note(part.value), WIDTH))


def _note(value: Any) -> str:
    """The first line of its docstring."""
    doc = getattr(getattr(value, "func", value), "__doc__", None) or ""
    first = next((line.strip() for line in doc.splitlines() if line.strip()), "")
    return " - " + _LINK.sub(r"\1", first) if first else ""


def _is_shown(setting: Setting) -> bool:
    """Whether a setting is not one of torch's internals, or the recipe has chosen it."""
    return setting.name.rpartition(".")[2] not in _INTERNAL or setting.value not in (None, False)


def _lines(setting: Setting, width: int) -> list[str]:
    kind, *more = wrap(
        setting.type_name, TYPE_WIDTH, break_long_words=False, break_on_hyphens=False
    )
    begin, value = f"  {setting.name:<{width}}  ", as_text(setting.value)
    first = f"{begin}{kind:<{TYPE_WIDTH}}  {value}"
    if len(first) > WIDTH:  # a long number, under no other one
        first = f"{begin}{kind}  {value}"
    return [first, *(f"  {'':<{width}}  {line}" for line in more)]
