"""Dotted names for everything in a recipe: list, override, and the resolved form as plain JSON.

`optimizer.lr` names a parameter of the callable in the slot `optimizer`, whether a `partial` sets
it already or the signature only has a default for it. `data.augment.crop.padding` goes through a
tuple of callables by their names. Values are checked against the annotations.
"""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import inspect
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.config.recipe import Recipe
from launcher.errors import UserError

# Parameters that the launcher fills in itself, or that would change what a step means.
_FILLED_IN = ("root", "train", "split", "download", "params")
_UNSUITABLE = ("transform", "target_transform", "loader", "is_valid_file")
_MEANING = ("size_average", "reduce", "reduction")
_NOT_SETTINGS = frozenset((*_FILLED_IN, *_UNSUITABLE, *_MEANING))
_PLAIN = (bool, int, float, str)
_SEQUENCES = (tuple, list, collections.abc.Sequence)


@dataclass(frozen=True)
class Setting:
    """One dotted name of a recipe, what it may be and what it is."""

    name: str
    annotation: Any
    value: Any

    @property
    def type_name(self) -> str:
        """The annotation as people write it: `float`, `int | None`."""
        if isinstance(self.annotation, type) and not typing.get_args(self.annotation):
            return self.annotation.__name__
        if _is_callable_type(self.annotation):
            return "code"
        if typing.get_origin(self.annotation) is typing.Union:  # Optional[int], written int | None
            options = typing.get_args(self.annotation)
            names = (Setting("", o, None).type_name for o in options)
            return " | ".join(names).replace("NoneType", "None")
        return str(self.annotation).replace("typing.", "").replace("NoneType", "None")


def list_settings(recipe: Recipe) -> list[Setting]:
    """All settings that an override can change, in the order of the recipe's fields."""
    return [s for s in _walk(recipe, "") if not _is_code(s.value) and _is_plain(s.annotation)]


def override(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """Apply words of the form `name=value` or `--name=value`.

    Raises `UserError` for a word without `=`, an unknown name, or a value of the wrong type.
    """
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            raise UserError(
                f"the word {word!r}",
                expected="settings of the form name=value",
                instead=f"type {name}=VALUE, or see launcher RECIPE --help",
            )
        recipe = _replace(recipe, name.split("."), text, name, recipe)
    return recipe


def as_dict(value: Any) -> Any:
    """The resolved form of a recipe or of a part of it: only JSON's own types.

    A callable becomes `{"call": "module:name", setting: value, ...}` with all of its settings,
    defaults included, so two equal recipes have equal forms. Raises `UserError` for a lambda.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [as_dict(item) for item in value]
    if callable(value):
        settings = {name: as_dict(child) for name, _, child in _parameters(value)}
        return {"call": code_name(value), **settings}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # a tensor or an array of class weights
        return value.tolist()
    return repr(value)


def code_name(value: Callable[..., Any]) -> str:
    """`module:name` of a callable, seen through its partials.

    Raises `UserError` for what has no name of its own.
    """
    function = _function(value)
    if isinstance(function, nn.Module):
        kind = type(function).__name__
        instead = f"write {kind} without brackets, with settings in partial({kind}, ...)"
        if kind.endswith("Loss"):
            instead = "write the function of torch.nn.functional, as in loss=cross_entropy"
        raise UserError(
            f"a {kind} that is built already in the recipe",
            expected="a class or a function, which every process calls for itself",
            instead=instead,
        )
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


def as_text(value: Any) -> str:
    """A value as it would be typed after `name=`, in a shell."""
    if isinstance(value, tuple | list) and value:  # without brackets: a shell has a use for them
        return shlex.quote(",".join(map(repr, value)) + "," * (len(value) == 1))
    return "none" if value is None else shlex.quote(str(value))


def _function(value: Callable[..., Any]) -> Callable[..., Any]:
    return value.func if isinstance(value, functools.partial) else value


def _parameters(value: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation and value of each setting of a callable."""
    function = _function(value)
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
            yield name, Any if current is None else type(current), current
    for name, parameter in signature.parameters.items():
        current = given.get(name, parameter.default)
        if name in _NOT_SETTINGS or current is inspect.Parameter.empty:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        yield name, hints.get(name, Any if current is None else type(current)), current


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        return {}


def _children(value: Any) -> Iterator[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            yield field.name, hints[field.name], getattr(value, field.name)
    elif isinstance(value, tuple):
        for item in value:
            if callable(item):
                yield _function(item).__name__, Callable, item
    elif callable(value):
        yield from _parameters(value)


def _walk(value: Any, prefix: str) -> Iterator[Setting]:
    for name, annotation, child in _children(value):
        yield Setting(prefix + name, annotation, child)
        yield from _walk(child, f"{prefix}{name}.")


def _replace(value: Any, path: list[str], text: str, name: str, recipe: Recipe) -> Any:
    """Copy `value` with the setting at `path` below it set from `text`."""
    head, *rest = path
    known = {child_name: (annotation, child) for child_name, annotation, child in _children(value)}
    if head not in known:
        raise _unknown(name, recipe)
    annotation, child = known[head]
    new = (
        _replace(child, rest, text, name, recipe) if rest else parse(text, annotation, name, child)
    )
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{head: new})  # type: ignore[type-var]
    if isinstance(value, tuple):
        return tuple(new if item is child else item for item in value)
    if isinstance(value, functools.partial):
        given = inspect.signature(value.func).bind_partial(*value.args)
        if head in given.arguments:
            given.arguments[head] = new
            return functools.partial(value.func, *given.args, **value.keywords)
        return functools.partial(value.func, *value.args, **{**value.keywords, head: new})
    return functools.partial(value, **{head: new})


def _unknown(name: str, recipe: Recipe) -> UserError:
    names = [setting.name for setting in list_settings(recipe)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # the right last word in the wrong place: lr for optimizer.lr
        close = [known for known in names if known.split(".")[-1] == name.split(".")[-1]][:1]
    return UserError(
        f"no setting is called {name!r}",
        expected="a name that launcher RECIPE --help lists",
        instead=f"did you mean {close[0]}?" if close else f"top level: {', '.join(_top(names))}",
    )


def _top(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def parse(text: str, annotation: Any, name: str, current: Any = None) -> Any:
    """Read `text` as a value of `annotation`; raises `UserError` where it is none."""
    value = _literal(text)
    for candidate in (value, text):  # a string such as 10 may be meant as text
        accepted, converted = _convert(candidate, annotation)
        if accepted:
            return converted
    setting = Setting(name, annotation, None)
    raise UserError(
        f"{name}={text}",
        expected=f"a value of type {setting.type_name}",
        instead="change code in the recipe file"
        if _is_callable_type(annotation)
        else f"type {name}={as_text(current)} to keep it as it is",
    )


def _literal(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError):
        return text


def _convert(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Whether `value` is of the annotated type, and the value itself (an int becomes a float)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True, value
    if origin is typing.Literal:
        return value in arguments, value
    if origin in (typing.Union, types.UnionType):
        return next((result for a in arguments if (result := _convert(value, a))[0]), (False, None))
    if annotation in (None, types.NoneType):
        return value is None, None
    if origin in _SEQUENCES:
        kinds = arguments if origin is tuple else (*arguments, Ellipsis)
        fits, items = _convert_tuple(value, kinds)
        return fits, list(items) if fits and origin is list else items
    if annotation in (tuple, list) and isinstance(value, tuple | list):
        return True, annotation(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if annotation in _PLAIN:
        return type(value) is annotation, value
    return False, None


def _convert_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, tuple | list):
        return False, None
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    results = [_convert(item, a) for item, a in zip(value, arguments, strict=False)]
    fits = len(value) == len(arguments) and all(accepted for accepted, _ in results)
    return fits, tuple(converted for _, converted in results)


def _is_callable_type(annotation: Any) -> bool:
    options = (annotation, *typing.get_args(annotation))
    return any(o is Callable or typing.get_origin(o) is collections.abc.Callable for o in options)


def _is_code(value: Any) -> bool:
    return callable(value) or dataclasses.is_dataclass(value)


def _is_plain(annotation: Any) -> bool:
    """Whether any value of this annotation can be typed on a command line."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or annotation in (*_PLAIN, tuple, list, Any):
        return True
    if origin in (typing.Union, types.UnionType, *_SEQUENCES):
        return any(_is_plain(argument) for argument in arguments)
    return False
