"""The resolution of the training images: from the progress of the training to pixels a side.

The progress is 0 in the first epoch and 1 in the last one (1 where there is only one), so each
epoch has one resolution, on all ranks and after a resume. A recipe fills in the settings with
`functools.partial`, and any function of one float serves as well.
"""

import math
from numbers import Integral

from launcher.config.serialize import code_name
from launcher.config.slots import Resolution
from launcher.errors import UserError
from launcher.utils.user_code import is_users, user_location

_ROUNDING = 1e-9  # of a product of fractions, by which a half may be less than one


def growing(
    progress: float,
    *,
    first: int,
    last: int,
    start: float = 0.0,
    end: float = 1.0,
    multiple: int = 8,
) -> int:
    """Grow evenly from `first` to `last` pixels between the fractions `start` and `end`.

    To the nearest `multiple` of pixels; of two that are equally near, the larger. Source: Howard,
    "Training Imagenet in 3 hours for $25" (2018), where it is called progressive resizing.
    """
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start={start}, end={end}: expected fractions, the smaller one first")
    if not 1 <= first <= last:
        raise ValueError(f"first={first}, last={last}: expected pixels, the smaller number first")
    if multiple < 1 or first % multiple or last % multiple:
        raise ValueError(f"first={first}, last={last}: expected multiples of multiple={multiple}")
    if progress <= start:
        return first
    if progress >= end:
        return last
    pixels = first + (last - first) * (progress - start) / (end - start)
    return math.floor(pixels / multiple + 0.5 + _ROUNDING) * multiple


def resolutions_of(
    resolution: Resolution, epochs: int, image_size: tuple[int, int] | None
) -> tuple[int, ...]:
    """That of each epoch; raises `UserError` for what is none of images of this height and width.

    Larger ones would be larger than what is evaluated, for which all else has room.
    """
    if image_size and image_size[0] != image_size[1]:
        height, width = image_size
        raise UserError(
            f"data.train_resolution with images of {height} x {width} pixels",
            expected="images that are as wide as they are high",
            instead="type data.train_resolution=none",
        )
    most = image_size[0] if image_size else None
    return tuple(
        _checked(resolution, epoch / (epochs - 1) if epochs > 1 else 1.0, most)
        for epoch in range(epochs)
    )


def _checked(resolution: Resolution, progress: float, most: int | None) -> int:
    name = code_name(resolution)
    try:
        pixels = resolution(progress)
        what = f"makes {pixels!r} of the progress {progress:.3g}"
    except Exception as error:
        if not is_users(error, (ValueError, TypeError)):
            raise  # of the launcher's own
        pixels = 0
        what = f"fails: {type(error).__name__}: {error}{user_location(error)}"
    is_number = isinstance(pixels, Integral) and not isinstance(pixels, bool)
    if not is_number or pixels < 1 or (most and pixels > most):
        limit = f", at most the {most} of the images that are evaluated" if most else ""
        raise UserError(
            f"data.train_resolution: {name} {what}",
            expected=f"a whole number of pixels, at least 1{limit}",
            instead="write train_resolution=partial(growing, first=24, last=32), for example, in "
            "the recipe file, or type data.train_resolution=none",
        )
    return int(pixels)
