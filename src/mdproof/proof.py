"""Proofs: what was seen when a page ran, and the keys that tell whether it still holds.

A block's key is a hash over everything that decides its result: the code of the blocks up to it
without comments and docstrings, what the repository's modules run when they are imported, the
bodies of their functions that had been entered by then, the data files that had been opened, and
the locked versions of the libraries that these import. All of it can be computed again without
importing or running anything, so a build can tell a fresh proof from a stale one.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdproof.block import Block
from mdproof.closure import object_closure
from mdproof.normal import digest, file_digest, normalise
from mdproof.site import Site
from mdproof.skeleton import module_digest

SCHEMA = 2

_ABANDONED = 3600.0
"""Seconds after which a file that was begun and not finished is nobody's."""

_LOCKED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
_SUFFIX = re.compile(r"\.[a-z]{2}(?:-[A-Za-z]{2,4})?$")


class ForgedError(ValueError):
    """A proof file was changed by hand; `str()` says which."""


@dataclass
class Proof:
    """The recorded results of one page, as they stand in its file.

    Attributes:
        page: Path of the page below `docs`.
        blocks: One record a block, in page order.
    """

    page: str
    blocks: list[dict[str, Any]] = field(default_factory=list)


def base_page(site: Site, page: str) -> str:
    """Return the page whose proof a page shares: a translation `room.en.md` shares `room.md`'s."""
    stem = page.removesuffix(".md")
    base = _SUFFIX.sub("", stem) + ".md"
    return base if base != page and (site.docs / base).is_file() else page


def proof_file(site: Site, page: str) -> Path:
    """Return where a page's proof is recorded."""
    return site.proofs / (base_page(site, page).removesuffix(".md") + ".json")


def figure_folder(site: Site, page: str) -> Path:
    """Return where a page's figures are recorded."""
    return site.proofs / base_page(site, page).removesuffix(".md")


def _seal(record: dict[str, Any]) -> str:
    body = {name: value for name, value in record.items() if name != "seal"}
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_proof(site: Site, page: str) -> Proof | None:
    """Return a page's proof, or None if it has none.

    Raises:
        ForgedError: If the file was edited by hand or is damaged.
    """
    file = proof_file(site, page)
    if not file.is_file():
        return None
    name = file.relative_to(site.root).as_posix()
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            return None
        if record["seal"] != _seal(record):
            raise ForgedError(f"{name}: the proof does not match its seal: it was edited by hand")
        return Proof(record["page"], record["blocks"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ForgedError):
            raise
        raise ForgedError(f"{name}: the proof is damaged: {error}") from None


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; it keeps its mode, if it was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o644
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, mode)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_proof(site: Site, proof: Proof) -> None:
    """Write a page's proof, whole or not at all."""
    record: dict[str, Any] = {"schema": SCHEMA, "page": proof.page, "blocks": proof.blocks}
    record["seal"] = _seal(record)
    file = proof_file(site, proof.page)
    for left in file.parent.glob(f".{file.name}.*"):  # of an engine that was killed while writing
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    write_text(
        proof_file(site, proof.page), json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    )


@functools.lru_cache(maxsize=8)
def _locked(path: str, mtime: int) -> dict[str, str]:
    text = Path(path).read_text(encoding="utf-8")
    return {canonical(name): version for name, version in _LOCKED.findall(text)}


def locked_versions(site: Site) -> dict[str, str]:
    """Return the version of every distribution in the lock file."""
    if site.lock is None or not site.lock.is_file():
        return {}
    return _locked(str(site.lock), site.lock.stat().st_mtime_ns)


def module_file(dotted: str, site: Site) -> Path | None:
    """Return the source file of one of the repository's modules, or None."""
    for root in site.source:
        base = root.joinpath(*dotted.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def canonical(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_names(code: str) -> set[str]:
    """Return the top-level names that a program imports, anywhere in it."""
    return {name.partition(".")[0] for name in _imports(code, "")} - {""}


def _imports(code: str, package: str) -> Iterator[str]:
    """Yield what a program imports, dotted; of `from a import b` both `a` and `a.b`.

    Args:
        code: The program.
        package: The package that relative imports start from, "" if there is none.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            wanted = node.args[0]
            if name in ("import_module", "__import__") and isinstance(wanted, ast.Constant):
                yield str(wanted.value).removeprefix(".")


def imported_modules(site: Site, code: str) -> set[str]:
    """Return the repository's modules that a program imports, and those that these import."""
    found: set[str] = set()
    waiting = [(code, "")]
    while waiting:
        for name in _imports(*waiting.pop()):
            if name.partition(".")[0] not in site.packages or name in found:
                continue
            file = module_file(name, site)
            if file is not None:
                found.add(name)
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                waiting.append((file.read_text(encoding="utf-8"), package))
    return found


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def used_libraries(site: Site, codes: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Return the installed version of every library that code and repository modules import."""
    names: set[str] = set()
    for code in codes:
        names |= imported_names(code)
    for module in modules:
        file = module_file(module, site)
        if file is not None:
            names |= imported_names(file.read_text(encoding="utf-8"))
    names -= set(sys.stdlib_module_names) | set(site.packages)
    found: dict[str, str] = {}
    for name in names:
        for distribution in _distributions().get(name, [])[:1]:
            version = importlib.metadata.version(distribution).partition("+")[0]
            found[canonical(distribution)] = version
    return dict(sorted(found.items()))


def block_code(block: Block) -> str:
    """Return what of a block enters the chain of keys."""
    if block.options.norun:
        return ""
    if block.kind == "doctest":
        return f"doctest:{block.code}"
    try:
        code = normalise(block.code)
        if code == normalise(""):  # a string alone is no docstring but the block's value
            code = block.code
    except (SyntaxError, RecursionError):
        code = block.code
    return f"{block.options.raises}:{code}"


_READS_TEXT = re.compile(r"__doc__|\bget(?:source|doc|comments)|\bhelp\(")
"""Code whose result depends on comments or docstrings."""


def block_key(
    site: Site,
    blocks: Sequence[Block],
    *,
    modules: Iterable[str],
    entered: Iterable[str],
    files: Iterable[str],
    libraries: dict[str, str],
) -> str:
    """Return the key of the last of `blocks`, which are the page's blocks up to it.

    Args:
        site: The site.
        blocks: The chain.
        modules: Repository modules that had been imported, dotted.
        entered: Functions of theirs that had been entered, "module:function".
        files: Data files that had been opened, below the root.
        libraries: Libraries that these use, with the versions seen; locked ones count as locked.
    """
    last = blocks[-1]
    if last.options.norun:
        return digest("norun", last.code, last.options.norun)
    parts = ["run", *(block_code(block) for block in blocks)]
    reads_text = any(_READS_TEXT.search(block.code) for block in blocks)
    if reads_text:
        parts += [block.code for block in blocks]
    by_module: dict[str, set[str]] = {module: set() for module in modules}
    for name in entered:
        module, _, function = name.partition(":")
        by_module.setdefault(module, set()).add(function)
    for module, functions in sorted(by_module.items()):
        file = module_file(module, site)
        if file is None:
            parts += [module, "missing"]
        elif reads_text:
            parts += [module, file_digest(file)]
        else:
            parts += [module, module_digest(file, functions)]
    if last.options.source:
        before, shown = object_closure(site, last)
        parts += [normalise(text) for text in (*before, shown)]
    for name in sorted(files):
        path = site.root / name
        parts += [name, file_digest(path) if path.is_file() else "missing"]
    locked = locked_versions(site)
    for name, version in sorted(libraries.items()):
        parts += [name, locked.get(name, version)]
    return digest(*parts)


def record_reason(site: Site, blocks: Sequence[Block], records: Sequence[dict[str, Any]]) -> str:
    """Return why the record of the last of `blocks` does not hold, "" if it does.

    Args:
        site: The site.
        blocks: The page's blocks up to it.
        records: Their records.
    """
    record = records[-1]
    key = block_key(
        site,
        blocks,
        modules=record["modules"],
        entered=[name for each in records for name in each["entered"]],
        files=record["files"],
        libraries=record["libraries"],
    )
    if key != record["key"]:
        return "changed since it was proven"
    damaged = damaged_figure(site, blocks[-1].page, record)
    return f"figure {damaged} is not the recorded one" if damaged else ""


def damaged_figure(site: Site, page: str, record: dict[str, Any]) -> str:
    """Return the name of a figure's file that is not as it was recorded, "" if there is none."""
    folder = figure_folder(site, page)
    for out in record["outputs"]:
        for theme, recorded in out.get("sha256", {}).items():
            file = folder / f"{out['name']}.{theme}.svg"
            if not file.is_file() or file_digest(file) != recorded:
                return file.name
    return ""


def orphans(site: Site, proven: Iterable[str]) -> list[Path]:
    """Return the files of proofs that belong to none of the pages that have blocks."""
    kept = {proof_file(site, page) for page in proven}
    found = [file for file in site.proofs.rglob("*.json") if file not in kept]
    found += [
        file for file in site.proofs.rglob("*.svg") if file.parent.with_suffix(".json") not in kept
    ]
    return sorted(found)


def staleness(site: Site, blocks: Sequence[Block], proof: Proof | None) -> list[str]:
    """Return for each block why its proof does not hold, "" where it does."""
    if proof is None:
        return ["not proven yet"] * len(blocks)
    reasons: list[str] = []
    for position in range(len(blocks)):
        if position >= len(proof.blocks):
            reasons.append("not proven yet")
            continue
        upto = position + 1
        reasons.append(record_reason(site, blocks[:upto], proof.blocks[:upto]))
    if reasons and len(proof.blocks) > len(blocks):
        reasons[-1] = reasons[-1] or "blocks were removed since the page was proven"
    return reasons
