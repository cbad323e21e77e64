"""Which tests use which objects, read from the tests' own syntax trees whenever it is asked.

Nothing is recorded, so nothing can be stale. A test uses what it names: imports are resolved, local
names and strings are none, helpers and fixtures are followed through the files of the tests. That a
test which names an object also runs it, is tested by running tests under a profiler.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mdproof.equations import cited_labels
from mdproof.names import Reference, read_program
from mdproof.site import Site


@dataclass(frozen=True)
class Evidence:
    """One test: its name, what it uses, and the equations that its docstring and comments cite."""

    name: str
    uses: frozenset[str]
    equations: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    """A file of tests or of their helpers.

    Attributes:
        imports: The dotted names that its top-level imports bind.
        definitions: Its top-level statements by the names they bind.
        references: What each top-level statement names, by the statement's number.
        body: The statements.
    """

    imports: dict[str, str]
    definitions: dict[str, int]
    references: dict[int, tuple[Reference, ...]]
    body: tuple[ast.stmt, ...]


@functools.lru_cache(maxsize=4096)
def _read(file: Path, mtime: int, size: int) -> _File:
    text = file.read_text(encoding="utf-8")
    body = tuple(ast.parse(text, str(file)).body)
    imports: dict[str, str] = {}
    definitions: dict[str, int] = {}
    for number, node in enumerate(body):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            imports |= {a.asname: a.name for a in node.names if a.asname}
            imports |= {a.name.split(".")[0]: a.name.split(".")[0] for a in node.names}
        else:
            definitions |= dict.fromkeys(_bound(node), number)
    references: dict[int, list[Reference]] = {}
    for one in read_program(text).references:
        references.setdefault(one.statement, []).append(one)
    return _File(imports, definitions, {n: tuple(found) for n, found in references.items()}, body)


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def _open(file: Path) -> _File:
    stat = file.stat()
    return _read(file, stat.st_mtime_ns, stat.st_size)


_every: dict[Path, tuple[object, list[tuple[str, Evidence]]]] = {}  # by the root of a site


def every_test(site: Site) -> list[tuple[str, Evidence]]:
    """Return the tests of a site, each with its file; read anew when any file of them changes.

    A helper is followed from every test that uses it, so one page's question costs as much as all.
    """
    folders = [site.root / folder for folder in site.settings.get("tests", ("tests",))]
    files = sorted({file for folder in folders for file in folder.rglob("*.py")})
    stats = [(file, file.stat()) for file in [*files, *site.root.glob("conftest.py")]]
    stamp = [(file, stat.st_mtime_ns, stat.st_size) for file, stat in stats]
    if site.root not in _every or _every[site.root][0] != stamp:
        found = [
            (file.relative_to(site.root).as_posix(), test)
            for file in files
            if file.name.startswith("test_")
            for test in tests_in(site, file)
        ]
        _every[site.root] = stamp, found
    return _every[site.root][1]


def tests_in(site: Site, file: Path) -> list[Evidence]:
    """Return the tests of a file, each with what it uses."""
    parsed = _open(file)
    labels = cited_labels(file)
    found = []
    for number, node in enumerate(parsed.body):
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inside = list(node.body)
        else:
            inside = [node]
        for test in inside:
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test"):
                continue
            lines = range(_first(test), (test.end_lineno or test.lineno) + 1)
            own = [one for one in parsed.references.get(number, ()) if one.line in lines]
            uses = _follow(site, file, own, [test])
            cited = dict.fromkeys(label for label, line in labels if line in lines)
            found.append(Evidence(test.name, frozenset(uses), tuple(cited)))
    return found


def _first(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _follow(
    site: Site, file: Path, references: Iterable[Reference], functions: list[ast.stmt]
) -> set[str]:
    """Return the dotted names that references lead to, through helpers and fixtures."""
    uses: set[str] = set()
    seen: set[tuple[Path, int]] = set()
    waiting = [(file, list(references), functions)]
    while waiting:
        here, refs, nodes = waiting.pop()
        parsed = _open(here)
        named = [(one.root, one.chain) for one in refs if one.imported is None]
        asked = {name for node in nodes for name in _fixtures(node)}
        asked -= {name for name in asked if not _is_helper(site, parsed.imports.get(name, ""))}
        named += [(name, ()) for name in sorted(asked)]
        for one in refs:
            if one.imported is not None:
                uses.add(".".join(filter(None, one.imported)))
        for root, chain in named:
            if root in parsed.imports:
                dotted = ".".join([parsed.imports[root], *chain])
                uses.add(dotted)
                places = _helpers(site, dotted)
            elif root in parsed.definitions:
                places = [(here, parsed.definitions[root])]
            else:
                places = _conftest(site, here, root)
            for place in places:
                if place not in seen:
                    seen.add(place)
                    other = _open(place[0])
                    found = list(other.references.get(place[1], ()))
                    waiting.append((place[0], found, [other.body[place[1]]]))
    return uses


def _fixtures(node: ast.stmt) -> Iterator[str]:
    """Yield the names by which a test or a fixture asks for fixtures."""
    if isinstance(node, ast.FunctionDef):
        yield from (argument.arg for argument in [*node.args.args, *node.args.kwonlyargs])
        for mark in node.decorator_list:
            called = mark.func if isinstance(mark, ast.Call) else mark
            if isinstance(called, ast.Attribute) and called.attr == "usefixtures":
                arguments = mark.args if isinstance(mark, ast.Call) else []
                yield from (str(a.value) for a in arguments if isinstance(a, ast.Constant))


def _is_helper(site: Site, dotted: str) -> bool:
    """Tell whether a fixture of this name can be meant: not what is imported from elsewhere."""
    return not dotted or dotted.partition(".")[0] in site.settings.get("tests", ("tests",))


def _helpers(site: Site, dotted: str) -> list[tuple[Path, int]]:
    """Return where a name of another file of the tests is defined."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        file = site.root.joinpath(*parts[:end]).with_suffix(".py")
        if parts[0] in site.settings.get("tests", ("tests",)) and file.is_file():
            number = _open(file).definitions.get(parts[end])
            return [(file, number)] if number is not None else []
    return []


def _conftest(site: Site, file: Path, name: str) -> list[tuple[Path, int]]:
    """Return where a fixture is defined that a file does not define itself."""
    for folder in file.parents:
        conftest = folder / "conftest.py"
        if conftest.is_file() and name in _open(conftest).definitions:
            return [(conftest, _open(conftest).definitions[name])]
        if folder == site.root:
            break
    return []
