"""Data flows one way: a room of the launcher imports only from rooms before it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from tests.support.helpers import ROOT

PACKAGE = ROOT / "launcher"
# The order of docs/design.md. Rooms of one line do not import each other.
ORDER = (
    ("errors",),
    ("utils",),
    ("distributed",),
    ("config",),
    ("data",),
    ("training",),
    ("checkpoint",),
    ("loggers",),
    ("run",),
    ("checks", "results", "cluster"),
    ("experiments",),
    ("api",),
    ("cli",),
)
ENTRANCES = {"__init__", "__main__"}


def rooms() -> set[str]:
    """The folders and files of `launcher/`."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    return found - ENTRANCES - {"__pycache__", "py"}


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in ENTRANCES]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, str]]:
    """Modules of the launcher and the names a file takes from them, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("launcher"):
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(a.name, "") for a in node.names if a.name.startswith("launcher")}
    return found


def rooms_of_import(module: str, name: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else name


def test_every_room_has_its_place_in_the_order() -> None:
    assert rooms() == {room for line in ORDER for room in line}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path: Path) -> None:
    own = room_of(path)
    place = next(number for number, line in enumerate(ORDER) if own in line)
    before = {room for line in ORDER[:place] for room in line} | {own, "__version__"}
    found = {rooms_of_import(*imported) for imported in imports(path)}
    assert found <= before, f"{path.name} imports {found - before}, which come later"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_is_imported(path: Path) -> None:
    private = {name for _, name in imports(path) if name.startswith("_") and name != "__version__"}
    assert not private


def test_no_file_is_part_of_a_cycle() -> None:
    """Not even within a room, and not by an import inside a function."""
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files()}
    graph = {
        module: {
            target
            for imported, name in imports(path)
            for target in (imported, f"{imported}.{name}")
            if target in modules.values()
        }
        for path, module in modules.items()
    }
    while leaves := {module for module, targets in graph.items() if not targets}:
        graph = {m: targets - leaves for m, targets in graph.items() if m not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_few_files_import_rich_and_wandb() -> None:
    owners_of = {
        "rich": (
            "command",
            "terminal",
            "verdicts",
            "console",
            "status",
            "runs",
            "compare",
            "predict",
            "repeat",
            "search",
        ),
        "wandb": ("wandb", "wandb_end"),
    }
    for library, owners in owners_of.items():
        for path in files():
            uses = re.search(rf"^\s*(import|from) {library}\b", path.read_text(), re.MULTILINE)
            assert not uses or path.stem in owners, f"{path.name} imports {library}"


def test_the_public_names_are_these() -> None:
    assert launcher.__all__ == sorted(launcher.__all__, key=lambda name: (name.islower(), name))
    assert set(launcher.__all__) == {
        *("Claim", "Draws", "Folder", "Images", "Packed", "Recipe", "Synthetic"),
        *("alternating_flip", "crop", "cutmix", "cutout", "flip", "jitter", "mixup"),
        "random_resized_crop",
        *("constant", "cosine", "ema", "growing", "linear", "steps"),
        *("RunResult", "TrainedRun", "load_run", "train"),
        *("ChainedOptimizer", "Muon", "NamedParameters", "mirrored", "mirrored_and_shifted"),
        "no_decay",
    }
    for name in launcher.__all__:
        assert getattr(launcher, name).__name__ in (name, "Iterable")


def test_help_needs_neither_torch_nor_wandb_nor_rich() -> None:
    code = (
        "import sys; from launcher.cli import main; code = main(['--help']);"
        "assert not {'torch', 'wandb', 'rich', 'accelerate'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "launcher [train] RECIPE" in done.stdout
