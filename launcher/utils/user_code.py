"""Which line of a user's own code is behind an exception."""

import traceback
from pathlib import Path

import torch

_LIBRARIES = (
    str(Path(traceback.__file__).parent),
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),  # the launcher
)


def user_location(error: BaseException) -> str:
    """` (file, line n)` of the user's code, where it can be told."""
    line = user_line(error)
    return f" ({line.filename}, line {line.lineno})" if line else ""


def user_line(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line behind an exception that is neither of a library nor of the launcher."""
    return next(
        (
            frame
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if Path(frame.filename).is_file()  # compiled code names files that are elsewhere
            and not frame.filename.startswith(_LIBRARIES)
            and {"site-packages", "dist-packages"}.isdisjoint(Path(frame.filename).parts)
        ),
        None,
    )
