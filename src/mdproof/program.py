"""A page's blocks as one program for tools that read Python, and the way back to the Markdown file.

Where the page allows it, the program has a line for each line of the file: what stands between the
fences is left blank, so a tool's line is the reader's line. A block that a snippet brought, and a
fence that a list indents, are the exceptions; `Program.place` knows them.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mdproof.block import Block
from mdproof.collect import read_page
from mdproof.site import Site

_PROMPT = re.compile(r"^(?:>>>|\.\.\.)(?: |$)")
_PREFIX = re.compile(r"^[ \t>]*")
_OPENING = re.compile(r"(`{3,}|~{3,})")


@dataclass(frozen=True)
class Fence:
    """Where a block's code stands in its file.

    Attributes:
        first: Index of the first line between the fences, from 0.
        last: Index of the closing fence, from 0.
        prefix: What stands before the code on each line: the indentation of a list, the marks of
            a quotation.
    """

    first: int
    last: int
    prefix: str

    @property
    def column(self) -> int:
        """The number of characters before the code."""
        return len(self.prefix)


@dataclass(frozen=True)
class Line:
    """A line of the program.

    Attributes:
        block: The block it belongs to.
        line: The line of the file that it stands for, from 1.
        column: The characters that stand before it in the file.
    """

    block: Block
    line: int
    column: int


class Program:
    """The program of a page.

    Attributes:
        text: The program.
        blocks: The blocks that are in it.
    """

    def __init__(self, text: str, lines: dict[int, Line], blocks: Sequence[Block]) -> None:
        self.text = text
        self.blocks = tuple(blocks)
        self._lines = lines
        self._finals = {final for block in blocks for final in self._final_lines(block)}

    def place(self, line: int) -> Line | None:
        """Return what a line of the program stands for, None between blocks."""
        return self._lines.get(line)

    def is_value(self, line: int) -> bool:
        """Tell whether a line belongs to an expression whose value the page shows."""
        place = self.place(line)
        return place is not None and (place.block.kind == "doctest" or line in self._finals)

    def _final_lines(self, block: Block) -> Iterable[int]:
        try:
            body = ast.parse(block.code).body
        except (SyntaxError, ValueError, RecursionError):
            return ()
        if not body or not isinstance(body[-1], ast.Expr):
            return ()
        first = next((n for n, line in self._lines.items() if line.block is block), 0)
        return range(first + body[-1].lineno - 1, first + (body[-1].end_lineno or 0))


def find_fence(lines: Sequence[str], block: Block) -> Fence | None:
    """Return where a block's code stands in its file, None where the file has it otherwise.

    Args:
        lines: The lines of the file, without their ends.
        block: The block.
    """
    if block.kind == "source" or block.line > len(lines):
        return None
    opening = lines[block.line - 1]
    prefix = _PREFIX.match(opening)[0]  # type: ignore[index]
    marks = _OPENING.match(opening[len(prefix) :])
    if marks is None:
        return None
    last = block.line
    while last < len(lines) and lines[last].strip(" \t>") != marks[1]:
        last += 1
    if last == len(lines):
        return None
    fence = Fence(block.line, last, prefix)
    inside = [_inside(line, prefix) for line in lines[fence.first : last]]
    if None in inside or "\n".join(map(str, inside)).strip("\n") != block.code.strip("\n"):
        return None
    return fence


def _inside(line: str, prefix: str) -> str | None:
    if not line.strip(" \t>") and line.strip() in ("", prefix.strip()):
        return ""
    return line[len(prefix) :] if line.startswith(prefix) else None


def make_program(site: Site, blocks: Sequence[Block], *, excused: bool) -> Program:
    """Return the program of a page.

    Args:
        site: The site.
        blocks: The page's blocks.
        excused: Whether blocks that are not run are in it; they are, if they are Python.
    """
    chosen = [block for block in blocks if _is_program(block, excused=excused)]
    raw = read_page(site, chosen[0].page).split("\n") if chosen else []
    text: list[str] = []
    lines: dict[int, Line] = {}
    for block in chosen:
        fence = find_fence(raw, block)
        first = fence.first if fence else block.line
        text += [""] * (first - 1 - len(text))
        # The imports of two blocks are two groups, whatever little stands between them.
        text.append("# isort: split")
        code = plain_lines(block)
        leading = 0
        if fence is not None:
            empty = [not _inside(line, fence.prefix) for line in raw[fence.first : fence.last]]
            leading = empty.index(False) - _leading(code)
            text += [""] * leading
        for number, line in enumerate(code, 1):
            text.append(line)
            prompt = 4 if block.kind == "doctest" else 0
            place = (
                Line(block, first + leading + number, fence.column + prompt)
                if fence is not None
                else Line(block, block.line, 0)
            )
            lines[len(text)] = place
    return Program("\n".join(text).rstrip("\n") + "\n", lines, chosen)


def _leading(code: Sequence[str]) -> int:
    return next((number for number, line in enumerate(code) if line), 0)


def _is_program(block: Block, *, excused: bool) -> bool:
    if block.options.norun or block.options.raises in ("SyntaxError", "IndentationError"):
        return excused and bool(block.options.norun) and _parses(block.code)
    return True


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def plain_lines(block: Block) -> list[str]:
    """Return a block's lines of Python; a session's outputs become blank lines."""
    lines = block.code.split("\n")
    if block.kind != "doctest":
        return lines
    margin = re.match(r"[ ]*", lines[0])[0]  # type: ignore[index]
    return [
        line[4:] if _PROMPT.match(line) else ""
        for line in (line.removeprefix(margin) for line in lines)
    ]
