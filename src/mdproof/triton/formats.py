"""Number formats that numpy lacks: bits, and rounding into them as torch and the hardware do."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""Formats that numpy lacks, and that the interpreter holds as unsigned integers."""


def to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """Return what the interpreter holds as a tensor."""
    bits = np.array(data, copy=True, order="C").view(f"i{dtype.primitive_bitwidth // 8}")
    if dtype.primitive_bitwidth == 8:
        bits = bits.view(np.uint8)
    return torch.from_numpy(bits).view(TORCH[dtype])


def to_bits(x: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    """Return a tensor's bits, as the interpreter holds them."""
    width = dtype.primitive_bitwidth
    return x.contiguous().view(_BITS[width]).numpy().view(f"u{width // 8}")


def round_bits(
    data: np.ndarray, source: tl.dtype, target: tl.dtype, *, toward_zero: bool = False
) -> np.ndarray:
    """Return the bits of `data` in another format; fp8 saturates, as on a GPU.

    To nearest even, or toward zero: then a result that is too large is one step down in its bits.
    """
    data = np.asarray(data)
    x = to_torch(data, source)
    if target.primitive_bitwidth == 8:
        limit = torch.finfo(TORCH[target]).max
        x = x.float().clamp(-limit, limit)  # NaN stays NaN
    y = x.to(TORCH[target])
    bits = to_bits(y, target)
    if toward_zero:
        exact = x.double().abs()
        bits = bits - ((y.double().abs() > exact) & exact.isfinite()).numpy().astype(bits.dtype)
    return bits.reshape(data.shape)


def round_to_odd(x: np.ndarray) -> np.ndarray:
    """Return float64 as float32, an inexact result odd: what rounds it again cannot round twice."""
    y = x.astype(np.float32)
    bits = y.view(np.uint32) - ((np.abs(y) > np.abs(x)) & np.isfinite(x)).astype(np.uint32)
    return np.where((y != x) & np.isfinite(x), bits | np.uint32(1), bits).view(np.float32)


def fma_bf16(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return xy + z in float32, rounded to odd: product and lost part are exact in float64."""
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)  # what the sum lost, exactly
    lost = np.isfinite(total) & (error != 0)
    bits = total.view(np.uint64) - (lost & (np.sign(error) != np.sign(total))).astype(np.uint64)
    return round_to_odd(np.where(lost, bits | np.uint64(1), bits).view(np.float64))


def is_of(value: Any, *dtypes: tl.dtype) -> bool:
    """Tell whether a value is held by the interpreter in one of these formats."""
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar in dtypes


def widen(value: Any) -> Any:
    """Return bfloat16 as float32, and anything else as it is."""
    if not is_of(value, tl.bfloat16):
        return value
    bits = np.asarray(value.data).astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def narrow(value: Any) -> Any:
    """Return float32 as bfloat16, and anything else as it is."""
    if value.data.dtype != np.float32:  # a comparison gives booleans
        return value
    return interpreter.TensorHandle(round_bits(value.data, tl.float32, tl.bfloat16), tl.bfloat16)
