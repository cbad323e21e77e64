"""Prove pages from the command line."""

import time

from mdproof.collect import collect, make_pipeline, shown
from mdproof.errors import PageError
from mdproof.proof import ForgedError
from mdproof.prove import Servers, open_page, update_page
from mdproof.site import Site


def prove(site: Site, pages: list[str], *, everything: bool) -> int:
    """Prove pages that are stale, or all, and record what was seen."""
    md, servers, failed = make_pipeline(site), Servers(site), 0
    try:
        for page in pages or site.pages():
            started = time.monotonic()
            try:
                collected = collect(site, page, md)
                if not collected.blocks:
                    continue
                run = open_page(site, page, servers, collected)
                if not everything and not any(run.stale) and run.proof is not None:
                    print(f"{page}: fresh", flush=True)
                    continue
                print(f"{page}: {len(run.blocks)} blocks ...", end=" ", flush=True)
                updated = update_page(run)
            except (PageError, ForgedError) as error:
                print(error)
                failed += 1
                continue
            print(f"{time.monotonic() - started:.1f} s{'' if updated.failures else ', proven'}")
            for failure in updated.failures.values():
                print(f"{shown(site, page)}:{failure.line}: {failure.message}")
                for frame in failure.frames[-3:]:
                    print(f"  at {frame}")
            failed += bool(updated.failures)
    finally:
        servers.close()
    return 1 if failed else 0
