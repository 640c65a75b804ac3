"""Pictures in class folders: layouts, what is done to a picture, and what is refused."""

import io
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from launcher import Folder
from launcher.data.decoding import fitted, open_picture
from tests.support.helpers import refused

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
ORIENTATION = 0x0112


def draw(path: Path, colour: Any = RED, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def fill(root: Path, kinds: dict[str, int], suffix: str = ".png") -> None:
    """Some pictures of each kind, each with a grey of its own."""
    for number, (kind, count) in enumerate(kinds.items()):
        for index in range(count):
            grey = 100 * number + index
            draw(root / kind / f"{index:03}{suffix}", (grey, grey, grey))


def greys(half: Folder) -> list[int]:
    return half.data[:, 0, 0, 0].tolist()


def both(root: Path) -> tuple[Folder, Folder]:
    return Folder(str(root)), Folder(str(root), "test")


# Layouts


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders_are_the_two_splits(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train", {"cat": 3, "dog": 2})
    fill(tmp_path / name, {"cat": 1, "dog": 1})
    train, test = both(tmp_path)
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.targets.tolist() == [0, 0, 0, 1, 1]
    assert test.targets.tolist() == [0, 1]
    assert greys(train) == [0, 1, 2, 100, 101]


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation")])
def test_splits_of_other_names_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        fill(tmp_path / name, {"cat": 5, "dog": 5})
    moved = f"mv {tmp_path / names[0]} {tmp_path / 'train'}"
    with refused("holds the folders ", "train and test (or val), called so", moved):
        Folder(str(tmp_path))


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    fill(tmp_path, {"Train": 5, "car": 5})
    assert both(tmp_path)[0].classes == ["Train", "car"]


def test_a_test_folder_wins_over_a_validation_folder(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 2})
    fill(tmp_path / "val", {"cat": 5})
    fill(tmp_path / "test", {"cat": 3})
    assert len(Folder(str(tmp_path), "test").data) == 3


def test_of_plain_class_folders_every_fifth_picture_is_kept_for_testing(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 11, "dog": 7})
    train, test = both(tmp_path)
    assert greys(test) == [4, 9, 104]
    assert test.targets.tolist() == [0, 0, 1]
    assert train.classes == test.classes == ["cat", "dog"]
    assert not set(greys(train)) & set(greys(test)), "no picture is in both halves"
    assert sorted(greys(train) + greys(test)) == [*range(11), *range(100, 107)]


def test_the_splits_of_plain_folders_are_the_same_every_time(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 10})
    one, two = Folder(str(tmp_path)), Folder(str(tmp_path))
    assert numpy.array_equal(one.data, two.data)


def test_classes_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"zebra": 1, "ant": 1, "my cat": 1})
    assert Folder(str(tmp_path)).classes == ["ant", "my cat", "zebra"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".bmp", ".webp"])
def test_the_usual_kinds_of_pictures_are_read(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path / "train", {"cat": 2}, suffix)
    assert len(Folder(str(tmp_path)).data) == 2


def test_hidden_files_and_what_desktops_leave_behind_are_skipped(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 5})
    for name in (".DS_Store", "Thumbs.db", ".hidden.png"):
        (tmp_path / "cat" / name).write_bytes(b"no picture")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("about these pictures")
    train, test = both(tmp_path)
    assert train.classes == ["cat"]
    assert (len(train.data), len(test.data)) == (4, 1)


def decoded(root: Path) -> None:
    """All pictures of both halves are read."""
    assert all(len(half.data) for half in both(root))


# Pictures


@pytest.mark.parametrize("shape", [(8, 8), (100, 100), (100, 40), (40, 100), (3, 5), (300, 2)])
@pytest.mark.parametrize("size", [16, 64])
def test_every_picture_becomes_a_square_of_the_size_asked_for(
    tmp_path: Path, shape: tuple[int, int], size: int
) -> None:
    draw(tmp_path / "train" / "cat" / "a.png", RED, shape)
    data = Folder(str(tmp_path), size=size).data
    assert data.shape == (1, size, size, 3)
    assert data.dtype == numpy.uint8
    assert (data == RED).all()


def test_an_oblong_picture_is_cropped_around_its_middle(tmp_path: Path) -> None:
    picture = Image.new("RGB", (90, 30), RED)
    picture.paste(GREEN, (30, 0, 60, 30))
    picture.paste(BLUE, (60, 0, 90, 30))
    (tmp_path / "train" / "flag").mkdir(parents=True)
    picture.save(tmp_path / "train" / "flag" / "a.png")
    data = Folder(str(tmp_path), size=30).data
    assert (data[0] == GREEN).all()


def test_a_larger_picture_is_scaled_and_not_cut(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(BLUE, (32, 0, 64, 64))
    (tmp_path / "train" / "flag").mkdir(parents=True)
    picture.save(tmp_path / "train" / "flag" / "a.png")
    data = Folder(str(tmp_path), size=16).data[0]
    assert (data[:, 1] == RED).all()
    assert (data[:, -2] == BLUE).all()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 32768, (128, 128, 128)),
    ],
)
def test_pictures_of_any_mode_become_rgb(
    tmp_path: Path, mode: str, colour: Any, expected: tuple[int, int, int]
) -> None:
    draw(tmp_path / "train" / "cat" / "a.png", colour, mode=mode)
    data = Folder(str(tmp_path), size=8).data
    assert (abs(data.astype(int) - expected) <= 1).all()


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "cat" / "a.jpg", (0, 0, 0, 0), mode="CMYK")
    assert (Folder(str(tmp_path), size=8).data == 255).all()


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, "top left"), (3, "bottom right"), (6, "top right"), (8, "bottom left")],
)
def test_a_picture_that_a_camera_marked_as_turned_is_upright(
    tmp_path: Path, orientation: int, corner: str
) -> None:
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (tmp_path / "train" / "cat").mkdir(parents=True)
    picture.save(tmp_path / "train" / "cat" / "a.png", exif=exif)
    data = Folder(str(tmp_path), size=16).data[0, :, :, 0]
    vertical, horizontal = corner.split()
    row, column = 0 if vertical == "top" else 15, 0 if horizontal == "left" else 15
    assert data[row, column] == 255
    assert data.sum() == 255 * 64


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(orientation: int, suffix: str) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=numpy.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, Image.registered_extensions()[suffix], exif=exif)
    with Image.open(stream) as picture:
        expected = ImageOps.exif_transpose(picture)
    with open_picture(Path("a" + suffix), stream.getvalue()) as picture:
        assert numpy.array_equal(fitted(picture, expected.size), numpy.asarray(expected))


def exif_of(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Tags as a camera may write them, and Pillow would not."""
    entries = b"".join(struct.pack("<HHL4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)


TURNED = (ORIENTATION, 3, 1, b"\6\0")


@pytest.mark.parametrize(
    ("exif", "is_turned"),
    [
        pytest.param(exif_of(TURNED, (0x011A, 2, 4, b"abc")), True, id="resolution of letters"),
        pytest.param(exif_of((0x0100, 2, 4, b"abc"), TURNED), True, id="width of letters"),
        pytest.param(b"Exif\0\0no EXIF at all", False, id="no EXIF at all"),
    ],
)
def test_odd_exif_loses_no_picture(tmp_path: Path, exif: bytes, is_turned: bool) -> None:
    picture = Image.new("RGB", (16, 16))
    picture.paste(RED, (0, 0, 8, 8))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    picture.save(tmp_path / "train" / "cat" / "a.png", exif=exif)
    data = Folder(str(tmp_path), size=16).data[0]
    assert tuple(data[0, -1 if is_turned else 0]) == RED
    assert data.sum() == 255 * 64


# Refusals


def test_a_root_that_is_not_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    """`datasets` turns it into a fallback or a refusal."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Folder(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_root_is_refused(tmp_path: Path, split: str) -> None:
    with refused(str(tmp_path), "no pictures", "CLASS/picture.png", "data.root=FOLDER"):
        Folder(str(tmp_path), split)


@pytest.mark.parametrize("half", ["", "train"])
def test_an_empty_class_folder_is_refused_by_name(tmp_path: Path, half: str) -> None:
    fill(tmp_path / half, {"cat": 5})
    (tmp_path / half / "dog").mkdir()
    with refused(str(tmp_path / half / "dog"), "no pictures"):
        Folder(str(tmp_path))


def test_a_train_folder_without_a_test_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 5})
    assert len(Folder(str(tmp_path)).data) == 5
    with refused(str(tmp_path / "test"), "no pictures"):
        Folder(str(tmp_path), "test")


def test_too_few_pictures_to_keep_one_for_testing_are_refused_with_the_number_needed(
    tmp_path: Path,
) -> None:
    fill(tmp_path, {"cat": 4, "dog": 4})
    with refused(str(tmp_path), "5"):
        Folder(str(tmp_path), "test")


def test_pictures_outside_of_class_folders_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with refused(str(tmp_path), "CLASS/picture.png"):
        Folder(str(tmp_path))


def test_a_text_file_among_the_pictures_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 5})
    (tmp_path / "cat" / "notes.txt").write_text("about cats")
    with refused(str(tmp_path / "cat" / "notes.txt"), "only pictures", "move it"):
        Folder(str(tmp_path))


def jpeg() -> bytes:
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def tiff() -> bytes:
    """With a number where its XMP, a text, belongs."""
    stream = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = 3
    tags[700] = 1
    Image.new("RGB", (8, 8)).save(stream, "TIFF", tiffinfo=tags)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.png", b"this is no picture"),
        ("cut.jpg", jpeg()[:-400]),
        ("cut_early.jpg", jpeg()[:40]),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00"),
        ("odd_tags.tif", tiff()),
    ],
)
def test_a_damaged_picture_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    fill(tmp_path, {"cat": 5})
    (tmp_path / "cat" / name).write_bytes(content)
    with refused(str(tmp_path / "cat" / name), "cannot be read as a picture", "repair"):
        decoded(tmp_path)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_without_a_known_white_is_refused(tmp_path: Path, mode: str) -> None:
    fill(tmp_path, {"cat": 5})
    draw(tmp_path / "cat" / "deep.tif", 1, mode=mode)
    with refused(str(tmp_path / "cat" / "deep.tif"), f"mode {mode}", "repair"):
        decoded(tmp_path)


def test_a_link_to_a_picture_that_is_gone_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 5})
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with refused(str(tmp_path / "cat" / "gone.png"), "No such file"):
        decoded(tmp_path)


def test_a_folder_inside_of_a_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 6, "dog": 6})
    (tmp_path / "dog" / "puppies").mkdir()
    with refused("puppies is a folder inside of a class"):
        both(tmp_path)


def test_folders_beside_train_and_test_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 2})
    fill(tmp_path / "test", {"cat": 1})
    (tmp_path / "extra").mkdir()
    (tmp_path / ".cache").mkdir()
    with refused("beside it extra"):
        both(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_be_waited_for_is_no_picture(tmp_path: Path, kind: str) -> None:
    fill(tmp_path, {"a": 5, "b": 5})
    odd = tmp_path / "b" / "odd.png"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("/dev/zero")
    with refused(f"{odd}", "a pipe or a device"):
        Folder(str(tmp_path))


def test_pictures_that_do_not_fit_into_memory_are_counted_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "000.png").write_bytes(b"no picture")  # that would be said of it
    needed = 8 * 100 * 100 * 3
    free = SimpleNamespace(available=needed - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with refused("8 images of 100 x 100 pixels need", "memory", "data.source.size=70"):
        _ = Folder(str(tmp_path), size=100).data
    with refused("cannot be read as a picture"):
        _ = Folder(str(tmp_path), size=70).data


def test_a_picture_has_pixels(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 5})
    with refused("size=0", "at least 1"):
        Folder(str(tmp_path), size=0)


def test_a_margin_is_cropped_off_where_pictures_are_scaled_to_more(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(GREEN, (5, 5, 59, 59))
    (tmp_path / "train" / "frame").mkdir(parents=True)
    picture.save(tmp_path / "train" / "frame" / "a.png")
    assert (Folder(str(tmp_path), size=24, scaled_to=32).data == GREEN).all()
    assert not (Folder(str(tmp_path), size=32).data == GREEN).all()
    with refused("data.source.scaled_to=16", "of 32 pixels", "scaled_to=36"):
        Folder(str(tmp_path), size=32, scaled_to=16)


@pytest.mark.parametrize("ending", ["webp", "png", "tiff"])
def test_several_pictures_in_one_file_are_refused(tmp_path: Path, ending: str) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    file = tmp_path / "train" / "cat" / f"a.{ending}"
    first.save(file, save_all=True, append_images=[second])
    with refused(f"{file} cannot be read as a picture (the file holds 2 pictures)", "move it out"):
        _ = Folder(str(tmp_path), size=8).data


def test_what_a_camera_wrote_behind_its_picture_is_passed_over(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    first.save(tmp_path / "train" / "cat" / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert abs(Folder(str(tmp_path), size=8).data.astype(int) - RED).max() <= 2
