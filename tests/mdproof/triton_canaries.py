"""Small kernels, some of them wrong on purpose, for the tests of `mdproof.triton`."""

import triton
import triton.language as tl


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
