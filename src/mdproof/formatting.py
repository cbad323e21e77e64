"""Format the code between the fences of a page, and touch nothing else in the file."""

import difflib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mdproof.block import Block
from mdproof.collect import collect, shown
from mdproof.program import find_fence
from mdproof.proof import block_code, write_bytes
from mdproof.site import Site
from mdproof.tools import ToolError, find_tool, run_tool


@dataclass(frozen=True)
class Formatted:
    """A page and how it should be.

    Attributes:
        page: Path below `docs`.
        old: The bytes of the file.
        new: The bytes that it should have.
        changed: The blocks whose code changes.
        elsewhere: Blocks that should change and stand in another file, which a snippet names.
    """

    page: str
    old: bytes
    new: bytes
    changed: tuple[Block, ...]
    elsewhere: tuple[Block, ...]


def format_page(site: Site, page: str, blocks: Sequence[Block] | None = None) -> Formatted:
    """Return a page with its code formatted by ruff under the project's settings.

    Sessions (`pycon`) hold outputs and source fences hold nothing, so both stay as they are; so
    does code that is not Python.

    Raises:
        PageError: If a fence of the page makes no sense.
        ToolError: If ruff is missing or fails.
    """
    ruff = find_tool("ruff", "`mdproof format`")
    old = (site.docs / page).read_bytes()
    blocks = [b for b in blocks or collect(site, page).blocks if b.kind == "code"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        formatted = list(pool.map(lambda block: _format(site, ruff, block), blocks))
    codes = [_kept(block, code) for block, code in zip(blocks, formatted, strict=True)]
    lines = old.decode("utf-8").split("\n")
    plain = [line.removesuffix("\r") for line in lines]
    plain[0] = plain[0].removeprefix("\ufeff")
    changed: list[Block] = []
    elsewhere: list[Block] = []
    for block, code in reversed(list(zip(blocks, codes, strict=True))):
        if code == block.code.rstrip("\n"):
            continue
        fence = find_fence(plain, block)
        if fence is None:
            elsewhere.append(block)
            continue
        end = "\r" if lines[block.line - 1].endswith("\r") else ""
        lines[fence.first : fence.last] = [
            (fence.prefix + line if line else fence.prefix.rstrip()) + end
            for line in code.split("\n")
        ]
        changed.append(block)
    new = "\n".join(lines).encode()
    return Formatted(page, old, new, tuple(reversed(changed)), tuple(reversed(elsewhere)))


def _format(site: Site, ruff: str, block: Block) -> str:
    """Return a block's code as ruff writes it, or as it is if it is not Python."""
    old = block.code.rstrip("\n")
    name = site.docs / re.sub(r"\.md$", ".py", block.page)
    command = [ruff, "format", "--stdin-filename", str(name), "-"]
    try:
        return run_tool(site, command, old + "\n").rstrip("\n")
    except ToolError as error:
        if "error: Failed to parse" in str(error):  # the linter says where
            return old
        raise


def _kept(block: Block, new: str) -> str:
    """Return a block's new code, or the old where the new would be another block.

    A string that stands alone is the block's value, and ruff takes it for a docstring. Not to be
    called in several threads: it parses (see `lint.py`).
    """
    same = block_code(block) == block_code(Block(block.page, 1, 1, "code", new, block.options))
    return new if same or block.options.norun else block.code.rstrip("\n")


def write_formatted(site: Site, formatted: Formatted) -> None:
    """Write a page as it should be, whole or not at all."""
    write_bytes(site.docs / formatted.page, formatted.new)


def difference(site: Site, formatted: Formatted) -> str:
    """Return what would change as a unified diff."""
    name = shown(site, formatted.page)
    old, new = (
        text.decode("utf-8").splitlines(keepends=True) for text in (formatted.old, formatted.new)
    )
    return "".join(difflib.unified_diff(old, new, name, f"{name} (formatted)"))
