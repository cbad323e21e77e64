"""Reductions and scans of half-precision numbers, which the interpreter does on bits or too well.

It adds the bits of bfloat16, and takes the index of the greatest bits; it sums float16 in float32.
A GPU adds in the format itself, in a tree, and rounds at each step; so does this.
"""

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from mdproof.triton.formats import narrow, widen

_CHOICES = ("_argmax_combine_tie_break_left", "_argmax_combine_tie_break_fast")
_CHOICES += ("_argmin_combine_tie_break_left", "_argmin_combine_tie_break_fast")
_CHOICES += ("_elementwise_max", "_elementwise_min")


def _is_half(value: Any) -> bool:
    return value.dtype.scalar in (tl.bfloat16, tl.float16)


def _refuse_fp8(value: Any) -> None:
    if value.dtype.scalar in (tl.float8e4nv, tl.float8e5):
        name = value.dtype.scalar.name
        raise TypeError(f"a reduction of {name}: GPUs have none; convert with .to(tl.float32).")


def _round(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Round float32 to a half format, and return it in float32."""
    if dtype == tl.float16:
        return data.astype(np.float16).astype(np.float32)
    return widen(narrow(interpreter.TensorHandle(data, tl.float32))).data


def _floats(value: Any) -> np.ndarray:
    handle = widen(value.handle)
    return np.asarray(handle.data).astype(np.float32)


def _tensor(data: np.ndarray, dtype: tl.dtype) -> Any:
    """Return float32 numbers, which a half format holds exactly, as a tensor of that format."""
    data = np.asarray(data, np.float32)
    if dtype == tl.float16:
        handle = interpreter.TensorHandle(data.astype(np.float16), tl.float16)
    else:
        handle = narrow(interpreter.TensorHandle(data, tl.float32))
    if not data.shape:
        handle.data = handle.data.reshape(1)
        return tl.tensor(handle, dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(data.shape)))


def _sum(reduction: Any, value: Any) -> Any:
    """Add in a tree, half to half, as threads and warps do."""
    dtype, data, axis = value.dtype.scalar, _floats(value), reduction.axis
    shape = data.shape
    if axis is None:
        data, axis = data.ravel(), 0
    while data.shape[axis] > 1:  # the length of a block is a power of two
        first, second = np.split(data, 2, axis=axis)
        data = _round(first + second, dtype)
    if reduction.axis is None:
        data = data.reshape([1] * len(shape)) if reduction.keep_dims else data.reshape(())
    elif not reduction.keep_dims:
        data = data.squeeze(axis)
    return _tensor(data, dtype)


def reduce(method: Any) -> Any:
    """Wrap `ReduceOps.apply_impl`."""

    @functools.wraps(method)
    def wrapped(self: Any, inputs: Any) -> Any:
        first = inputs[0]
        _refuse_fp8(first)
        if self.combine_fn is tl.standard._sum_combine and _is_half(first):
            return _sum(self, first)
        choices = [getattr(tl.standard, name, None) for name in _CHOICES]
        if first.dtype.scalar != tl.bfloat16 or self.combine_fn not in choices:
            return method(self, inputs)
        kind = tl.block_type(tl.float32, list(first.shape))
        results = method(self, (tl.tensor(widen(first.handle), kind), *inputs[1:]))
        several = results if isinstance(results, tuple) else (results,)
        several = tuple(
            _tensor(r.handle.data.reshape(r.shape), tl.bfloat16) if r.dtype == tl.float32 else r
            for r in several
        )
        return several if isinstance(results, tuple) else several[0]

    return wrapped


def scan(method: Any) -> Any:
    """Wrap `ScanOps.apply_impl`."""
    steps = {"_sum_combine": np.add, "_prod_combine": np.multiply}

    @functools.wraps(method)
    def wrapped(self: Any, inputs: Any) -> Any:
        value = inputs[0]
        _refuse_fp8(value)
        found = [op for name, op in steps.items() if self.combine_fn is getattr(tl.standard, name)]
        if value.dtype.scalar != tl.bfloat16 or not found:
            return method(self, inputs)
        data = np.moveaxis(_floats(value), self.axis, 0)
        data = data[::-1].copy() if self.reverse else data.copy()
        for at in range(1, len(data)):
            data[at] = _round(found[0](data[at - 1], data[at]), tl.bfloat16)
        data = data[::-1] if self.reverse else data
        return [_tensor(np.ascontiguousarray(np.moveaxis(data, 0, self.axis)), tl.bfloat16)]

    return wrapped
