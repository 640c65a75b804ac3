"""JSON that others may have written: every failure to read it is an `OSError` or a `ValueError`."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def parse(text: str | bytes) -> Any:
    """What a text says; ValueError where it is no JSON, or nested deeper than anything is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path: Path) -> Any:
    """What a file says; `OSError` for what is no file, as a FIFO, for which one would wait."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    return parse(path.read_bytes())


def read_object(path: Path) -> dict[str, Any]:
    """What a file says; empty where it is absent, damaged or says something else."""
    try:
        content = read(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects under dotted names; a list counts as one where it has some."""
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix.removesuffix("."): value}
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}{name}.").items()}


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Of each name that not all have with the same value, the values; None where it is absent."""
    names = {name: None for mapping in values for name in mapping}
    rows = {name: [mapping.get(name) for mapping in values] for name in names}
    return {name: row for name, row in rows.items() if any(cell != row[0] for cell in row)}
