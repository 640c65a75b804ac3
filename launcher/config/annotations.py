"""The annotation of a setting: whether a value fits it, and how it reads in a message."""

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from os import PathLike
from typing import Any

# What is taken for a plain type: numpy's numbers are some, too. True and False are no numbers.
_ACCEPTED: dict[Any, Any] = {int: Integral, float: Real, str: str | PathLike}
_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, collections.abc.Sequence)


def convert(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Whether `value` is of the annotated type, and the value in that type.

    A whole number becomes a float and a list a tuple where the annotation says so. Of a callable,
    only that it can be called is checked.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin is typing.Literal:
        return value in arguments, value
    if origin in _UNIONS:
        return next((found for a in arguments if (found := convert(value, a))[0]), (False, None))
    if origin is collections.abc.Callable:
        return callable(value), value
    if (kind := origin or annotation) in _SEQUENCES:
        fits, items = _convert_items(value, arguments if origin is tuple else (*arguments, ...))
        return fits, list(items) if kind is list else items
    if annotation in _ACCEPTED:
        fits = isinstance(value, _ACCEPTED[annotation]) and not isinstance(value, bool)
        try:
            return fits, annotation(value) if fits else None
        except OverflowError:  # a whole number beyond every float
            return False, None
    return isinstance(kind, type) and isinstance(value, kind), value


def _convert_items(value: Any, kinds: tuple[Any, ...]) -> tuple[bool, tuple[Any, ...]]:
    if not isinstance(value, tuple | list):
        return False, ()
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0] if len(kinds) == 2 else Any,) * len(value)
    results = [convert(item, kind) for item, kind in zip(value, kinds, strict=False)]
    fits = len(value) == len(kinds) and all(accepted for accepted, _ in results)
    return fits, tuple(item for _, item in results)


def ill_typed(part: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass whose values do not fit their annotations, with these."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        if not convert(getattr(part, field.name), hints[field.name])[0]:
            yield field, hints[field.name]


def describe(annotation: Any) -> str:
    """The annotation as people write it: `float`, `int | None`, `fp32 | bf16`.

    Of several options those are named that can be typed: `float` of `float | Tensor`.
    """
    options = typing.get_args(annotation)
    if is_callable_type(annotation):
        return "code"
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, options))
    if typing.get_origin(annotation) in _UNIONS:  # Optional[int] is int | None
        can_be_typed = [o for o in options if is_plain(o) or o is types.NoneType]
        return " | ".join(map(describe, can_be_typed if any(map(is_plain, options)) else options))
    if typing.get_origin(annotation) is tuple:
        items = ("..." if option is ... else describe(option) for option in options)
        return f"tuple[{', '.join(items)}]"
    if annotation is types.NoneType:
        return "None"
    if isinstance(annotation, type) and not options:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def is_callable_type(annotation: Any) -> bool:
    """Whether the annotation, or one of its options, is that of code."""
    options = (annotation, *typing.get_args(annotation))
    return any(o is Callable or typing.get_origin(o) is collections.abc.Callable for o in options)


def is_plain(annotation: Any) -> bool:
    """Whether any value of this annotation can be typed on a command line."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or annotation in (bool, int, float, str, tuple, list, Any):
        return True
    return origin in (*_UNIONS, *_SEQUENCES) and any(map(is_plain, arguments))
