"""`launcher pack`: what it writes, how it goes on, what it finds damaged, and what it refuses."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torchvision.datasets import CIFAR10

from launcher import Folder, Images, Packed, random_resized_crop
from launcher.cli import main
from launcher.data import cache, packing, sources, storage, tiers
from launcher.data.storage import Joined
from launcher.errors import BrokenPictureError
from tests.support import helpers
from tests.support.helpers import HALF, RECIPES, refused
from tests.unit.data.test_sources import Cifar

COUNTS = {"train": 11, "test": 3}  # of each of two classes: the last chunk is smaller
LINE = ("pack", "pets", "out", "--size", "8")
ENCODED = ("pack", "pets", "out", "--encoded")
KINDS = ("pictures", "offsets", "names", "labels")
SIMPLECNN = str(RECIPES / "simplecnn.py")


@pytest.fixture(autouse=True)
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of noise, of several sizes, in the working folder; they are packed four by four."""
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 4)
    monkeypatch.chdir(tmp_path)
    draw(Path("pets"), COUNTS)


def draw(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    random = numpy.random.default_rng(seed)
    for half, number in counts.items():
        for name in ("cat", "dog"):
            (root / half / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (9 + index, 14, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(root / half / name / f"{index:03}.png")


def pack(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said by a pack that succeeds."""
    assert main([*LINE, *words]) == 0
    return capsys.readouterr().out


def spoil(name: str) -> Path:
    path = Path("pets", name)
    path.write_bytes(b"no picture")
    return path


def has_pack_of(folder: str, left_out: tuple[str, ...] = ()) -> None:
    """Pixels, labels and classes are those of the folder."""
    for half in ("train", "test"):
        packed, source = Packed("out", half), Folder(folder, half, size=8)
        kept = [place for place, file in enumerate(source.files) if file not in left_out]
        whole = storage.read(source.encoded, torch.tensor(kept))
        assert torch.equal(packed.data, whole)
        assert packed.targets.tolist() == source.targets[kept].tolist()
        assert packed.classes == source.classes


def content(file: str) -> Any:
    return json.loads(Path("out", file).read_text())


def change(path: Path, place: int) -> None:
    """Another byte at the place."""
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)


# What is packed


def test_a_folder_is_packed_as_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    said = pack(capsys)
    assert said == "packed images of 8 x 8 x 3, 22 for train and 6 for test (5.4 KB) into out\n"
    has_pack_of("pets")
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"pack.json", *(f"{h}.{k}" for h in COUNTS for k in ("images", "labels"))}


def test_the_validation_split_of_a_folder_is_packed_as_well() -> None:
    draw(Path("pets"), {"val": 2}, seed=1)
    assert main(LINE) == 0
    assert torch.equal(
        Packed("out", "val").data, torch.from_numpy(Folder("pets", "val", size=8).data)
    )


@pytest.mark.parametrize("source", ["CIFAR10", SIMPLECNN])
def test_a_set_of_torchvision_and_that_of_a_recipe_are_packed(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cifar = Cifar()
    cifar.write(tmp_path / "data")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar.source())
    assert main(["pack", source, "out", "--root", "data"]) == 0
    original = cifar.source()("data", train=True)
    assert numpy.array_equal(Packed("out").data.numpy(), original.data)
    assert Packed("out").targets.tolist() == original.targets


def test_a_recipe_names_the_split_that_it_validates_on() -> None:
    draw(Path("pets"), {"val": 2}, seed=1)
    text = Path(SIMPLECNN).read_text().replace("        CIFAR10,\n", "        Folder,\n")
    text = text.replace("from launcher import ", "from launcher import Folder, ")
    Path("mine.py").write_text(text.replace("fallback=Synthetic", 'validation="val", root="pets"'))
    assert main(["pack", "mine.py", "out"]) == 0
    assert Packed("out", "val").data.shape == (4, 32, 32, 3)


# Going on


def test_a_broken_picture_ends_it_and_what_is_packed_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Path("pets/train/dog/002.png").read_bytes()
    broken = spoil("train/dog/002.png")
    line = helpers.complaint(capsys, *LINE)
    assert f"{broken} cannot be read as a picture" in line
    assert "or type --on-broken skip; what is packed stays" in line
    assert content("pack.partial.json")["splits"]["train"]["read"] == 12
    before = Path("out/train.images").read_bytes()
    broken.write_bytes(whole)
    pack(capsys)
    has_pack_of("pets")
    assert Path("out/train.images").read_bytes()[: len(before)] == before
    assert not Path("out/pack.partial.json").exists()


def test_only_what_is_left_is_read_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = spoil("train/dog/002.png")
    helpers.complaint(capsys, *LINE)
    broken.unlink()  # the others of the split move up
    places = []
    reading = storage.Reading

    def seen(stored: Any, chosen: Any) -> Any:
        places.append(chosen.tolist())
        return reading(stored, chosen)

    monkeypatch.setattr(packing, "Reading", seen)
    pack(capsys)
    assert places[0] == [12, 13, 14, 15]
    has_pack_of("pets")


def test_broken_pictures_can_be_left_out_and_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("train/cat/000.png", "train/dog/002.png", "test/dog/001.png")
    for name in names:
        spoil(name)
    said = pack(capsys, "--on-broken", "skip")
    assert "20 for train and 5 for test" in said
    assert f"left out: 3 broken pictures: {', '.join(names)}\n" in said
    has_pack_of("pets", names)
    halves = content("pack.json")["splits"]
    assert [halves[half]["skipped"] for half in COUNTS] == [list(names[:2]), [names[2]]]
    assert f"left out: 3 broken pictures: {', '.join(names)}\n" in pack(capsys)


def test_a_split_of_broken_pictures_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path("pets/test").rglob("*.png"):
        spoil(str(path.relative_to("pets")))
    line = helpers.complaint(capsys, *LINE, "--on-broken", "skip")
    assert "no picture for test that can be read" in line


def test_what_was_written_after_the_last_whole_chunk_is_written_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = spoil("train/dog/002.png")
    helpers.complaint(capsys, *LINE)
    with Path("out/train.images").open("ab") as file:
        file.write(b"half a chunk")
    pack(capsys, "--on-broken", "skip")
    has_pack_of("pets", (str(broken.relative_to("pets")),))


@pytest.mark.parametrize("place", [0, -1])
def test_a_split_whose_packed_part_has_changed_is_packed_again(
    place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil("train/dog/002.png")
    helpers.complaint(capsys, *LINE)
    change(Path("out/train.images"), place)
    said = pack(capsys, "--on-broken", "skip")
    assert "out/train.images has changed since it was packed: it is packed again\n" in said
    has_pack_of("pets", ("train/dog/002.png",))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        ("pack", "pets", "out", "--size", "9"),
        ("pack", "others", "out", "--size", "8"),
        ("pack", SIMPLECNN, "out", "--root", "data"),
    ],
)
def test_another_source_or_size_is_refused(
    other: tuple[str, ...],
    whole: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cifar = Cifar()
    cifar.write(Path("data"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", cifar.source())
    draw(Path("others"), COUNTS)
    if whole:
        pack(capsys)
    else:
        spoil("train/dog/002.png")
        helpers.complaint(capsys, *LINE)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    line = helpers.complaint(capsys, *other)
    assert "Folder(size=8) in" in line
    assert "8 x 8 x 3" in line
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize("whole", [False, True])
def test_a_source_that_has_changed_is_refused(
    whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if whole:
        pack(capsys)
    else:
        spoil("train/dog/002.png")
        helpers.complaint(capsys, *LINE)
    Path("pets/train/cat/000.png").rename("pets/train/cat/zzz.png")
    assert "changed" in helpers.complaint(capsys, *LINE)


def test_one_process_packs_into_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    with FileLock("out/.pack.lock"):
        assert "into which another process packs" in helpers.complaint(capsys, *LINE)
    pack(capsys)


# What is whole


def test_a_whole_pack_is_compared_with_its_digests(capsys: pytest.CaptureFixture[str]) -> None:
    pack(capsys)
    before = [path.stat().st_mtime_ns for path in sorted(Path("out").iterdir())]
    said = pack(capsys)
    assert said.startswith("out is whole: images of 8 x 8 x 3, 22 for train and 6 for test")
    assert [path.stat().st_mtime_ns for path in sorted(Path("out").iterdir())] == before


@pytest.mark.parametrize(
    "file", [f"{half}.{kind}" for half in COUNTS for kind in ("images", "labels")]
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_found(file: str, place: int, capsys: pytest.CaptureFixture[str]) -> None:
    pack(capsys)
    change(Path("out", file), place)
    assert f"out/{file}, which is damaged" in helpers.complaint(capsys, *LINE)


@pytest.mark.parametrize("file", ["train.images", "test.labels"])
def test_a_file_that_is_gone_or_no_file_is_found(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(capsys)
    Path("out", file).unlink()
    assert f"out/{file}, which is no file of" in helpers.complaint(capsys, *LINE)
    os.mkfifo(Path("out", file))
    assert f"out/{file}, which is no file of" in helpers.complaint(capsys, *LINE)


# Bad input


def test_images_out_of_reach_are_answered_with_the_option_of_pack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    line = helpers.complaint(capsys, "pack", "CIFAR10", "out", "--root", "none")
    assert "CIFAR10 is not in 'none' and cannot be downloaded" in line
    assert line.endswith("; type --root FOLDER, or name another SOURCE")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere", "out"], ["'nowhere', which does not exist"]),
        (["nowhere.py", "out"], ["nowhere.py", "no such file"]),
        (["CIFAR11", "out"], ["did you mean CIFAR10?"]),
        (["CIFAR10", "out", "--root", "file"], ["file", "type --root FOLDER, or name another"]),
        (["ImageFolder", "out", "--root", "pets"], ["ImageFolder", "neither `train` nor `split`"]),
        (["CIFAR10", "out", "--size", "8"], ["--size 8 of CIFAR10", "leave out --size"]),
        (["CIFAR10", "out", "--encoded"], ["--encoded of CIFAR10", "leave out --encoded"]),
        (["pets", "out", "--encoded", "--size", "8"], ["--size 8 with --encoded"]),
        (["pets", "/proc/self/out", "--encoded"], ["/proc/self/out", "0 bytes are free"]),
        (["pets", "out", "--size", "0"], ["--size: '0'", "whole number from 1"]),
        (["pets", "out", "--size", "9" * 12], ["to be written to out", "are free"]),
        (["pets", "out", "--root", "x"], ["--root x with the folder pets"]),
        (["pets", "out", "--on-broken", "x"], ["--on-broken", "'stop', 'skip'"]),
        (["pets", "pets/out"], ["OUT=pets/out, inside of pets"]),
        (["pets", "."], ["OUT=., a folder with", "pets"]),
        (["pets", "file"], ["OUT=file, a file"]),
        (["pets", "file/out"], ["OUT=file/out", "Not a directory"]),
        (["pets", "/proc/self/out"], ["/proc/self/out", "0 bytes are free"]),
        (["pets"], ["OUT", "launcher pack --help"]),
        (["empty", "out"], ["empty holds no pictures", "; put them there, or name another"]),
        (["file", "out"], ["file"]),
    ],
)
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("file").write_text("no recipe (\n")
    before = sorted(Path().rglob("*"))
    line = helpers.complaint(capsys, "pack", *words)
    for part in parts:
        assert part in line
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"splits": 3}', '{"version": 1, "splits": {}}'])
def test_a_damaged_list_of_what_is_packed_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil("train/dog/002.png")
    helpers.complaint(capsys, *LINE)
    Path("out/pack.partial.json").write_text(text)
    assert "pack.partial.json, which is damaged" in helpers.complaint(capsys, *LINE)


# Reading a pack that is none


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 2}, "of version 2 in place of 1"),
        ({"version": "9" * 4000}, "of version 999"),
        ({"shape": [8, 8]}, "damaged"),
        ({"shape": [8, 8, 0]}, "damaged"),
        ({"shape": [8, 8, -3]}, "damaged"),
        ({"shape": [8, 8, 3.0]}, "damaged"),
        ({"shape": [8, 8, 10**40]}, "damaged"),
        ({"shape": [2**40, 2**40, 3]}, "4,224 bytes; expected"),
        ({"shape": [8, 16, 3]}, "train.images, which has 4,224 bytes; expected 8,448 bytes"),
        ({"classes": "cat"}, "damaged"),
        ({"classes": ["cat", 3]}, "damaged"),
        ({"splits": []}, "damaged"),
        ({"splits": {}}, "without the split 'train'"),
        ({"splits": {"train": {"count": 22}}}, "damaged"),
    ],
)
def test_a_manifest_of_something_else_is_refused(change: dict[str, Any], found: str) -> None:
    assert main(LINE) == 0
    Path("out/pack.json").write_text(json.dumps({**content("pack.json"), **change}))
    with refused(found):
        Packed("out")


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("../train", {}),
        ("a/b", {}),
        ("train", {"count": 0}),
        ("train", {"count": True}),
        ("train", {"count": 2**60}),
        ("train", {"images": 3}),
        ("train", {"skipped": [3]}),
        ("train", {"more": 3}),
    ],
)
def test_a_manifest_of_an_odd_split_is_refused(name: str, about: dict[str, Any]) -> None:
    assert main(LINE) == 0
    whole = content("pack.json")
    whole["splits"][name] = {**whole["splits"]["train"], **about}
    Path("out/pack.json").write_text(json.dumps(whole))
    with refused("pack.json, which is damaged"):
        Packed("out")


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, '{"version": 1}'])
def test_a_damaged_manifest_is_refused(text: str) -> None:
    Path("out").mkdir()
    Path("out/pack.json").write_text(text)
    with refused("pack.json, which is damaged"):
        Packed("out")


def test_a_pack_that_is_not_finished_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    spoil("train/dog/002.png")
    helpers.complaint(capsys, *LINE)
    with refused("out, in which there is no pack.json", "goes on where it stopped"):
        Packed("out")
    os.mkfifo("out/pack.json")
    with refused("out, in which there is no pack.json"):
        Packed("out")


def assert_needed_whole(path: Path) -> None:
    """Shorter by a byte, and then not there at all, a file of a pack is refused."""
    path.write_bytes(path.read_bytes()[:-1])
    with refused(f"{path}, which has"):
        Packed("out")
    path.unlink()
    with refused(f"{path}, which is not there"):
        Packed("out")


@pytest.mark.parametrize("file", ["train.images", "train.labels"])
def test_a_pack_with_a_file_of_another_length_is_refused(file: str) -> None:
    assert main(LINE) == 0
    path = Path("out", file)
    assert_needed_whole(path)
    os.mkfifo(path)
    with refused(f"out/{file}, which is no file"):
        Packed("out")


def test_a_split_that_was_not_packed_is_refused() -> None:
    assert main(LINE) == 0
    with refused("without the split 'val'", "one of train, test"):
        Packed("out", "val")


def test_a_pack_of_pixels_is_not_scaled_to_another_size() -> None:
    assert main(LINE) == 0
    assert torch.equal(Packed("out", size=8).data, Packed("out").data)
    with refused("data.source.size=9 of out, whose images are packed as 8 x 8", "--encoded"):
        Packed("out", size=9)
    with refused("data.source.scaled_to=9 of out, whose images are packed as 8 x 8"):
        Packed("out", scaled_to=9)


# Pictures that stay encoded


def pack_encoded(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said by a pack of encoded pictures that succeeds."""
    assert main([*ENCODED, *words]) == 0
    return capsys.readouterr().out


def joined(half: str = "train", size: int = 8) -> Joined:
    found = Packed("out", half, size=size).encoded
    assert isinstance(found, Joined)
    return found


def has_encoded(folder: str, left_out: tuple[str, ...] = ()) -> None:
    """The files of the folder, one behind the other, with their names and labels."""
    for half in COUNTS:
        packed, source = Packed("out", half), Folder(folder, half)
        kept = [place for place, file in enumerate(source.files) if file not in left_out]
        files = [source.files[place] for place in kept]
        whole = [Path(folder, file).read_bytes() for file in files]
        assert Path(f"out/{half}.pictures").read_bytes() == b"".join(whole)
        assert joined(half).files == tuple(files)
        assert [joined(half).contents([place]) for place in range(len(files))] == whole
        assert packed.targets.tolist() == source.targets[kept].tolist()
        assert packed.classes == source.classes


def images_of(source: Any, root: str, **changes: Any) -> Images:
    return replace(Images(source, batch_size=4, mean=HALF, std=HALF, root=root), **changes)


def test_encoded_pictures_are_packed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(path.stat().st_size for path in Path("pets").rglob("*.png"))
    said = pack_encoded(capsys)
    assert said == (
        f"packed encoded pictures, 22 for train and 6 for test ({size / 1000:.1f} KB) into out\n"
    )
    has_encoded("pets")
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"pack.json", *(f"{half}.{kind}" for half in COUNTS for kind in KINDS)}


@pytest.mark.parametrize("changes", [{}, {"tier": "disk"}, {"tier": "device"}, {"tier": "host"}])
@pytest.mark.parametrize(
    "cut", [(), (partial(random_resized_crop, area=(0.25, 1.0)),)], ids=["whole", "cut"]
)
def test_they_are_loaded_as_those_of_the_folder(changes: dict[str, Any], cut: Any) -> None:
    assert main(ENCODED) == 0
    changes = {**changes, "augment": cut, "validation": 0.25}
    loaded = [
        sources.load(images_of(partial(source, size=8, scaled_to=9), root, **changes), seed=1)
        for source, root in ((Folder, "pets"), (Packed, "out"))
    ]
    folder, packed = loaded
    for name, half in folder.splits.items():
        other = packed.splits[name]
        assert other.tensor.equal(half.tensor)
        assert other.labels.equal(half.labels)
        assert other.files == half.files
        assert isinstance(other.images, torch.Tensor) == isinstance(half.images, torch.Tensor)
    assert tiers.describe(packed) == tiers.describe(folder)
    assert packed.digest == folder.digest


def test_without_a_size_they_have_that_of_a_folder() -> None:
    assert main(ENCODED) == 0
    encoded = Packed("out").encoded
    assert encoded is not None
    assert encoded.shape == (22, 32, 32, 3)
    with refused("scaled_to=7, of pictures of 8 pixels"):
        Packed("out", size=8, scaled_to=7)
    with refused("size=0 for a source of images"):
        Packed("out", size=0)


def test_another_process_of_the_node_maps_the_file() -> None:
    """Rather than a copy of it."""
    assert main(ENCODED) == 0
    loaded = sources.load(images_of(partial(Packed, size=8), "out", tier="disk"))
    with cache._written(loaded) as place:
        assert os.stat(json.loads(place)[0]).st_size < Path("out/train.pictures").stat().st_size
        other = cache._map(place)
    assert other is not None
    assert isinstance(other.train.images, Joined)
    assert other.train.tensor.equal(loaded.train.tensor)
    assert other.train.files == loaded.train.files
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(Path("out/train.pictures").resolve())) == 2  # others may not be freed yet


def test_names_may_hold_any_characters(capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"pets/train/cat/a\nb \xff.png")
    Path("pets/train/cat/000.png").rename(odd)
    pack_encoded(capsys)
    has_encoded("pets")
    assert "out is whole" in pack_encoded(capsys)


def test_a_broken_picture_ends_a_pack_of_encoded_ones_which_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path("pets/train/dog/002.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # its beginning is that of a picture
    line = helpers.complaint(capsys, *ENCODED)
    assert f"{path} cannot be read as a picture" in line
    assert "or type --on-broken skip; what is packed stays" in line
    assert content("pack.partial.json")["splits"]["train"]["read"] == 12
    path.write_bytes(whole)
    before = {kind: Path(f"out/train.{kind}").stat().st_ino for kind in ("pictures", "offsets")}
    pack_encoded(capsys)
    has_encoded("pets")
    assert before == {kind: Path(f"out/train.{kind}").stat().st_ino for kind in before}


def test_broken_ones_can_be_left_out_of_encoded_ones(capsys: pytest.CaptureFixture[str]) -> None:
    first = [f"train/cat/{number:03}.png" for number in range(4)]  # all of the first chunk
    names = (*first, "train/dog/002.png", "test/dog/001.png")
    for name in names:
        spoil(name)
    Path("pets", names[-1]).unlink()
    Path("pets", names[-1]).symlink_to("nowhere")
    said = pack_encoded(capsys, "--on-broken", "skip")
    assert "17 for train and 5 for test" in said
    assert "left out: 6 broken pictures: train/cat/000.png" in said
    has_encoded("pets", names)
    assert "left out: 6 broken pictures: train/cat/000.png" in pack_encoded(capsys)


@pytest.mark.parametrize("kind", ["pictures", "offsets"])
@pytest.mark.parametrize("place", [0, -1])
def test_encoded_ones_that_have_changed_are_packed_again(
    kind: str, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil("train/dog/002.png")
    helpers.complaint(capsys, *ENCODED)
    change(Path("out", f"train.{kind}"), place)
    said = pack_encoded(capsys, "--on-broken", "skip")
    if (kind, place) == ("pictures", -1):  # which is behind the last whole chunk
        assert "has changed" not in said
    else:
        assert f"out/train.{kind} has changed since it was packed: it is packed again\n" in said
    has_encoded("pets", ("train/dog/002.png",))


@pytest.mark.parametrize("lines", [(LINE, ENCODED), (ENCODED, LINE)])
@pytest.mark.parametrize("whole", [False, True])
def test_pixels_and_encoded_ones_do_not_go_into_one_folder(
    lines: tuple[tuple[str, ...], ...], whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if whole:
        assert main(lines[0]) == 0
        capsys.readouterr()
    else:
        spoil("train/dog/002.png")
        helpers.complaint(capsys, *lines[0])
    line = helpers.complaint(capsys, *lines[1])
    assert "8 x 8 x 3" in line if lines[0] == LINE else "encoded pictures" in line


@pytest.mark.parametrize("file", [f"{half}.{kind}" for half in COUNTS for kind in KINDS])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_of_encoded_ones_is_found(
    file: str, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_encoded(capsys)
    assert "out is whole: encoded pictures, 22 for train" in pack_encoded(capsys)
    change(Path("out", file), place)
    assert f"out/{file}, which is damaged" in helpers.complaint(capsys, *ENCODED)


@pytest.mark.parametrize(
    ("places", "value", "found"),
    [
        ([5], 2**40, "train.offsets, whose numbers do not increase"),
        ([5], -1, "train.offsets, whose numbers do not increase"),
        ([4, 5], 300, "train.offsets, whose numbers do not increase"),
        ([0], 1, "train.offsets, whose numbers go from 1 to"),
        ([-1], 2**40, "train.offsets, whose numbers go from 0 to 1,099,511,627,776; expected"),
    ],
)
def test_offsets_that_are_none_are_refused(places: list[int], value: int, found: str) -> None:
    assert main(ENCODED) == 0
    offsets = numpy.fromfile("out/train.offsets", "<i8")
    offsets[places] = value
    offsets.tofile("out/train.offsets")
    with refused(found, "where each picture begins"):
        Packed("out")


@pytest.mark.parametrize("kind", KINDS)
def test_encoded_ones_with_a_file_of_another_length_are_refused(kind: str) -> None:
    assert main(ENCODED) == 0
    assert_needed_whole(Path("out", f"train.{kind}"))


@pytest.mark.parametrize("about", [{"bytes": 0}, {"bytes": "3"}, {"names": 3}, {"offsets": None}])
def test_a_manifest_of_an_odd_split_of_encoded_ones_is_refused(about: dict[str, Any]) -> None:
    assert main(ENCODED) == 0
    whole = content("pack.json")
    whole["splits"]["train"].update(about)
    Path("out/pack.json").write_text(json.dumps(whole))
    with refused("pack.json, which is damaged"):
        Packed("out")


def test_labels_beyond_the_classes_are_refused() -> None:
    assert main(ENCODED) == 0
    numpy.full(22, 2, "<i8").tofile("out/train.labels")
    with refused("labels from 2 to 2 in Packed"):
        sources.load(images_of(partial(Packed, size=8), "out"))


def test_a_packed_picture_that_has_changed_is_named_or_left_out() -> None:
    assert main(ENCODED) == 0
    start = int(joined().offsets[3])
    for place in range(start, start + 30):
        change(Path("out/train.pictures"), place)
    with pytest.raises(BrokenPictureError, match=r"out/train.pictures/train/cat/003.png cannot"):
        storage.read(joined(), torch.tensor([3]))
    images = images_of(partial(Packed, size=8), "out", tier="disk", on_broken="skip")
    loaded = sources.load(images)
    assert loaded.train.left_out == ("train/cat/003.png",)
    assert len(loaded.train) == 21
    assert "train/cat/003.png" not in loaded.train.files
