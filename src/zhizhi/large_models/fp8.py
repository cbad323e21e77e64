"""FP8 matrix products: a scale for every 128 numbers, and sums that must not stay short."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

E4M3_MAX = 448.0


class Scaled(NamedTuple):
    """Numbers in fp8 and the scale of each tile or block; number = value * scale."""

    values: Tensor
    scales: Float[Tensor, "rows columns"]


def quantize_tiles(
    x: Float[Tensor, "N K"], *, tile: int = 128, dtype: torch.dtype = torch.float8_e4m3fn
) -> Scaled:
    r"""Give each run of 128 numbers of a row a scale of its own: activations.

    $$
    s = \max_{\text{tile}} |x| / 448, \qquad \hat x = \operatorname{e4m3}(x / s)
    $$

    Args:
        x: Activations.
        tile: Length of a run; divides K. K itself gives a scale a row.
        dtype: An fp8 type.

    Returns:
        Values [N, K] and scales [N, K / tile].

    Raises:
        ValueError: If the tile does not divide K.

    Example:
        >>> q = quantize_tiles(torch.tensor([[448.0, 1.0, 2.0, 4.48]]), tile=2)
        >>> q.scales.tolist()
        [[1.0, 0.009999999776482582]]

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 3.3.2 and Fig. 7.
    """
    if x.shape[1] % tile:
        raise ValueError(f"K is {x.shape[1]} and tile {tile}: the tile must divide it.")
    tiles = rearrange(x, "N (k t) -> N k t", t=tile)
    largest = torch.finfo(dtype).max
    scales = tiles.abs().amax(dim=-1).clamp_min(1e-30) / largest
    values = (tiles / scales[..., None]).clamp(-largest, largest).to(dtype)
    return Scaled(rearrange(values, "N k t -> N (k t)"), scales)  # (eq:deepseek-v3-fp8)


def quantize_blocks(w: Float[Tensor, "M K"], *, block: int = 128) -> Scaled:
    r"""Give each square of 128 x 128 numbers a scale: weights.

    Args:
        w: Weight.
        block: Side of a square; divides both sides.

    Returns:
        Values [M, K] and scales [M / block, K / block].

    Raises:
        ValueError: If the block does not divide both.

    Example:
        >>> quantize_blocks(torch.ones(4, 6), block=2).scales.shape
        torch.Size([2, 3])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 3.3.2.
    """
    if w.shape[0] % block or w.shape[1] % block:
        raise ValueError(f"{tuple(w.shape)} in blocks of {block}: it must divide both sides.")
    squares = rearrange(w, "(m a) (k b) -> m k a b", a=block, b=block)
    scales = squares.abs().amax(dim=(-2, -1)).clamp_min(1e-30) / E4M3_MAX
    values = (squares / scales[..., None, None]).to(torch.float8_e4m3fn)
    return Scaled(rearrange(values, "m k a b -> (m a) (k b)"), scales)


def fp8_matmul(x: Scaled, w: Scaled, *, tile: int = 128) -> Float[Tensor, "N M"]:
    r"""Multiply in fp8, and add the products of each 128 in float32 after scaling them.

    $$
    y_{n,m} = \sum_k s^x_{n,k}\, s^w_{m,k} \sum_{j \in \text{tile } k} \hat x_{n,j}\, \hat w_{m,j}
    $$

    Args:
        x: Of `quantize_tiles`.
        w: Of `quantize_blocks` with the same length.
        tile: That length.

    Returns:
        x w^T in float32.

    Example:
        >>> x, w = torch.ones(2, 4), torch.ones(4, 4)
        >>> fp8_matmul(quantize_tiles(x, tile=2), quantize_blocks(w, block=2), tile=2)[0].round()
        tensor([4., 4., 4., 4.])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 3.3.2, Fig. 7 (b).
    """
    y = torch.zeros(len(x.values), len(w.values))
    rows = w.scales.repeat_interleave(tile, dim=0)
    for k in range(x.scales.shape[1]):
        part = slice(k * tile, (k + 1) * tile)
        product = x.values[:, part].float() @ w.values[:, part].float().T
        y += product * x.scales[:, k, None] * rows[None, :, k]
    return y


def short_sum(
    products: Float[Tensor, "*batch K"],
    *,
    bits: int = 14,
    step: int = 32,
    promote: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Add numbers in an accumulator of few bits, as tensor cores do.

    Args:
        products: What is added.
        bits: Bits of the accumulator's significand; what does not fit is cut off.
        step: Numbers that are added exactly at a time.
        promote: After how many numbers the accumulator is emptied into float32; None never.

    Returns:
        The sum.

    Example:
        >>> short_sum(torch.ones(100_000), bits=14)  # 2 ** 14 and more lose the small ones
        tensor(100000.)
        >>> short_sum(torch.ones(100_000) * 1.001, bits=14, step=1) < 100_000
        tensor(True)

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 3.3.2: some 14 bits on H800, promotion after 128.
    """
    total = torch.zeros(products.shape[:-1])
    held = torch.zeros_like(total)
    for i, chunk in enumerate(products.split(step, dim=-1), start=1):
        held = held + chunk.sum(dim=-1)
        mantissa, exponent = torch.frexp(held)
        held = torch.ldexp((mantissa * 2.0**bits).trunc() / 2.0**bits, exponent)
        if promote is not None and i * step % promote == 0:
            total, held = total + held, torch.zeros_like(held)
    return total + held
