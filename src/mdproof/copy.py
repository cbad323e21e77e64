"""The runnable copy: for each block the text that the copy button gives, and that is run alone."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdproof.block import Block
from mdproof.closure import object_closure
from mdproof.collect import collect
from mdproof.normal import digest, normalise
from mdproof.proof import (
    Proof,
    base_page,
    imported_modules,
    load_proof,
    staleness,
    used_libraries,
)
from mdproof.site import Site, load_site
from mdproof.slicing import LEVELS, Statement, cached_statements, close

_HEADER = {
    "zh": "# {site} · {page} · 第 {block} 段\n# {versions}\n",
    "en": "# {site}: {page}, block {block}\n# {versions}\n",
}


_FUTURE = re.compile(r"(?:#.*\n)*from __future__ ")


@dataclass(frozen=True)
class Copy:
    """A program that runs alone.

    Attributes:
        text: The program.
        split: Its first line that belongs to the block itself.
        level: How much of the page it holds, one of `slicing.LEVELS`.
    """

    text: str
    split: int
    level: str

    @property
    def sha256(self) -> str:
        """The hash of the text, as recorded in the proof."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def code(self) -> str:
        """The hash of what the program does, which its layout and its comments do not change."""
        return digest(normalise(self.text))


def header(site: Site, block: Block, libraries: dict[str, str]) -> str:
    """Return the comment that a copy begins with: site, page, block and versions."""
    project = site.settings.get("project", {})
    own = {project["name"]: project["version"]} if {"name", "version"} <= project.keys() else {}
    versions = " · ".join(f"{name} {version}" for name, version in {**own, **libraries}.items())
    template = _HEADER["zh" if site.language.startswith("zh") else "en"]
    return template.format(
        site=site.settings["mkdocs"].get("site_name", ""),
        page=base_page(site, block.page).removesuffix(".md"),
        block=block.index,
        versions=versions,
    )


def plain_code(block: Block) -> str:
    """Return a block's code as a program; of a doctest, what stands behind its prompts."""
    if block.kind != "doctest":
        return block.code
    lines = block.code.splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "...")))


def _join(texts: Sequence[str]) -> str:
    out, gap = "", ""
    for text in texts:
        tall = "\n" in text and text.lstrip().startswith(("def ", "class ", "@", "async "))
        out += ("\n\n\n" if tall and gap else gap) + text
        gap = "\n\n\n" if tall else "\n"
    return out


def build_copy(
    site: Site, blocks: Sequence[Block], *, level: str, libraries: dict[str, str]
) -> Copy:
    """Return the runnable copy of the last of `blocks`, which are the page's blocks up to it.

    Args:
        site: The site.
        blocks: The page's blocks up to the one wanted.
        level: How much of the page to keep, one of `slicing.LEVELS`.
        libraries: Libraries for the header, with their versions.
    """
    block = blocks[-1]
    top = header(site, block, libraries)
    if block.kind == "source":
        prelude, body = object_closure(site, block)
    else:
        body = plain_code(block).rstrip("\n")
        earlier: list[Statement] = []
        for other in blocks[:-1]:
            if not other.options.norun and not other.options.raises:
                earlier += cached_statements(plain_code(other).rstrip("\n"), other.index)
        prelude = close(earlier, cached_statements(body, block.index), level=level)
    future = [text for text in prelude if _FUTURE.match(text)]
    prelude = [*dict.fromkeys(future), *(text for text in prelude if text not in future)]
    above = top + ("\n" + _join(prelude) if prelude else "")
    above = above.rstrip("\n") + ("\n\n" if not _tall(body) else "\n\n\n")
    text = above + body + "\n"
    return Copy(text, above.count("\n") + 1, level)


def _tall(body: str) -> bool:
    return body.startswith(("def ", "class ", "@", "async "))


def candidates(site: Site, blocks: Sequence[Block]) -> list[tuple[Copy, dict[str, str]]]:
    """Return the copies to try, smallest first, each with the libraries that its header names."""
    levels = ("slice",) if blocks[-1].kind == "source" else LEVELS
    found: dict[str, tuple[Copy, dict[str, str]]] = {}
    for level in levels:
        bare = build_copy(site, blocks, level=level, libraries={})
        if bare.text in found:
            continue
        libraries = used_libraries(site, [bare.text], imported_modules(site, bare.text))
        found[bare.text] = build_copy(site, blocks, level=level, libraries=libraries), libraries
    return list(found.values())


def recorded_copy(site: Site, blocks: Sequence[Block], record: Mapping[str, Any]) -> Copy | None:
    """Return the recorded copy of the last of `blocks`, or None if it has none."""
    recorded = record.get("copy")
    if not recorded:
        return None
    return build_copy(site, blocks, level=recorded["level"], libraries=recorded["libraries"])


def is_recorded(site: Site, blocks: Sequence[Block], record: Mapping[str, Any], copy: Copy) -> bool:
    """Tell whether a copy of the last of `blocks` is the one that was run.

    It may differ from it in layout, comments and docstrings: the block's key tells whether the
    page reads its own text.
    """
    if copy.sha256 == record["copy"]["sha256"] or copy.code == record["copy"].get("code"):
        return True
    page = blocks[-1].page
    base = base_page(site, page)
    if base == page:
        return False
    others = _blocks(site, base, (site.docs / base).stat().st_mtime_ns)[: len(blocks)]
    original = recorded_copy(site, others, record) if len(others) == len(blocks) else None
    return (
        original is not None
        and original.sha256 == record["copy"]["sha256"]
        and normalise(original.text) == normalise(copy.text)
    )


def stale_reasons(site: Site, blocks: Sequence[Block], proof: Proof | None) -> list[str]:
    """Return for each block why its proof, or that of its copy, does not hold, "" where it does."""
    reasons = staleness(site, blocks, proof)
    for position, record in enumerate(proof.blocks[: len(blocks)] if proof else ()):
        upto = blocks[: position + 1]
        copy = recorded_copy(site, upto, record) if not reasons[position] else None
        if copy is not None and not is_recorded(site, upto, record, copy):
            reasons[position] = "its runnable copy changed"
    return reasons


@functools.lru_cache(maxsize=64)
def _blocks(site: Site, page: str, mtime: int) -> tuple[Block, ...]:
    return tuple(collect(site, page).blocks)


def payloads(page: str, site: Site | None = None) -> list[str]:
    """Return the texts that the copy buttons of a page give, and that the engine runs alone.

    Args:
        page: Path below `docs`.
        site: The site; by default the one of the working directory.
    """
    site = site or load_site()
    proof = load_proof(site, page)
    if proof is None:
        return []
    blocks = collect(site, page).blocks
    found = [
        recorded_copy(site, blocks[: position + 1], record)
        for position, record in enumerate(proof.blocks[: len(blocks)])
    ]
    return [copy.text for copy in found if copy is not None]
