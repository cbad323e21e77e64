"""The command line: `mdproof status` and `mdproof prove`."""

import argparse
import sys
import time
from pathlib import Path

from mdproof.benchmark import record_benchmark
from mdproof.collect import collect, make_pipeline, shown
from mdproof.errors import PageError
from mdproof.proof import ForgedError, load_proof, orphans, staleness
from mdproof.prove import Servers, open_page, update_page
from mdproof.site import Site, load_site


def status(site: Site) -> int:
    """Print a table of pages and tell by the exit code whether all is fresh."""
    md = make_pipeline(site)
    proven: list[str] = []
    bad = total = excused = 0
    for page in site.pages():
        try:
            blocks = collect(site, page, md).blocks
            if not blocks:
                continue
            proven.append(page)
            proof = load_proof(site, page)
        except (PageError, ForgedError) as error:
            print(error)
            proven.append(page)
            bad += 1
            continue
        stale = sum(bool(reason) for reason in staleness(site, blocks, proof))
        seconds = sum(record["seconds"] for record in proof.blocks) if proof else 0.0
        state = f"{stale} stale" if stale else "fresh"
        print(f"{page:<44} {len(blocks):>3} blocks  {state:<9} {seconds:7.1f} s")
        bad += bool(stale)
        total += len(blocks)
        excused += sum(bool(block.options.norun) for block in blocks)
    left = orphans(site, proven)
    for file in left:
        print(f"{file.relative_to(site.root).as_posix()}: no page has these blocks: delete it")
    print(f"{total} blocks, {excused} excused; {bad} pages need `mdproof prove`")
    return 1 if bad or left else 0


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
                if not everything and run.fresh:
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


def bench(site: Site, pages: list[str]) -> int:
    """Measure on this machine's device what pages have a benchmark for, and record the rows."""
    servers, failed = Servers(site), 0
    try:
        if servers.device is None:
            print("there is no CUDA device on this machine")
            return 1
        for page in pages:
            try:
                rows = record_benchmark(open_page(site, page, servers), servers.device)
                print(f"{page}: {rows} rows measured on {servers.device.name}")
            except (PageError, ForgedError) as error:
                print(error)
                failed += 1
    finally:
        servers.close()
    return 1 if failed else 0


def _page(site: Site, given: str) -> str:
    """Return a page that was named by its path, or by its path below `docs`."""
    for file in (Path(given).resolve(), site.docs / given):
        if file.is_file() and file.is_relative_to(site.docs):
            return file.relative_to(site.docs).as_posix()
    raise PageError(given, 1, f"no such page below {site.docs.name}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="mdproof", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="which pages are proven")
    proving = commands.add_parser("prove", help="run what is stale and record it")
    proving.add_argument("pages", nargs="*", help="pages below docs; default: all that are stale")
    proving.add_argument("--all", action="store_true", help="also pages whose proof is fresh")
    measuring = commands.add_parser("bench", help="measure pages on this machine's device")
    measuring.add_argument("pages", nargs="+", help="pages below docs that have a benchmark")
    given = parser.parse_args(arguments)
    try:
        site = load_site()
    except (FileNotFoundError, PageError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if given.command == "status":
            return status(site)
        pages = [_page(site, page) for page in given.pages]
        if given.command == "bench":
            return bench(site, pages)
        return prove(site, pages, everything=given.all or bool(pages))
    except PageError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
