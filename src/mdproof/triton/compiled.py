"""Record which kernels were compiled and launched on the device of this process."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from triton.runtime.jit import JITFunction


def describe(kernel: Any, compiled: Any) -> dict[str, Any]:
    """Return one launch: the kernel, and what the driver says of its binary."""
    function = kernel.fn
    return {
        "kernel": f"{function.__module__}:{function.__qualname__}",
        "cubin_sha256": hashlib.sha256(compiled.asm["cubin"]).hexdigest(),
        "registers": compiled.n_regs,
        "spills": compiled.n_spills,
        "shared_bytes": int(compiled.metadata.shared),
        "num_warps": compiled.metadata.num_warps,
    }


@contextlib.contextmanager
def record() -> Iterator[list[dict[str, Any]]]:
    """Collect every different binary that is launched in this context."""
    launches: list[dict[str, Any]] = []
    run = JITFunction.run

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **kwargs)
        if not kwargs.get("warmup") and compiled is not None:
            launch = describe(self, compiled)
            if launch not in launches:
                launches.append(launch)
        return compiled

    try:
        JITFunction.run = recording
        yield launches
    finally:
        JITFunction.run = run
