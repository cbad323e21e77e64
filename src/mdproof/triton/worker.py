"""The compile worker, `python -m mdproof.triton.worker`: a job in, reports out, both as JSON."""

import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdproof.triton.compiling import SHARED_MEMORY_LIMIT

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", re.MULTILINE)
# warp-level (Ampere), warp-group (Hopper: half, fp8, int8), tensor memory (Blackwell)
_TENSOR_CORE = ("HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "QGMMA", "IGMMA")
_TENSOR_CORE += ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
_PTX = {
    "mma.sync": r"\bmma\.sync\b",
    "wgmma.mma_async": r"\bwgmma\.mma_async\b",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "cp.async.bulk.tensor": r"\bcp\.async\.bulk\.tensor\b",
}
"""Instructions of the virtual machine that tell of tensor cores and of asynchronous copies."""


def _kernel(address: str) -> Any:
    module, _, name = address.partition(":")
    kernel = importlib.import_module(module)
    for part in name.split("."):
        kernel = getattr(kernel, part)
    while not isinstance(kernel, triton.JITFunction):  # @autotune and @heuristics wrap
        kernel = kernel.fn
    return kernel


def _constant(value: Any) -> Any:
    return tl.dtype(value["dtype"]) if isinstance(value, dict) else value


def _source(launch: dict[str, Any]) -> ASTSource:
    kernel = _kernel(launch["kernel"])
    names = list(kernel.arg_names)
    return ASTSource(
        fn=kernel,
        signature=launch["signature"],
        constexprs={name: _constant(value) for name, value in launch["constants"].items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in launch["divisible_by_16"]
        },
    )


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(_TOOLS / "cuobjdump"), option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def report(launch: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile one launch for one target; a refusal by the compiler is part of the report."""
    row = {**launch, "capability": capability, "triton": triton.__version__, "error": None}
    options = {name: launch[name] for name in _OPTIONS if name in launch}
    source = _source(launch)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"[:2000]}
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "-res-usage"))
    assert usage, "cuobjdump prints registers and stack"
    opcodes = Counter(_OPCODE.findall(_dump(cubin, "-sass")))
    ptx = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in _PTX.items()}
    shared, limit = int(compiled.metadata.shared), SHARED_MEMORY_LIMIT.get(capability)
    if limit is not None and shared > limit:  # it compiles, and cannot be launched
        row["error"] = f"asks for {shared} bytes of shared memory; sm_{capability} has {limit}"
    return {
        **row,
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "spill_instructions": opcodes["LDL"] + opcodes["STL"],
        "shared_bytes": shared,
        "tensor_core": {name: opcodes[name] for name in _TENSOR_CORE if opcodes[name]},
        "ptx": {name: count for name, count in ptx.items() if count},
        "cubin_sha256": hashlib.sha256(cubin).hexdigest(),
    }


def main() -> None:
    """Answer one job."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a kernel module prints is not the answer
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in job["programs"].items():
            _define(name, text, Path(folder))
        rows = [report(launch, cap) for launch in job["launches"] for cap in job["capabilities"]]
    json.dump(rows, out)


def _define(name: str, text: str, folder: Path) -> None:
    """Make a module of a text; it stands in a file, for `@triton.jit` reads its source."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
