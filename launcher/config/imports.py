"""What a recipe imports from beside it, such as a file with the network.

By the texts alone, so that each process finds the same, whatever it has imported before.
"""

import ast
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

_OWN = Path(__file__).resolve().parents[1]  # of which a run writes down the version


def neighbours_of(source: str, folder: Path) -> dict[str, str]:
    """The files that a recipe of this text imports, and those that these import.

    As paths from its folder, each with the beginning of its SHA-256. They are looked for where the
    loader lets Python look for them: in the folder and in the one above it.
    """
    found: dict[Path, str] = {}
    waiting = [(source, folder)]
    while waiting:
        text, package = waiting.pop()
        for level, name in _imports(text):
            # One dot is the package itself, two are the one above it.
            above = [package, *package.parents][level - 1 : level]
            places = above if level else [folder, folder.parent]
            files = next(filter(None, (_files(place, name) for place in places)), [])
            for file in files:
                if file not in found and not file.resolve().is_relative_to(_OWN):
                    content = _read(file)
                    found[file] = sha256(content).hexdigest()[:12]
                    waiting.append((content.decode(errors="replace"), file.parent))
    return {os.path.relpath(file, folder): found[file] for file in sorted(found)}


def changed(before: Any, now: Mapping[str, str]) -> list[str]:
    """The files that differ from those that a run wrote down, if it did."""
    if not isinstance(before, dict):
        return []
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _imports(text: str) -> Iterator[tuple[int, str]]:
    """What a text imports: the dots before a name, and the name, which may be one in a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # which nobody has imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            before = [node.module] if node.module else []
            yield from ((node.level, ".".join([*before, alias.name])) for alias in node.names)


def _files(place: Path, name: str) -> list[Path]:
    """The files of a module and of the packages that it is in, as far as they are in `place`."""
    files: list[Path] = []
    for part in name.split("."):
        if (file := place / f"{part}.py").is_file():
            return [*files, file]
        place = place / part
        if (file := place / "__init__.py").is_file():
            files.append(file)
        elif not place.is_dir():
            break
    return files


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
