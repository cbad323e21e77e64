"""The corrected interpreter gives torch's bits; when Triton itself does, a test here says so."""

import os
import subprocess
import sys

import pytest
import torch
from tests.mdproof import triton_canaries as kernels

BF16 = torch.bfloat16
# zeros, ties between two bfloat16 neighbours, the ends of the ranges, subnormals
ODD = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.0e38, 1e-40, -1e-40, 448.0, 464.0, 1e5]


def values(n: int, dtype: torch.dtype, *, scale: float = 1.0, limit: float = 3e38) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) * scale
    x[: len(ODD)] = torch.tensor(ODD)
    return x.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("target", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32])
def test_cast_has_the_bits_of_torch(source, target):
    half = torch.float16 in (source, target)  # numpy warns when a cast overflows
    x = values(257, source, scale=30.0, limit=6e4 if half else 3e38)
    y = torch.empty(257, dtype=target)
    kernels.cast[(3,)](x, y, 257, BLOCK=128)
    assert torch.equal(y.view(torch.uint8), x.to(target).view(torch.uint8))


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32])
def test_cast_to_fp8_rounds_as_torch_does_and_saturates_as_the_hardware_does(source, target):
    x = values(257, source, scale=30.0, limit=6e4)
    y = torch.empty(257, dtype=target)
    kernels.cast[(3,)](x, y, 257, BLOCK=128)
    limit = torch.finfo(target).max
    expected = x.float().clamp(-limit, limit).to(target)
    assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))


def test_bf16_arithmetic_is_float32_rounded_once():
    x, y = values(128, BF16, limit=1e18), values(128, BF16, limit=1e18).flip(0)
    out = torch.empty(7, 128, dtype=BF16)
    kernels.arithmetic[(1,)](x, y, out, 128, BLOCK=128)
    expected = torch.stack(
        [x + y, x - y, x * y, torch.maximum(x, y), torch.minimum(x, y), -x, x.abs()]
    )
    assert torch.equal(out, expected)


def test_bf16_maximum_of_negative_numbers_compares_numbers_and_not_bits():
    x = -values(128, BF16).abs() - 1
    out = torch.empty(2, dtype=BF16)
    kernels.reduce[(1,)](x, out, BLOCK=128)
    assert out.tolist() == [x.max().item(), x.min().item()]


def test_bf16_dot_accumulates_in_float32():
    a, b = (
        values(256, BF16).clamp(-4, 4).reshape(16, 16),
        values(256, BF16).clamp(-4, 4).reshape(16, 16),
    )
    c = torch.empty(16, 16)
    kernels.matmul[(1,)](a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_fp16_and_fp32_are_left_alone():
    x = values(128, torch.float16, limit=100.0)
    out = torch.empty(7, 128, dtype=torch.float16)
    kernels.arithmetic[(1,)](x, x, out, 128, BLOCK=128)
    assert torch.equal(out[0], x + x)


UNCORRECTED = """
import torch
from tests.mdproof import triton_canaries as kernels
x = torch.tensor([1.5, -2.0] * 64, dtype=torch.bfloat16)
out = torch.empty(7, 128, dtype=torch.bfloat16)
kernels.arithmetic[(1,)](x, x, out, 128, BLOCK=128)
print(torch.equal(out[2], x * x))
"""


def test_the_correction_is_still_needed():
    """When this fails, Triton multiplies bfloat16 by itself: retire `interpreter.py`."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", UNCORRECTED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"
