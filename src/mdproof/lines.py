"""Where a line that the fences' preprocessor sees stands in the page's file.

Front matter, snippets, macros and other preprocessors move lines before fences are looked for. The
lines that are still the same lead back to the file; what was put between them came from the line
that it replaced.
"""

from difflib import SequenceMatcher

_TAB = 4

_NEAR = 10


def align(file: list[str], seen: list[str]) -> list[int]:
    """Return for each seen line the position, from 0, of the file's line that it came from.

    A line that a snippet brought has the position of the line that named the snippet.

    Args:
        file: The lines of the file.
        seen: The lines that the preprocessor is given.
    """
    ours = [(_normal(part), at) for at, line in enumerate(file) for part in line.split("\r")]
    ours = ours or [("", 0)]
    texts = [text for text, _ in ours]
    theirs = [_normal(line) for line in seen]
    positions = [0] * len(theirs)

    def put(target: int, source: int) -> None:
        positions[target] = ours[min(source, len(ours) - 1)][1]

    head = _common(texts, theirs)
    for at in range(head):
        put(at, at)
    while theirs and len(theirs) > head and not theirs[-1]:  # blank lines that Markdown adds
        put(len(theirs) - 1, len(ours) - 1)
        theirs.pop()
    while len(texts) > head and not texts[-1]:
        texts.pop()
    tail = _common(texts[head:][::-1], theirs[head:][::-1])
    for back in range(1, tail + 1):
        put(len(theirs) - back, len(texts) - back)
    middle, other = texts[head : len(texts) - tail], theirs[head : len(theirs) - tail]
    edits = SequenceMatcher(None, middle, other).get_opcodes()
    gone = [
        at for kind, i, end, *_ in edits if kind in ("replace", "delete") for at in (i, end - 1)
    ]
    for kind, i, end, j, stop in edits:
        same = end - i == stop - j
        origin = _nearest(gone, i) if kind == "insert" else i
        for at in range(j, stop):
            put(head + at, head + (i + at - j if same else origin))
    return positions


def _nearest(gone: list[int], at: int) -> int:
    """Return the line that what is put before line `at` came from, where nothing was replaced.

    Included text may have lines of the page in it; then it seems to be two pieces, of which only
    one stands where the line that named it was.
    """
    close = [line for line in gone if abs(line - at) <= _NEAR]
    return min(close, key=lambda line: abs(line - at), default=at)


def _normal(line: str) -> str:
    return (
        line.replace("\ufeff", "").replace("\x02", "").replace("\x03", "").expandtabs(_TAB).rstrip()
    )


def _common(one: list[str], two: list[str]) -> int:
    pairs = zip(one, two, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
