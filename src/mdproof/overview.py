"""What is known about the whole site: reading orders, recorded proofs, who uses an object."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdproof.block import Block
from mdproof.collect import collect
from mdproof.errors import PageError
from mdproof.exercised import Evidence, every_test
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


def tests_using(site: Site, module: str) -> dict[str, dict[str, list[Evidence]]]:
    """Return for each object of a module the files with tests that use it, and these tests."""
    uses: dict[str, dict[str, list[Evidence]]] = {}
    for where, test in every_test(site):
        inside = {name.removeprefix(f"{module}.") for name in test.uses} - test.uses
        for owner in {f"{module}.{name.split('.')[0]}" for name in inside}:
            uses.setdefault(owner, {}).setdefault(where, []).append(test)
    return uses


def has_example(site: Site, dotted: str) -> bool:
    """Tell whether an object's docstring has an example, which runs as a test of its own."""
    source = find_source(dotted, site)
    if source.docstring_span is None:
        return False
    first, last = source.docstring_span
    lines = read_module(source.file).lines[first - 1 : last]
    return any(line.lstrip().startswith(">>> ") for line in lines)


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
