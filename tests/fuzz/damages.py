"""One thing wrong in a run folder, as a full disk, a careless hand or a stranger leaves it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("json", "json", "json", "cut", "bits", "text", "gone", "folder", "fifo", "endless", "deep")
_VALUES: tuple[Any, ...] = (
    *(None, -1, 0, True, 1.5, float("nan"), float("inf"), 10**30, "", "text", [], {}, [[]]),
    *("../../x", "\x1b[31mred", "\ud800", "x" * 5000, {"call": "os:system"}, [None], 2**63),
)
_TEXTS = (b"", b"\0" * 4096, b"[" * 3000, b"{}", b"[]", b'"text"', b"\xff\xfe\x00", b"1e999")


def damage(run: Path, place: str, kind: str, number: int) -> None:
    """Damage a file; a checkpoint's manifest is made to agree with it, where it can be."""
    path = run / place
    if kind == "json" and path.suffix in (".json", ".jsonl"):
        _change_json(path, number)
    elif kind in ("json", "cut"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * (number % 100) // 100])
    elif kind == "bits":
        turned = bytearray(path.read_bytes() or b"x")
        for bit in range(5):
            turned[(number * (bit + 1) * 7919) % len(turned)] ^= 1 << (number % 8)
        path.write_bytes(turned)
    elif kind == "text":
        path.write_bytes(_TEXTS[number % len(_TEXTS)])
    elif kind == "deep":
        path.write_bytes(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "endless":
            path.symlink_to("/dev/zero")
    _correct_manifest(path)


def _change_json(path: Path, number: int) -> None:
    """Another value at one place in it; of several lines, in one of them."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    chosen = number % len(lines)
    whole = [json.loads(lines[chosen])]
    nodes = list(_nodes(whole))
    parent, key = nodes[number // 7 % len(nodes)]
    parent[key] = _VALUES[number // 3 % len(_VALUES)]
    if number % 5 == 0 and isinstance(parent, dict):
        del parent[key]
    lines[chosen] = json.dumps(whole[0] if whole else {})
    path.write_text("\n".join(lines) + "\n")


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _nodes(value[key])


def _correct_manifest(path: Path) -> None:
    manifest = path.with_name("manifest.json")
    if path == manifest or path.is_symlink() or not (path.is_file() and manifest.is_file()):
        return
    said = json.loads(manifest.read_text())
    if path.name in said:
        content = path.read_bytes()
        said[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(said))


def copied(good: Path, folder: Path) -> Path:
    """A copy of a good run in a folder of its own."""
    return Path(shutil.copytree(good, folder))
