"""The settings of a recipe, under dotted names.

`optimizer.lr` names a parameter of the callable in the slot `optimizer`, whether a `partial` sets
it already or the signature only has a default for it. `data.augment.crop.padding` goes through a
tuple of callables by their names.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from launcher.config import annotations
from launcher.config.recipe import Recipe
from launcher.errors import UserError
from launcher.utils.user_code import function_of

# Parameters that the launcher fills in itself, or that would change what a step means.
_FILLED_IN = ("root", "train", "split", "download", "params")
_UNSUITABLE = ("transform", "target_transform", "loader", "is_valid_file")
_MEANING = ("size_average", "reduce", "reduction")
_NOT_SETTINGS = frozenset((*_FILLED_IN, *_UNSUITABLE, *_MEANING))


@dataclass(frozen=True)
class Setting:
    """A part of a recipe: its dotted name, what it may be and what it is."""

    name: str
    annotation: Any
    value: Any

    @property
    def type_name(self) -> str:
        """The annotation as people write it: `float`, `int | None`."""
        return annotations.describe(self.annotation)

    @property
    def is_plain(self) -> bool:
        """Whether a value can be typed on a command line; else it is code, or holds code."""
        is_code = callable(self.value) or dataclasses.is_dataclass(self.value)
        return not is_code and annotations.is_plain(self.annotation)


def list_settings(recipe: Recipe) -> list[Setting]:
    """All settings that an override can change, in the order of the recipe's fields."""
    return [setting for setting in walk(recipe) if setting.is_plain]


def children(value: Any, prefix: str = "") -> Iterator[Setting]:
    """The parts of a dataclass, of a tuple or list of callables, or of a callable."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            if not field.metadata.get("is_setting", True):
                continue
            yield Setting(prefix + field.name, hints[field.name], getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            if callable(item):
                yield Setting(prefix + function_of(item).__name__, Callable, item)
    elif isinstance(value, nn.Module):
        yield from _module_settings(value, prefix)
    elif callable(value):
        yield from _parameters(value, prefix)


def walk(value: Any, prefix: str = "") -> Iterator[Setting]:
    """All parts of a recipe, the parts of its parts included."""
    for child in children(value, prefix):
        yield child
        yield from walk(child.value, f"{child.name}.")


def module_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that a module was built with, which are its attributes of the same names.

    Raises `UserError` for one that it does not keep: two losses would look alike that are not.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(module)).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds]
    for name in names:
        if not hasattr(module, name) and name not in _MEANING:
            raise UserError(
                f"{type(module).__name__}, which does not keep its argument {name}",
                expected="each argument as an attribute, so that a run can say what it ran",
                instead=f"write self.{name} = {name} in its __init__",
            )
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _module_settings(module: nn.Module, prefix: str) -> Iterator[Setting]:
    hints = _hints(type(module))
    for name, value in module_arguments(module).items():
        if name not in _NOT_SETTINGS:
            yield Setting(prefix + name, hints.get(name, _annotation_of(value)), value)


def _parameters(value: Callable[..., Any], prefix: str) -> Iterator[Setting]:
    function = function_of(value)
    try:
        signature = inspect.signature(function)
    except ValueError:  # code without a signature, written in C
        return
    given: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        given = {**signature.bind_partial(*value.args).arguments, **value.keywords}
    hints = _hints(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name, current in given.items() if takes_any else ():  # what **kwargs pass on
        if name not in signature.parameters:
            yield Setting(prefix + name, _annotation_of(current), current)
    for name, parameter in signature.parameters.items():
        current = given.get(name, parameter.default)
        if name in _NOT_SETTINGS or current is inspect.Parameter.empty:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(current, Tensor) and current.ndim == 0:  # as a rate may be
            current = current.item()
        yield Setting(prefix + name, hints.get(name, _annotation_of(current)), current)


def _annotation_of(value: Any) -> Any:
    return Any if value is None else type(value)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        return {}
