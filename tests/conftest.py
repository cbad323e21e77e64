"""One set-up for every test: shapes are checked, kernels are interpreted, threads are few."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

SRC = Path(__file__).parents[1] / "src"

# Machines are shared: a slow example is not a wrong one. Every run tries the same examples.
settings.register_profile("zhizhi", deadline=None, derandomize=True)
settings.load_profile("zhizhi")

# The annotations become checks. Kernel files are left alone: @triton.jit reads its own source.
install_import_hook(
    [
        ".".join(path.relative_to(SRC).with_suffix("").parts)
        for path in sorted((SRC / "zhizhi").rglob("*.py"))
        if path.stem != "__init__" and not path.stem.endswith("_triton")
    ],
    "beartype.beartype",
)


@pytest.fixture(autouse=True)
def _exact_interpreter() -> None:
    """Make bfloat16 and fp8 right in Triton's interpreter, for tests that loaded it."""
    if "triton.runtime.interpreter" in sys.modules:
        from mdproof.triton.interpreter import install

        install()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN: an output that is not written, or a tail that is read, shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def compiled() -> Callable[..., list[dict[str, Any]]]:
    """Compile recorded launches in a worker process; the same job is done once a session."""
    from mdproof.triton.compiling import compile_launches

    done: dict[str, list[dict[str, Any]]] = {}

    def compile_once(launches: list[dict[str, Any]], **kwargs: Any) -> list[dict[str, Any]]:
        key = json.dumps([launches, kwargs], sort_keys=True)
        if key not in done:
            done[key] = compile_launches(launches, **kwargs)
        return done[key]

    return compile_once
