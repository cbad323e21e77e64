"""Tables in a terminal: columns line up, also where a title is Chinese."""

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """Return the number of columns that a terminal gives a text."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Return rows as lines with columns two spaces apart.

    Args:
        rows: The cells, the heading first.
        right: Columns that hold numbers and stand at the right.
    """
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for position, (cell, wide) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (wide - width(cell))
            cells.append(gap + cell if position in right else cell + gap)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
