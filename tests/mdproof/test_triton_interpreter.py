"""The corrected interpreter gives torch's bits; when Triton itself does, a test here says so."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from tests.closeness import relative_error
from tests.mdproof import triton_canaries as kernels

from mdproof.triton.launches import record

InterpreterError = triton.runtime.errors.InterpreterError

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


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, BF16]


def every(dtype: torch.dtype) -> torch.Tensor:
    """Return every bit pattern of a narrow format, infinities and NaNs too."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def cast_by_kernel(x: torch.Tensor, target: torch.dtype, kernel=kernels.cast) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=target)
    extra = () if kernel is kernels.cast_toward_zero else (x.numel(),)
    kernel[(x.numel() // 256,)](x, y, *extra, BLOCK=256)
    return y


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare bits; a NaN is a NaN, whatever its payload."""
    assert actual.dtype == expected.dtype
    nan = expected.double().isnan()
    assert torch.equal(actual.double().isnan(), nan)
    bits = f"int{8 * actual.itemsize}"
    bits = torch.uint8 if actual.itemsize == 1 else getattr(torch, bits)
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("target", [*NARROW, torch.float32])
@pytest.mark.parametrize("source", NARROW)
def test_every_bit_pattern_is_cast_as_torch_casts_it(source, target):
    x = every(source)
    saturated = x
    if target.itemsize == 1 and source != target:
        limit = torch.finfo(target).max
        saturated = x.float().clamp(-limit, limit)
    assert_same_bits(cast_by_kernel(x, target), saturated.to(target))


def nearest_even(x: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Round by looking for the nearest of all numbers of a format; no cast takes part."""
    numbers = every(target).double()
    positive = numbers[numbers.isfinite() & ~torch.signbit(numbers)].sort().values
    size = x.double().abs()
    above = torch.searchsorted(positive, size.contiguous()).clamp(1, len(positive) - 1)
    below = above - 1
    low, high = size - positive[below], positive[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))  # bits and numbers have one order
    result = positive[torch.where(up, above, below)]
    step = positive[-1] - positive[-2]
    if target.itemsize > 1:
        result = torch.where(size >= positive[-1] + step / 2, torch.inf, result)
    return torch.where(x.double().isnan(), torch.nan, torch.copysign(result, x.double()))


@pytest.mark.parametrize("target", NARROW)
def test_float32_goes_to_the_nearest_number_and_a_tie_to_the_even_one(target):
    numbers = every(target).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:].double() + numbers[:-1].double()) / 2  # the ties, and their neighbours
    tie = between.float()
    inf = torch.tensor(torch.inf)
    x = torch.cat([numbers, tie, tie.nextafter(inf), tie.nextafter(-inf)])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38])])
    x = torch.cat([x, x.new_zeros(-len(x) % 256)])
    actual = cast_by_kernel(x, target).double()
    torch.testing.assert_close(actual, nearest_even(x, target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [torch.float16, BF16])
def test_rounding_toward_zero_never_grows(target):
    x = values(256 * 64, torch.float32, scale=1e3, limit=6e4)
    actual = cast_by_kernel(x, target, kernels.cast_toward_zero).double()
    nearest = x.to(target)
    too_far = nearest.double().abs() > x.double().abs()
    steps = nearest.view(torch.int16) - too_far.to(torch.int16)
    assert too_far.any()
    assert torch.equal(actual, steps.view(target).double())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers_become_bfloat16_rounded_once_and_come_back_truncated(dtype):
    x = torch.arange(-(2**14), 2**14).to(dtype)
    x[:4] = torch.tensor([2**24 + 2**16 + 1, 127, -128, 0]).to(dtype)  # one above a tie
    assert_same_bits(cast_by_kernel(x, BF16), nearest_even(x, BF16).to(BF16))
    y = every(BF16).float().clamp(-100, 100).nan_to_num().to(BF16)
    assert torch.equal(cast_by_kernel(y, dtype), y.float().trunc().to(dtype))


@pytest.mark.parametrize("op", ["add", "mul", "div"])
def test_arithmetic_on_every_bfloat16_is_torchs(op):
    x = every(BF16)
    y = x.roll(12_345)
    out = torch.empty_like(x)
    kernels.binary[(256,)](x, y, out, OP=op, BLOCK=256)
    assert_same_bits(out, {"add": x + y, "mul": x * y, "div": x / y}[op])


def test_a_choice_between_bfloat16_moves_bits():
    x = every(BF16)
    y = x.roll(1)
    out = torch.empty_like(x)
    kernels.binary[(256,)](x, y, out, OP="where", BLOCK=256)
    expected = torch.where(torch.arange(len(x)) % 2 == 0, x.view(torch.int16), y.view(torch.int16))
    assert torch.equal(out.view(torch.int16), expected)


def test_a_fused_multiply_add_of_bfloat16_rounds_once():
    x = every(BF16)
    size = x.float().abs()
    x = torch.where((size < 2.0**40) & (size > 2.0**-40), x, 1)
    y = x.roll(7)
    # 1.0625 squared is a tie between two bfloat16; what is far below float32 decides it
    x[:4] = torch.tensor([1.0625, 2.0**-100, 1.0625, -(2.0**-100)], dtype=BF16)
    y[:4] = 1.0625
    out = torch.empty_like(x)
    kernels.binary[(256,)](x, y, out, OP="fma", BLOCK=256)
    assert out[:3:2].tolist() == [1.1328125, 1.125]
    added = x.reshape(-1, 2).flip(1).reshape(-1)
    for a, b, c, result in zip(*(z.tolist() for z in (x, y, added, out)), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        quantum = Fraction(2) ** (math.frexp(float(exact))[1] - 8)
        assert Fraction(result) == round(exact / quantum) * quantum  # halves go to the even


def tree(x: torch.Tensor) -> torch.Tensor:
    """Add halves until one number is left, in the dtype of x."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x[..., 0]


def steps(x: torch.Tensor, op) -> torch.Tensor:
    out = [x[0]]
    for value in x[1:]:
        out.append(op(out[-1], value))
    return torch.stack(out)


REDUCTIONS = {
    "sum": tree,
    "sum of rows": lambda x: tree(x.reshape(4, -1)),
    "argmax": lambda x: x.argmax().int(),
    "argmin": lambda x: x.argmin().int(),
    "max": lambda x: x.max(),
    "cumsum": lambda x: steps(x, torch.add),
    "cumsum from behind": lambda x: steps(x.flip(0), torch.add).flip(0),
    "cumprod": lambda x: steps(x, torch.mul),
    "sort": lambda x: x.sort().values,
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_of_half_precision_round_at_each_step(op, dtype):
    x = torch.randn(128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = REDUCTIONS[op](x)
    out = torch.zeros(expected.shape or (1,), dtype=expected.dtype)
    kernels.reduction[(1,)](x, out, OP=op, BLOCK=128)
    assert torch.equal(out.reshape(expected.shape), expected)


@pytest.mark.parametrize("op", ["sum", "argmax", "cumsum"])
def test_a_reduction_of_fp8_is_refused(op):
    x = torch.ones(128).to(torch.float8_e5m2)
    message = r"a reduction of fp8e5: GPUs have none; convert with \.to\(tl\.float32\)\."
    with pytest.raises(InterpreterError, match=message):
        kernels.reduction[(1,)](x, x.clone(), OP=op, BLOCK=128)


def test_a_sum_in_bfloat16_loses_what_a_gpu_loses():
    x = torch.full((128,), 0.5, dtype=BF16)
    x[0] = 256  # the next bfloat16 is 258
    out = torch.zeros(1, dtype=BF16)
    kernels.reduction[(1,)](x, out, OP="sum", BLOCK=128)
    assert (out.item(), x.double().sum().item()) == (318.0, 319.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_arithmetic_on_fp8_is_refused_as_the_compiler_refuses_it(dtype, compiled):
    x = torch.ones(256).to(dtype)
    name = {torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}[dtype]
    message = rf"arithmetic on {name}: GPUs have none; convert with \.to\(tl\.float32\) first\."
    with record() as launches, pytest.raises(InterpreterError, match=message):
        kernels.binary[(1,)](x, x, x.clone(), OP="add", BLOCK=256)
    assert compiled(launches, capabilities=(90,))[0]["error"]


@pytest.mark.parametrize(
    ("kernel", "source", "how"),
    [
        (kernels.cast_toward_zero, torch.float32, "fp32 to fp8e4nv, rounded toward zero"),
        (kernels.cast, torch.float64, "fp64 to fp8e4nv"),
    ],
)
def test_a_cast_that_no_gpu_has_is_refused(kernel, source, how):
    message = rf"a cast of {how}: GPUs have float32 to fp8, to nearest, only\."
    with pytest.raises(InterpreterError, match=message):
        cast_by_kernel(torch.ones(256, dtype=source), torch.float8_e4m3fn, kernel)


UNARY = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "sin": torch.sin,
    "cos": torch.cos, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "erf": torch.erf,
    "floor": torch.floor, "ceil": torch.ceil, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "log1p": torch.log1p,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", UNARY)
def test_elementary_functions_are_those_of_torch(op, dtype):
    x = torch.linspace(-30, 90, 256, dtype=dtype)
    x[:4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    out = torch.empty_like(x)
    kernels.unary[(1,)](x, out, OP=op, BLOCK=256)  # no warning of numpy becomes an error here
    torch.testing.assert_close(out, UNARY[op](x), equal_nan=True)


@pytest.mark.parametrize("op", ["exp", "sqrt", "sin", "floor"])
def test_elementary_functions_of_bfloat16_are_refused_by_triton_itself(op):
    x = torch.ones(256, dtype=BF16)
    with pytest.raises(InterpreterError, match="Expected dtype \\['fp32', 'fp64'\\] but got bf16"):
        kernels.unary[(1,)](x, x.clone(), OP=op, BLOCK=256)


def test_what_only_a_gpu_can_do_is_named():
    x = torch.ones(256)
    message = r"libdevice function __nv_y0f cannot be interpreted; such a kernel runs on a GPU only"
    with pytest.raises(InterpreterError, match=message):
        kernels.unary[(1,)](x, x.clone(), OP="y0", BLOCK=256)
    x = torch.ones(256, dtype=torch.int32)
    message = r"inline assembly cannot be interpreted; such a kernel runs on a GPU only"
    with pytest.raises(InterpreterError, match=message):
        kernels.assembly[(1,)](x, x.clone(), BLOCK=256)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_atomic_addition_goes_one_by_one_and_returns_what_was_there(dtype):
    x = values(256, dtype, limit=100.0)
    sums, old = torch.zeros(2, dtype=dtype), torch.empty(256, dtype=dtype)
    kernels.adds_in_place[(1,)](x, sums, old, M=2, BLOCK=256)
    expected = torch.zeros(2, dtype=dtype)
    for i in range(256):
        assert old[i] == expected[i % 2]
        expected[i % 2] += x[i]
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, BF16])
def test_a_product_of_narrow_numbers_is_exact_before_it_is_summed(dtype):
    a, b = (values(1024, torch.float32, limit=4).roll(i).to(dtype).reshape(32, 32) for i in (0, 99))
    c = torch.empty(32, 32)
    kernels.product[(1,)](a, b, c, N=32, PRECISION="ieee", DTYPE=tl.float32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_int8_products_are_summed_in_int32():
    a = torch.randint(-128, 128, (32, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    c = torch.empty(32, 32, dtype=torch.int32)
    kernels.product[(1,)](a, a, c, N=32, PRECISION="ieee", DTYPE=tl.int32)
    assert torch.equal(c, a.int() @ a.int())


def test_tf32_is_what_tensor_cores_read_of_float32():
    x = values(1024, torch.float32, limit=4).reshape(32, 32)
    results = {}
    for precision in ("ieee", "tf32"):
        c = torch.empty(32, 32)
        kernels.product[(1,)](x, x, c, N=32, PRECISION=precision, DTYPE=tl.float32)
        results[precision] = c
    ten_bits = (x.view(torch.int32) & -0x2000).view(torch.float32)
    exact = {name: z.double() @ z.double() for name, z in (("ieee", x), ("tf32", ten_bits))}
    for name, result in results.items():
        assert relative_error(result, exact[name]) < 1e-6
    assert 1e-5 < relative_error(results["tf32"], exact["ieee"]) < 1e-2


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
