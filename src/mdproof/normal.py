"""What of a program decides its result: its syntax tree without comments, docstrings and layout."""

import ast
import functools
import hashlib
from pathlib import Path

_SKIPPED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def drop_docstrings(tree: ast.AST) -> None:
    """Take the docstrings out of a syntax tree."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]


def dump(node: object) -> str:
    """Return a text of a syntax tree that is the same under every version of Python."""
    # ast.dump differs between Python versions; empty fields left out, this does not.
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={dump(value)}"
            for name, value in ast.iter_fields(node)
            if name not in _SKIPPED and value is not None and value != []
        )
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(dump, node))}]"
    return repr(node)


@functools.lru_cache(maxsize=4096)
def normalise(code: str) -> str:
    """Return a text that two programs share if they differ in comments, docstrings or layout only.

    Raises:
        SyntaxError: If the code is not Python.
    """
    tree = ast.parse(code)
    drop_docstrings(tree)
    return dump(tree)


def digest(*texts: str) -> str:
    """Return a short hash of several texts."""
    state = hashlib.sha256()
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()[:32]


@functools.lru_cache(maxsize=4096)
def _source_digest(path: str, mtime: int, size: int) -> str:
    return digest(normalise(Path(path).read_text(encoding="utf-8")))


def source_digest(path: Path) -> str:
    """Return the hash of a source file's syntax tree, cached while the file is unchanged."""
    stat = path.stat()
    return _source_digest(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, mtime: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the hash of a data file's bytes."""
    stat = path.stat()
    return _file_digest(str(path), stat.st_mtime_ns, stat.st_size)
