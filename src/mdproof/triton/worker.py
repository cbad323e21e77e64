"""The compile worker, `python -m mdproof.triton.worker`: a job in, reports out, both as JSON."""

import hashlib
import importlib
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

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", re.MULTILINE)
# warp-level (Ampere), warp-group (Hopper: half, fp8, int8), tensor memory (Blackwell)
_TENSOR_CORE = ("HMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA")


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
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    source = _source(launch)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"[:2000]}
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "-res-usage"))
    assert usage, "cuobjdump prints registers and stack"
    opcodes = Counter(_OPCODE.findall(_dump(cubin, "-sass")))
    return {
        **row,
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "shared_bytes": int(compiled.metadata.shared),
        "tensor_core": {name: opcodes[name] for name in _TENSOR_CORE if opcodes[name]},
        "cubin_sha256": hashlib.sha256(cubin).hexdigest(),
    }


def main() -> None:
    """Answer one job."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a kernel module prints is not the answer
    job = json.load(sys.stdin)
    rows = [report(launch, cap) for launch in job["launches"] for cap in job["capabilities"]]
    json.dump(rows, out)


if __name__ == "__main__":
    main()
