"""Normalisation: one vector-Jacobian product, and the choice of what is averaged together."""

from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor


class Grads(NamedTuple):
    """Gradients of a loss with respect to input, gain and, where there is one, shift."""

    dx: Float[Tensor, "*shape"]
    dweight: Float[Tensor, " C"]
    dbias: Float[Tensor, " C"] | None


def _wide(x: Tensor) -> Tensor:
    """Half precision has too few digits for a mean and float16 no room for a square."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _standardise(x: Tensor, *, dim: int | list[int], eps: float) -> tuple[Tensor, Tensor]:
    """Return x_hat and the factor that made it, 1 / sqrt(var + eps)."""
    centred = x - x.mean(dim=dim, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=dim, keepdim=True) + eps)
    return centred * rstd, rstd  # (eq:norm-standardise)


def _standardise_vjp(g: Tensor, x_hat: Tensor, rstd: Tensor, *, dim: int | list[int]) -> Tensor:
    along = (g * x_hat).mean(dim=dim, keepdim=True)
    return rstd * (g - g.mean(dim=dim, keepdim=True) - x_hat * along)  # (eq:norm-vjp)


def layer_norm(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"],
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch D"]:
    r"""Standardise each vector by its own mean and variance, then scale and shift.

    $$
    y = w \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + b
    $$

    Args:
        x: Vectors; computed in float32 at least.
        weight: Gain.
        bias: Shift.
        eps: Added to the variance, under the root.

    Returns:
        Vectors in the dtype of x.

    Example:
        >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), torch.zeros(2), eps=0.0)
        tensor([-1.,  1.])

    Reference:
        Ba et al. (2016), arXiv:1607.06450, Section 3.
    """
    x_hat, _ = _standardise(_wide(x), dim=-1, eps=eps)
    return (x_hat * weight + bias).to(x.dtype)


def layer_norm_backward(
    dy: Float[Tensor, "*batch D"],
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    *,
    eps: float = 1e-5,
) -> Grads:
    r"""Return the gradients of `layer_norm`.

    $$
    \mathrm{d}x = \frac{1}{\sqrt{\sigma^2 + \epsilon}}
        \Big(g - \overline{g} - \hat x\,\overline{g \odot \hat x}\Big),
    \qquad g = w \odot \mathrm{d}y
    $$

    Args:
        dy: Gradient with respect to the output.
        x: Input of the forward pass.
        weight: Gain.
        eps: As in the forward pass.

    Returns:
        Gradients in the dtypes of x and of weight.
    """
    dy_wide = _wide(dy)
    x_hat, rstd = _standardise(_wide(x), dim=-1, eps=eps)
    dx = _standardise_vjp(dy_wide * weight, x_hat, rstd, dim=-1)
    dweight = reduce(dy_wide * x_hat, "... D -> D", "sum")  # (eq:norm-affine)
    dbias = reduce(dy_wide, "... D -> D", "sum")
    return Grads(dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype))


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], *, eps: float = 1e-6
) -> Float[Tensor, "*batch D"]:
    r"""Divide each vector by its root mean square, then scale; round once, at the end.

    $$
    y = w \odot \frac{x}{\sqrt{\tfrac{1}{D}\sum_i x_i^2 + \epsilon}}
    $$

    Args:
        x: Vectors; computed in float32 at least.
        weight: Gain.
        eps: Added to the mean square, under the root.

    Returns:
        Vectors in the dtype of x.

    Example:
        >>> rms_norm(torch.tensor([3.0, -3.0]), torch.ones(2), eps=0.0)
        tensor([ 1., -1.])

    Reference:
        Zhang & Sennrich (2019), arXiv:1910.07467, Eq. (4), which has no eps.
    """
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)  # (eq:norm-rms)


def rms_norm_cast_first(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], *, eps: float = 1e-6
) -> Float[Tensor, "*batch D"]:
    r"""Do what `rms_norm` does, rounded to the dtype of x before the gain and once more after it.

    Args:
        x: Vectors.
        weight: Gain, taken to the dtype of x.
        eps: As in `rms_norm`.

    Returns:
        Vectors in the dtype of x; equal to `rms_norm` in float32 and wider.

    Example:
        >>> x, weight = torch.tensor([1.0, 0.7]).bfloat16(), torch.tensor([1.0, 1.7]).bfloat16()
        >>> rms_norm(x, weight).tolist(), rms_norm_cast_first(x, weight).tolist()
        ([1.15625, 1.3828125], [1.15625, 1.375])

    Reference:
        Hugging Face transformers, `LlamaRMSNorm`.
    """
    return rms_norm(x, torch.ones_like(weight), eps=eps) * weight.to(x.dtype)


def rms_norm_backward(
    dy: Float[Tensor, "*batch D"],
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    *,
    eps: float = 1e-6,
) -> Grads:
    r"""Return the gradients of `rms_norm`; there is no shift.

    $$
    \mathrm{d}x = \frac{1}{\sqrt{\overline{x^2} + \epsilon}}
        \Big(g - \hat x\,\overline{g \odot \hat x}\Big), \qquad g = w \odot \mathrm{d}y
    $$

    Args:
        dy: Gradient with respect to the output.
        x: Input of the forward pass.
        weight: Gain.
        eps: As in the forward pass.

    Returns:
        Gradients in the dtypes of x and of weight.
    """
    wide, dy_wide = _wide(x), _wide(dy)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    x_hat, g = wide * rstd, dy_wide * weight
    dx = rstd * (g - x_hat * (g * x_hat).mean(dim=-1, keepdim=True))  # (eq:norm-rms-vjp)
    dweight = reduce(dy_wide * x_hat, "... D -> D", "sum")
    return Grads(dx.to(x.dtype), dweight.to(weight.dtype), None)


def _in_groups(x: Tensor, n_groups: int) -> Tensor:
    C = x.shape[1]
    if n_groups < 1 or C % n_groups:
        raise ValueError(
            f"there are {C} channels and {n_groups} groups: {n_groups} must divide {C}."
        )
    return x.reshape(x.shape[0], n_groups, -1)


def group_norm(
    x: Float[Tensor, "B C *space"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    n_groups: int,
    eps: float = 1e-5,
) -> Float[Tensor, "B C *space"]:
    r"""Standardise each group of channels of each example, over the group's channels and space.

    One group is layer norm over channels and space, C groups are instance norm.

    Args:
        x: Feature maps.
        weight: Gain of each channel.
        bias: Shift of each channel.
        n_groups: Groups of neighbouring channels.
        eps: Added to the variance, under the root.

    Returns:
        Feature maps in the dtype of x.

    Raises:
        ValueError: If the number of groups does not divide that of channels.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
        >>> group_norm(x, torch.ones(4), torch.zeros(4), n_groups=2, eps=0.0)
        tensor([[-1.,  1., -1.,  1.]])

    Reference:
        Wu & He (2018), arXiv:1803.08494, Eq. (1), (2) and (7).
    """
    x_hat, _ = _standardise(_in_groups(_wide(x), n_groups), dim=-1, eps=eps)
    channels_last = x_hat.reshape(x.shape).movedim(1, -1)
    return (channels_last * weight + bias).movedim(-1, 1).to(x.dtype)


def group_norm_backward(
    dy: Float[Tensor, "B C *space"],
    x: Float[Tensor, "B C *space"],
    weight: Float[Tensor, " C"],
    *,
    n_groups: int,
    eps: float = 1e-5,
) -> Grads:
    r"""Return the gradients of `group_norm`: those of `layer_norm`, group by group.

    Args:
        dy: Gradient with respect to the output.
        x: Input of the forward pass.
        weight: Gain of each channel.
        n_groups: As in the forward pass.
        eps: As in the forward pass.

    Returns:
        Gradients in the dtypes of x and of weight.
    """
    dy_wide = _wide(dy)
    x_hat, rstd = _standardise(_in_groups(_wide(x), n_groups), dim=-1, eps=eps)
    g = _in_groups((dy_wide.movedim(1, -1) * weight).movedim(-1, 1), n_groups)
    dx = _standardise_vjp(g, x_hat, rstd, dim=-1).reshape(x.shape)
    dweight = reduce(dy_wide * x_hat.reshape(x.shape), "B C ... -> C", "sum")
    dbias = reduce(dy_wide, "B C ... -> C", "sum")
    return Grads(dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype))
