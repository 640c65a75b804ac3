"""Packs that end early in real processes, and trainings on what was packed."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
from PIL import Image

from launcher import Folder, Packed
from tests.support import forked
from tests.support.helpers import alike
from tests.support.processes import PATIENCE, RESUMABLE, ROOT, TORCHRUN, Run, fingerprint

LINKS = 2_600  # more than two chunks of each half


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of many pictures, which are few on disk, and one class that differs."""
    root = tmp_path_factory.mktemp("many") / "pets"
    random = numpy.random.default_rng(0)
    originals = []
    for number in range(10):
        originals.append(root.parent / f"{number}.png")
        pixels = random.integers(0, 256, (120, 120, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(originals[-1])
    for half, links in (("train", LINKS), ("test", 50)):
        for name in ("cat", "dog"):
            (root / half / name).mkdir(parents=True)
            for index in range(links // 2):
                os.link(originals[index % 7], root / half / name / f"{index:05}.png")
    return root


def start(
    root: Path, folder: Path, output: Path | None = None, how: tuple[str, ...] = ("--size", "8")
) -> forked.Popen:
    command = [sys.executable, "-m", "launcher", "pack", str(root), "out", *how]
    with (output or folder / "output").open("a") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return forked.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)


def is_that_of(root: Path, out: Path) -> None:
    for half in ("train", "test"):
        packed, folder = Packed(str(out), half, size=8), Folder(str(root), half, size=8)
        assert packed.targets.tolist() == folder.targets.tolist()
        if packed.encoded is None:
            assert numpy.array_equal(packed.data.numpy(), folder.data)
        else:
            places = range(len(folder.files))
            assert packed.encoded.contents(places) == folder.encoded.contents(places)
            assert packed.encoded.files == folder.encoded.files


def read_so_far(out: Path) -> int:
    """Images of the training half that are packed."""
    try:
        return int(json.loads((out / "pack.partial.json").read_text())["splits"]["train"]["read"])
    except (OSError, KeyError):
        return 0


PIXELS, PICTURES = ("--size", "8"), ("--encoded",)


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        (PIXELS, {"images", "labels"}),
        pytest.param(
            *(PICTURES, {"pictures", "offsets", "names", "labels"}), marks=pytest.mark.slow
        ),
    ],
)
def test_a_pack_that_is_killed_goes_on_from_its_last_whole_chunk(
    how: tuple[str, ...], kinds: set[str], many: Path, tmp_path: Path
) -> None:
    """Killed after each chunk, and in the middle of one."""
    reached = [0]
    for kill in range(3):
        process = start(many, tmp_path, how=how)
        until = time.monotonic() + PATIENCE
        while read_so_far(tmp_path / "out") <= reached[-1] and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(0.02 * kill)
        process.kill()
        process.wait()
        if (tmp_path / "out" / "pack.json").exists():  # what was left took no longer than the wait
            break
        reached.append(read_so_far(tmp_path / "out"))
    assert len(reached) >= 3, "it was killed before it had ended, twice"
    assert reached[1] >= 1024, "it was killed before it had packed anything"
    assert reached == sorted(reached)
    assert start(many, tmp_path, how=how).wait() == 0, (tmp_path / "output").read_text()
    is_that_of(many, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"pack.json", *(f"{h}.{k}" for h in ("train", "test") for k in kinds)}


@pytest.mark.slow
@pytest.mark.thorough
def test_a_file_that_may_not_grow_is_said_in_one_line_and_the_pack_goes_on(
    many: Path, tmp_path: Path
) -> None:
    """What a full quota looks like."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500 * 8 * 8 * 3, hard))
    command = [sys.executable, "-m", "launcher", "pack", str(many), "out", "--size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "File too large" in line
    assert "make room and type the same command, which goes on" in line
    assert read_so_far(tmp_path / "out") == 1024
    assert start(many, tmp_path).wait() == 0, (tmp_path / "output").read_text()
    is_that_of(many, tmp_path / "out")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, a little larger than what is packed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_the_pack_goes_on(many: Path, disk: Path) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    assert complaint(many, disk).startswith("launcher: 530 KB to be written to out, where")
    assert not (disk / "out").exists()
    ballast.unlink()
    process = start(many, disk, disk.parent / "output")
    while not read_so_far(disk / "out"):  # it has found enough room
        assert process.poll() is None
        time.sleep(0.005)
    fill(ballast)
    assert process.wait() == 2
    assert "OUT=out (No space left on device)" in (disk.parent / "output").read_text()
    ballast.unlink()
    assert start(many, disk, disk.parent / "output").wait() == 0
    is_that_of(many, disk / "out")


@pytest.mark.slow
def test_on_a_disk_that_is_only_read_a_whole_pack_is_compared(many: Path, disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True)
    assert "OUT=out (Read-only file system)" in complaint(many, disk)
    subprocess.run([*remount[:2], "remount,rw", str(disk)], check=True)
    assert start(many, disk, disk.parent / "output").wait() == 0
    subprocess.run(remount, check=True)
    assert start(many, disk, disk.parent / "again").wait() == 0
    assert "out is whole" in (disk.parent / "again").read_text()


def complaint(root: Path, folder: Path) -> str:
    """The one line of a pack that is refused."""
    output = folder.parent / f"refused-{time.monotonic_ns()}"
    assert start(root, folder, output).wait() == 2
    (line,) = output.read_text().splitlines()
    return line


def fill(path: Path) -> None:
    """Until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


# Trainings


def recipe_of(folder: Path, source: str, root: str) -> Path:
    """The resumable recipe on other images."""
    text = RESUMABLE.read_text().replace("Synthetic, cosine", "Folder, Packed, cosine")
    text = text.replace("partial(Synthetic, count=1_230)", source)
    text = text.replace("batch_size=50,", f'batch_size=50,\n        root="{root}",')
    path = folder / f"{root}.py"
    path.write_text(text.replace("        augment", "        validation=0.1,\n        augment"))
    return path


CUT = "partial(random_resized_crop, area=(0.25, 1.0)), "


@pytest.mark.parametrize("augmented", [alike(""), pytest.param(CUT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [alike(1), 2])
def test_a_pack_of_encoded_pictures_trains_to_the_weights_of_its_folder(
    ranks: int, augmented: str, small: Path, tmp_path: Path
) -> None:
    size = "size=32, scaled_to=36"
    recipes = {
        "pets": recipe_of(tmp_path, f"partial(Folder, {size})", "pets"),
        "out": recipe_of(tmp_path, f"partial(Packed, {size})", "out"),
    }
    (tmp_path / "pets").symlink_to(small)
    assert start(small, tmp_path, how=PICTURES).wait() == 0, (tmp_path / "output").read_text()
    for name, recipe in recipes.items():
        text = recipe.read_text().replace("cosine,", "cosine, random_resized_crop,", 1)
        text = text.replace("augment=(", f"augment=({augmented}")
        recipe.write_text(text.replace("batch_size=50,", 'batch_size=50,\n        tier="disk",'))
        run = Run(ranks, tmp_path, "epochs=2", "--name", name, recipe=recipe)
        assert run.end() == 0, run.text()
        assert "decoded from disk for each step" in run.text()
    assert fingerprint(tmp_path / "runs" / "pets") == fingerprint(tmp_path / "runs" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [alike(1), 2])
def test_a_pack_trains_to_the_weights_of_its_folder(
    ranks: int, small: Path, tmp_path: Path
) -> None:
    recipes = {
        "pets": recipe_of(tmp_path, "partial(Folder, size=32)", "pets"),
        "out": recipe_of(tmp_path, "Packed", "out"),
    }
    (tmp_path / "pets").symlink_to(small)
    command = [sys.executable, "-m", "launcher", "pack", "pets", "out", "--size", "32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forked.run(command, cwd=tmp_path, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for name, recipe in recipes.items():
        run = Run(ranks, tmp_path, "epochs=2", "--name", name, recipe=recipe)
        assert run.end() == 0, run.text()
    assert "in the memory of the host" in run.text()
    assert fingerprint(tmp_path / "runs" / "pets") == fingerprint(tmp_path / "runs" / "out")


@pytest.mark.slow
def test_two_ranks_train_on_one_copy_of_a_pack(small: Path, tmp_path: Path) -> None:
    recipe, own = recipe_of(tmp_path, "Packed", "out"), tmp_path / "own"
    own.mkdir()
    assert start(small, tmp_path, how=("--size", "32")).wait() == 0
    weights = set()
    for name, copied in (("whole", "false"), ("copied", "true")):
        # New processes: those that are forked know already where temporary files are.
        words = ("epochs=2", "--name", name, f"data.local_copy={copied}")
        run = Run(TORCHRUN, tmp_path, *words, recipe=recipe, environment={"TMPDIR": str(own)})
        assert run.end() == 0, run.text()
        weights.add(fingerprint(tmp_path / "runs" / name))
    assert f"from the copy of the pack in {own}".replace(" ", "") in "".join(run.text().split())
    assert len(weights) == 1
    assert len(list(own.glob("launcher-*/pack-*/train.images"))) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten classes, every picture of noise of its own."""
    root = tmp_path_factory.mktemp("small")
    random = numpy.random.default_rng(0)
    for number in range(10):
        (root / f"{number}").mkdir()
        for index in range(21):
            pixels = random.integers(0, 256, (32 + number, 40, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(root / f"{number}" / f"{index:03}.png")
    return root
