"""A recipe as plain JSON: what a run writes down, and what a resumed run compares."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from launcher.config.settings import children
from launcher.errors import UserError
from launcher.utils.user_code import function_of


def resolve(value: Any) -> Any:
    """A recipe or a part of it in JSON's own types.

    A callable becomes `{"call": "module:name", setting: value, ...}` with all of its settings,
    defaults included, so two equal recipes have equal forms. Raises `UserError` for a lambda, and
    for a module that is built already, unless it is the recipe's loss.
    """
    if isinstance(value, tuple | list):
        return [resolve(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            child.name: _with_settings(child.value)
            if child.name == "loss" and isinstance(child.value, nn.Module)
            else resolve(child.value)
            for child in children(value)
        }
    if callable(value):
        _refuse_built(value)
        return _with_settings(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # a tensor or an array of class weights
        return value.tolist()
    return repr(value)


def _with_settings(value: Any) -> dict[str, Any]:
    settings = {child.name: resolve(child.value) for child in children(value)}
    return {"call": code_name(value), **settings}


def _refuse_built(value: Callable[..., Any]) -> None:
    function = function_of(value)
    if isinstance(function, nn.Module):
        kind = type(function).__name__
        instead = f"write {kind} without brackets, with settings in partial({kind}, ...)"
        if isinstance(function, _Loss):
            instead = f"make it in the code of the loss that calls it, or write loss=nn.{kind}(...)"
        raise UserError(
            f"a {kind} that is built already in the recipe",
            expected="a class or a function, which every process calls for itself",
            instead=instead,
        )


def code_name(value: Callable[..., Any]) -> str:
    """`module:name` of a callable, seen through its partials; of a module, that of its class.

    Raises `UserError` for what has no name of its own.
    """
    function = function_of(value)
    if isinstance(function, nn.Module):
        function = type(function)
    name = getattr(function, "__qualname__", None)
    if name is None or "<lambda>" in name:
        raise UserError(
            "a lambda in the recipe" if name else f"{function!r} in the recipe",
            expected="code with a name, so that a run can say what it ran",
            instead="write it with def, at the top of the recipe file",
        )
    return f"{function.__module__}:{name}"


def short_name(value: Callable[..., Any]) -> str:
    """The name of a callable without its module."""
    return code_name(value).split(":")[1]
