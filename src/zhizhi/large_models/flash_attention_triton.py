"""Attention that never writes a score to global memory, forward and backward.

Reference: `attention.grouped_query_attention`. The forward pass reads each key once for every tile
of queries; the backward pass recomputes the probabilities, and each program owns what it writes, so
there are no atomics and two runs agree bit for bit.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit(do_not_specialize=["T", "S", "H", "P"])
def _flash_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g,
    v_stride_b, v_stride_s, v_stride_g, T, S, H, P, scale,
    DH: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_T queries of one head. Scores are in units of log 2, so that e^x is exp2.
    n_t = tl.cdiv(T, BLOCK_T)
    pid_t = n_t - 1 - tl.program_id(0) % n_t  # the last tile has the most keys: begin with it
    pid_h = (tl.program_id(0) // n_t % H).to(tl.int64)
    pid_b = (tl.program_id(0) // n_t // H).to(tl.int64)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d, o_e = tl.arange(0, DH), tl.arange(0, DV)
    m_t = o_t < T
    q_ptr += pid_b * q_stride_b + pid_h * q_stride_h
    k_ptr += pid_b * k_stride_b + pid_h // P * k_stride_g
    v_ptr += pid_b * v_stride_b + pid_h // P * v_stride_g
    q_tile = o_t[:, None].to(tl.int64) * q_stride_t
    b_q = tl.load(q_ptr + q_tile + o_d[None, :], mask=m_t[:, None], other=0.0)
    b_m = tl.full([BLOCK_T], -float("inf"), tl.float32)
    b_d = tl.zeros([BLOCK_T], tl.float32)
    b_o = tl.zeros([BLOCK_T, DV], tl.float32)

    # Keys before `full` are visible to the whole tile; from there to `end` a mask is needed.
    full, end = S // BLOCK_S * BLOCK_S, S
    if IS_CAUSAL:
        first = pid_t * BLOCK_T + S - T  # the last key that the first query reads
        full = tl.maximum(tl.minimum(S, first + 1), 0) // BLOCK_S * BLOCK_S
        end = tl.minimum(S, first + BLOCK_T)
    for IS_MASKED in tl.static_range(0, 2):
        for s in range(full if IS_MASKED else 0, end if IS_MASKED else full, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)
            m_s = o_s < S if IS_MASKED else tl.full([BLOCK_S], True, tl.int1)
            k_tile = o_s[:, None].to(tl.int64) * k_stride_s
            v_tile = o_s[:, None].to(tl.int64) * v_stride_s
            b_k = tl.load(k_ptr + k_tile + o_d[None, :], mask=m_s[:, None], other=0.0)
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            if IS_MASKED:
                keep = m_s[None, :]
                if IS_CAUSAL:
                    keep = keep & (o_s[None, :] <= o_t[:, None] + (S - T))
                b_x = tl.where(keep, b_x, -float("inf"))
            b_m_new = tl.maximum(b_m, tl.max(b_x, 1) * scale)
            b_base = tl.where(b_m_new == -float("inf"), 0.0, b_m_new)  # no key visible so far
            b_p = tl.exp2(b_x * scale - b_base[:, None])
            b_old = tl.exp2(b_m - b_base)
            b_d = b_d * b_old + tl.sum(b_p, 1)  # (eq:flash-merge)
            b_v = tl.load(v_ptr + v_tile + o_e[None, :], mask=m_s[:, None], other=0.0)
            b_o = b_o * b_old[:, None]
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
            b_m = b_m_new

    b_safe = tl.where(b_d == 0.0, 1.0, b_d)  # a query without keys: o = 0, lse = -inf
    rows = (pid_b * T + o_t) * H + pid_h
    b_o = (b_o / b_safe[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + rows[:, None] * DV + o_e[None, :], b_o, mask=m_t[:, None])
    tl.store(lse_ptr + (pid_b * H + pid_h) * T + o_t, b_m + tl.log2(b_safe), mask=m_t)


@triton.jit(do_not_specialize=["T", "H"])
def _flash_delta_kernel(
    o_ptr, do_ptr, delta_ptr, T, H, DV: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    # D = rowsum(dO * O), one number for each query (eq:flash-delta).
    n_t = tl.cdiv(T, BLOCK_T)
    pid_h = (tl.program_id(0) // n_t % H).to(tl.int64)
    pid_b = (tl.program_id(0) // n_t // H).to(tl.int64)
    o_t = tl.program_id(0) % n_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, DV)
    m_t = o_t < T
    tile = ((pid_b * T + o_t) * H + pid_h)[:, None] * DV + o_e[None, :]
    b_o = tl.load(o_ptr + tile, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BLOCK_T, DV]
    b_do = tl.load(do_ptr + tile, mask=m_t[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + (pid_b * H + pid_h) * T + o_t, tl.sum(b_o * b_do, 1), mask=m_t)


@triton.jit(do_not_specialize=["T", "S", "G", "P"])
def _flash_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g,
    v_stride_b, v_stride_s, v_stride_g, T, S, G, P, scale, d_scale,
    DH: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_S keys of one key head, and all P query heads that read them.
    n_s = tl.cdiv(S, BLOCK_S)
    pid_s = tl.program_id(0) % n_s
    pid_g = (tl.program_id(0) // n_s % G).to(tl.int64)
    pid_b = (tl.program_id(0) // n_s // G).to(tl.int64)
    o_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    o_d, o_e = tl.arange(0, DH), tl.arange(0, DV)
    m_s = o_s < S
    k_ptr += pid_b * k_stride_b + pid_g * k_stride_g
    v_ptr += pid_b * v_stride_b + pid_g * v_stride_g
    b_k = tl.load(
        k_ptr + o_s[:, None].to(tl.int64) * k_stride_s + o_d[None, :], mask=m_s[:, None], other=0.0
    )
    b_v = tl.load(
        v_ptr + o_s[:, None].to(tl.int64) * v_stride_s + o_e[None, :], mask=m_s[:, None], other=0.0
    )
    b_dk = tl.zeros([BLOCK_S, DH], tl.float32)
    b_dv = tl.zeros([BLOCK_S, DV], tl.float32)

    # Queries before `start` see none of these keys, from `full` on they see all of them.
    start, full = 0, 0
    if IS_CAUSAL:
        start = tl.maximum(pid_s * BLOCK_S + T - S, 0) // BLOCK_T * BLOCK_T
        full = tl.cdiv(tl.maximum((pid_s + 1) * BLOCK_S - 1 + T - S, 0), BLOCK_T) * BLOCK_T
    full = tl.where((pid_s + 1) * BLOCK_S > S, tl.cdiv(T, BLOCK_T) * BLOCK_T, full)
    for p in range(P):
        h = pid_g * P + p
        for IS_MASKED in tl.static_range(0, 2):
            stop = tl.minimum(full, T) if IS_MASKED else T
            for t in range(start if IS_MASKED else full, stop, BLOCK_T):
                o_t = t + tl.arange(0, BLOCK_T)
                m_t = o_t < T
                q_tile = (
                    pid_b * q_stride_b + h * q_stride_h + o_t[:, None].to(tl.int64) * q_stride_t
                )
                do_tile = ((pid_b * T + o_t) * G * P + h)[:, None] * DV
                rows = (pid_b * G * P + h) * T + o_t
                b_q = tl.load(q_ptr + q_tile + o_d[None, :], mask=m_t[:, None], other=0.0)
                b_lse = tl.load(lse_ptr + rows, mask=m_t, other=float("inf"))
                b_x = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
                b_x = b_x * scale - b_lse[None, :]
                if IS_MASKED:
                    keep = m_s[:, None]
                    if IS_CAUSAL:
                        keep = keep & (o_s[:, None] <= o_t[None, :] + (S - T))
                    b_x = tl.where(keep, b_x, -float("inf"))
                b_p = tl.exp2(b_x)  # (eq:flash-recompute)
                b_do = tl.load(do_ptr + do_tile + o_e[None, :], mask=m_t[:, None], other=0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                b_delta = tl.load(delta_ptr + rows, mask=m_t, other=0.0)
                b_dx = b_p * (b_dp - b_delta[None, :])  # (eq:flash-dscore)
                b_dk = tl.dot(b_dx.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    rows_s = ((pid_b * S + o_s) * G + pid_g)[:, None]
    b_dk = (b_dk * d_scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + rows_s * DH + o_d[None, :], b_dk, mask=m_s[:, None])
    tl.store(
        dv_ptr + rows_s * DV + o_e[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=m_s[:, None]
    )


@triton.jit(do_not_specialize=["T", "S", "H", "P"])
def _flash_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_s, k_stride_g,
    v_stride_b, v_stride_s, v_stride_g, T, S, H, P, scale, d_scale,
    DH: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_T queries of one head, walking over the keys as the forward pass did.
    n_t = tl.cdiv(T, BLOCK_T)
    pid_t = n_t - 1 - tl.program_id(0) % n_t
    pid_h = (tl.program_id(0) // n_t % H).to(tl.int64)
    pid_b = (tl.program_id(0) // n_t // H).to(tl.int64)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d, o_e = tl.arange(0, DH), tl.arange(0, DV)
    m_t = o_t < T
    q_ptr += pid_b * q_stride_b + pid_h * q_stride_h
    k_ptr += pid_b * k_stride_b + pid_h // P * k_stride_g
    v_ptr += pid_b * v_stride_b + pid_h // P * v_stride_g
    rows_o = ((pid_b * T + o_t) * H + pid_h)[:, None]
    rows = (pid_b * H + pid_h) * T + o_t
    q_tile = o_t[:, None].to(tl.int64) * q_stride_t
    b_q = tl.load(q_ptr + q_tile + o_d[None, :], mask=m_t[:, None], other=0.0)
    b_do = tl.load(do_ptr + rows_o * DV + o_e[None, :], mask=m_t[:, None], other=0.0)
    b_lse = tl.load(lse_ptr + rows, mask=m_t, other=float("inf"))
    b_delta = tl.load(delta_ptr + rows, mask=m_t, other=0.0)
    b_dq = tl.zeros([BLOCK_T, DH], tl.float32)

    full, end = S // BLOCK_S * BLOCK_S, S
    if IS_CAUSAL:
        first = pid_t * BLOCK_T + S - T
        full = tl.maximum(tl.minimum(S, first + 1), 0) // BLOCK_S * BLOCK_S
        end = tl.minimum(S, first + BLOCK_T)
    for IS_MASKED in tl.static_range(0, 2):
        for s in range(full if IS_MASKED else 0, end if IS_MASKED else full, BLOCK_S):
            o_s = s + tl.arange(0, BLOCK_S)
            m_s = o_s < S if IS_MASKED else tl.full([BLOCK_S], True, tl.int1)
            k_tile = o_s[:, None].to(tl.int64) * k_stride_s
            v_tile = o_s[:, None].to(tl.int64) * v_stride_s
            b_k = tl.load(k_ptr + k_tile + o_d[None, :], mask=m_s[:, None], other=0.0)
            b_v = tl.load(v_ptr + v_tile + o_e[None, :], mask=m_s[:, None], other=0.0)
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            b_x = b_x * scale - b_lse[:, None]
            if IS_MASKED:
                keep = m_s[None, :]
                if IS_CAUSAL:
                    keep = keep & (o_s[None, :] <= o_t[:, None] + (S - T))
                b_x = tl.where(keep, b_x, -float("inf"))
            b_p = tl.exp2(b_x)  # (eq:flash-recompute)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_dx = b_p * (b_dp - b_delta[:, None])  # (eq:flash-dscore)
            b_dq = tl.dot(b_dx.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    b_dq = (b_dq * d_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + rows_o * DH + o_d[None, :], b_dq, mask=m_t[:, None])


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Tiles = tuple[int, int, int, int]  # BLOCK_T, BLOCK_S, num_warps, num_stages


def _tiles(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
    """Choose tiles by head width; all of them fit into the shared memory of sm_80, 90 and 100."""
    if dtype == torch.float32:  # no tensor cores: products in float32 by ordinary arithmetic
        return (32, 32, 4, 1) if width > 64 else (64, 32, 4, 2)
    if kernel == "forward":
        return (128, 128, 8, 2) if width > 64 else (128, 64, 4, 3)
    if kernel == "dkdv":
        return 64, 128, 8, 2
    return (128, 64, 8, 2) if width > 64 else (128, 64, 8, 3)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(kernel: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> dict[str, Any]:
    width = max(q.shape[-1], v.shape[-1])
    block_t, block_s, num_warps, num_stages = _tiles(kernel, width, q.dtype)
    strides = {
        f"{name}_stride_{axis}": x.stride(i)
        for name, x, axes in (("q", q, "bth"), ("k", k, "bsg"), ("v", v, "bsg"))
        for i, axis in enumerate(axes)
    }
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, **strides, T=q.shape[1], S=k.shape[1],
        P=q.shape[2] // k.shape[2], scale=q.shape[-1] ** -0.5 * math.log2(math.e),
        DH=q.shape[-1], DV=v.shape[-1], BLOCK_T=block_t, BLOCK_S=block_s, IS_CAUSAL=causal,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[-1])
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    args = _arguments("forward", q, k, v, causal=causal)
    grid = (triton.cdiv(T, args["BLOCK_T"]) * H * B,)
    with torch.cuda.device_of(q):
        _flash_forward_kernel[grid](**args, o_ptr=out, lse_ptr=lse, H=H)
    return out, lse


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, Dh = q.shape
    S, G, Dv = k.shape[1], k.shape[2], v.shape[-1]
    do = do.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    more = {"do_ptr": do, "lse_ptr": lse, "delta_ptr": delta, "d_scale": Dh**-0.5}
    kv_args = _arguments("dkdv", q, k, v, causal=causal) | more
    q_args = _arguments("dq", q, k, v, causal=causal) | more
    with torch.cuda.device_of(q):
        rows = triton.cdiv(T, 64) * H * B
        _flash_delta_kernel[(rows,)](out, do, delta, T, H, DV=Dv, BLOCK_T=64)
        grid = (triton.cdiv(S, kv_args["BLOCK_S"]) * G * B,)
        _flash_dkdv_kernel[grid](**kv_args, dk_ptr=dk, dv_ptr=dv, G=G)
        grid = (triton.cdiv(T, q_args["BLOCK_T"]) * H * B,)
        _flash_dq_kernel[grid](**q_args, dq_ptr=dq, H=H)
    return dq, dk, dv


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out, lse = _forward(q, k, v, causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_backward(do, *ctx.saved_tensors, causal=ctx.causal), None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        not (q.ndim == k.ndim == v.ndim == 4)
        or q.shape[0] != k.shape[0]
        or k.shape[:3] != v.shape[:3]
    ):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            f"shapes are {shapes}; they must be [B, T, H, Dh], [B, S, G, Dh], [B, S, G, Dv]."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q has head width {q.shape[3]} and k has {k.shape[3]}: they must be equal."
        )
    H, G = q.shape[2], k.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"q has {H} heads and k has {G}: {G} must divide {H}.")
    for name, width in (("q", q.shape[3]), ("v", v.shape[3])):
        if width not in (16, 32, 64, 128):
            raise ValueError(f"{name} has head width {width}; the kernels have 16, 32, 64 and 128.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        dtypes = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"q, k, v are {dtypes}; all must be float32, float16 or bfloat16.")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}; it must be one device."
        )
    if not q.is_cuda and isinstance(_flash_forward_kernel, triton.JITFunction):
        remedy = "without a GPU set TRITON_INTERPRET=1 before importing this module"
        raise ValueError(f"q is on {q.device}; {remedy}.")


def fused_attention(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S G Dh"],
    v: Float[Tensor, "B S G Dv"],
    *,
    causal: bool = False,
) -> Float[Tensor, "B T H Dv"]:
    r"""Do what `attention.grouped_query_attention` does, in memory linear in T and S.

    Args:
        q: Queries, any strides, in float32, float16 or bfloat16.
        k: Keys. Head g serves the H/G neighbouring query heads.
        v: Values, grouped like the keys. Dh and Dv are 16, 32, 64 or 128.
        causal: Whether a query reads only keys that are not after it, the last query aligned with
            the last key.

    Returns:
        One output vector for each query position and query head; 0 where there is no key to read.

    Raises:
        ValueError: If shapes, head counts, head widths, dtypes or devices do not fit, or if there
            is neither a GPU nor the interpreter.

    Reference:
        Dao (2023), arXiv:2307.08691, Algorithms 1 and 2.
    """
    _check(q, k, v)
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    return _FusedAttention.apply(q, k, v, causal)
