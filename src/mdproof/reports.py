"""What proving pages led to, as lines of a terminal, JUnit XML, JSON or annotations."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from mdproof.proof import write_text

_CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class BlockResult:
    """What became of one block.

    Attributes:
        block: Its number.
        line: Line of its fence; of a failed block, the line of the failure.
        state: "passed", "failed" or "excused".
        seconds: Time that it took.
        message: Why it failed, or why it is excused.
        frames: Further places of a failure.
        change: How what it shows now differs from what was recorded before.
    """

    block: int
    line: int
    state: str
    seconds: float = 0.0
    message: str = ""
    frames: tuple[str, ...] = ()
    change: str = ""


@dataclass(frozen=True)
class PageResult:
    """What became of one page.

    Attributes:
        page: Path below `docs`.
        file: The page's file, from the root.
        state: "proven", "fresh", "failed", or "error" if the page cannot be read.
        seconds: Time that proving it took, copies included.
        blocks: Its blocks; none of a page with an error.
        line: Of a page with an error, the line.
        message: Of a page with an error, what is wrong.
    """

    page: str
    file: str
    state: str
    seconds: float = 0.0
    blocks: tuple[BlockResult, ...] = ()
    line: int = 1
    message: str = ""

    def failures(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Return line, message and frames of everything that failed."""
        if self.state == "error":
            return [(self.line, self.message, ())]
        return [(b.line, b.message, b.frames) for b in self.blocks if b.state == "failed"]


def lines(result: PageResult) -> list[str]:
    """Return the failures of a page, and what it shows anew, as a terminal shows them."""
    shown: list[str] = []
    for line, message, frames in result.failures():
        shown.append(f"{result.file}:{line}: {message}")
        shown += [f"  at {frame}" for frame in frames[-3:]]
    for block in result.blocks:
        if block.change:
            shown += change_lines(f"{result.file}:{block.line}", block.change)
    return shown


def change_lines(place: str, change: str) -> list[str]:
    """Return how a block's output changed, as a terminal shows it: at most 12 lines of diff."""
    diff = change.splitlines()
    more = [f"  … {len(diff) - 12} more lines"] if len(diff) > 12 else []
    return [f"{place}: shows something else now", *(f"  {line}" for line in diff[:12]), *more]


def summary(results: Sequence[PageResult], seconds: float) -> str:
    """Return one line over all pages."""
    states = [result.state for result in results]
    failed = states.count("failed") + states.count("error")
    counts = f"{states.count('proven')} proven, {states.count('fresh')} fresh, {failed} failed"
    return f"{counts} in {seconds:.1f} s"


def annotations(results: Sequence[PageResult]) -> list[str]:
    """Return the failures as the workflow commands that GitHub shows beside the lines."""

    def escape(text: str, more: str = "") -> str:
        for char in "%\r\n" + more:
            text = text.replace(char, f"%{ord(char):02X}")
        return text

    return [
        f"::error file={escape(result.file, ':,')},line={line}::{escape(message)}"
        for result in results
        for line, message, _ in result.failures()
    ]


def write_json(file: Path, results: Sequence[PageResult]) -> None:
    """Write the results for a program."""
    record = {"schema": 1, "pages": [dataclasses.asdict(result) for result in results]}
    write_text(file, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def write_junit(file: Path, results: Sequence[PageResult]) -> None:
    """Write the results as JUnit XML: a suite for each page, a case for each block."""
    root = ElementTree.Element("testsuites", name="mdproof")
    for result in results:
        cases = [_case(result, block) for block in result.blocks]
        if result.state == "error":
            case = ElementTree.Element(
                "testcase", classname=result.file, name="page", file=result.file
            )
            case.set("line", str(result.line))
            error = ElementTree.SubElement(case, "error", message=_clean(result.message))
            error.text = _clean(f"{result.file}:{result.line}: {result.message}")
            cases = [case]
        states = [block.state for block in result.blocks]
        suite = ElementTree.SubElement(root, "testsuite", name=result.file)
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(states.count("failed")))
        suite.set("errors", str(int(result.state == "error")))
        skipped = len(cases) if result.state == "fresh" else states.count("excused")
        suite.set("skipped", str(skipped))
        suite.set("time", f"{result.seconds:.3f}")
        suite.extend(cases)
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    write_text(file, head + ElementTree.tostring(root, encoding="unicode") + "\n")


def _case(result: PageResult, block: BlockResult) -> ElementTree.Element:
    name = f"block-{block.block}"
    case = ElementTree.Element("testcase", classname=result.file, name=name, file=result.file)
    case.set("line", str(block.line))
    case.set("time", f"{block.seconds:.3f}")
    if block.state == "failed":
        failure = ElementTree.SubElement(case, "failure", message=_clean(block.message))
        text = [f"{result.file}:{block.line}: {block.message}"]
        failure.text = _clean("\n".join([*text, *(f"  at {frame}" for frame in block.frames)]))
    elif result.state == "fresh":
        ElementTree.SubElement(case, "skipped", message="its proof is fresh")
    elif block.state == "excused":
        ElementTree.SubElement(case, "skipped", message=_clean(f"norun: {block.message}"))
    return case


def _clean(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return _CONTROL.sub("\ufffd", text)
