"""NF4: sixteen levels at quantiles of the normal distribution, a scale for every 64 weights."""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


class Quantised(NamedTuple):
    """Weights as indices of levels, one byte each here, and the largest magnitude of each block."""

    codes: UInt8[Tensor, " n"]
    absmax: Float[Tensor, " blocks"]
    shape: torch.Size


class QuantisedScales(NamedTuple):
    """Scales in eight bits: what they were centred by, and the scale of each of their blocks."""

    codes: Tensor
    scales: Float[Tensor, " blocks"]
    mean: Float[Tensor, ""]


def nf4_levels() -> Float[Tensor, " 16"]:
    r"""Return the levels: equal shares of a normal distribution, with an exact zero.

    $$
    \Phi^{-1}\big(\text{8 steps from } \delta \text{ to } \tfrac12\big), \quad 0, \quad
    -\Phi^{-1}\big(\text{7 steps from } \delta \text{ to } \tfrac12\big), \qquad
    \delta = \tfrac12\Big(\tfrac{31}{32} + \tfrac{29}{30}\Big)
    $$

    All are divided by the largest. There is one level more above zero than below.

    Returns:
        Sixteen ascending float32 numbers from -1 to 1.

    Example:
        >>> nf4_levels()[[0, 6, 7, 8, 15]]
        tensor([-1.0000, -0.0910,  0.0000,  0.0796,  1.0000])

    Reference:
        Dettmers et al. (2023), arXiv:2305.14314, Sec. 3, Eq. (4) and App. E; `create_normal_map`
        of bitsandbytes.
    """
    delta = (31 / 32 + 29 / 30) / 2

    def upper(n: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(delta, 0.5, n + 1, dtype=torch.float64)[:-1])

    levels = torch.cat([upper(8), torch.zeros(1, dtype=torch.float64), -upper(7)]).sort().values
    return (levels / levels.max()).float()  # (eq:lora-nf4)


def quantize_nf4(w: Float[Tensor, "*shape"], *, block: int = 64) -> Quantised:
    r"""Divide each block by its largest magnitude and take the nearest level.

    $$
    c_i = \arg\min_j \Big| \frac{w_i}{\max_{k \in \text{block}} |w_k|} - \ell_j \Big|
    $$

    Args:
        w: Weights, in blocks along the flattened order.
        block: Weights that share a scale; divides their number.

    Returns:
        Indices and scales.

    Raises:
        ValueError: If the blocks do not come out even.

    Example:
        >>> quantize_nf4(torch.tensor([0.0, 2.0, -2.0, 1.0]), block=4).codes.tolist()
        [7, 15, 0, 12]

    Reference:
        Dettmers et al. (2023), arXiv:2305.14314, Sec. 2 and 3.
    """
    if block < 1 or w.numel() % block:
        raise ValueError(f"{w.numel()} weights in blocks of {block}: it must divide them.")
    levels = nf4_levels().to(w.device)
    rows = w.reshape(-1, block).float()
    absmax = rows.abs().amax(dim=1)
    scaled = rows / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    middle = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, middle)
    return Quantised(codes.flatten().to(torch.uint8), absmax, w.shape)


def dequantize_nf4(q: Quantised) -> Float[Tensor, "*shape"]:
    r"""Return the weights that the codes stand for, in float32.

    Args:
        q: Of `quantize_nf4`.

    Returns:
        Level times scale.

    Example:
        >>> dequantize_nf4(quantize_nf4(torch.tensor([0.0, 2.0, -2.0, 0.0]), block=4)).tolist()
        [0.0, 2.0, -2.0, 0.0]
    """
    block = len(q.codes) // len(q.absmax)
    values = nf4_levels().to(q.codes.device)[q.codes.long()].reshape(-1, block)
    return (values * q.absmax[:, None]).reshape(q.shape)


def quantize_scales(absmax: Float[Tensor, " n"], *, block: int = 256) -> QuantisedScales:
    r"""Keep the scales themselves in eight bits (double quantisation).

    They are positive and alike, so their mean is taken off first; what is left goes to float8 with
    a scale for every 256.

    Args:
        absmax: Scales.
        block: Scales that share one; the last block may be shorter.

    Returns:
        Codes in float8 (e4m3), a float32 scale a block, the mean.

    Example:
        >>> scales = torch.rand(600) + 1
        >>> q = quantize_scales(scales)
        >>> q.codes.element_size(), len(q.scales)
        (1, 3)
        >>> (dequantize_scales(q) - scales).abs().max() < 0.02
        tensor(True)

    Reference:
        Dettmers et al. (2023), arXiv:2305.14314, Sec. 3; their library uses a dynamic 8-bit map in
        place of a float8.
    """
    mean = absmax.mean()
    pieces = (absmax - mean).split(block)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = torch.stack([piece.abs().amax().clamp_min(1e-30) / largest for piece in pieces])
    codes = [
        (piece / scale).to(torch.float8_e4m3fn) for piece, scale in zip(pieces, scales, strict=True)
    ]
    return QuantisedScales(torch.cat(codes), scales, mean)


def dequantize_scales(q: QuantisedScales, *, block: int = 256) -> Float[Tensor, " n"]:
    r"""Return the scales that `quantize_scales` kept.

    Args:
        q: Of `quantize_scales`.
        block: As there.

    Returns:
        Scales in float32.

    Example:
        >>> dequantize_scales(quantize_scales(torch.tensor([1.0, 3.0])))
        tensor([1., 3.])
    """
    return q.codes.float() * q.scales.repeat_interleave(block)[: len(q.codes)] + q.mean


def bits_per_weight(*, block: int = 64, scale_block: int | None = 256) -> float:
    r"""Return what a weight costs with its share of the scales.

    $$
    4 + \frac{32}{64} \quad\text{or}\quad 4 + \frac{8}{64} + \frac{32}{64 \cdot 256}
    $$

    Args:
        block: Weights that share a scale.
        scale_block: Scales that share one; None keeps them in 32 bits.

    Returns:
        Bits.

    Example:
        >>> bits_per_weight(scale_block=None), round(bits_per_weight(), 3)
        (4.5, 4.127)

    Reference:
        Dettmers et al. (2023), arXiv:2305.14314, Sec. 3: 0.373 bits saved.
    """
    return 4 + (32 / block if scale_block is None else 8 / block + 32 / (block * scale_block))


class NF4Linear(nn.Module):
    r"""A frozen linear map that keeps its weight in NF4 and makes it anew for every call.

    Gradients pass through to the input; there is nothing here to train.

    Args:
        linear: Whose weight is quantised; its bias is kept as it is.
        block: As in `quantize_nf4`.

    Example:
        >>> linear = nn.Linear(64, 4)
        >>> layer = NF4Linear(linear)
        >>> (layer(torch.ones(1, 64)) - linear(torch.ones(1, 64))).abs().max() < 0.3
        tensor(True)

    Reference:
        Dettmers et al. (2023), arXiv:2305.14314, Eq. (5).
    """

    codes: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, block: int = 64) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        codes, absmax, self._shape = quantize_nf4(linear.weight.detach(), block=block)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the map of the dequantised weight, in the dtype of x."""
        w = dequantize_nf4(Quantised(self.codes, self.absmax, self._shape)).to(x.dtype)
        return F.linear(x, w, self.bias)
