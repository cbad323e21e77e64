"""The runnable copy: for each block the text that the copy button gives, and that is run alone."""

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdproof.block import Block
from mdproof.collect import collect
from mdproof.proof import imported_modules, load_proof, used_libraries
from mdproof.reference import find_source
from mdproof.site import Site, load_site
from mdproof.slicing import LEVELS, Statement, close, read_statements

_HEADER = {
    "zh": "# {site} · {page} · 第 {block} 段\n# {versions}\n",
    "en": "# {site}: {page}, block {block}\n# {versions}\n",
}


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


def header(site: Site, block: Block, libraries: dict[str, str]) -> str:
    """Return the comment that a copy begins with: site, page, block and versions."""
    project = site.settings.get("project", {})
    own = {project["name"]: project["version"]} if {"name", "version"} <= project.keys() else {}
    versions = " · ".join(f"{name} {version}" for name, version in {**own, **libraries}.items())
    template = _HEADER["zh" if site.language.startswith("zh") else "en"]
    return template.format(
        site=site.settings["mkdocs"].get("site_name", ""),
        page=block.page.removesuffix(".md"),
        block=block.index,
        versions=versions,
    )


def plain_code(block: Block) -> str:
    """Return a block's code as a program; of a doctest, what stands behind its prompts."""
    if block.kind != "doctest":
        return block.code
    lines = block.code.splitlines()
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "...")))


def _object_closure(site: Site, block: Block) -> tuple[list[str], str]:
    """Return what of its module an object needs, and the object itself, closed over the module."""
    source = find_source(block.options.source, site)
    module = source.file.read_text(encoding="utf-8")
    statements = [
        statement
        for statement in read_statements(module, 0)
        if not (
            isinstance(statement.node, ast.Expr) and isinstance(statement.node.value, ast.Constant)
        )
    ]
    inside = [
        statement
        for statement in statements
        if statement.node.lineno <= source.last_line
        and (statement.node.end_lineno or 0) >= source.first_line
    ]
    others = [statement for statement in statements if statement not in inside]
    kept = close(others, inside, level="slice")
    before = [s.text for s in others if s.node.lineno < source.first_line]
    after = {s.text for s in others if s.node.lineno > source.last_line}
    first = [text for text in kept if text in before or text not in after]
    later = [text for text in kept if text not in first]
    return [*first, *later], "\n\n\n".join(statement.text for statement in inside)


def _join(texts: Sequence[str]) -> str:
    out = ""
    for text in texts:
        tall = "\n" in text and text.lstrip().startswith(("def ", "class ", "@", "async "))
        out += ("\n\n" if tall and out else "") + text + ("\n\n" if tall else "") + "\n"
    while "\n\n\n\n" in out:
        out = out.replace("\n\n\n\n", "\n\n\n")
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
        prelude, body = _object_closure(site, block)
    else:
        body = plain_code(block).rstrip("\n")
        earlier: list[Statement] = []
        for other in blocks[:-1]:
            if not other.options.norun and not other.options.raises:
                earlier += read_statements(plain_code(other), other.index)
        prelude = close(earlier, read_statements(body, block.index), level=level)
    future = [text for text in prelude if text.startswith("from __future__")]
    prelude = [*dict.fromkeys(future), *(text for text in prelude if text not in future)]
    above = top + ("\n" + _join(prelude) if prelude else "")
    above = above.rstrip("\n") + ("\n\n" if not _tall(body) else "\n\n\n")
    text = above + body + "\n"
    return Copy(text, above.count("\n") + 1, level)


def _tall(body: str) -> bool:
    return body.startswith(("def ", "class ", "@", "async "))


def candidates(site: Site, blocks: Sequence[Block]) -> list[tuple[Copy, dict[str, str]]]:
    """Return the copies to try, smallest first, each with the libraries that its header names."""
    levels = LEVELS[:1] if blocks[-1].kind == "source" else LEVELS
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
