"""Softmax over the last axis in one kernel. Reference: `softmax_cross_entropy.softmax`.

A row that fits into a tile is read once and written once. A longer row is read twice: the first
sweep keeps the largest exponent and the sum relative to it, tile by tile, and never writes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _softmax_row_kernel(x_ptr, p_ptr, x_stride, C, BLOCK: tl.constexpr):
    # One program: one row, all of it in registers.
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_x = tl.load(x_ptr + row * x_stride + o_c, mask=m_c, other=-float("inf"))
    b_x = b_x.to(tl.float32)  # [BLOCK]
    base = tl.max(b_x, 0)
    base = tl.where(base == -float("inf"), 0.0, base)  # a row without finite scores gives NaN
    b_e = tl.exp(b_x - base)
    tl.store(p_ptr + row * C + o_c, b_e / tl.sum(b_e, 0), mask=m_c)  # (eq:triton-softmax)


@triton.jit
def _softmax_online_kernel(x_ptr, p_ptr, x_stride, C, BLOCK: tl.constexpr):
    # One program: one row, a tile at a time; each lane merges the columns that it meets.
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    b_m = tl.full([BLOCK], -float("inf"), tl.float32)
    b_z = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + o_c, mask=o_c < C, other=-float("inf")).to(tl.float32)  # [BLOCK]
        b_new = tl.maximum(b_m, b_x)
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_z = b_z * tl.exp(b_m - b_base) + tl.exp(b_x - b_base)  # (eq:triton-online)
        b_m = b_new
    base = tl.max(b_m, 0)
    base = tl.where(base == -float("inf"), 0.0, base)
    z = tl.sum(b_z * tl.exp(b_m - base), 0)
    for start in range(0, C, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        b_x = tl.load(x_ptr + o_c, mask=o_c < C, other=-float("inf")).to(tl.float32)
        tl.store(p_ptr + row * C + o_c, tl.exp(b_x - base) / z, mask=o_c < C)


@triton.jit
def _softmax_backward_row_kernel(dp_ptr, p_ptr, dx_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_p = tl.load(p_ptr + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK]
    b_dp = tl.load(dp_ptr + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)  # [BLOCK]
    delta = tl.sum(b_p * b_dp, 0)
    tl.store(dx_ptr + row * C + o_c, b_p * (b_dp - delta), mask=m_c)  # (eq:triton-backward)


@triton.jit
def _softmax_backward_loop_kernel(dp_ptr, p_ptr, dx_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        b_p = tl.load(p_ptr + row * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)  # [BLOCK]
        b_dp = tl.load(dp_ptr + row * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_sum += b_p * b_dp
    delta = tl.sum(b_sum, 0)
    for start in range(0, C, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        b_p = tl.load(p_ptr + row * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_dp = tl.load(dp_ptr + row * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * C + o_c, b_p * (b_dp - delta), mask=o_c < C)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _tile(n_columns: int) -> tuple[bool, int, int]:
    """Return whether a row fits into one tile, the tile's length, and the warps of a program."""
    fits = n_columns <= 16_384  # 32 numbers a thread of 16 warps; backward holds two rows
    block = triton.next_power_of_2(n_columns) if fits else 4096
    return fits, block, min(max(block // 512, 4), 16)


def _forward(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    fits, block, num_warps = _tile(x.shape[1])
    kernel = _softmax_row_kernel if fits else _softmax_online_kernel
    if out.numel():
        with torch.cuda.device_of(x):
            kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=block, num_warps=num_warps)
    return out


def _backward(dp: Tensor, p: Tensor) -> Tensor:
    dx = torch.empty_like(p)
    fits, block, num_warps = _tile(p.shape[1])
    kernel = _softmax_backward_row_kernel if fits else _softmax_backward_loop_kernel
    if dx.numel():
        with torch.cuda.device_of(p):
            kernel[(p.shape[0],)](
                dp.contiguous(), p, dx, p.shape[1], BLOCK=block, num_warps=num_warps
            )
    return dx


class _FusedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = _forward(x)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> Tensor:
        return _backward(dp, *ctx.saved_tensors)


def fused_softmax(x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
    r"""Do what `softmax_cross_entropy.softmax` does at temperature 1, with less traffic.

    The input is read once if C is at most 16,384, twice if it is more; the output is written once.
    Sums are in float32, whatever the dtype.

    Args:
        x: Scores in float32, float16 or bfloat16, with at least one axis.

    Returns:
        Probabilities in the dtype of x. A row with no score above $-\infty$ is NaN, as in PyTorch.

    Raises:
        ValueError: If x has no axis or another dtype, or if there is neither a GPU nor the
            interpreter.

    Reference:
        Milakov & Gimelshein (2018), arXiv:1805.02867, Algorithm 3: the first sweep over a long row.
    """
    if x.ndim == 0:
        raise ValueError("x has no axis: softmax needs a row.")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be float32, float16 or bfloat16.")
    if not x.is_cuda and isinstance(_softmax_row_kernel, triton.JITFunction):
        remedy = "without a GPU set TRITON_INTERPRET=1 before importing this module"
        raise ValueError(f"x is on {x.device}; {remedy}.")
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, max(x.shape[-1], 1))
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return _FusedSoftmax.apply(rows).reshape(x.shape)
