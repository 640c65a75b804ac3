"""One slip in a recipe, as people make them: a word left out, a call too much, a wrong constant."""

import ast
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

CONSTANTS = ("0", "-1", "None", "'text'", "10**15", "1.5", "True", "float('nan')", "()", "b'x'")
ERRORS = (
    "ValueError('own')",
    "KeyError('own')",
    "SystemExit(3)",
    "StopIteration",
    "OSError('own')",
)
Change = Callable[[Any], ast.AST | None]  # of a node of one type; None: it changed itself


@dataclass(frozen=True)
class Mutation:
    """The source with one change, and the change in words."""

    source: str
    change: str


def mutations(source: str) -> Iterator[Callable[[], Mutation]]:
    """All of them, each made when it is called."""
    tree = ast.parse(source)
    passed_over = set(map(id, _without_effect(tree)))
    for index, node in enumerate(ast.walk(tree)):
        for kind, change in _changes(node) if id(node) not in passed_over else ():
            yield partial(_mutated, tree, index, kind, change)


def _without_effect(tree: ast.Module) -> Iterator[ast.AST]:
    """Annotations and docstrings, with what is in them."""
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            yield from ast.walk(part) if part is not None else ()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield from (node, node.value)


def _mutated(tree: ast.Module, index: int, kind: str, change: Change) -> Mutation:
    """Apply a change to the node of that number in a copy of the tree; None: it changed itself."""
    copy = deepcopy(tree)
    node = list(ast.walk(copy))[index]
    before, line = _text(node), getattr(node, "lineno", 0)
    changed = change(node)
    if changed is not None:
        _Replacing(node, changed).visit(copy)
    ast.fix_missing_locations(copy)
    after = _text(node if changed is None else changed)
    return Mutation(ast.unparse(copy), f"line {line}, {kind}: {before} -> {after}")


class _Replacing(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._old else self.generic_visit(node)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(deepcopy(node))).split())
    return text if len(text) < 70 else f"{text[:50]} ... {text[-15:]}"


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Call):
        for number in range(len(node.keywords)):
            yield "keyword left out", partial(_leave_out, "keywords", number)
        for number in range(len(node.args)):
            yield "argument left out", partial(_leave_out, "args", number)
        for number in range(len(node.args) - 1):
            yield "arguments swapped", partial(_swap, number)
        for number in range(len(node.keywords) - 1):
            yield "values swapped", partial(_swap_values, number)
        yield "not called", lambda call: call.func
        yield "called twice", lambda call: ast.Call(call, [], [])
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        for text in CONSTANTS:
            if text != repr(node.value):
                yield "constant", partial(_constant, text)
    if isinstance(node, ast.BinOp):
        yield "operands swapped", lambda pair: ast.BinOp(pair.right, pair.op, pair.left)
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield "renamed", _renamed
        yield "called", lambda name: ast.Call(name, [], [])
    if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        yield "in a tuple", lambda value: ast.Tuple([value], ast.Load())
        yield "None instead", lambda value: ast.Constant(None)
    if isinstance(node, ast.Return):
        yield "nothing returned", lambda statement: ast.Return(None)
    if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom):
        yield "left out", lambda statement: ast.Pass()
    if isinstance(node, ast.FunctionDef):
        yield "async", lambda function: ast.AsyncFunctionDef(**vars(function))
        for text in ("yield", *(f"raise {error}" for error in ERRORS)):
            yield text, partial(_begin, text)
        for number in range(len(node.args.args)):
            yield "parameter left out", partial(_leave_out_parameter, number)


def _leave_out(part: str, number: int, call: ast.Call) -> None:
    del getattr(call, part)[number]


def _leave_out_parameter(number: int, function: ast.FunctionDef) -> None:
    del function.args.args[number]


def _swap(number: int, call: ast.Call) -> None:
    call.args[number : number + 2] = reversed(call.args[number : number + 2])


def _swap_values(number: int, call: ast.Call) -> None:
    first, second = call.keywords[number : number + 2]
    first.value, second.value = second.value, first.value


def _constant(text: str, node: ast.AST) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _renamed(node: ast.Name | ast.Attribute) -> ast.AST:
    if isinstance(node, ast.Name):
        return ast.Name(f"{node.id}x", ast.Load())
    return ast.Attribute(node.value, f"{node.attr}x", ast.Load())


def _begin(text: str, function: ast.FunctionDef) -> None:
    function.body[:0] = ast.parse(text).body
