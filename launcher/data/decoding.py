"""One picture: from its file, or its bytes, to uint8 pixels of a given size.

Pillow decodes, since it knows every format that people have and lets other threads go on; torch
resamples, three times as fast as Pillow, where a part of the picture is cut out.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from launcher.errors import BrokenPictureError

# What Pillow raises for files that are no whole picture, and `_in_colour`.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# How to turn the stored pixels upright, by the EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Cut:
    """A part of a picture: its area as a fraction of the whole, and its width over its height."""

    area: tuple[float, float]
    ratio: tuple[float, float]

    def __post_init__(self) -> None:
        """Refuse parts that no picture has."""
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"area={self.area}, ratio={self.ratio}: two numbers each, the smaller one first, "
                "of an area above 0 and at most 1, and of a ratio above 0"
            )

    def shares(self, draws: Tensor) -> Tensor:
        """Random parts, relative to the picture, from draws `(n, 4)`: `(n, 4)`, float64.

        Height and width relative to the square root of the picture's area, then the distances from
        the top and the left, from 0 to 1 of the possible range. The area and the logarithm of the
        ratio are drawn evenly. Source: Szegedy et al., "Going Deeper with Convolutions" (2015).
        """
        draws = draws.double()
        area = self.area[0] + draws[:, 0] * (self.area[1] - self.area[0])
        low, high = map(math.log, self.ratio)
        ratio = (low + draws[:, 1] * (high - low)).exp()
        return torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt(), *draws[:, 2:].T], dim=1)


def span(share: float, place: float, length: int, area: int) -> tuple[int, int]:
    """Start and stop of a part, along one side of a picture; not more than the whole side.

    torchvision's RandomResizedCrop draws again where it would be more.
    """
    size = min(length, max(1, round(share * math.sqrt(area))))
    start = int(place * (length - size + 1))
    return start, start + size


@contextmanager
def open_picture(file: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open a picture from a file or its bytes; raises `BrokenPictureError` for a damaged one."""
    try:
        with Image.open(BytesIO(content) if content is not None else file) as picture:
            # Some cameras write MPO: the picture, followed by others of the same moment.
            if picture.format != "MPO" and (several := getattr(picture, "n_frames", 1)) > 1:
                raise ValueError(f"the file holds {several} pictures")
            yield picture
    except UnidentifiedImageError:  # whose words name the object that held the bytes
        raise not_a_picture(file, "its content has no known format") from None
    except BROKEN as error:
        raise not_a_picture(file, str(error)) from None


def cut_out(picture: Image.Image, share: Tensor, size: int) -> Tensor:
    """A part of it, upright, in colour, stretched to `size` pixels square: uint8 `(h, w, 3)`.

    `share` is `Cut.shares`' of this picture.
    """
    upright = _in_colour(_upright(picture))
    width, height = upright.size
    tall, wide, down, right = share.tolist()
    top, bottom = span(tall, down, height, height * width)
    left, right = span(wide, right, width, height * width)
    part = torch.from_numpy(numpy.array(upright.crop((left, top, right, bottom))))
    # The axis of one image before the others, or torch would not see that the channels come last.
    pixels = part[None].permute(0, 3, 1, 2)
    resized = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


def fitted(
    picture: Image.Image, size: tuple[int, int], mode: str = "RGB", margin: float = 0.0
) -> Any:
    """Upright, scaled and cropped around the middle: uint8 `(height, width[, 3])`.

    `size` is width and height; `mode` is RGB, or L for one channel; `margin` is what is cropped off
    on each side, of the picture's own. Raises `ValueError` for a picture whose values do not say
    what is white.
    """
    return numpy.asarray(
        ImageOps.fit(_in_colour(_upright(picture)), size, bleed=margin).convert(mode)
    )


def margin_of(size: int, scaled_to: int) -> float:
    """The fraction to crop off on each side of a picture scaled to `scaled_to` pixels."""
    return (1 - size / scaled_to) / 2


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF orientation; without one, return it and not a copy.

    `ImageOps.exif_transpose` would also write the EXIF anew, and fails where a tag has an odd type.
    """
    try:
        picture.load()  # before EXIF is read: Pillow turns a TIFF itself and removes the tag
    except (LookupError, TypeError, struct.error) as error:  # a TIFF's tags, read on the way
        raise ValueError(f"its tags: {error}") from None
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are whole, and other programs show them as they are stored
        return picture
    return picture if turn is None else picture.transpose(turn)


def _in_colour(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F"):  # Pillow would turn nearly all pixels white, or black
        raise ValueError(f"in Pillow's mode {picture.mode} no value is known to be white")
    if picture.mode.startswith("I;16"):  # ... all but the darkest white
        picture = Image.fromarray((numpy.asarray(picture) >> 8).astype(numpy.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def not_a_picture(file: Path, why: str) -> BrokenPictureError:
    """The error of a file that cannot be read as a picture."""
    return BrokenPictureError(
        f"{file} cannot be read as a picture ({why})",
        expected="only pictures in a class folder",
        instead="repair the file or move it out of the folder",
    )
