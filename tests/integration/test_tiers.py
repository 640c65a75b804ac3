"""One trajectory wherever the images are, on any number of ranks, killed and resumed."""

import json
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.support.helpers import alike
from tests.support.processes import Run, fingerprint, write_double

PICTURES = "partial(Folder, size=32), root={root!r}"
TIERS = ("device", "host", "disk")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The resumable recipe in float64, on PNGs of different sizes in folders."""
    folder = tmp_path_factory.mktemp("recipe")
    random = numpy.random.default_rng(0)
    for half, count in (("train", 33), ("test", 7)):
        for label in range(10):
            (folder / "pictures" / half / str(label)).mkdir(parents=True)
            for number in range(count):
                shape = (*random.integers(24, 56, 2), 3)
                pixels = random.integers(20 * label, 20 * label + 70, shape, dtype=numpy.uint8)
                place = folder / "pictures" / half / str(label) / f"{number}.png"
                Image.fromarray(pixels).save(place)
    path = write_double(folder / "recipe.py")
    text = path.read_text().replace("Images, Recipe, Synthetic", "Folder, Images, Recipe")
    source = PICTURES.format(root=str(folder / "pictures"))
    path.write_text(text.replace("partial(Synthetic, count=1_230)", source))
    return path


def trained(recipe: Path, folder: Path, ranks: int, name: str, *words: str) -> Path:
    words = ("--name", name, "epochs=3", *words)
    run = Run(ranks, folder, *words, recipe=recipe)
    assert run.end() == 0, run.text()
    return folder / "runs" / name


def apart(one: Path, other: Path) -> float:
    weights = [load_file(run / "final.safetensors") for run in (one, other)]
    return max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [alike(1), 2, alike(4)])
def test_the_tiers_train_alike_and_go_on_after_a_kill(
    recipe: Path, tmp_path: Path, ranks: int
) -> None:
    runs = [trained(recipe, tmp_path, ranks, tier, f"data.tier={tier}") for tier in TIERS]
    for one, other in pairwise(map(fingerprint, runs)):
        assert one == other
    assert apart(trained(recipe, tmp_path, 1, "alone"), runs[-1]) < 1e-12
    words = ("--name", "killed", "epochs=3", "data.tier=disk", "--checkpoint-every", "3")
    killed = Run(ranks, tmp_path, *words, "--log-every", "1", recipe=recipe)
    killed.wait_for("epoch 1/3")
    for process in killed.ranks():
        process.kill()
    killed.end()
    run = trained(recipe, tmp_path, ranks, "killed", "--resume", "data.tier=disk")
    assert fingerprint(run) == fingerprint(runs[-1])


@pytest.mark.slow
def test_parts_of_stored_pictures_are_the_same_on_two_ranks_and_after_a_kill(
    recipe: Path, tmp_path: Path
) -> None:
    text = recipe.read_text().replace("(flip, crop)", "(random_resized_crop, flip)")
    own = tmp_path / "cut.py"
    own.write_text(text.replace("Folder, Images", "Folder, Images, random_resized_crop"))
    one, two = (trained(own, tmp_path, ranks, f"on{ranks}") for ranks in (1, 2))
    assert "decoded from disk" in (one / "run.json").read_text()
    assert apart(one, two) < 1e-12
    first = trained(own, tmp_path, 1, "pieces", "--max-steps", "11")
    assert fingerprint(first) != fingerprint(one)
    assert fingerprint(trained(own, tmp_path, 1, "pieces", "--resume")) == fingerprint(one)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["crop", "random_resized_crop"])
@pytest.mark.parametrize("ranks", [1, alike(2)])
def test_images_that_grow_are_alike_on_the_tiers_on_ranks_and_after_a_kill(
    recipe: Path, tmp_path: Path, ranks: int, first: str
) -> None:
    text = recipe.read_text().replace("(flip, crop)", f"({first}, flip)")
    text = text.replace("Folder, Images", "Folder, Images, growing, random_resized_crop")
    text = text.replace("nn.Flatten()", "nn.AdaptiveAvgPool2d(2), nn.Flatten()")
    text = text.replace("width * 8 * 8", "width * 2 * 2")
    sizes = "train_resolution=partial(growing, first=16, last=32),"
    own = tmp_path / "growing.py"
    own.write_text(text.replace("mix=cutmix,", f"mix=cutmix, {sizes}"))
    # A part that is cut out of the stored picture is another one than one of what was cropped.
    tiers = TIERS if first == "crop" else ("disk",)
    runs = [trained(own, tmp_path, ranks, tier, f"data.tier={tier}") for tier in tiers]
    assert "trained at 16 to 32 pixels" in (runs[0] / "run.json").read_text()
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert (rows[0]["train/resolution"], rows[-1]["train/resolution"]) == (16, 32)
    for one, other in pairwise(map(fingerprint, runs)):
        assert one == other
    assert apart(trained(own, tmp_path, 3 - ranks, "others"), runs[-1]) < 1e-12
    words = ("--name", "killed", "epochs=3", "data.tier=disk", "--checkpoint-every", "3")
    killed = Run(ranks, tmp_path, *words, "--log-every", "1", recipe=own)
    killed.wait_for("epoch 1/3")
    for process in killed.ranks():
        process.kill()
    killed.end()
    run = trained(own, tmp_path, ranks, "killed", "--resume", "data.tier=disk")
    assert fingerprint(run) == fingerprint(runs[-1])


@pytest.mark.slow
def test_a_picture_that_is_broken_ends_all_ranks_with_its_name(
    recipe: Path, tmp_path: Path
) -> None:
    """Whichever rank meets it, in the middle of the training."""
    pictures = recipe.parent / "pictures"
    root = tmp_path / "pictures"
    for path in pictures.rglob("*.png"):
        (root / path.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(pictures)).write_bytes(path.read_bytes())
    odd = root / "train" / "3" / "5.png"
    odd.write_bytes(odd.read_bytes()[:200])
    words = ("--name", "broken", "epochs=2", f"data.root={root}", "data.tier=disk")
    run = Run(2, tmp_path, *words, recipe=recipe)
    assert run.end() == 2, run.text()
    assert f"{odd} cannot be read as a picture" in run.text()
    assert "Traceback" not in run.text()
    skipped = trained(recipe, tmp_path, 2, "skipped", *words[2:], "data.on_broken=skip")
    assert "1 broken picture left out" in (skipped / "run.json").read_text()
