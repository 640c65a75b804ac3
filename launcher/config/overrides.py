"""Overrides: words of the form `name=value` change settings of a recipe for one run."""

import ast
import dataclasses
import difflib
import functools
import inspect
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from launcher.config import annotations
from launcher.config.options import RunOptions
from launcher.config.recipe import Recipe
from launcher.config.settings import children, list_settings, module_arguments, walk
from launcher.errors import UserError

_IN_OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay", "bs": "batch_size"}


def override(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """Apply words of the form `name=value` or `--name=value`, which may stand in any order.

    Raises `UserError` for a word without `=`, an unknown name, or a value of the wrong type.
    """
    changed, is_refused = recipe, False
    pairs = list(pairwise((*words, "")))
    for word, following in pairs:
        try:
            changed = _with_word(changed, word, following)
        except UserError:
            is_refused = True
    if not is_refused:
        return changed
    # A setting may fit only another one that is typed after it. All words are said again, not only
    # those refused, so that of two for one setting the last still counts.
    for word, following in pairs:
        changed = _with_word(changed, word, following)
    return changed


def _with_word(recipe: Recipe, word: str, following: str) -> Recipe:
    if not isinstance(word, str):
        raise UserError(
            f"the word {word!r}, which is a {type(word).__name__}",
            expected="settings of the form name=value, each a text of its own",
            instead='write train(recipe, "epochs=2", "optimizer.lr=0.1"), for example',
        )
    name, equals, text = word.removeprefix("--").partition("=")
    if not equals:
        raise UserError(
            f"the word {word!r}",
            expected="settings of the form name=value",
            instead="name a recipe before all settings, and several only behind launcher repeat"
            if name.endswith(".py")
            else f"type {_meant(name, following, recipe)}, or see launcher RECIPE --help",
        )
    if name not in {part.name for part in walk(recipe)}:
        raise _unknown(name, text, recipe)
    return _replace(recipe, "", name, text)


def parse(text: str, annotation: Any, name: str, current: Any = None) -> Any:
    """Read `text` as a value of `annotation`; raises `UserError` where it is none."""
    for candidate in (_literal(text), text):  # a string such as 10 may be meant as text
        fits, value = annotations.convert(candidate, annotation)
        if fits:
            return value
    raise UserError(
        f"{name}={text}",
        expected=f"a value of type {annotations.describe(annotation)}",
        instead="change code in the recipe file"
        if annotations.is_callable_type(annotation)
        else f"type {name}={as_text(current)} to keep it as it is",
    )


def as_text(value: Any) -> str:
    """A value as it would be typed after `name=`, in a shell."""
    if isinstance(value, tuple | list) and value:  # without brackets: a shell has a use for them
        return shlex.quote(",".join(map(repr, value)) + "," * (len(value) == 1))
    return "none" if value is None else shlex.quote(str(value))


def _replace(value: Any, prefix: str, name: str, text: str) -> Any:
    """Copy `value`, whose parts' names begin with `prefix`, with one setting below it changed."""
    head = name.removeprefix(prefix).partition(".")[0]
    child = {child.name: child for child in children(value, prefix)}[prefix + head]
    if child.name == name:
        new = parse(text, child.annotation, name, child.value)
    else:
        new = _replace(child.value, f"{child.name}.", name, text)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{head: new})  # type: ignore[type-var]
    if isinstance(value, tuple | list):
        return type(value)(new if item is child.value else item for item in value)
    if isinstance(value, functools.partial):
        given = inspect.signature(value.func).bind_partial(*value.args)
        if head in given.arguments:
            given.arguments[head] = new
            return functools.partial(value.func, *given.args, **value.keywords)
        return functools.partial(value.func, *value.args, **{**value.keywords, head: new})
    if isinstance(value, nn.Module):  # built anew: its attributes may follow from each other
        return type(value)(**{**module_arguments(value), head: new})
    return functools.partial(value, **{head: new})


def _meant(name: str, following: str, recipe: Recipe) -> str:
    """For `--lr 0.1`, `optimizer.lr=0.1`."""
    close = _close(name.lstrip("-"), [setting.name for setting in list_settings(recipe)])
    is_value = following and "=" not in following and not following.startswith("--")
    if not close:
        return "epochs=2, for example"
    return f"{close[0]}={following if is_value else 'VALUE'}"


def _close(name: str, names: Sequence[str]) -> list[str]:
    """The name in `names` that may be meant, if one is."""
    last = name.split(".")[-1]
    last = _IN_OTHER_WORDS.get(last, last)
    kinds = (
        [known for known in names if known == name],
        # The right last word in the wrong place, lr for optimizer.lr, or how it begins.
        [known for known in names if known.split(".")[-1] == last],
        [known for known in names if known.split(".")[-1].startswith(f"{last}_")],
        difflib.get_close_matches(name, names, n=1, cutoff=0.7),
    )
    return next((found[:1] for found in kinds if found), [])


def _unknown(name: str, text: str, recipe: Recipe) -> UserError:
    if option := _option(name, text):
        return UserError(
            f"{name}={text}",
            expected="settings of the recipe; this is an option of the command",
            instead=f"type {option}",
        )
    names = [setting.name for setting in list_settings(recipe)]
    close = _close(name, names)
    top_level = dict.fromkeys(known.split(".")[0] for known in names)
    return UserError(
        f"no setting is called {name!r}",
        expected="a name that launcher RECIPE --help lists",
        instead=f"did you mean {close[0]}?" if close else f"top level: {', '.join(top_level)}",
    )


def _option(name: str, text: str) -> str | None:
    """The option of the command line that is meant by `max_steps=3` or `smoke=true`, if one is."""
    value: Any = _literal(text)
    field = {own.name: own for own in dataclasses.fields(RunOptions)}.get(name.replace("-", "_"))
    # Without a default is what nobody types: host_facts.
    if field is None or field.default in (value, dataclasses.MISSING):
        return None
    given: Any = Path(text) if field.type is Path else value
    try:
        RunOptions(**{field.name: given})
    except UserError:
        return None
    words = field.name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words} {shlex.quote(text)}"


def _literal(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
