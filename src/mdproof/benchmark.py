"""Benchmark rows of a page, measured on a device by a program of `examples/`, kept in its proof."""

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mdproof.device import Device, outdated
from mdproof.errors import PageError
from mdproof.gpu import run_benchmark
from mdproof.kernel_source import script_digest
from mdproof.page_run import PageRun
from mdproof.proof import save_proof
from mdproof.site import Site


def script_of(site: Site, page: str) -> Path:
    """Return where the benchmark of a page stands: the room keeps its name on every floor."""
    room = page.removesuffix(".md").replace("-", "_")
    return site.root / "examples" / f"{room}_bench.py"


def benchmark_outdated(site: Site, page: str, way: Mapping[str, Any]) -> str:
    """Return why the rows of a device proof no longer hold, "" if they do or there are none."""
    rows = way.get("benchmark")
    if rows and rows["script"] != script_digest(script_of(site, page)):
        return "the benchmark changed"
    return ""


def record_benchmark(
    run: PageRun,
    device: Device,
    measure: Callable[[Path], dict[str, Any]] = run_benchmark,
) -> int:
    """Measure, and enter the rows into the device proof of the page's last block that has one.

    Args:
        run: The page.
        device: The device of this machine.
        measure: Runs the program and returns its report, whose `results` are the rows.

    Returns:
        The number of rows.

    Raises:
        PageError: If the page has no benchmark, or nothing of it is proven on the device, or the
            program fails.
    """
    script = script_of(run.site, run.page)
    name = script.relative_to(run.site.root).as_posix()
    if not script.is_file():
        raise PageError(run.file, 1, f"has no benchmark: there is no {name}")
    ways = [
        way
        for block, record in zip(run.blocks, run.proof.blocks if run.proof else (), strict=False)
        for way in record["verified"]
        if way["how"] == "device"
        and way["device"] == device.name
        and not outdated(run.site, run.blocks[: block.index], way)
    ]
    if not ways or run.proof is None:
        raise PageError(run.file, 1, f"nothing is proven on {device.name}: run `mdproof prove`")
    try:
        report = measure(script)
    except RuntimeError as error:
        raise PageError(name, 1, str(error)) from None
    rows = report.get("results") or []
    if not rows:
        raise PageError(name, 1, "wrote no results")
    ways[-1]["benchmark"] = {
        "script": script_digest(script),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": report.get("machine", {}),
        "rows": rows,
    }
    save_proof(run.site, run.proof)
    return len(rows)
