"""Many small pictures as one image in a data URI, so that a page with hundreds is one file."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image

from launcher.checkpoint.outcomes import as_picture

MOST_BYTES = 1_200_000  # of a lossless sheet; larger ones are photographs, and become lossy
QUALITY = 90  # of WebP, in per cent
SHOWN = 96  # longer side of a picture on the page, in pixels


@dataclass(frozen=True)
class Sheet:
    """Pictures side by side; `width` and `height` of one, in pixels of the page."""

    uri: str
    columns: int
    rows: int
    width: int
    height: int
    is_enlarged: bool

    def position(self, number: int) -> str:
        """Where a picture lies, as CSS's background-position."""
        row, column = divmod(number, self.columns)
        return f"-{column * self.width}px -{row * self.height}px"

    @property
    def size(self) -> str:
        """Of the whole sheet, as CSS's background-size."""
        return f"{self.columns * self.width}px {self.rows * self.height}px"


def sheet(pictures: NDArray[Any], shown: int = SHOWN) -> Sheet:
    """Of pictures, uint8 `(k, h, w, c)` with k > 0."""
    count, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = numpy.zeros((rows * columns, height, width, channels), numpy.uint8)
    whole[:count] = pictures
    whole = whole.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    whole = whole.reshape(rows * height, columns * width, channels)
    scale = shown / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Sheet(_uri(as_picture(whole)), columns, rows, *size, is_enlarged=scale >= 2)


def _uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "WEBP", lossless=True, quality=0, method=2)
    if content.tell() > MOST_BYTES:
        content = io.BytesIO()
        image.save(content, "WEBP", quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
