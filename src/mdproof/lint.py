"""Lint the code of pages with ruff and the project's rules, line for line."""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mdproof.block import Block
from mdproof.collect import collect, make_pipeline, shown
from mdproof.formatting import format_page
from mdproof.program import Program, make_program
from mdproof.site import Site
from mdproof.tools import find_tool, run_tool

NORMAL = {
    "E402": "a block imports what it uses, wherever it stands",
    "F811": "so the next block imports it again, whether or not the linter saw a use",
    "T201": "a page prints",
    "T203": "a page prints",
    "N999": "a page's file is no module; its name may hold hyphens",
    "INP001": "a folder of pages is no package",
    "D100": "a page begins with its text, which needs no docstring",
    "W391": "the end of the program is not the end of the page",
}
"""Rules that speak of files and do not hold for pages, each with the reason."""

_VALUES = ("B015", "B018")
"""Rules against an expression whose value nobody sees; the value of a block's last one is shown."""

_FROM_LINE = re.compile(r"\bfrom line (\d+)\b")


@dataclass(frozen=True, order=True)
class Finding:
    """Something that a tool says about a page.

    Attributes:
        file: The page's file, from the root.
        line: Line of the file, from 1.
        column: Column, from 1.
        code: Name of the rule.
        message: One line.
    """

    file: str
    line: int
    column: int
    code: str
    message: str

    def __str__(self) -> str:
        """Return the line that editors and terminals make a link of."""
        return f"{self.file}:{self.line}:{self.column}: {self.code} {self.message}"


def lint_pages(site: Site, pages: Sequence[str]) -> list[Finding]:
    """Return what ruff says about pages: its rules, and whether the blocks are formatted.

    Raises:
        PageError: If a fence of a page makes no sense.
        ToolError: If ruff is missing or fails.
    """
    ruff = find_tool("ruff", "`mdproof lint`")
    md = make_pipeline(site)
    every = [(page, collect(site, page, md).blocks) for page in pages]
    every = [(page, blocks) for page, blocks in every if blocks]
    # Threads wait for ruff and do nothing else: two that parse Python at one time can make
    # CPython 3.11 raise SystemError (gh-106905).
    programs = [make_program(site, blocks, excused=True) for _, blocks in every]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [
            pool.submit(_check, site, ruff, page, program.text) if program.blocks else None
            for (page, _), program in zip(every, programs, strict=True)
        ]
        rows = [check.result() if check else [] for check in checks]
    found = [
        _findings(site, ruff, page, blocks, program, told)
        for (page, blocks), program, told in zip(every, programs, rows, strict=True)
    ]
    return sorted(finding for findings in found for finding in findings)


def _findings(
    site: Site,
    ruff: str,
    page: str,
    blocks: list[Block],
    program: Program,
    rows: list[dict[str, Any]],
) -> list[Finding]:
    """Return what ruff said of a page as the reader of the page sees it."""
    read = [_read(site, program, row) for row in rows]
    findings = [finding for finding in read if finding is not None]
    findings = [
        finding
        for finding in findings
        if finding.code != "I001" or _is_unsorted(site, ruff, blocks, finding.line)
    ]
    formatted = format_page(site, page, blocks)
    file = shown(site, page)
    for block in formatted.changed:
        message = "the block is not formatted: run `mdproof format`"
        findings.append(Finding(file, block.first, 1, "format", message))
    for block in formatted.elsewhere:
        message = "the block is not formatted; its code comes from a snippet: format that file"
        findings.append(Finding(file, block.line, 1, "format", message))
    return findings


def _check(site: Site, ruff: str, page: str, text: str, *options: str) -> list[dict[str, Any]]:
    name = site.docs / re.sub(r"\.md$", ".py", page)  # settings for `docs/**` hold
    command = [ruff, "check", "--quiet", "--no-cache", "--output-format=json", *options]
    return json.loads(run_tool(site, [*command, "--stdin-filename", str(name), "-"], text) or "[]")


def _read(site: Site, program: Program, row: dict[str, Any]) -> Finding | None:
    """Return what ruff found as the reader of the page sees it, None if it is normal there."""
    code = row["code"] or "syntax"
    line = row["location"]["row"]
    place = program.place(line)
    if code in NORMAL or place is None or place.block.kind == "source":
        return None
    if code in _VALUES and program.is_value(line):
        return None
    message = " ".join(row["message"].split())
    first = _FROM_LINE.search(message)
    if first is not None:
        before = program.place(int(first[1]))
        if before is not None and before.block.kind == "source":
            return None  # a source fence imports; the block that uses the name imports it, too
        if before is not None:
            message = _FROM_LINE.sub(f"from line {before.line}", message)
    column = row["location"]["column"] + place.column
    file = shown(site, place.block.page)
    return Finding(file, place.line, column, code, message)


def _is_unsorted(site: Site, ruff: str, blocks: Sequence[Block], line: int) -> bool:
    """Tell whether the imports at a line are unsorted in their block, too.

    In the page's program the blank lines of the prose count as blank lines below the imports.
    """
    block = max((b for b in blocks if b.line <= line), key=lambda b: b.line)
    if block.kind == "doctest":  # a session has no layout of its own
        return False
    return bool(_check(site, ruff, block.page, block.code.rstrip("\n") + "\n", "--select=I001"))
