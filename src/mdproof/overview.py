"""What is known about the whole site: reading orders, recorded proofs, who uses an object."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdproof.block import Block
from mdproof.collect import collect
from mdproof.errors import PageError
from mdproof.proof import ForgedError, Proof, load_proof, proof_file, staleness
from mdproof.reference import Module, UnknownNameError, find_source, read_module
from mdproof.site import Site, load_site


@dataclass(frozen=True)
class State:
    """What is proven of one page, now.

    Attributes:
        passed: Number of blocks that ran, whose output was compared, and whose proof still holds.
        unrun: Blocks that are shown and not run: number and reason.
        varying: Blocks that run and whose output is not compared: number and reason.
        stale: Number of blocks without a proof that holds.
        date: The oldest day on which a block of the page was last verified, or "".
        seconds: Time that the blocks of the page took together.
    """

    passed: int
    unrun: tuple[tuple[int, str], ...]
    varying: tuple[tuple[int, str], ...]
    stale: int
    date: str
    seconds: float

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.passed + len(self.unrun) + len(self.varying) + self.stale


def read_state(site: Site, page: str) -> State:
    """Tell what is proven of a page, by its blocks as they are now and its proof.

    Raises:
        PageError: If a block of the page makes no sense, or its proof was changed by hand.
    """
    sources = max(
        (_changed(path) for root in site.source for path in root.rglob("*.py")), default=0
    )
    proof = proof_file(site, page)
    return _state(site.root, page, _changed(site.docs / page), _changed(proof), sources)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@functools.lru_cache(maxsize=4096)
def _state(root: Path, page: str, *changed: int) -> State:
    site = load_site(root)
    blocks = _blocks(site, page)
    proof = _proof(site, page)
    stale = [bool(reason) for reason in staleness(site, blocks, proof)]
    dates: list[str] = []
    seconds = 0.0
    for block, record in zip(blocks, proof.blocks if proof else (), strict=False):
        if not stale[block.index - 1] and not block.options.norun:
            dates.append(record.get("date") or "")
            seconds += record.get("seconds") or 0.0
    run = [block for block in blocks if not block.options.norun]
    holds = [block for block in run if not stale[block.index - 1]]
    return State(
        passed=sum(not block.options.varies for block in holds),
        unrun=tuple((b.index, b.options.norun) for b in blocks if b.options.norun),
        varying=tuple((b.index, b.options.varies) for b in holds if b.options.varies),
        stale=len(run) - len(holds),
        date=min(filter(None, dates), default=""),
        seconds=seconds,
    )


def names_used(site: Site, page: str) -> dict[str, int]:
    """Return the dotted names of the objects that a page uses, each with its first block."""
    blocks = _blocks(site, page)
    proof = _proof(site, page)
    names: dict[str, int] = {}
    for block, record in zip(blocks, proof.blocks if proof else (), strict=False):
        for name in (record.get("names") or {}).values():
            names.setdefault(name, block.index)
    for block in blocks:
        if block.options.source:
            first = names.get(block.options.source, block.index)
            names[block.options.source] = min(first, block.index)
    return names


def _proof(site: Site, page: str) -> Proof | None:
    try:
        return load_proof(site, page)
    except ForgedError as error:
        raise PageError(f"{site.docs.name}/{page}", 1, str(error)) from None


def _blocks(site: Site, page: str) -> tuple[Block, ...]:
    stat = (site.docs / page).stat()
    return _collected(site.root, page, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4096)
def _collected(root: Path, page: str, mtime: int, size: int) -> tuple[Block, ...]:
    return tuple(collect(load_site(root), page).blocks)


def reading_order(site: Site, wing: str) -> list[str]:
    """Return the articles of a wing in the order of `nav` in `mkdocs.yml`.

    Raises:
        LookupError: If `nav` names no article of such a wing.
    """
    pages = list(_pages(site.settings["mkdocs"].get("nav") or []))
    found = [page for page in pages if page.startswith(f"{wing}/") and site.is_article(page)]
    if not found:
        wings = ", ".join(site.articles) or "none"
        raise LookupError(f"the nav of mkdocs.yml has no article of `{wing}`; wings are: {wings}.")
    return found


def nav_pages(site: Site) -> list[str]:
    """Return every page that `nav` in `mkdocs.yml` names, in its order."""
    return list(_pages(site.settings["mkdocs"].get("nav") or []))


def nav_title(site: Site, page: str) -> str:
    """Return the title of the section of `nav` that opens with `page`, or ""."""
    for entry in site.settings["mkdocs"].get("nav") or []:
        if isinstance(entry, Mapping):
            for title, value in entry.items():
                if value == page or (isinstance(value, list) and value[:1] == [page]):
                    return title
    return ""


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, Mapping):
        for value in entry.values():
            yield from _pages(value)
    elif isinstance(entry, list):
        for item in entry:
            yield from _pages(item)


def public_objects(site: Site, module: str) -> list[str]:
    """Return the dotted names of the public functions, classes and constants of a module.

    Raises:
        LookupError: If there is no such module.
    """
    source = find_source(module, site)
    if source.kind != "module":
        raise UnknownNameError(f"{module} is a {source.kind}; give a module.")
    return [
        f"{module}.{name}"
        for name in read_module(source.file).definitions
        if "." not in name and not name.startswith("_")
    ]


def articles_using(site: Site, module: str) -> dict[str, list[tuple[str, int]]]:
    """Return for each object of a module the pages that use it, each with its first block.

    A page uses an object if its proof says so, or if one of its source fences shows it.
    """
    uses: dict[str, list[tuple[str, int]]] = {}
    for page in site.pages():
        if not site.is_article(page):
            continue
        blocks: dict[str, int] = {}
        for name, block in names_used(site, page).items():
            rest = name.removeprefix(f"{module}.")
            if rest != name:
                owner = f"{module}.{rest.split('.')[0]}"
                blocks[owner] = min(blocks.get(owner, block), block)
        for owner, block in blocks.items():
            uses.setdefault(owner, []).append((page, block))
    return uses


def tests_using(site: Site, module: str) -> dict[str, dict[str, list[str]]]:
    """Return for each object of a module the test files and the test functions that name it."""
    uses: dict[str, dict[str, list[str]]] = {}
    for file in sorted((site.root / "tests").rglob("test_*.py")):
        stat = file.stat()
        for name, tests in _names_in_tests(file, stat.st_mtime_ns, stat.st_size).items():
            rest = name.removeprefix(f"{module}.")
            if rest != name:
                owner = f"{module}.{rest.split('.')[0]}"
                where = file.relative_to(site.root).as_posix()
                known = uses.setdefault(owner, {}).setdefault(where, [])
                known += [test for test in tests if test not in known]
    return uses


@functools.lru_cache(maxsize=4096)
def _names_in_tests(file: Path, mtime: int, size: int) -> dict[str, tuple[str, ...]]:
    """Return the dotted names that the tests of a file use, helpers followed."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    imports: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            imports |= {a.asname: a.name for a in node.names if a.asname}
            imports |= {a.name.split(".")[0]: a.name.split(".")[0] for a in node.names}
    top: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            top[node.name] = node
        elif isinstance(node, ast.Assign):
            top |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            for name in _reach(node, top, imports):
                found.setdefault(name, []).append(node.name)
    return {name: tuple(tests) for name, tests in found.items()}


def _reach(start: ast.AST, top: Mapping[str, ast.AST], imports: Mapping[str, str]) -> set[str]:
    """Return the imported names that a node uses, also through the definitions of its file."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in ast.walk(waiting.pop()):
            dotted = _dotted(node)
            head, _, rest = dotted.partition(".")
            if head in imports:
                found.add(imports[head] + (f".{rest}" if rest else ""))
            elif head in top and head not in seen:
                seen.add(head)
                waiting.append(top[head])
            if isinstance(node, ast.FunctionDef):  # fixtures are named by arguments
                for argument in node.args.args:
                    if argument.arg in top and argument.arg not in seen:
                        seen.add(argument.arg)
                        waiting.append(top[argument.arg])
    return found


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def summary(site: Site, dotted: str) -> str:
    """Return the first line of an object's docstring, or ""."""
    source = find_source(dotted, site)
    module: Module = read_module(source.file)
    if source.docstring_span is None:
        return ""
    first, last = source.docstring_span
    text = "".join(module.lines[first - 1 : last])
    body = re.sub(r'^\s*[a-zA-Z]*("""|\'\'\'|"|\')', "", text)
    return body.strip().split("\n")[0].rstrip("\"'").strip()
