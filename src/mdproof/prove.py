"""Hold a page to its record: run its blocks and copies, and compare what they do with it."""

import base64
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdproof import figures
from mdproof.block import Block
from mdproof.compare import first_difference, images, same_figure
from mdproof.copy import Copy, is_recorded, plain_code, recorded_copy
from mdproof.device import check_way, ways_of
from mdproof.page_run import UPDATE, PageRun
from mdproof.proof import (
    canonical,
    damaged_figure,
    figure_folder,
    locked_versions,
    used_libraries,
)
from mdproof.runner import Failure, Ran, copy_job


def check_block(run: PageRun, block: Block) -> Failure | None:
    """Run a page if need be, and compare one block with its record."""
    failure = run.failure_of(block)
    if failure is not None:
        return failure
    reason = run.stale[block.index - 1]
    record = run.record(block)
    if record is None:
        return Failure(block.line, f"not proven yet: {UPDATE}")
    differs = "" if block.options.norun else difference(run, block, record)
    if differs:
        return Failure(block.line, differs)
    if reason:
        return Failure(block.line, f"{reason}; the output is the same: run `pytest docs --update`")
    return _check_claims(run, block, record)


def _check_claims(run: PageRun, block: Block, record: dict[str, Any]) -> Failure | None:
    """Compare what a record says besides its outputs with what the run showed."""
    if block.options.norun:
        same = record["status"] == "excused" and record["outputs"] == []
        return None if same else Failure(block.line, "the record claims that this block was run")
    ran = run.ran[block.index]
    claims = {
        "modules": ran.modules,
        "entered": ran.entered,
        "files": ran.files,
        "names": ran.names,
        "links": ran.links,
        "libraries": libraries_of(run, block, ran),
    }
    for name, seen in claims.items():
        if record.get(name) != seen:
            return Failure(block.line, f"the record's {name} are not what the run showed: {UPDATE}")
    for way in ways_of(record):
        wrong = check_way(run.site, run.blocks[: block.index], way, ran.launches)
        if wrong:
            return Failure(block.line, f"{wrong}: {UPDATE}")
    hows = {way["how"] for way in record["verified"]} - {"device"}
    expected = {"cpu", "interpreter", "compiled"} if ran.launches else {"cpu"}
    if record["status"] != "passed" or hows != expected:
        claim = ", ".join(sorted(hows))
        return Failure(
            block.line, f"the record claims {claim}; the run shows {', '.join(sorted(expected))}"
        )
    for name, version in record["libraries"].items():
        locked = locked_versions(run.site).get(canonical(name))
        if locked and locked.partition("+")[0] != version:
            message = f"{name} {version} is installed, the lock says {locked}: use the locked set"
            return Failure(block.line, message)
    return None


def libraries_of(run: PageRun, block: Block, ran: Ran) -> dict[str, str]:
    """Return the versions of the libraries that a block depends on, by name."""
    codes = [plain_code(b) for b in run.blocks[: block.index] if not b.options.norun]
    return used_libraries(run.site, codes, ran.modules)


def difference(run: PageRun, block: Block, record: dict[str, Any]) -> str:
    """Return how a block's outputs differ from the recorded ones, "" if they agree."""
    ran = run.ran[block.index]
    old, new = record["outputs"], ran.outputs
    if not block.options.varies:
        difference = first_difference(text_of(old), ran.text(), rtol=block.options.tol)
        if difference is not None:
            return f"the output changed: recorded {difference[0]!r}, now {difference[1]!r}"
    drawn_old = [out for out in old if out["type"] == "figure"]
    drawn_new = [out["svg"] for out in new if out["type"] == "figure"]
    if len(drawn_old) != len(drawn_new):
        return f"{len(drawn_new)} figures, {len(drawn_old)} recorded"
    damaged = damaged_figure(run.site, run.page, record)
    if damaged:
        return f"figure {damaged} is not the recorded one"
    folder = figure_folder(run.site, run.page)
    for out, svg in zip(drawn_old, drawn_new, strict=True):
        for theme in out["sha256"] if not block.options.varies else ():
            file = folder / f"{out['name']}.{theme}.svg"
            text = file.read_text(encoding="utf-8")
            if not same_figure(text, figures.themed(svg, theme)) or not _same_images(text, svg):
                return f"figure {file.name} changed: {UPDATE}"
    return ""


def text_of(outputs: Sequence[dict[str, Any]]) -> str:
    """Return the text of recorded outputs."""
    return Ran(0, outputs=list(outputs)).text()


def _same_images(recorded: str, new: str) -> bool:
    """Tell whether the pictures inside two drawings agree, pixel by pixel within a few levels."""
    pairs = list(zip(images(recorded), images(new), strict=False))
    if len(images(recorded)) != len(images(new)):
        return False
    if all(a == b for a, b in pairs):
        return True
    import io

    from PIL import Image, ImageChops

    for a, b in pairs:
        one, two = (Image.open(io.BytesIO(base64.b64decode(x))).convert("RGBA") for x in (a, b))
        if one.size != two.size:
            return False
        extrema = ImageChops.difference(one, two).getextrema()
        if max(high for _, high in extrema) > 8:  # type: ignore[operator,misc]
            return False
    return True


def try_copy(
    run: PageRun, block: Block, copy: Copy, recorded: Sequence[dict[str, Any]]
) -> tuple[Failure | None, Ran]:
    """Run a copy alone, and compare what its block prints and draws with what is recorded.

    Returns:
        The failure if there is one, and what the copy did.
    """
    with tempfile.TemporaryDirectory(prefix="mdproof-") as folder:
        job = copy_job(run.site, copy.text, copy.split, block, Path(folder))
        ran = run.servers.run(job, hash_seed=1)[0]
    if ran.failure is not None:
        message = f"the runnable copy fails alone: {ran.failure.message}"
        return Failure(block.line, message), ran
    if block.kind == "doctest" or block.options.varies:
        return None, ran
    difference = first_difference(text_of(recorded), ran.text(), rtol=block.options.tol)
    if difference is not None:
        message = f"the runnable copy prints {difference[1]!r}, the page {difference[0]!r}"
        return Failure(block.line, message), ran
    drawn = [out["svg"] for out in ran.outputs if out["type"] == "figure"]
    kept = [out for out in recorded if out["type"] == "figure"]
    if len(kept) != len(drawn):
        message = f"the runnable copy draws {len(drawn)} figures, the page {len(kept)}"
        return Failure(block.line, message), ran
    return None, ran


def check_copy(run: PageRun, block: Block) -> Failure | None:
    """Run a block's recorded copy alone."""
    record = run.record(block)
    copy = recorded_copy(run.site, run.blocks[: block.index], record) if record else None
    if record is None or copy is None:
        return Failure(block.line, f"no runnable copy is recorded: {UPDATE}")
    if not is_recorded(run.site, run.blocks[: block.index], record, copy):
        return Failure(block.line, f"the runnable copy is not the recorded one: {UPDATE}")
    return try_copy(run, block, copy, record["outputs"])[0]
