"""What of a module decides a result: what runs when it is imported, and each function's body.

Importing a module runs everything but the bodies of its functions; a body decides a result only
when it is entered. So an edit of a function that a page never enters leaves the page's proof alone.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdproof.normal import digest, drop_docstrings, dump

Function = ast.FunctionDef | ast.AsyncFunctionDef

WHOLE = "*"
"""Stands for every function of a module whose functions were not watched."""

_TRANSPARENT = frozenset(
    {
        "abstractmethod",
        "cache",
        "cached_property",
        "classmethod",
        "contextmanager",
        "deleter",
        "enable_grad",
        "getter",
        "inference_mode",
        "lru_cache",
        "no_grad",
        "overload",
        "override",
        "property",
        "setter",
        "staticmethod",
        "wraps",
    }
)
"""Decorators that call the function, or hand it on, and do not look into it."""


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield the functions of a module that are not inside of another, with their dotted names.

    A function inside of another is part of that one's body.
    """
    yield from _functions(tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _functions(child, prefix)


def is_opaque(function: Function) -> bool:
    """Tell whether a decorator may read the body without entering it, as `@triton.jit` does."""
    for decorator in function.decorator_list:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name not in _TRANSPARENT:
            return True
    return False


@dataclass(frozen=True)
class Skeleton:
    """The hashes of a module's parts.

    Attributes:
        frame: Of what importing it runs: everything but the bodies of functions.
        bodies: Of each function's body, by dotted name; definitions of one name share an entry.
    """

    frame: str
    bodies: dict[str, str]


def read_skeleton(code: str) -> Skeleton:
    """Take a module apart.

    Raises:
        SyntaxError: If the code is not Python.
    """
    tree = ast.parse(code)
    drop_docstrings(tree)
    bodies: dict[str, str] = {}
    for name, function in list(functions(tree)):
        if not is_opaque(function):
            bodies[name] = digest(bodies.get(name, ""), dump(function.body))
            function.body = []
    return Skeleton(digest(dump(tree)), bodies)


@functools.lru_cache(maxsize=4096)
def _skeleton(path: str, mtime: int, size: int) -> Skeleton:
    return read_skeleton(Path(path).read_text(encoding="utf-8"))


def module_digest(path: Path, entered: set[str]) -> str:
    """Return the hash of what a module contributes to a run that entered some of its functions.

    Args:
        path: The module's file.
        entered: Dotted names of the functions; `WHOLE` stands for all of them.
    """
    stat = path.stat()
    skeleton = _skeleton(str(path), stat.st_mtime_ns, stat.st_size)
    wanted = skeleton.bodies if WHOLE in entered else entered
    parts = [part for name in sorted(wanted) for part in (name, skeleton.bodies.get(name, ""))]
    return digest(skeleton.frame, *parts)
