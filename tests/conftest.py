"""One set-up for every test: shapes are checked, kernels are interpreted, threads are few."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from jaxtyping import install_import_hook

SRC = Path(__file__).parents[1] / "src"

# The annotations become checks. Kernel files are left alone: @triton.jit reads its own source.
install_import_hook(
    [
        ".".join(path.relative_to(SRC).with_suffix("").parts)
        for path in sorted((SRC / "zhizhi").rglob("*.py"))
        if path.stem != "__init__" and not path.stem.endswith("_triton")
    ],
    "beartype.beartype",
)
