"""The names in a program that stand for something outside of it: where they are, what they mean.

A reference is found in the syntax tree, so that text in strings and comments, the names of keyword
arguments and everything local to a function is none. The n-th reference of a program stays the n-th
whatever its comments and its layout are, so a proof can say what it means (`mdproof.meanings`).
"""

import ast
import contextlib
import doctest
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Assert, ast.Raise, ast.Delete)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Reference:
    """One token that names something global, or an attribute of it.

    Attributes:
        line: Its line in the program, from 1.
        column: Its first character in the line, from 0.
        text: The token; of an import, the dotted module.
        root: The global name that the chain begins with; of an import, the name it binds, or "".
        chain: The attributes from the root to this token.
        imported: Of an import, the module and the name in it ("" for a module itself).
        statement: Number of the top-level statement, or of the example in a doctest.
        deferred: Whether it is looked up later than its statement runs: it is in a function.
    """

    line: int
    column: int
    text: str
    root: str
    chain: tuple[str, ...] = ()
    imported: tuple[str, str] | None = None
    statement: int = 0
    deferred: bool = False


@dataclass(frozen=True)
class Statement:
    """What a statement of the module does to names.

    Attributes:
        stored: The names it binds in other ways than by importing.
        simple: Whether it reads all names before it binds one.
    """

    stored: frozenset[str]
    simple: bool


@dataclass(frozen=True)
class Program:
    """A program's references in order, and its statements."""

    references: tuple[Reference, ...] = ()
    statements: tuple[Statement, ...] = ()


def read_program(code: str, *, kind: str = "code") -> Program:
    """Find the references of a program, a doctest ("doctest") or a definition ("source").

    Code that is not Python has none.
    """
    with contextlib.suppress(SyntaxError, RecursionError, ValueError):
        if kind == "doctest":
            return _read_doctest(code)
        tree = ast.parse(code)
        finder = _Finder(code.split("\n"))
        statements = []
        for number, node in enumerate(tree.body):
            finder.statement = number
            if kind == "source" and isinstance(node, _DEFINITIONS):
                finder.definition(node)
            finder.visit(node)
            statements.append(_statement([node]))
        return Program(tuple(finder.found), tuple(statements))
    return Program()


def _read_doctest(code: str) -> Program:
    """Read the examples of a doctest; each is a statement, its columns those of the page."""
    found: list[Reference] = []
    statements = []
    for number, example in enumerate(doctest.DocTestParser().get_examples(code)):
        finder = _Finder(example.source.split("\n"))
        finder.statement = number
        body: list[ast.stmt] = []
        with contextlib.suppress(SyntaxError):
            body = ast.parse(example.source).body
        for node in body:
            finder.visit(node)
        statements.append(_statement(body))
        shift = example.indent + len(">>> ")
        for one in finder.found:
            place = {"line": one.line + example.lineno, "column": one.column + shift}
            found.append(replace(one, **place))
    return Program(tuple(found), tuple(statements))


def _statement(nodes: list[ast.stmt]) -> Statement:
    imports = ast.Import | ast.ImportFrom
    stored = _bound([node for node in nodes if not isinstance(node, imports)], imports=False)
    walrus = any(isinstance(inner, ast.NamedExpr) for node in nodes for inner in ast.walk(node))
    simple = len(nodes) == 1 and isinstance(nodes[0], (*_SIMPLE, *_DEFINITIONS)) and not walrus
    return Statement(frozenset(stored), simple)


def _bound(nodes: Iterable[ast.AST], *, imports: bool = True) -> set[str]:
    """Return the names that code binds in its own scope."""
    names: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if imports:
                names |= {a.asname or a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        if isinstance(node, _DEFINITIONS):
            names.add(node.name)
            waiting += node.decorator_list
        elif isinstance(node, _COMPREHENSIONS):  # of its names only those bound by := escape
            walrus = (n for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            names |= {n.target.id for n in walrus}
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def _declared(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that a function's own statements declare global."""
    names: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Global):
            names |= set(node.names)
        elif not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)
    return names


@dataclass
class _Scope:
    kind: str
    bound: set[str]
    declared: set[str] = field(default_factory=set)


class _Finder(ast.NodeVisitor):
    """Walks a tree and notes every reference, in order."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.found: list[Reference] = []
        self.statement = 0
        self._scopes: list[_Scope] = []

    def _is_global(self, name: str) -> bool:
        for scope in reversed(self._scopes):
            if scope.kind == "class" and scope is not self._scopes[-1]:
                continue
            if name in scope.declared:
                return True
            if name in scope.bound:
                return False
        return True

    def _column(self, line: int, offset: int) -> int:
        """Return a byte offset as one of characters."""
        return len(self.lines[line - 1].encode()[:offset].decode(errors="ignore"))

    def _note(self, line: int, column: int, text: str, root: str, **more: Any) -> None:
        if self.lines[line - 1][column : column + len(text)] != text:
            return  # an identifier that Python writes otherwise
        deferred = any(scope.kind == "function" for scope in self._scopes)
        self.found.append(
            Reference(line, column, text, root, statement=self.statement, deferred=deferred, **more)
        )

    # Names and attributes.

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and self._is_global(node.id):
            column = self._column(node.lineno, node.col_offset)
            self._note(node.lineno, column, node.id, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        chain: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and self._is_global(inner.id) and node.end_lineno:
            end = self._column(node.end_lineno, node.end_col_offset or 0)
            place = (node.end_lineno, end - len(node.attr))
            self._note(*place, node.attr, inner.id, chain=tuple(chain))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            column = self._column(alias.lineno, alias.col_offset)
            name = alias.asname or alias.name.partition(".")[0]
            root = name if self._is_global(name) else ""
            self._note(alias.lineno, column, alias.name, root, imported=(alias.name, ""))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            return
        line = self.lines[node.lineno - 1]
        start = self._column(node.lineno, node.col_offset)
        at = re.compile(r"from[ \t]+").match(line, start)
        if at:
            self._note(node.lineno, at.end(), module, "", imported=(module, ""))
        for alias in node.names:
            name = alias.asname or alias.name
            root = name if self._is_global(name) else ""
            column = self._column(alias.lineno, alias.col_offset)
            self._note(alias.lineno, column, alias.name, root, imported=(module, alias.name))

    # Scopes.

    def definition(self, node: Any) -> None:
        """Note the name that a definition gives."""
        line = self.lines[node.lineno - 1]
        at = re.search(rf"\b(?:def|class)\s+({re.escape(node.name)})\b", line)
        if at:
            self._note(node.lineno, at.start(1), node.name, node.name)

    def _function(self, node: Any, body: list[ast.AST]) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            self.visit(default)
        for argument in every:
            if argument.annotation is not None:
                self.visit(argument.annotation)
        if getattr(node, "returns", None) is not None:
            self.visit(node.returns)
        declared = _declared(body)
        bound = {argument.arg for argument in every} | _bound(body)
        self._within(_Scope("function", bound - declared, declared), body)

    def _within(self, scope: _Scope, nodes: Iterable[ast.AST]) -> None:
        self._scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self._scopes.pop()

    def visit_FunctionDef(self, node: Any) -> None:
        for decorator in node.decorator_list:
            self.visit(decorator)
        self._function(node, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outer in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
            self.visit(outer)
        self._within(_Scope("class", _bound(node.body)), node.body)

    def _comprehension(self, node: Any) -> None:
        first, *rest = node.generators
        self.visit(first.iter)  # looked up outside
        bound = _bound(generator.target for generator in node.generators)
        inner: list[ast.AST] = [*first.ifs]
        for generator in rest:
            inner += [generator.iter, *generator.ifs]
        inner += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        lazy = isinstance(node, ast.GeneratorExp)
        self._within(_Scope("function" if lazy else "comprehension", bound), inner)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815
