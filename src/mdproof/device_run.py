"""Run a page on the device of this machine, beside the run that every machine makes."""

from typing import TYPE_CHECKING, Any

from mdproof.block import Block
from mdproof.compare import first_difference
from mdproof.device import Device, kept_ways, new_way, ways_of
from mdproof.runner import Failure, Ran, page_job

if TYPE_CHECKING:
    from mdproof.page_run import PageRun

UPDATE = "run `pytest docs --update` and look at what changes"


def run_on_device(
    run: "PageRun", today: str
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, Failure]]:
    """Run a page's kernels on this machine's device, if it has one; keep what others recorded.

    Returns:
        The device proofs of each block, and why blocks that ran there failed.
    """
    old = run.proof.blocks if run.proof is not None else []
    ways: dict[int, list[dict[str, Any]]] = {}
    for block in run.blocks:
        ran = run.ran.get(block.index)
        launches = ran.launches if ran is not None and not block.options.nodevice else []
        ways[block.index] = kept_ways(run.site, run.blocks[: block.index], launches, old)
    device = run.servers.device
    wanted = [b for b in run.blocks if _on_device(run, b)] if device is not None else []
    failures: dict[int, Failure] = {}
    if device is None or not wanted:
        return ways, failures
    there = {ran.block: ran for ran in device.run(page_job(run.site, run.page, run.blocks))}
    for block in wanted:
        ran, here = there.get(block.index), run.ran[block.index]
        failure = _device_failure(run, block, device, ran, there)
        if failure is not None:
            failures[block.index] = failure
            continue
        assert ran is not None
        way = new_way(run.site, run.blocks[: block.index], device, here.launches, ran, today)
        others = [w for w in ways[block.index] if w["device"] != device.name]
        before = [w for w in ways[block.index] if w["device"] == device.name]
        if before and "benchmark" in before[0]:
            way["benchmark"] = before[0]["benchmark"]
        ways[block.index] = [*others, way]
    return ways, failures


def _on_device(run: "PageRun", block: Block) -> bool:
    ran = run.ran.get(block.index)
    return ran is not None and bool(ran.launches) and not block.options.nodevice


def _device_failure(
    run: "PageRun", block: Block, device: Device, ran: Ran | None, there: dict[int, Ran]
) -> Failure | None:
    """Return why a block that ran on a device proves nothing there."""
    if ran is None:
        broken = next((r for r in there.values() if r.failure is not None), None)
        why = f"block {broken.block} failed before it" if broken else "it was not reached"
        return Failure(block.line, f"on {device.name}: not run: {why}")
    if ran.failure is not None:
        return Failure(ran.failure.line, f"on {device.name}: {ran.failure.message}")
    here = run.ran[block.index]
    wanted, got = ({row["kernel"] for row in rows} for rows in (here.launches, ran.launches))
    if wanted != got:
        names = ", ".join(sorted(wanted ^ got))
        message = f"on {device.name} it launches other kernels than interpreted: {names}"
        return Failure(block.line, message)
    if block.options.varies:
        return None
    difference = first_difference(here.text(), ran.text(), rtol=block.options.tol)
    if difference is not None:
        message = f"on {device.name} it prints {difference[1]!r}, interpreted {difference[0]!r}"
        return Failure(block.line, message)
    return None


def check_device(run: "PageRun") -> Failure | None:
    """Run the page on this machine's device, and compare with what is recorded of this device."""
    for block in run.blocks:
        failure = run.failure_of(block)
        if failure is not None:
            return failure
    device = run.servers.device
    ways, failures = run_on_device(run, "")
    for failure in failures.values():
        return failure
    for block in run.blocks:
        now = [w for w in ways[block.index] if device is not None and w["device"] == device.name]
        old = [
            {**way, "date": ""}
            for way in ways_of(run.record(block))
            if device is not None and way["device"] == device.name
        ]
        if [{**way, "date": ""} for way in now] != old:
            name = device.name if device is not None else "the device"
            return Failure(block.line, f"what ran on {name} is not what is recorded: {UPDATE}")
    return None
