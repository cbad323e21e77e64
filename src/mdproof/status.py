"""What is proven, page by page."""

from mdproof.collect import collect, make_pipeline
from mdproof.errors import PageError
from mdproof.proof import ForgedError, load_proof, orphans, staleness
from mdproof.site import Site


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
