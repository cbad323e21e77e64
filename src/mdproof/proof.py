"""Proofs: what was seen when a page ran, and the keys that tell whether it still holds.

A block's key is a hash over everything that decides its result: the code of the blocks up to it
without comments and docstrings, the sources of the repository's modules that had been imported by
then, the data files that had been opened, and the locked versions of the libraries that these
import. All of it can be computed again without importing or running anything, so a build can tell a
fresh proof from a stale one.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdproof.block import Block
from mdproof.normal import digest, file_digest, normalise, source_digest
from mdproof.site import Site

SCHEMA = 1

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
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_proof(site: Site, proof: Proof) -> None:
    """Write a page's proof, whole or not at all."""
    record: dict[str, Any] = {"schema": SCHEMA, "page": proof.page, "blocks": proof.blocks}
    record["seal"] = _seal(record)
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
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def imported_modules(site: Site, code: str) -> set[str]:
    """Return the repository's modules that a program imports, and those that these import."""
    found: set[str] = set()
    waiting = [code]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.partition(".")[0] not in site.packages or name in found:
                    continue
                file = module_file(name, site)
                if file is not None:
                    found.add(name)
                    waiting.append(file.read_text(encoding="utf-8"))
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
    except SyntaxError:
        code = block.code
    return f"{block.options.raises}:{code}"


def block_key(
    site: Site,
    blocks: Sequence[Block],
    *,
    modules: Iterable[str],
    files: Iterable[str],
    libraries: dict[str, str],
) -> str:
    """Return the key of the last of `blocks`, which are the page's blocks up to it.

    Args:
        site: The site.
        blocks: The chain.
        modules: Repository modules that had been imported, dotted.
        files: Data files that had been opened, below the root.
        libraries: Libraries that these use, with the versions seen; locked ones count as locked.
    """
    last = blocks[-1]
    if last.options.norun:
        return digest("norun", last.code, last.options.norun)
    parts = ["run", *(block_code(block) for block in blocks)]
    for module in sorted(modules):
        file = module_file(module, site)
        parts += [module, source_digest(file) if file is not None else "missing"]
    for name in sorted(files):
        path = site.root / name
        parts += [name, file_digest(path) if path.is_file() else "missing"]
    locked = locked_versions(site)
    for name, version in sorted(libraries.items()):
        parts += [name, locked.get(name, version)]
    return digest(*parts)


def staleness(site: Site, blocks: Sequence[Block], proof: Proof | None) -> list[str]:
    """Return for each block why its proof does not hold, "" where it does."""
    if proof is None:
        return ["not proven yet"] * len(blocks)
    reasons: list[str] = []
    for position in range(len(blocks)):
        if position >= len(proof.blocks):
            reasons.append("not proven yet")
            continue
        record = proof.blocks[position]
        key = block_key(
            site,
            blocks[: position + 1],
            modules=record["modules"],
            files=record["files"],
            libraries=record["libraries"],
        )
        reasons.append("" if key == record["key"] else "changed since it was proven")
    if reasons and len(proof.blocks) > len(blocks):
        reasons[-1] = reasons[-1] or "blocks were removed since the page was proven"
    return reasons
