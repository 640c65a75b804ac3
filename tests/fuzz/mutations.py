"""One slip in a recipe, as people make them: a word left out, a call too much, a wrong constant."""

import ast
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

CONSTANTS = ("0", "-1", "None", "'text'", "10**15", "1.5", "True", "float('nan')", "()", "b'x'")
ERRORS = (
    "ValueError('own')",
    "KeyError('own')",
    "SystemExit(3)",
    "StopIteration",
    "OSError('own')",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutation:
    """The source with one change, and the change in words."""

    source: str
    change: str


def mutations(source: str) -> Iterator[Callable[[], Mutation]]:
    """All of them, each made when it is called."""
    tree = ast.parse(source)
    for index, node in enumerate(ast.walk(tree)):
        for kind, change in _changes(node):
            yield lambda i=index, k=kind, c=change: _mutated(tree, i, k, c)


def _mutated(
    tree: ast.Module, index: int, kind: str, change: Callable[[ast.AST], ast.AST | None]
) -> Mutation:
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


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST | None]]]:
    if isinstance(node, ast.Call):
        for number in range(len(node.keywords)):
            yield "keyword left out", lambda n, i=number: n.keywords.pop(i) and None
        for number in range(len(node.args)):
            yield "argument left out", lambda n, i=number: n.args.pop(i) and None
        for number in range(len(node.args) - 1):
            yield "arguments swapped", lambda n, i=number: _swap(n.args, i, i + 1)
        for number in range(len(node.keywords) - 1):
            yield "values swapped", lambda n, i=number: _swap_values(n.keywords, i, i + 1)
        yield "not called", lambda n: n.func
        yield "called twice", lambda n: ast.Call(n, [], [])
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        for text in CONSTANTS:
            yield "constant", lambda n, t=text: _expression(t)
    if isinstance(node, ast.BinOp):
        yield "operands swapped", lambda n: ast.BinOp(n.right, n.op, n.left)
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield "renamed", _renamed
        yield "called", lambda n: ast.Call(n, [], [])
    if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        yield "in a tuple", lambda n: ast.Tuple([n], ast.Load())
        yield "None instead", lambda n: ast.Constant(None)
    if isinstance(node, ast.Return):
        yield "nothing returned", lambda n: ast.Return(None)
    if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom):
        yield "left out", lambda n: ast.Pass()
    if isinstance(node, ast.FunctionDef):
        yield "async", lambda n: ast.AsyncFunctionDef(**{f: getattr(n, f) for f in n._fields})
        yield "generator", lambda n: _begin(n, "yield")
        for text in ERRORS:
            yield "raises", lambda n, t=text: _begin(n, f"raise {t}")
        for number in range(len(node.args.args)):
            yield "parameter left out", lambda n, i=number: n.args.args.pop(i) and None


def _swap(items: list[ast.expr], i: int, j: int) -> None:
    items[i], items[j] = items[j], items[i]


def _swap_values(items: list[ast.keyword], i: int, j: int) -> None:
    items[i].value, items[j].value = items[j].value, items[i].value


def _renamed(node: ast.AST) -> ast.AST:
    if isinstance(node, ast.Name):
        return ast.Name(f"{node.id}x", ast.Load())
    assert isinstance(node, ast.Attribute)
    return ast.Attribute(node.value, f"{node.attr}x", ast.Load())


def _begin(node: Function, text: str) -> None:
    node.body[:0] = ast.parse(text).body if text != "yield" else [ast.Expr(ast.Yield(None))]
