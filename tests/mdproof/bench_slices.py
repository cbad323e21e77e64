"""How much smaller the runnable copies are than the page: `python tests/mdproof/bench_slices.py`.

For each block: the characters of its copy without the header comment, over those of all the code
that the page shows up to and including the block (excused fences left out; of a source fence the
code that its copy holds). Prints the median of each page and of all blocks, and how many copies are
of which level.
"""

import argparse
import statistics
from collections import Counter

from mdproof.collect import collect, make_pipeline
from mdproof.copy import build_copy, candidates, plain_code, recorded_copy
from mdproof.proof import load_proof
from mdproof.site import load_site


def body(text: str) -> str:
    """Return a copy without the comment that it begins with."""
    lines = text.split("\n")
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "\n".join(lines).strip()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="pages below docs; default: every page with code")
    parser.add_argument("--static", action="store_true", help="the narrowest copy, tried or not")
    given = parser.parse_args()
    site = load_site()
    md = make_pipeline(site)
    every: list[float] = []
    levels: Counter[str] = Counter()
    print(f"{'page':<46} {'blocks':>6} {'median':>7} {'largest':>8}")
    for page in given.pages or site.pages():
        blocks = collect(site, page, md).blocks
        proof = load_proof(site, page)
        shares, so_far = [], 0
        for i, block in enumerate(blocks, start=1):
            if block.options.norun:
                continue
            if given.static or proof is None:
                copy = candidates(site, blocks[:i])[0][0]
            else:
                found = recorded_copy(site, blocks[:i], proof.blocks[i - 1])
                assert found is not None
                copy = found
            alone = body(build_copy(site, blocks[:i], level="slice", libraries={}).text)
            so_far += len(alone if block.options.source else plain_code(block).strip())
            shares.append(len(body(copy.text)) / so_far)
            levels[copy.level] += 1
        if shares:
            every += shares
            print(
                f"{page:<46} {len(shares):>6} {statistics.median(shares):7.2f} {max(shares):8.2f}"
            )
    print(f"{len(every)} copies, median {statistics.median(every):.3f}, levels {dict(levels)}")


if __name__ == "__main__":
    main()
