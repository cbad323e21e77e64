"""Make Triton's CPU interpreter right for bfloat16 and fp8.

The interpreter keeps a bfloat16 number as its 16 bits in an unsigned integer and then adds,
multiplies and compares these integers; its casts to narrow formats truncate, or round away from the
even neighbour. `install` replaces both: an operation on bfloat16 operands is done in float32 and
rounded once, to nearest even, and a cast is the one that torch does. The tests hold it to torch bit
for bit, and tell when Triton itself becomes right.

Nothing here concerns the compiled path.
"""

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    bits = np.array(data, copy=True, order="C").view(f"i{dtype.primitive_bitwidth // 8}")
    if dtype.primitive_bitwidth == 8:
        bits = bits.view(np.uint8)
    return torch.from_numpy(bits).view(_TORCH[dtype])


def _to_bits(x: torch.Tensor, dtype: tl.dtype) -> np.ndarray:
    width = dtype.primitive_bitwidth
    return x.contiguous().view(_BITS[width]).numpy().view(f"u{width // 8}")


def _round(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Return the bits of `data` in another format, to nearest even; fp8 saturates, as on a GPU."""
    data = np.asarray(data)
    x = _to_torch(data, source)
    if target.primitive_bitwidth == 8:
        limit = torch.finfo(_TORCH[target]).max
        x = x.float().clamp(-limit, limit)  # NaN stays NaN
    return _to_bits(x.to(_TORCH[target]), target).reshape(data.shape)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bf16(value):
        return value
    bits = np.asarray(value.data).astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(value: Any) -> Any:
    if value.data.dtype != np.float32:  # a comparison gives booleans
        return value
    return interpreter.TensorHandle(_round(value.data, tl.float32, tl.bfloat16), tl.bfloat16)


def _in_float32(method: Any, *, narrow: bool) -> Any:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any) -> Any:
        if not any(_is_bf16(arg) for arg in args):
            return method(self, *args)
        result = method(self, *[_widen(arg) for arg in args])
        return _narrow(result) if narrow else result

    return wrapped


def install() -> None:
    """Correct the interpreter in this process; a second call does nothing."""
    if getattr(interpreter, "_mdproof_installed", False):
        return
    original = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source in _TORCH and target in _TORCH:
            return _round(data, source, target)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float
    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(builder, name, _in_float32(getattr(builder, name), narrow=True))
    builder.create_dot = _in_float32(builder.create_dot, narrow=False)
    interpreter._mdproof_installed = True
