"""Make Triton's CPU interpreter right for bfloat16, fp8 and tf32.

The interpreter keeps a bfloat16 number as its 16 bits in an unsigned integer and then adds,
multiplies and compares these integers; a cast between it and an integer moves bits; its casts to
narrow formats truncate, or round away from the even neighbour; a float32 product that a tensor core
takes as tf32 is exact. `install` replaces all of this:

- an operation on bfloat16 operands is done in float32 and rounded once, to nearest even;
- a cast is the one that torch does, and the one toward zero where the kernel asks for it; fp8
  saturates, as the hardware's `cvt.rn.satfinite` does;
- `tl.dot` with `input_precision="tf32"`, the default for float32, sees 10 bits of each mantissa;
- what overflows becomes an infinity without a warning of numpy;
- sums, scans and extrema of bfloat16 and float16 round at each step (`mdproof.triton.reductions`);
- elementwise functions of libdevice are torch's functions of the same name;
- what a GPU cannot do either (arithmetic on fp8 before a cast, float64 to fp8) is refused instead
  of being done on bits, and so is what only a GPU can do (inline assembly).

The tests hold it to torch over every bit pattern of the narrow formats, and tell when Triton itself
becomes right. Nothing here concerns the compiled path.
"""

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter

from mdproof.triton import reductions
from mdproof.triton.formats import (
    AS_BITS,
    TORCH,
    fma_bf16,
    is_of,
    narrow,
    round_bits,
    round_to_odd,
    to_bits,
    to_torch,
    widen,
)


def _truncate_to_tf32(value: Any) -> Any:
    """Drop the 13 bits of a float32 mantissa that a tensor core does not read."""
    bits = np.asarray(value.data, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _arithmetic(method: Any) -> Any:
    """Do an operation on bfloat16 in float32, and refuse it on fp8."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any) -> Any:
        if args[-1] is np.where:  # a choice moves bits
            return method(self, *args)
        for arg in args:
            if is_of(arg, tl.float8e4nv, tl.float8e5):
                name = arg.dtype.scalar.name
                raise TypeError(
                    f"arithmetic on {name}: GPUs have none; convert with .to(tl.float32) first."
                )
        if not any(is_of(arg, tl.bfloat16) for arg in args):
            return method(self, *args)
        return narrow(method(self, *[widen(arg) for arg in args]))

    return wrapped


def _fma(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any) -> Any:
        if not all(is_of(arg, tl.bfloat16) for arg in args):
            return method(self, *args)
        x, y, z = np.broadcast_arrays(*(widen(arg).data for arg in args))
        return narrow(interpreter.TensorHandle(fma_bf16(x, y, z), tl.float32))

    return wrapped


def _dot(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b = widen(a), widen(b)
        both = a.data.dtype == b.data.dtype == np.float32
        if both and precision == ir.INPUT_PRECISION.TF32 and is_of(a, tl.float32):
            a, b = _truncate_to_tf32(a), _truncate_to_tf32(b)
        if is_of(d, tl.bfloat16):
            return narrow(method(self, a, b, widen(d), precision, *rest))
        return method(self, a, b, d, precision, *rest)

    return wrapped


def _cast(method: Any) -> Any:
    """Cast between all formats that torch has; integers to and from those that numpy lacks."""

    @functools.wraps(method)
    def wrapped(self: Any, value: Any, dtype: Any) -> Any:
        source, target = value.dtype.scalar, dtype.scalar
        if source in TORCH and target in TORCH:
            bits = round_bits(value.data, source, target)
        elif target in AS_BITS:  # an integer; below 2^53 it is exact in float64
            x = round_to_odd(np.asarray(value.data, np.float64))
            bits = round_bits(x, tl.float32, target)
        else:
            if source in AS_BITS:
                wide = round_bits(value.data, source, tl.float32).view(np.float32)
                value = interpreter.TensorHandle(wide, tl.float32)
            with np.errstate(all="ignore"):
                return method(self, value, dtype)
        return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(target)), target)

    return wrapped


def _atomic(method: Any) -> Any:
    """Add to bfloat16 in memory one element after the other: a block may name an address twice."""

    @functools.wraps(method)
    def wrapped(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if not is_of(value, tl.bfloat16) or op == ir.ATOMIC_OP.XCHG:
            return method(self, op, ptr, value, mask, *rest)
        pointers, bits, keep = np.broadcast_arrays(ptr.data, value.data, mask.data)
        before = np.zeros(pointers.shape, np.uint16)
        for at in np.ndindex(pointers.shape):
            if not keep[at]:
                continue
            address, yes = pointers[at].reshape(1), np.ones(1, bool)
            old = interpreter._interpreter.load(address, yes, np.zeros(1, np.uint16), np.uint16)
            handles = [interpreter.TensorHandle(x, tl.bfloat16) for x in (old, bits[at].reshape(1))]
            new = self.create_fadd(*handles).data.astype(np.uint16)
            interpreter._interpreter.store(address, new, yes)
            before[at] = old[0]
        return interpreter.TensorHandle(before, tl.bfloat16)

    return wrapped


def _no_inline_assembly(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "inline assembly cannot be interpreted; such a kernel runs on a GPU only."
    )


def _libdevice(
    library: str, path: str, args: Any, symbols: Any, is_pure: bool, _semantic: Any = None
) -> Any:
    """Do what `tl.core.extern_elementwise` does, with torch's function of the same name."""
    semantic = interpreter.interpreter_semantic
    tensors = [semantic.to_tensor(arg) for arg in args]
    dtypes = tuple(x.dtype for x in tensors)
    symbol, result = symbols.get(dtypes, ("", None))
    name = symbol.removeprefix("__nv_")
    function = next(
        (getattr(torch, n) for n in (name, name.removesuffix("f")) if n and hasattr(torch, n)), None
    )
    if function is None or result not in TORCH or not all(d in TORCH for d in dtypes):
        shown = symbol or f"of {', '.join(d.name for d in dtypes)}"
        raise NotImplementedError(
            f"libdevice function {shown} cannot be interpreted; such a kernel runs on a GPU only."
        )
    arrays = np.broadcast_arrays(*(x.handle.data for x in tensors))
    out = function(*(to_torch(a, d) for a, d in zip(arrays, dtypes, strict=True)))
    bits = to_bits(out.to(TORCH[result]), result).view(interpreter._get_np_dtype(result))
    kind = tl.block_type(result, list(bits.shape)) if tensors[0].type.is_block() else result
    return tl.tensor(interpreter.TensorHandle(bits, result), kind)


def _with_semantic(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args, _semantic=interpreter.interpreter_semantic)

    return wrapped


def _without_warnings(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return method(self, *args, **kwargs)

    return wrapped


def installed() -> bool:
    """Tell whether the interpreter of this process is corrected."""
    return getattr(interpreter, "_mdproof_installed", False)


def install() -> None:
    """Correct the interpreter in this process; a second call does nothing."""
    if installed():
        return
    original = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source in TORCH and target in TORCH:
            toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
            if target.primitive_bitwidth == 8 and (toward_zero or source == tl.float64):
                how = f"{source.name} to {target.name}" + ", rounded toward zero" * toward_zero
                raise TypeError(f"a cast of {how}: GPUs have float32 to fp8, to nearest, only.")
            return round_bits(data, source, target, toward_zero=toward_zero)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float
    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _arithmetic(getattr(builder, name)))
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fma = _fma(_arithmetic(builder.create_fma))
    builder.create_dot = _dot(builder.create_dot)
    builder.create_atomic_rmw = _atomic(builder.create_atomic_rmw)
    builder.create_inline_asm = _no_inline_assembly
    tl.core.extern_elementwise = _libdevice
    for name, function in vars(cuda_libdevice).items():
        if tl.core.is_builtin(function) and hasattr(libdevice, name):
            setattr(libdevice, name, _with_semantic(function))  # a stub that returns None
    interpreter.ReduceOps.apply_impl = reductions.reduce(interpreter.ReduceOps.apply_impl)
    interpreter.ScanOps.apply_impl = reductions.scan(interpreter.ScanOps.apply_impl)
    executor = interpreter.GridExecutor
    executor.__call__ = _without_warnings(executor.__call__)
    interpreter._mdproof_installed = True
