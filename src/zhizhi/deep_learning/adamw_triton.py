"""One step of AdamW in one kernel. Reference: `adamw.adamw_step`.

The definition written with tensor operations reads and writes memory for each of them. Here each
element is loaded once, its moments and its new value stay in registers, and each is stored once.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def _adamw_kernel(
    theta_ptr, g_ptr, m_ptr, v_ptr, n,
    beta_1, beta_2, new_1, new_2, correction_1, correction_2,
    lr, keep, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK elements. What is the same for all comes from the host, which
    # has double precision: 1 - 0.999 in float32 is wrong in the fifth digit.
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_theta = tl.load(theta_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)  # [BLOCK]
    b_g = tl.load(g_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_m = tl.load(m_ptr + o_n, mask=m_n, other=0.0)
    b_v = tl.load(v_ptr + o_n, mask=m_n, other=0.0)
    b_m = beta_1 * b_m + new_1 * b_g  # (eq:adamw-m)
    b_v = beta_2 * b_v + new_2 * b_g * b_g  # (eq:adamw-v)
    b_step = lr * (b_m / correction_1) / (tl.sqrt(b_v / correction_2) + eps)
    tl.store(theta_ptr + o_n, keep * b_theta - b_step, mask=m_n)  # (eq:adamw-decoupled)
    tl.store(m_ptr + o_n, b_m, mask=m_n)
    tl.store(v_ptr + o_n, b_v, mask=m_n)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(theta: Tensor, g: Tensor, m: Tensor, v: Tensor, *, t: int) -> None:
    if t < 1:
        raise ValueError(f"t is {t}: steps are counted from t = 1.")
    named = {"theta": theta, "g": g, "m": m, "v": v}
    for name, x in named.items():
        if x.shape != theta.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and theta {tuple(theta.shape)}: "
                "they must be equal."
            )
        if x.device != theta.device:
            raise ValueError(f"{name} is on {x.device} and theta on {theta.device}.")
        if not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous; the step is taken in its own memory.")
    if theta.dtype not in _DTYPES or g.dtype != theta.dtype:
        raise ValueError(
            f"theta is {theta.dtype} and g {g.dtype}; both must be float32, float16 or bfloat16."
        )
    if not m.dtype == v.dtype == torch.float32:
        raise ValueError(f"m is {m.dtype} and v {v.dtype}; the moments must be float32.")
    if not theta.is_cuda and isinstance(_adamw_kernel, triton.JITFunction):
        remedy = "without a GPU set TRITON_INTERPRET=1 before importing this module"
        raise ValueError(f"theta is on {theta.device}; {remedy}.")


def fused_adamw_step_(
    theta: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    r"""Take the step of `adamw.adamw_step` in place: four loads and three stores an element.

    Args:
        theta: Parameters in float32, float16 or bfloat16, contiguous; changed.
        g: Gradient at theta, in its dtype.
        m: First moment in float32; changed.
        v: Second moment in float32; changed.
        t: Number of this step, from 1.
        lr: Learning rate; it multiplies the decay too.
        betas: Weights of the past in m and in v.
        eps: Added to the root, outside of it.
        weight_decay: The factor lambda; one step keeps 1 - lr lambda of theta.

    Raises:
        ValueError: If t is less than 1, if shapes, devices or dtypes do not fit, if a tensor is not
            contiguous, or if there is neither a GPU nor the interpreter.

    Reference:
        Loshchilov & Hutter (2019), arXiv:1711.05101, Algorithm 2.
    """
    _check(theta, g, m, v, t=t)
    n = theta.numel()
    if n == 0:
        return
    beta_1, beta_2 = betas
    with torch.cuda.device_of(theta):
        _adamw_kernel[(triton.cdiv(n, 1024),)](
            theta, g, m, v, n, beta_1, beta_2, 1 - beta_1, 1 - beta_2, 1 - beta_1**t, 1 - beta_2**t,
            lr, 1 - lr * weight_decay, eps, BLOCK=1024,
        )  # fmt: skip
