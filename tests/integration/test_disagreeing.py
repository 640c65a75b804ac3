"""Ranks that were not started alike do not train together, and an error of any rank is heard."""

import re
import socket
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from tests.support.processes import RESUMABLE, Run, places_of

HOST = re.escape(socket.gethostname())
SAME = ("--max-steps", "2", "--name", "run")


def two(
    folder: Path,
    *others: str,
    recipes: tuple[Path, Path] = (RESUMABLE, RESUMABLE),
    on_nodes: bool = False,
) -> tuple[list[int], str]:
    """Exit codes and output of two ranks; the second is started with other words."""
    runs = []
    for place, words, recipe in zip(places_of(2), ((), others), recipes, strict=True):
        if on_nodes:  # of which each opens the images for itself
            place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": place["RANK"]}
        runs.append(Run(1, folder, *SAME, *words, recipe=recipe, environment=place))
    codes = [run.end() for run in runs]
    text = "".join(run.text() for run in runs)
    assert "Traceback" not in text
    assert (folder / "runs").exists() == (codes == [0, 0])
    return codes, text


@pytest.mark.parametrize(
    ("words", "own", "first"),
    [
        pytest.param(
            *(("seed=9", "optimizer.lr=0.5"), r"optimizer\.lr 0\.5, seed 9"),
            r"optimizer\.lr .*seed 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(("--max-steps", "3"), "--max-steps 3", "--max-steps 2"), marks=pytest.mark.slow
        ),
    ],
)
def test_other_settings_on_one_rank_are_named(
    words: tuple[str, ...], own: str, first: str, tmp_path: Path
) -> None:
    codes, text = two(tmp_path, *words)
    assert codes == [2, 2], text
    (line,) = re.findall("launcher: .*", text)
    said = f"launcher: rank 1 of 2 on {HOST}: {own}, but rank 0 on {HOST} has {first}; expected the"
    assert re.match(said, line), line


@pytest.mark.slow
def test_another_recipe_text_on_one_rank_is_named(tmp_path: Path) -> None:
    changed = tmp_path / "resumable.py"
    changed.write_text(RESUMABLE.read_text() + "# changed\n")
    codes, text = two(tmp_path, recipes=(RESUMABLE, changed))
    assert codes == [2, 2], text
    assert (
        len(re.findall(r"rank 1 of 2 .*: the recipe file \(SHA-256\) \w+, but rank 0", text)) == 1
    )


@pytest.mark.slow
def test_another_network_on_one_rank_is_named(tmp_path: Path) -> None:
    """torch's DistributedDataParallel said it, with a traceback."""
    recipe = tmp_path / "ranked.py"
    width = "super().__init__()\n        width = int(os.environ['RANK']) + 4"
    source = RESUMABLE.read_text().replace("super().__init__()", width, 1)
    recipe.write_text(source.replace("\nfrom functools", "\nimport os\nfrom functools", 1))
    codes, text = two(tmp_path, recipes=(recipe, recipe))
    assert codes == [2, 2], text
    assert re.search(r"rank 1 of 2 .*: layers\.0\.weight of the network \(5, .* has .*\(4, ", text)
    assert "let its code depend on no rank" in text


@pytest.mark.slow
def test_the_folder_of_the_images_may_differ(tmp_path: Path) -> None:
    codes, text = two(tmp_path, "data.root=elsewhere")
    assert codes == [0, 0], text


@pytest.mark.slow
def test_other_images_on_one_node_are_named(tmp_path: Path) -> None:
    """Another number of them, and as many with one that differs."""
    roots = {}
    for name, shades in {"first": range(4), "more": range(5), "other": (0, 1, 2, 9)}.items():
        roots[name] = tmp_path / name
        for half, label in product(("train", "test"), ("cat", "dog")):
            (roots[name] / half / label).mkdir(parents=True)
            for number, shade in enumerate(shades):
                picture = Image.new("RGB", (8, 8), (shade, 0, 0))
                picture.save(roots[name] / half / label / f"{number}.png")
    recipe = tmp_path / "resumable.py"
    source = f"partial(Folder, size=32), root={str(roots['first'])!r}"
    text = RESUMABLE.read_text().replace("partial(Synthetic, count=1_230)", source)
    text = text.replace("Synthetic,", "Folder,").replace("batch_size=50", "batch_size=4")
    recipe.write_text(text.replace("width * 8 * 8, 10)", "width * 8 * 8, 2)"))
    for name in ("more", "other"):
        root = f"data.root={roots[name]}"
        codes, said = two(tmp_path, root, recipes=(recipe, recipe), on_nodes=True)
        assert codes == [2, 2], said
        found = re.findall(r"launcher: rank 1 of 2 .*: digest \w+, but rank 0 .* digest \w+", said)
        assert len(found) == 1, said


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_recipe_that_fails_on_one_rank_only_is_said_once_with_the_rank(
    rank: int, tmp_path: Path
) -> None:
    recipe = tmp_path / "failing.py"
    odd = f'import os\nif os.environ["RANK"] == "{rank}":\n    raise KeyError("no such file")\n'
    recipe.write_text(odd + RESUMABLE.read_text())
    codes, text = two(tmp_path, recipes=(recipe, recipe))
    assert codes == [2, 2], text
    place = "" if rank == 0 else f"rank 1 of 2 on {HOST}: "
    assert len(re.findall(f"launcher: {place}.*failing.py, line 3: KeyError", text)) == 1, text
    assert text.count("launcher: ") == 1


def test_code_that_ends_the_process_is_no_success(tmp_path: Path) -> None:
    recipe = tmp_path / "leaving.py"
    source = RESUMABLE.read_text().replace("\nfrom functools", "\nimport sys\nfrom functools")
    recipe.write_text(
        source.replace("        return self", "        sys.exit()\n        return self")
    )
    run = Run(1, tmp_path, *SAME, recipe=recipe)
    assert run.end() == 1
    assert "sys.exit" in run.text()
    assert "leaving.py" in run.text()
