"""Find an object of the repository by its dotted name, reading sources and importing nothing."""

import ast
import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdproof.site import Site, load_site

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class UnknownNameError(LookupError):
    """No such module or name; `str()` says what there is instead."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Source:
    """Where an object is written.

    Attributes:
        file: The file.
        first_line: Its first line, decorators included, counted from 1.
        last_line: Its last line.
        text: These lines as they stand in the file (a method keeps its indentation).
        docstring_span: First and last line of its docstring in the file, or None.
        kind: `module`, `function`, `class`, `method` or `constant`.
    """

    file: Path
    first_line: int
    last_line: int
    text: str
    docstring_span: tuple[int, int] | None
    kind: str


@dataclass(frozen=True)
class Definition:
    """One definition in a module; `name` is its qualified name inside the module."""

    name: str
    kind: str
    first_line: int
    last_line: int
    docstring_span: tuple[int, int] | None


@dataclass(frozen=True)
class Module:
    """A parsed source file: its definitions and what it imports from elsewhere, by name."""

    file: Path
    lines: tuple[str, ...]
    docstring_span: tuple[int, int] | None
    definitions: dict[str, Definition]
    imports: dict[str, str]

    def enclosing(self, line: int) -> Definition | None:
        """Return the function, method or class around a line (the innermost), if any."""
        around = [
            found
            for found in self.definitions.values()
            if found.kind != "constant" and found.first_line <= line <= found.last_line
        ]
        return min(around, key=lambda found: found.last_line - found.first_line, default=None)


def read_module(file: Path) -> Module:
    """Parse a file; the result is kept until the file changes."""
    stat = file.stat()
    return _read_module(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)
def _read_module(file: Path, mtime: int, size: int) -> Module:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text, str(file))
    definitions: dict[str, Definition] = {}
    imports: dict[str, str] = {}
    _visit(tree, "", definitions, imports)
    return Module(
        file, tuple(text.splitlines(keepends=True)), _docstring(tree), definitions, imports
    )


def _visit(
    parent: ast.AST, prefix: str, found: dict[str, Definition], imports: dict[str, str]
) -> None:
    body = list(_statements(parent))
    for position, node in enumerate(body):
        if isinstance(node, (*_FUNCTION, ast.ClassDef)):
            if any(
                isinstance(decorator, ast.Attribute) and decorator.attr in ("setter", "deleter")
                for decorator in node.decorator_list
            ):
                continue  # the getter is the property
            is_class = isinstance(node, ast.ClassDef)
            kind = "class" if is_class else "method" if prefix else "function"
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            name = prefix + node.name
            found[name] = Definition(name, kind, first, node.end_lineno or first, _docstring(node))
            if is_class:
                _visit(node, f"{name}.", found, imports)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not prefix:
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            for alias in node.names:
                imports[alias.asname or alias.name] = base + alias.name
        else:
            after = body[position + 1] if position + 1 < len(body) else None
            span = _string_span(after)  # the string below an attribute documents it
            for name in _assigned(node):
                first, last = node.lineno, node.end_lineno or node.lineno
                found[prefix + name] = Definition(
                    prefix + name, "constant", first, span[1] if span else last, span
                )


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a body, and those under its `if`, `try` and `with`."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from _statements(child)
            elif isinstance(child, ast.stmt):
                yield child


def _assigned(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = list(node.targets)
    elif isinstance(node, ast.AnnAssign) or type(node).__name__ == "TypeAlias":
        targets = [node.target if isinstance(node, ast.AnnAssign) else node.name]  # type: ignore[attr-defined]
    else:
        return
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
            if isinstance(part, ast.Name):
                yield part.id


def _string_span(node: ast.stmt | None) -> tuple[int, int] | None:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return node.lineno, node.end_lineno or node.lineno
    return None


def _docstring(node: ast.AST) -> tuple[int, int] | None:
    body = getattr(node, "body", None)
    return _string_span(body[0]) if body else None


def _module_file(root: Path, parts: list[str]) -> Path | None:
    path = root.joinpath(*parts)
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    return None


def _split(dotted: str, site: Site) -> tuple[str, Path, str]:
    """Split a dotted name into the module, its file, and the name inside it ('' for a module)."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        for root in site.source:
            file = _module_file(root, parts[:end])
            if file is not None:
                module, rest = ".".join(parts[:end]), ".".join(parts[end:])
                if file.name == "__init__.py" and rest and not _defines(file, rest):
                    children = _children(file.parent)
                    wanted = parts[end]
                    raise UnknownNameError(
                        f"no module {module}.{wanted}{_instead(module, wanted, children)}"
                    )
                return module, file, rest
    packages = sorted({name for root in site.source for name in _children(root)})
    raise UnknownNameError(f"no module {parts[0]}{_instead('the repository', parts[0], packages)}")


def _defines(file: Path, name: str) -> bool:
    return name in read_module(file).definitions


def _children(folder: Path) -> list[str]:
    return sorted(
        path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
    )


def _instead(where: str, wanted: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=1)
    guess = f"; did you mean {near[0]}?" if near else ";"
    return f"{guess} {where} has: {', '.join(names) or 'nothing'}"


def find_source(dotted: str, site: Site | None = None) -> Source:
    """Find the source of a module, function, class, method or module constant.

    Raises:
        UnknownNameError: If there is no such module, or no such name in it.
    """
    module, file, name = _split(dotted, site or load_site())
    parsed = read_module(file)
    if not name:
        text = "".join(parsed.lines)
        return Source(file, 1, len(parsed.lines), text, parsed.docstring_span, "module")
    found = parsed.definitions.get(name)
    if found is None:
        if name in parsed.imports:
            raise UnknownNameError(
                f"{module} only imports {name}: write {parsed.imports[name]}, where it is defined"
            )
        owner, _, wanted = name.rpartition(".")
        inside = f"{owner}." if owner in parsed.definitions else ""
        names = [
            key.removeprefix(inside)
            for key in parsed.definitions
            if key.startswith(inside) and "." not in key.removeprefix(inside)
        ]
        where = f"{module}.{owner}" if inside else module
        wanted = wanted if inside else name
        raise UnknownNameError(f"{where} has no {wanted}{_instead(where, wanted, names)}")
    return Source(
        file,
        found.first_line,
        found.last_line,
        "".join(parsed.lines[found.first_line - 1 : found.last_line]),
        found.docstring_span,
        found.kind,
    )


def reference_target(dotted: str, site: Site | None = None) -> str | None:
    """Return where the API reference describes a public object, as a link below `docs`.

    `zhizhi.large_models.dpo.dpo_loss` is described at
    `reference/large-models/dpo.md#zhizhi.large_models.dpo.dpo_loss`. What does not exist, is
    private, or belongs to none of the site's packages has no page: None.
    """
    site = site or load_site()
    parts = dotted.split(".")
    if parts[0] not in site.packages or any(part.startswith("_") for part in parts):
        return None
    try:
        module, file, _ = _split(dotted, site)
        find_source(dotted, site)
    except (UnknownNameError, SyntaxError):
        return None
    rooms = module.split(".")[1:]
    if file.name == "__init__.py" or not rooms:
        return None  # a package has no page of its own
    return f"reference/{'/'.join(rooms).replace('_', '-')}.md#{dotted}"


def dotted_name(file: Path, site: Site | None = None) -> str | None:
    """Return the dotted name of a module file under the source roots, or None."""
    for root in (site or load_site()).source:
        if file.is_relative_to(root):
            parts = file.relative_to(root).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None
