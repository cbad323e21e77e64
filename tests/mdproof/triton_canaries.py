"""Small kernels, some of them wrong on purpose, for the tests of `mdproof.triton`."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def cast(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    tl.store(y_ptr + o, x.to(y_ptr.dtype.element_ty), mask=o < n)


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    m = o < n
    x = tl.load(x_ptr + o, mask=m, other=1.0)
    y = tl.load(y_ptr + o, mask=m, other=1.0)
    tl.store(out_ptr + o, x + y, mask=m)
    tl.store(out_ptr + n + o, x - y, mask=m)
    tl.store(out_ptr + 2 * n + o, x * y, mask=m)
    tl.store(out_ptr + 3 * n + o, tl.maximum(x, y), mask=m)
    tl.store(out_ptr + 4 * n + o, tl.where(x < y, x, y), mask=m)
    tl.store(out_ptr + 5 * n + o, -x, mask=m)
    tl.store(out_ptr + 6 * n + o, tl.abs(x), mask=m)


@triton.jit
def reduce(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.min(x, 0))


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    c = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.store(c_ptr + tile, c)


@triton.jit
def reads_past_the_end(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o), mask=o < n)


@triton.jit
def writes_past_the_end(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n, other=0.0))


@triton.jit
def two_programs_store_one_address(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o % (BLOCK + 3), tl.load(x_ptr + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def reads_what_the_neighbour_stores(x_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + o, tl.load(x_ptr + (o + BLOCK) % (2 * BLOCK)))


@triton.jit
def adds_atomically(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + o))


@triton.jit
def cast_toward_zero(x_ptr, y_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + o).to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(y_ptr + o, y)


@triton.jit
def binary(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + o), tl.load(y_ptr + o)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "where":
        z = tl.where(o % 2 == 0, x, y)
    else:
        z = tl.fma(x, y, tl.load(x_ptr + (o ^ 1)))  # the neighbour's x is added
    tl.store(out_ptr + o, z.to(out_ptr.dtype.element_ty))


@triton.jit
def unary(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "exp2":
        y = tl.exp2(x)
    elif OP == "log":
        y = tl.log(x)
    elif OP == "log2":
        y = tl.log2(x)
    elif OP == "sin":
        y = tl.sin(x)
    elif OP == "cos":
        y = tl.cos(x)
    elif OP == "sqrt":
        y = tl.sqrt(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    elif OP == "erf":
        y = tl.erf(x)
    elif OP == "floor":
        y = tl.floor(x)
    elif OP == "ceil":
        y = tl.ceil(x)
    elif OP == "sigmoid":
        y = tl.sigmoid(x)
    elif OP == "tanh":
        y = libdevice.tanh(x)
    elif OP == "log1p":
        y = libdevice.log1p(x)
    else:
        y = libdevice.y0(x)
    tl.store(out_ptr + o, y)


@triton.jit
def assembly(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr + o, y)


@triton.jit
def adds_in_place(x_ptr, y_ptr, old_ptr, M: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    old = tl.atomic_add(y_ptr + o % M, tl.load(x_ptr + o))
    tl.store(old_ptr + o, old)


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    a, b = tl.load(a_ptr + tile), tl.load(b_ptr + tile)
    tl.store(c_ptr + tile, tl.dot(a, b, input_precision=PRECISION, out_dtype=DTYPE))


@triton.jit
def copies_rows(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + r * stride + c, mask=c < n, other=0.0)
    tl.store(y_ptr + r * n + c, x, mask=c < n)


@triton.jit
def differences(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(x_ptr + o, mask=o < n, other=0.0)
    before = tl.load(x_ptr + o - 1, mask=(o < n) & (o > 0), other=0.0)
    tl.store(y_ptr + o, here - before, mask=o < n)


@triton.jit
def copies_by_descriptor(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    at = [tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK]
    y.store(at, x.load(at))


@triton.jit
def histogram(x_ptr, count_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(count_ptr + x % n, 1)


@triton.jit
def last_program_adds_up(x_ptr, part_ptr, out_ptr, count_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK)), 0)
    tl.store(part_ptr + pid, total)
    done = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        parts = tl.load(part_ptr + tl.arange(0, 4))
        tl.store(out_ptr, tl.sum(parts, 0))


@triton.jit
def adds_under_a_lock(x_ptr, y_ptr, lock_ptr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + c)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(y_ptr + c, tl.load(y_ptr + c) + x)
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def softmax(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    pid, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid * n + c, mask=c < n, other=-float("inf"))
    z = tl.exp(x - tl.max(x, 0))
    y = z / tl.sum(z, 0)
    tl.store(y_ptr + pid * n + c, y, mask=c < n)


@triton.jit
def by_table(table_ptr, y_ptr, BLOCK: tl.constexpr):
    i, c = tl.program_id(0), tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr + i).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + i * 8 + c, tl.load(x_ptr + c))


@triton.jit
def the_first_program_looks_ahead(x_ptr, BLOCK: tl.constexpr):
    pid, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid * BLOCK + c)
    if pid == 0:
        x += tl.load(x_ptr + BLOCK + c)
    tl.store(x_ptr + pid * BLOCK + c, x)


@triton.jit
def wide_tile(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(y_ptr + tile, tl.dot(x, x) + tl.trans(x))


@triton.jit
def scaled_product(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k, g = tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    a = tl.load(a_ptr + n[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    a_scale = tl.load(a_scale_ptr + n[:, None] * (K // 32) + g[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + g[None, :])
    c = tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3")
    tl.store(c_ptr + n[:, None] * N + n[None, :], c)


@triton.jit
def reduction(x_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    if OP == "sum":
        tl.store(y_ptr, tl.sum(x, 0))
    elif OP == "sum of rows":
        tl.store(y_ptr + tl.arange(0, 4), tl.sum(tl.reshape(x, [4, BLOCK // 4]), 1))
    elif OP == "argmax":
        tl.store(y_ptr, tl.argmax(x, 0))
    elif OP == "argmin":
        tl.store(y_ptr, tl.argmin(x, 0))
    elif OP == "max":
        tl.store(y_ptr, tl.max(x, 0))
    elif OP == "cumsum":
        tl.store(y_ptr + o, tl.cumsum(x, 0))
    elif OP == "cumsum from behind":
        tl.store(y_ptr + o, tl.cumsum(x, 0, reverse=True))
    elif OP == "cumprod":
        tl.store(y_ptr + o, tl.cumprod(x, 0))
    else:
        tl.store(y_ptr + o, tl.sort(x))
