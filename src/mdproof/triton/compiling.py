"""Compile recorded launches for GPUs that are not here, in a process that does not interpret.

One process has one mode: `TRITON_INTERPRET` is read when `@triton.jit` runs. So the compiler lives
in a worker, `python -m mdproof.triton.worker`, which reads JSON and writes JSON. This module itself
imports neither Triton nor torch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may ask for (163 KiB and 227 KiB)."""

_REPRODUCIBLE = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}


def compile_launches(
    launches: Sequence[dict[str, Any]],
    *,
    capabilities: Sequence[int] = CAPABILITIES,
    programs: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Compile each launch for each compute capability and report what it asks of the hardware.

    Args:
        launches: What `mdproof.triton.launches.record` yielded.
        capabilities: Compute capabilities, 80 for an A100, 90 for an H100 or H200, 100 for a B200.
        programs: Sources of modules that cannot be imported, by name: kernels written on a page.

    Returns:
        A row for each launch and capability: the launch's fields, `capability`, `triton`,
        `registers`, `stack_bytes` and `spill_instructions` (what did not fit into registers),
        `shared_bytes`, `tensor_core` (machine instructions by name), `ptx` (instructions of the
        virtual machine that tell of tensor cores and asynchronous copies), `cubin_sha256` and
        `error` (None, or why this target refuses the kernel).

    Raises:
        RuntimeError: If Triton is missing or the worker fails.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "Triton is not installed; kernels are compiled with the extra zhizhi[gpu]."
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= _REPRODUCIBLE
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    job = json.dumps(
        {
            "launches": list(launches),
            "capabilities": list(capabilities),
            "programs": dict(programs or {}),
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "mdproof.triton.worker"],
        input=job,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The compile worker failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def assert_tensor_cores(rows: Sequence[dict[str, Any]], *kernels: str) -> None:
    """Raise unless every compiled row of these kernels has a tensor-core instruction.

    Both witnesses count: the virtual instruction in the PTX, and the machine instruction in the
    cubin that ptxas made of it.

    Args:
        rows: What `compile_launches` returned.
        kernels: Names of kernels, without their module; every kernel if none is named.

    Raises:
        AssertionError: Naming kernel and target, or what kernels there are if a name is not theirs.
    """
    names = {row["kernel"].rpartition(":")[2] for row in rows}
    unknown = sorted(set(kernels) - names)
    if unknown or not names:
        there = ", ".join(sorted(names)) or "no kernel"
        raise AssertionError(
            f"no row is of {', '.join(unknown) or 'any kernel'}; there is {there}."
        )
    for row in rows:
        name = row["kernel"].rpartition(":")[2]
        if kernels and name not in kernels:
            continue
        target = f"{name} on sm_{row['capability']}"
        if row["error"] is not None:
            raise AssertionError(f"{target} does not compile: {row['error']}")
        virtual = [key for key in row["ptx"] if "mma" in key]
        if not row["tensor_core"] or not virtual:
            raise AssertionError(f"{target} has no tensor-core instruction.")
