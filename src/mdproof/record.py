"""Prove a page anew: run its blocks and copies, and record what they do."""

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdproof import figures
from mdproof.block import Block
from mdproof.collect import collect
from mdproof.compare import address_in, text_diff
from mdproof.compiled_page import compile_page, failures_of_tensor_cores
from mdproof.copy import candidates
from mdproof.device_run import run_on_device
from mdproof.errors import PageError
from mdproof.page_run import PageRun
from mdproof.proof import (
    Proof,
    base_page,
    block_code,
    block_key,
    figure_folder,
    save_proof,
    write_text,
)
from mdproof.prove import difference, libraries_of, text_of, try_copy
from mdproof.runner import Failure


@dataclass(frozen=True)
class Updated:
    """What proving anew led to.

    Attributes:
        failures: By block, why it could not be proven; the proof is written only if there are none.
        written: Whether the proof file changed.
        changes: By block, how what it shows differs from what was recorded: a diff of its text, and
            the names of figures drawn anew. A block recorded for the first time is not among them.
    """

    failures: dict[int, Failure]
    written: bool = False
    changes: dict[int, str] = field(default_factory=dict)


def update_page(run: PageRun) -> Updated:
    """Run a page and its copies and record what was seen; nothing is written if anything fails.

    A translation has no proof of its own: its code must be that of the page it translates.

    Raises:
        PageError: If the proof cannot be written.
    """
    if base_page(run.site, run.page) != run.page:
        return Updated(_compare_translation(run))
    failures = {
        block.index: failure
        for block in run.blocks
        if (failure := run.failure_of(block)) is not None
    }
    failures |= _with_addresses(run) if not failures else {}
    if failures:
        return Updated(failures)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    compiled = compile_page(run, today)
    devices, failures = run_on_device(run, today)
    failures = failures_of_tensor_cores(run, compiled) | failures
    if failures:
        return Updated(failures)
    records: list[dict[str, Any]] = []
    drawings: dict[str, str] = {}
    for block in run.blocks:
        record, drawn = _new_record(run, block, today, compiled)
        record["verified"] += devices.get(block.index, [])
        old = run.record(block)
        if old is not None and _same_record(run, block, old, record):
            record = {
                **record,
                "outputs": old["outputs"],
                "seconds": old["seconds"],
                "date": old["date"],
            }
            record["verified"] = _keep_dates(old["verified"], record["verified"])
            drawn = {}
        if not block.options.norun:
            found = _find_copy(run, block, record)
            if isinstance(found, Failure):
                failures[block.index] = found
                continue
            record["copy"] = found
        records.append(record)
        drawings |= drawn
    if failures:
        return Updated(failures)
    proof = Proof(run.page, records)
    if run.proof is not None and run.proof.blocks == records and not drawings:
        return Updated({})
    folder = figure_folder(run.site, run.page)
    try:
        for name, svg in drawings.items():
            write_text(folder / name, svg)
        save_proof(run.site, proof)
        _remove_orphans(folder, records)
    except OSError as error:
        raise PageError(run.file, 1, f"its proof cannot be written: {error}") from None
    return Updated({}, written=True, changes=_changes(run, records, drawings))


def _with_addresses(run: PageRun) -> dict[int, Failure]:
    """Return a failure for each block whose output shows where an object lies in memory."""
    failures: dict[int, Failure] = {}
    for block in run.blocks:
        shows = "" if block.options.norun else address_in(run.ran[block.index].text())
        if shows and not block.options.varies:
            message = f"the output shows an address, {shows}, which differs in every run"
            failures[block.index] = Failure(block.line, message)
    return failures


def _changes(
    run: PageRun, records: Sequence[dict[str, Any]], drawings: dict[str, str]
) -> dict[int, str]:
    changes: dict[int, str] = {}
    for block, record in zip(run.blocks, records, strict=True):
        old = run.record(block)
        if old is None:
            continue
        names = [out["name"] for out in record["outputs"] if out["type"] == "figure"]
        drawn = [name for name in names if any(file.startswith(f"{name}.") for file in drawings)]
        told = [text_diff(text_of(old["outputs"]), text_of(record["outputs"]))]
        told += [f"figure {name} is drawn anew" for name in drawn]
        if any(told):
            changes[block.index] = "\n".join(part for part in told if part)
    return changes


def _compare_translation(run: PageRun) -> dict[int, Failure]:
    base = base_page(run.site, run.page)
    originals = [block_code(block) for block in collect(run.site, base).blocks]
    theirs = [block_code(block) for block in run.blocks]
    if originals == theirs:
        return {}
    pairs = zip(run.blocks, [*originals, *([None] * len(theirs))], theirs, strict=False)
    differ = next((block for block, one, two in pairs if one != two), run.blocks[-1])
    message = f"the code is not that of {base}, whose proof this page shares"
    return {differ.index: Failure(differ.line, message)}


def _same_record(run: PageRun, block: Block, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old["key"] != new["key"] or old["status"] != new["status"]:
        return False
    return block.options.norun != "" or not difference(run, block, old)


def _keep_dates(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def undated(way: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in way.items() if name != "date"}

    known = {repr(undated(way)): way for way in old}
    return [known.get(repr(undated(way)), way) for way in new]


def _new_record(
    run: PageRun, block: Block, today: str, compiled: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a block's record, and its drawings by file name."""
    if block.options.norun:
        key = block_key(
            run.site, run.blocks[: block.index], modules=(), entered=(), files=(), libraries={}
        )
        return {
            "key": key,
            "kind": block.kind,
            "status": "excused",
            "reason": block.options.norun,
            "date": today,
            "seconds": 0.0,
            "verified": [],
            "outputs": [],
            "libraries": {},
            "modules": [],
            "entered": [],
            "files": [],
            "names": {},
            "links": {},
        }, {}
    ran = run.ran[block.index]
    outputs: list[dict[str, Any]] = []
    drawings: dict[str, str] = {}
    for out in ran.outputs:
        if out["type"] != "figure":
            outputs.append(out)
            continue
        name = f"{block.index}-{1 + sum(o['type'] == 'figure' for o in outputs)}"
        width, height = figures.size(out["svg"])
        hashes = {}
        for theme in figures.THEMES:
            drawings[f"{name}.{theme}.svg"] = text = figures.themed(out["svg"], theme)
            hashes[theme] = hashlib.sha256(text.encode()).hexdigest()[:32]
        record = {"type": "figure", "name": name, "width": width, "height": height}
        if figures.count(out["svg"]) > 1:
            record["frames"] = figures.count(out["svg"])
        outputs.append(record | {"sha256": hashes})
    libraries = libraries_of(run, block, ran)
    key = block_key(
        run.site,
        run.blocks[: block.index],
        modules=ran.modules,
        entered=[name for i, each in run.ran.items() if i <= block.index for name in each.entered],
        files=ran.files,
        libraries=libraries,
    )
    verified: list[dict[str, Any]] = [{"how": "cpu", "date": today}]
    if ran.launches:
        verified.append({"how": "interpreter", "date": today})
        verified += compiled[str(block.index)]
    record = {
        "key": key,
        "kind": block.kind,
        "status": "passed",
        "date": today,
        "seconds": round(ran.seconds, 2),
        "verified": verified,
        "outputs": outputs,
        "libraries": libraries,
        "modules": ran.modules,
        "entered": ran.entered,
        "files": ran.files,
        "names": ran.names,
        "links": ran.links,
    }
    return record, drawings


def _find_copy(run: PageRun, block: Block, record: dict[str, Any]) -> dict[str, Any] | Failure:
    """Return the record of the smallest copy that runs alone and does what the page does.

    It must print what the page prints, and at its block's beginning the names that the block reads
    must stand for what they stand for on the page. Where no copy does the latter (a set in another
    order, say), the first that prints the same is taken.
    """
    failure: Failure | None = None
    prints_the_same: dict[str, Any] | None = None
    state = run.ran[block.index].state
    for copy, libraries in candidates(run.site, run.blocks[: block.index]):
        found = {
            "level": copy.level,
            "sha256": copy.sha256,
            "code": copy.code,
            "libraries": libraries,
        }
        failed, ran = try_copy(run, block, copy, record["outputs"])
        if failed is None and (ran.state == state or block.kind != "code"):
            return found
        failure = failed or failure
        if failed is None:
            prints_the_same = prints_the_same or found
    if prints_the_same is not None:
        return prints_the_same
    assert failure is not None
    return failure


def _remove_orphans(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    kept = {
        f"{out['name']}.{theme}.svg"
        for record in records
        for out in record["outputs"]
        if out["type"] == "figure"
        for theme in out["sha256"]
    }
    for file in folder.glob("*.svg") if folder.is_dir() else ():
        if file.name not in kept:
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
