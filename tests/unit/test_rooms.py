"""Data flows one way: a file of the launcher imports only from files above it in docs/design.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import launcher

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "launcher"


def order() -> list[str]:
    """The files in the order of the table of the design document."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+\.py`", line)]
    return [name for row in rows for name in re.findall(r"`(\w+)\.py`", row.split("|")[1])]


def imports(name: str) -> set[str]:
    """The launcher's own modules that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "launcher":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("launcher."):
            found.add((node.module or "").split(".")[1])
    return found


def test_every_file_is_in_the_table() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(order()) == files
    assert len(order()) == len(files)


def test_files_import_only_from_above() -> None:
    names = order()
    for place, name in enumerate(names):
        below = imports(name) - set(names[:place]) - {"__version__"}
        assert not below, f"{name}.py imports {below}, which stand below it in docs/design.md"


def test_no_file_is_much_over_300_lines() -> None:
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, path.name


def test_only_the_libraries_own_file_imports_it() -> None:
    for library, owner in (("rich", "console"), ("wandb", "tracking")):
        for path in PACKAGE.glob("*.py"):
            uses = re.search(rf"^\s*(import|from) {library}\b", path.read_text(), re.MULTILINE)
            assert not uses or path.stem == owner, f"{path.name} imports {library}"


def test_the_public_names_are_these() -> None:
    assert launcher.__all__ == sorted(launcher.__all__, key=lambda name: (name.islower(), name))
    assert set(launcher.__all__) == {
        *("Draws", "Folder", "Images", "Recipe", "Synthetic"),
        *("alternating_flip", "crop", "cutmix", "cutout", "flip", "mixup"),
        *("constant", "cosine", "ema", "linear", "steps"),
        *("Muon", "NamedParameters", "ChainedOptimizer", "mirrored", "mirrored_and_shifted"),
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
