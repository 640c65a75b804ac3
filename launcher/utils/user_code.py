"""The user's own code: what stands in a slot, and where in it an exception comes from."""

import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

_LIBRARIES = (
    str(Path(traceback.__file__).parent),
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),  # the launcher
)


def function_of(value: Any) -> Any:
    """The function or class that a partial fills in; anything else as it is."""
    return value.func if isinstance(value, partial) else value


@contextmanager
def seeded_draws(seed: int = 0) -> Iterator[None]:
    """Let code of a recipe draw the same on all ranks and in a resumed run.

    It draws from the generators that are global: of Python and numpy, which are then as before, and
    of torch, which a training seeds anew for each step.
    """
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


def global_states() -> dict[str, Any]:
    """Of the generators that Python code draws from when it names none, in comparable form."""
    kind, keys, *rest = numpy.random.get_state()
    states = [torch.default_generator.get_state().numpy().tobytes()]
    if torch.cuda.is_available():
        states += [torch.cuda.get_rng_state().numpy().tobytes()]
    return {
        "torch": states,
        "numpy": (kind, numpy.asarray(keys).tobytes(), *rest),
        "Python": random.getstate(),
    }


def comparable(value: Any) -> Any:
    """What a value holds of numbers and of generators' states, for `==`; None where it is neither.

    Not the keys of a dictionary, which may be parameters.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        flat = value.detach().cpu().contiguous().view(-1)
        return tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if isinstance(value, dict):
        return [comparable(item) for item in value.values()]
    if isinstance(value, torch.Generator):
        return comparable(value.get_state())
    if isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState | random.Random):
        return repr(value.__getstate__())
    return repr(value) if isinstance(value, int | float | complex | numpy.generic) else None


def place_of(function: Callable[..., Any]) -> str:
    """` (file, line n)` where a function is defined; empty for what is none, such as a class."""
    code = getattr(function_of(function), "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""


def is_users(error: Exception, kinds: tuple[type[Exception], ...]) -> bool:
    """Whether an exception is for the recipe's author, and no fault of the launcher.

    It was raised in code of the recipe, or is one of the `kinds` that libraries raise for what they
    are given.
    """
    return isinstance(error, kinds) or user_line(error) is not None


def user_location(error: Exception) -> str:
    """` (file, line n)` of the user's code, where it can be told."""
    return describe_line(user_line(error))


def user_line(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line behind an exception that is neither of a library nor of the launcher."""
    return innermost_user_line(traceback.extract_tb(error.__traceback__))


def innermost_user_line(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    """Of frames, outermost first: the last one that is neither of a library nor the launcher's."""
    return next(
        (
            frame
            for frame in reversed(frames)
            if Path(frame.filename).is_file()  # compiled code names files that are elsewhere
            and not frame.filename.startswith(_LIBRARIES)
            and {"site-packages", "dist-packages"}.isdisjoint(Path(frame.filename).parts)
        ),
        None,
    )


def describe_line(line: traceback.FrameSummary | None) -> str:
    """` (file, line n)`; empty where there is none."""
    return f" ({line.filename}, line {line.lineno})" if line else ""
