"""Measure the engine against plain Python on the same code: `make bench`.

For each page, in one run and alternating: the page's blocks as one script in a fresh interpreter,
and the page in a fresh worker of the engine. The script saves its figures after each block, as one
who wants to see them would. Prints the median of the ratio and of the seconds that the engine adds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mdproof.collect import collect, make_pipeline
from mdproof.copy import plain_code
from mdproof.page_run import Servers
from mdproof.runner import environment, page_job
from mdproof.site import Site, load_site

SAVE = """
import sys as _sys
if "matplotlib.pyplot" in _sys.modules:
    import io as _io
    _plt = _sys.modules["matplotlib.pyplot"]
    for _number in _plt.get_fignums():
        _plt.figure(_number).savefig(_io.StringIO(), format="svg", bbox_inches="tight")
    _plt.close("all")
"""


def script_seconds(folder: Path, codes: list[str]) -> float:
    """Return how long the blocks take as one script in a fresh interpreter."""
    file = folder / "page.py"
    file.write_text("\n".join(code + "\n" + SAVE for code in codes), encoding="utf-8")
    started = time.perf_counter()
    command = [sys.executable, str(file)]
    subprocess.run(command, check=True, env=environment(), capture_output=True, cwd=folder)
    return time.perf_counter() - started


def engine_seconds(site: Site, page: str) -> float:
    """Return how long the engine takes for the same blocks, its worker started anew."""
    blocks = collect(site, page).blocks
    servers = Servers(site)
    started = time.perf_counter()
    ran = servers.run(page_job(site, page, blocks))
    seconds = time.perf_counter() - started
    servers.close()
    failed = [each.failure for each in ran if each.failure is not None]
    assert not failed, failed
    return seconds


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", help="pages below docs; default: every page with code")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    site, md = load_site(), make_pipeline(load_site())
    print(f"{'page':<40} {'python':>8} {'engine':>8} {'ratio':>6} {'added':>8}")
    worst = 0.0
    for page in given.pages or site.pages():
        blocks = [block for block in collect(site, page, md).blocks if not block.options.norun]
        if not blocks or any(block.options.raises for block in blocks):
            continue
        codes = [plain_code(block) for block in blocks]
        pairs = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(given.rounds):
                pairs.append((script_seconds(Path(folder), codes), engine_seconds(site, page)))
        plain, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
        added = statistics.median(b - a for a, b in pairs)
        ratio = statistics.median(b / a for a, b in pairs)
        worst = max(worst, added / max(0.1 * plain, 0.3))
        print(f"{page:<40} {plain:7.2f}s {engine:7.2f}s {ratio:6.3f} {added:+7.2f}s", flush=True)
    print(f"worst page uses {100 * worst:.0f} % of its allowance (10 % or 0.3 s)")


if __name__ == "__main__":
    main()
