"""A block: one fence of a page, with its options read and refused where they make no sense."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mdproof.errors import PageError

RUNNABLE = {"python": "code", "py": "code", "python3": "code", "pycon": "doctest"}
"""Languages that are run, and how."""

LOOKS_RUNNABLE = frozenset(
    {*RUNNABLE, "py3", "pyi", "sage", "ipython", "ipython3", "python-console", "doctest"}
)
"""Names, in small letters, of languages that a reader takes for Python that was run."""

HIGHLIGHT = ("title", "title_mode", "hl_lines", "linenums")
"""Options that belong to the highlighter; `hl_lines` and the like are checked there."""

RTOL = 1e-4
"""Default relative tolerance of recorded numbers."""

TIMEOUT = 60.0
"""Default seconds a block may take."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Options:
    """What the author asked of the engine in the fence's first line.

    Attributes:
        source: Dotted name of the object that a source fence shows.
        tol: Relative tolerance of the numbers printed here.
        varies: Why the output differs between machines; it is shown and not compared.
        raises: Name of the exception that the block must raise.
        norun: Why the block is shown and not run.
        alt: Text alternative of the block's figures.
        caption: Caption of the block's figures.
        timeout: Seconds.
        tensor_cores: Names of kernels that must run on tensor cores wherever they compile.
        network: Why the block may reach other hosts.
        warns: What the block may do that fails others, "Category: reason" or "stderr: reason".
        nodevice: Why the block, which launches kernels, is not compared on a device.
    """

    source: str = ""
    tol: float = RTOL
    varies: str = ""
    raises: str = ""
    norun: str = ""
    alt: str = ""
    caption: str = ""
    timeout: float = TIMEOUT
    tensor_cores: str = ""
    network: str = ""
    warns: str = ""
    nodevice: str = ""


EXCUSES = ("norun", "varies", "nodevice", "network", "warns")
"""Options that say why less is proven of a block than of others; each is counted in public."""


def excuses(options: Options) -> dict[str, str]:
    """Return the reason of each excuse that a block makes."""
    found = ((name, getattr(options, name, "")) for name in EXCUSES)
    return {name: reason for name, reason in found if reason}


@dataclass(frozen=True)
class Block:
    """One fence that is run.

    Attributes:
        page: Path of the page below `docs`.
        index: Number on its page, from 1.
        line: Line of the opening fence in the page's file, from 1.
        kind: "code", "doctest" or "source".
        code: The text between the fences; of a source fence the import that it stands for.
        options: The author's options.
        shown: What the reader sees, where it is not `code`.
    """

    page: str
    index: int
    line: int
    kind: str
    code: str
    options: Options = field(default_factory=Options)
    shown: str = ""

    @property
    def first(self) -> int:
        """The line of the block's first line of code."""
        return self.line + 1


def _number(file: str, line: int, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number > 0:
        raise PageError(file, line, f'fence option {key}="{value}" is not a positive number')
    return number


def read_options(given: Mapping[str, Any], *, file: str, line: int) -> Options:
    """Read the fence options that are ours.

    Args:
        given: Options by name, those of the highlighter already taken out.
        file: The page's file, for the error.
        line: The fence's line, for the error.

    Raises:
        PageError: If an option is unknown, has no value, or contradicts another.
    """
    known = list(Options.__dataclass_fields__)
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            names = ", ".join(sorted([*known, *HIGHLIGHT[:1], *HIGHLIGHT[2:]]))
            raise PageError(file, line, f'unknown fence option "{key}"; known are {names}')
        if not isinstance(value, str) or not value.strip() or value == key:
            raise PageError(file, line, f'fence option "{key}" needs a value: {key}="..."')
        read[key] = _number(file, line, key, value) if key in ("tol", "timeout") else value
    if read.get("norun") and (read.get("raises") or read.get("varies")):
        raise PageError(file, line, 'a fence with "norun" has no output: drop "raises" or "varies"')
    if read.get("source") and not _DOTTED.fullmatch(read["source"]):
        raise PageError(file, line, f'source="{read["source"]}" is not a dotted name')
    if read.get("warns") and not re.fullmatch(r"\s*\w+\s*:.*\S.*", read["warns"]):
        message = f'warns="{read["warns"]}" is not "Category: reason" or "stderr: reason"'
        raise PageError(file, line, message)
    return Options(**read)
