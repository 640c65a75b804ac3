"""Numbers of images that are below 1, or too large for the memory, are refused at once."""

import math

from launcher.errors import UserError


def at_least_one(name: str, value: int) -> None:
    """Raise `UserError` for a number that leaves no images."""
    if value < 1:
        raise UserError(
            f"{name}={value} for a source of images",
            expected="a whole number of at least 1",
            instead=f"type data.source.{name}=32, or for a fallback data.fallback.{name}=32",
        )


def refuse_smaller_scale(size: int, scaled_to: int | None) -> None:
    """Raise `UserError` where scaled pictures would be smaller than the crop from their middle."""
    at_least_one("size", size)
    if scaled_to is not None and scaled_to < size:
        raise UserError(
            f"data.source.scaled_to={scaled_to}, of pictures of {size} pixels",
            expected=f"at least {size}, of which the middle is cropped",
            instead=f"type data.source.scaled_to={size * 8 // 7}, for example",
        )


def fits_in_memory(count: int, size: int) -> bool:
    """Whether so many uint8 images of `size` pixels square leave half of the free memory free.

    Images of three channels, as pictures are decoded.
    """
    import psutil

    return count * size * size * 3 <= psutil.virtual_memory().available / 2


def refuse_too_large(what: str, count: int, size: int, channels: int = 3) -> None:
    """Raise `UserError` where so many uint8 images of `size` pixels square do not fit."""
    import psutil

    needed, available = count * size * size * channels, int(psutil.virtual_memory().available)
    if needed > available:
        fits = max(1, math.isqrt(available // (2 * count * channels)))
        raise UserError(
            f"{what}: {count:,} images of {size} x {size} pixels need {needed / 1e9:,.1f} GB",
            expected=f"no more than the {available / 1e9:,.1f} GB of memory that are free here",
            instead=f"type data.source.size={fits}, for a fallback data.fallback.size={fits}, or "
            "use fewer images",
        )
