"""Measure how much of its page each recorded copy holds: `python tests/mdproof/bench_slices.py`.

The payload is the recorded copy without its header comment; the page's code so far is the code of
all blocks up to and including this one. Their quotient, in characters and in top-level statements,
is printed as a median a page and over all blocks. The block itself is always kept, so a first block
counts as 100 %. Source fences show code from outside the page, so that their copies are left out;
blocks without a recorded copy are, too.
"""

import ast
import statistics

from mdproof.collect import collect, make_pipeline
from mdproof.copy import candidates, plain_code
from mdproof.proof import load_proof
from mdproof.site import Site, load_site

_HEADER_LINES = 2


def _statements(code: str) -> int:
    return len(ast.parse(code).body)


def shares(site: Site, page: str) -> list[tuple[float, float, str]]:
    """Return each block's quotient in characters and in statements, and its level.

    The level is the recorded one; the text is what the slicer gives for it today.
    """
    proof = load_proof(site, page)
    if proof is None:
        return []
    blocks = collect(site, page, make_pipeline(site)).blocks
    found = []
    for position, record in enumerate(proof.blocks[: len(blocks)]):
        block = blocks[position]
        if block.kind == "source" or not record.get("copy"):
            continue
        level = record["copy"]["level"]
        made = {copy.level: copy for copy, _ in candidates(site, blocks[: position + 1])}
        # Levels that give one text are one candidate, named after the smallest.
        copy = made.get(level, next(iter(made.values())))
        payload = "\n".join(copy.text.split("\n")[_HEADER_LINES:]).strip()
        so_far = "\n".join(plain_code(other).strip() for other in blocks[: position + 1])
        parts = _statements(payload) / max(_statements(so_far), 1)
        found.append((len(payload) / max(len(so_far), 1), parts, level))
    return found


def main() -> None:
    """Print a table."""
    site = load_site()
    everything: list[tuple[float, float, str]] = []
    print(f"{'page':<44} {'blocks':>6} {'characters':>10} {'statements':>10} {'wider':>5}")
    for page in site.pages():
        found = shares(site, page)
        if not found:
            continue
        everything += found
        _print_row(page, found)
    if everything:
        _print_row("all", everything)


def _print_row(name: str, found: list[tuple[float, float, str]]) -> None:
    characters, statements = (statistics.median(each[i] for each in found) for i in (0, 1))
    wider = sum(level != "slice" for *_, level in found)
    print(f"{name:<44} {len(found):6} {characters:10.0%} {statements:10.0%} {wider:5}")


if __name__ == "__main__":
    main()
