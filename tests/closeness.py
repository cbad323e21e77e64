"""The three tolerances of the project, and the comparisons that raise.

EXACT is for identities in float64, FLOAT32 for the same number by another route in float32. Kernels
are held to a yardstick instead: at most twice the error that the reference makes in the same dtype.
"""

from typing import Any

import torch
from torch import Tensor

EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-10}
FLOAT32: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}


def assert_exact(actual: Any, expected: Any) -> None:
    """Raise unless the two agree to 1e-10 in float64."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, **EXACT)


def assert_float32(actual: Tensor, expected: Tensor) -> None:
    """Raise unless the two agree as float32 results of one computation do."""
    torch.testing.assert_close(actual.float(), expected.float(), **FLOAT32)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return the L2 norm of the difference over the L2 norm of the float64 truth."""
    truth = truth.double()
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_yardstick(
    actual: Tensor, reference: Tensor, truth: Tensor, *, factor: float = 2.0
) -> None:
    """Raise unless `actual` errs at most `factor` times as much as `reference` does.

    Args:
        actual: What the kernel returned.
        reference: What the plain definition returns in the same dtype.
        truth: What the plain definition returns in float64.
        factor: How much worse than the reference is allowed.
    """
    floor = torch.finfo(actual.dtype).eps
    ours, theirs = relative_error(actual, truth), relative_error(reference, truth)
    assert ours <= factor * max(theirs, floor), (
        f"relative error {ours:.3e}, over {factor} x max({theirs:.3e}, {floor:.3e})"
    )
