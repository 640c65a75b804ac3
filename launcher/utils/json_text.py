"""JSON that others may have written: every failure to read it is an `OSError` or a `ValueError`."""

import errno
import json
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
