"""The kernels that a page launches, compiled for every target, and held to their record."""

from collections.abc import Sequence
from typing import Any

from mdproof.kernel_source import kernel_program
from mdproof.kernels import short_name, without_tensor_cores
from mdproof.page_run import UPDATE, PageRun
from mdproof.runner import Failure, module_name


def compile_page(run: PageRun, today: str) -> dict[str, list[dict[str, Any]]]:
    """Return for each block that launched kernels how these compile, target by target.

    A target that refuses one of a block's kernels (fp8 on sm_80) is not claimed for the block.
    """
    every: list[dict[str, Any]] = []
    for ran in run.ran.values():
        every += [launch for launch in ran.launches if launch not in every]
    if not every:
        return {}
    from mdproof.triton import compiling

    rows = compiling.compile_launches(every, programs=_own_kernels(run, every))
    found: dict[str, list[dict[str, Any]]] = {}
    for index, ran in run.ran.items():
        ways = []
        for capability in sorted({row["capability"] for row in rows}):
            mine = [
                row
                for row in rows
                if row["capability"] == capability
                and any(all(row[n] == launch[n] for n in launch) for launch in ran.launches)
            ]
            if mine and not any(row["error"] for row in mine):
                kernels = [{name: row[name] for name in _COMPILED} for row in mine]
                target = f"sm_{capability}"
                ways.append(
                    {"how": "compiled", "target": target, "kernels": kernels, "date": today}
                )
        found[str(index)] = ways
    return found


def _own_kernels(run: PageRun, launches: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the program of the kernels that are written on the page, by the page's module name."""
    name = module_name(run.site, run.page)
    own = [
        short_name(launch["kernel"])
        for launch in launches
        if launch["kernel"].partition(":")[0] == name
    ]
    codes = [b.code for b in run.blocks if not b.options.norun and b.kind == "code"]
    return {name: kernel_program("\n".join(codes), own)} if own else {}


def failures_of_tensor_cores(
    run: PageRun, compiled: dict[str, list[dict[str, Any]]]
) -> dict[int, Failure]:
    """Return where a kernel that a fence says to run on tensor cores does not."""
    failures = {}
    for block in run.blocks:
        ways = compiled.get(str(block.index), [])
        rows = [{**row, "target": way["target"]} for way in ways for row in way["kernels"]]
        for kernel in block.options.tensor_cores.split():
            for sentence in without_tensor_cores(rows, kernel)[:1]:
                failures[block.index] = Failure(block.line, sentence)
    return failures


_COMPILED = (
    "kernel",
    "triton",
    "num_warps",
    "num_stages",
    "registers",
    "stack_bytes",
    "spill_instructions",
    "shared_bytes",
    "tensor_core",
    "ptx",
    "cubin_sha256",
)
"""What a proof keeps of a compiled kernel."""


def check_compiled(run: PageRun) -> Failure | None:
    """Compile the kernels that the page launched, and compare them with the recorded ones."""
    for block in run.blocks:
        failure = run.failure_of(block)
        if failure is not None:
            return failure
    now = compile_page(run, "")
    for failure in failures_of_tensor_cores(run, now).values():
        return failure
    for block in run.blocks:
        record = run.record(block)
        if record is None:
            return Failure(block.line, f"not proven yet: {UPDATE}")
        old = [{**way, "date": ""} for way in record["verified"] if way["how"] == "compiled"]
        if old != now.get(str(block.index), []):
            return Failure(block.line, f"the compiled kernels are not the recorded ones: {UPDATE}")
    return None
