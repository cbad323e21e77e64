"""Record which kernels were launched, with which types and compile-time values, as plain JSON.

The interpreter runs a kernel without compiling it. What it was launched with is all that a compiler
needs, so a recorded launch can be compiled for GPUs that are not here (`mdproof.triton.compiling`):

    with record() as launches:
        my_function(x)
    reports = compile_launches(launches)
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from mdproof.triton.interpreter import installed

_DTYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_OPTIONS = {"num_warps": 4, "num_stages": 3}
_RARE_OPTIONS = ("num_ctas", "maxnreg")

Launch = dict[str, Any]


def _constant(value: Any, name: str) -> Any:
    value = getattr(value, "value", value) if isinstance(value, tl.constexpr) else value
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{name} is {type(value).__name__}; a compile-time value is a number, text or None."
    )


def _describe(value: Any, name: str, *, specialise: bool) -> tuple[str, Any]:
    """Return type and compile-time value, or whether 16 divides it, as Triton's launcher does."""
    if isinstance(value, torch.Tensor):
        return f"*{_DTYPES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1 and specialise:
            return "constexpr", 1
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, specialise and value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value is None:
        return "constexpr", None
    raise ValueError(f"{name} is {type(value).__name__}; only tensors and numbers can be recorded.")


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Return one launch as JSON: the kernel, its signature, its constants, its options."""
    function = kernel.fn
    given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    arguments = inspect.getcallargs(function, *args, **given)
    unspecialised = set(getattr(kernel, "kwargs", {}).get("do_not_specialize") or ())
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if "constexpr" in str(function.__annotations__.get(name, "")):
            signature[name], constants[name] = "constexpr", _constant(value, name)
            continue
        specialise = name not in unspecialised and index not in unspecialised
        signature[name], extra = _describe(value, name, specialise=specialise)
        if signature[name] == "constexpr":
            constants[name] = extra
        elif extra:
            divisible.append(name)
    return {
        "kernel": f"{function.__module__}:{function.__qualname__}",
        "signature": signature,
        "constants": constants,
        "divisible_by_16": divisible,
        **{name: kwargs.get(name, default) for name, default in _OPTIONS.items()},
        **{name: kwargs[name] for name in _RARE_OPTIONS if kwargs.get(name) is not None},
    }


_UNCORRECTED = ("get_bf16_ty", "get_fp8e4nv_ty", "get_fp8e5_ty")


def _refuse(what: str) -> None:
    raise RuntimeError(
        f"{what}: Triton's own interpreter gets it wrong. "
        "Call mdproof.triton.interpreter.install() before the launch."
    )


@contextlib.contextmanager
def _only_what_is_right() -> Iterator[None]:
    """Refuse a kernel that names bfloat16 or fp8 as long as the interpreter is uncorrected."""
    builder = interpreter.InterpreterBuilder
    originals = {name: getattr(builder, name) for name in _UNCORRECTED}

    def refusing(name: str) -> Any:
        def get_type(self: Any) -> Any:
            if not installed():
                _refuse(f"the kernel converts to {name[4:-3]}")
            return originals[name](self)

        return get_type

    try:
        for name in _UNCORRECTED:
            setattr(builder, name, refusing(name))
        yield
    finally:
        for name, method in originals.items():
            setattr(builder, name, method)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect every different launch that the interpreter runs in this context.

    A launch that the interpreter would get wrong, with bfloat16 or fp8 and without the corrections
    of `mdproof.triton.interpreter`, raises RuntimeError.

    Yields:
        The list of launches in order of first use, JSON-serialisable.
    """
    launches: list[Launch] = []
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launch = describe(self, args, kwargs)
        narrow = [t for t in launch["signature"].values() if t in ("*bf16", "*fp8e4nv", "*fp8e5")]
        if narrow and not installed():
            _refuse(f"the kernel takes {narrow[0][1:]}")
        if launch not in launches:
            launches.append(launch)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    try:
        InterpretedFunction.run = recording
        with _only_what_is_right():
            yield launches
    finally:
        InterpretedFunction.run = run
