"""Batch norm: moments of a batch, of all ranks' batches, and of the batches so far."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from zhizhi.deep_learning.normalization import Grads


class Moments(NamedTuple):
    """How many numbers there are, their mean and their variance, divided by the count itself."""

    count: int
    mean: Float[Tensor, "*stat"]
    var: Float[Tensor, "*stat"]


def merge_moments(a: Moments, b: Moments) -> Moments:
    r"""Return the moments of two disjoint sets together, from those of each.

    $$
    \mu = \mu_a + \frac{n_b}{n}\,\delta, \qquad
    \sigma^2 = \frac{n_a}{n}\sigma_a^2 + \frac{n_b}{n}\sigma_b^2 + \frac{n_a n_b}{n^2}\,\delta^2,
    \qquad \delta = \mu_b - \mu_a
    $$

    With $n_b = 1$ it is Welford's update. A set without elements changes nothing.

    Args:
        a: One set.
        b: The other.

    Returns:
        Their union.

    Example:
        >>> one = Moments(1, torch.tensor(1.0), torch.tensor(0.0))
        >>> merge_moments(one, Moments(3, torch.tensor(5.0), torch.tensor(0.0)))
        Moments(count=4, mean=tensor(4.), var=tensor(3.))

    Reference:
        Chan, Golub & LeVeque (1983), The American Statistician 37(3), updating formulas.
    """
    n = a.count + b.count
    share_a, share_b = a.count / max(n, 1), b.count / max(n, 1)
    delta = b.mean - a.mean
    var = share_a * a.var + share_b * b.var + share_a * share_b * delta**2  # (eq:bn-chan)
    return Moments(n, a.mean + share_b * delta, var)


def batch_moments(x: Float[Tensor, "B C *space"]) -> Moments:
    """Return each channel's moments over batch and space, in float32 at least.

    An empty batch has count, mean and variance 0, which `merge_moments` passes over.

    Example:
        >>> batch_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        Moments(count=2, mean=tensor([2., 5.]), var=tensor([1., 0.]))
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    by_channel = rearrange(x.to(dtype), "B C ... -> C (B ...)")
    if by_channel.shape[1] == 0:  # a rank without rows still takes part in the merge
        return Moments(0, *by_channel.new_zeros(2, len(by_channel)))
    var, mean = torch.var_mean(by_channel, dim=1, correction=0)
    return Moments(by_channel.shape[1], mean, var)


def batch_norm(
    x: Float[Tensor, "B C *space"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    moments: Moments,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "B C *space"]:
    r"""Standardise each channel by given moments, then scale and shift.

    In training the moments are `batch_moments(x)`, and the gradient passes through them; in
    evaluation they are running estimates, and this is an affine map.

    Args:
        x: Feature maps, or vectors.
        weight: Gain of each channel.
        bias: Shift of each channel.
        moments: Mean and variance of each channel; their count plays no part.
        eps: Added to the variance, under the root.

    Returns:
        What x has become, in its dtype.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, torch.ones(1), torch.zeros(1), batch_moments(x), eps=0.0)[:, 0]
        tensor([-1.,  1.])

    Reference:
        Ioffe & Szegedy (2015), arXiv:1502.03167, Algorithm 1.
    """
    x_hat = (x.movedim(1, -1) - moments.mean) * torch.rsqrt(moments.var + eps)
    return (x_hat * weight + bias).movedim(-1, 1).to(x.dtype)


def batch_norm_backward(
    dy: Float[Tensor, "B C *space"],
    x: Float[Tensor, "B C *space"],
    weight: Float[Tensor, " C"],
    *,
    eps: float = 1e-5,
) -> Grads:
    r"""Return the gradients of `batch_norm` in training, where the moments depend on x.

    $$
    \mathrm{d}x = \frac{w}{\sqrt{\sigma^2 + \epsilon}}
        \Big(\mathrm{d}y - \overline{\mathrm{d}y} - \hat x\,\overline{\mathrm{d}y \odot \hat x}\Big)
    $$

    Args:
        dy: Gradient with respect to the output.
        x: Input of the forward pass.
        weight: Gain of each channel.
        eps: As in the forward pass.

    Returns:
        Gradients in the dtypes of x and of weight.
    """
    return _backward(dy, x, weight, batch_moments(x), eps=eps, over_ranks=lambda sums: sums)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    moments: Moments,
    *,
    eps: float,
    over_ranks: Callable[[Tensor], Tensor],
) -> Grads:
    rstd = torch.rsqrt(moments.var + eps)
    x_hat = (x.movedim(1, -1) - moments.mean) * rstd
    g = dy.movedim(1, -1).to(rstd.dtype)
    dbias, dweight = reduce(torch.stack([g, g * x_hat]), "two ... C -> two C", "sum")
    mean_g, along = over_ranks(torch.stack([dbias, dweight])) / moments.count
    dx = (weight * rstd * (g - mean_g - x_hat * along)).movedim(-1, 1)  # (eq:norm-vjp)
    return Grads(dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype))


def running_update(
    running_mean: Float[Tensor, " C"],
    running_var: Float[Tensor, " C"],
    batch: Moments,
    *,
    momentum: float,
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    r"""Move running estimates towards a batch's mean and its unbiased variance.

    $$
    \mu \leftarrow (1 - m)\,\mu + m\,\mu_B, \qquad
    \sigma^2 \leftarrow (1 - m)\,\sigma^2 + m\,\frac{n}{n - 1}\,\sigma_B^2
    $$

    Args:
        running_mean: Estimate of the mean.
        running_var: Estimate of the variance.
        batch: Moments of one batch.
        momentum: Weight of the new, as in PyTorch; Keras calls 1 - m the momentum.

    Returns:
        The new estimates.

    Raises:
        ValueError: If a channel has a single value, which has no unbiased variance.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> running_update(zero, one, Moments(2, one, 2 * one), momentum=0.1)
        (tensor([0.1000]), tensor([1.3000]))

    Reference:
        Ioffe & Szegedy (2015), arXiv:1502.03167, Algorithm 2, step 10: the factor n / (n - 1).
    """
    n = batch.count
    if n < 2:
        values = "value" if n == 1 else "values"
        raise ValueError(f"a channel has {n} {values} in the batch: training needs 2 at least.")
    m, unbiased = momentum, batch.var * (n / (n - 1))
    mean = (1 - m) * running_mean + m * batch.mean
    return mean, (1 - m) * running_var + m * unbiased  # (eq:bn-running)


def all_rank_moments(local: Moments) -> Moments:
    """Merge the moments of all ranks, in the order of ranks: bit for bit the same on each."""
    # One message; float64, in which a count of any size is exact.
    packed = torch.cat([local.mean.new_tensor([local.count]).double(), local.mean, local.var])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, packed)
    parts = [Moments(int(p[0].item()), *p[1:].chunk(2)) for p in gathered]
    n, mean, var = functools.reduce(merge_moments, parts)
    return Moments(n, mean.to(local.mean.dtype), var.to(local.var.dtype))


def _all_rank_sum(sums: Tensor) -> Tensor:
    dist.all_reduce(sums)
    return sums


class BatchNorm(nn.Module):
    r"""Batch norm with running estimates: the batch's moments in training, those in evaluation.

    Args:
        C: Channels.
        eps: Added to the variance.
        momentum: Weight of a new batch; None weighs all batches so far alike.

    Example:
        >>> norm = BatchNorm(1)
        >>> norm(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-0.9999949932098389, 0.9999949932098389]
        >>> norm.running_mean, norm.running_var
        (tensor([0.2000]), tensor([1.1000]))
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, C: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        """Normalise; in training, update the running estimates as well."""
        if not self.training:
            known = Moments(0, self.running_mean, self.running_var)  # the count plays no part
            return batch_norm(x, self.weight, self.bias, known, eps=self.eps)
        y, moments = self._normalised(x)
        with torch.no_grad():
            m = self.momentum
            if m is None:
                m = 1 / (int(self.num_batches_tracked.item()) + 1)
            mean, var = running_update(self.running_mean, self.running_var, moments, momentum=m)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.num_batches_tracked.add_(1)
        return y

    def _normalised(self, x: Tensor) -> tuple[Tensor, Moments]:
        moments = batch_moments(x)
        return batch_norm(x, self.weight, self.bias, moments, eps=self.eps), moments


class SyncBatchNorm(BatchNorm):
    """Batch norm whose training batch is that of all ranks together, forward and backward."""

    def _normalised(self, x: Tensor) -> tuple[Tensor, Moments]:
        with torch.no_grad():
            moments = all_rank_moments(batch_moments(x))
        return _SyncBatchNorm.apply(x, self.weight, self.bias, moments, self.eps), moments


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, moments: Moments, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.moments, ctx.eps = moments, eps
        return batch_norm(x, weight, bias, moments, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        grads = _backward(
            grad_outputs[0], x, weight, ctx.moments, eps=ctx.eps, over_ranks=_all_rank_sum
        )
        # Gain and shift keep this rank's sums: data parallelism averages them with the others.
        return (*grads, None, None)


def fold_batch_norm(
    kernel: Float[Tensor, "O *rest"], bias: Float[Tensor, " O"], norm: BatchNorm
) -> tuple[Float[Tensor, "O *rest"], Float[Tensor, " O"]]:
    r"""Return the convolution that does what convolution and evaluated batch norm do together.

    $$
    W' = s\,W, \qquad b' = s\,(b - \mu) + \beta,
    \qquad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}
    $$

    Args:
        kernel: Weights of a convolution or a linear map, outputs first.
        bias: Its bias.
        norm: The batch norm that follows directly; its running estimates are used.

    Returns:
        New weights and bias.

    Example:
        >>> norm = BatchNorm(1, eps=0.0)
        >>> norm.running_mean[0], norm.running_var[0] = 1.0, 4.0
        >>> kernel, bias = fold_batch_norm(torch.tensor([[6.0]]), torch.tensor([3.0]), norm)
        >>> kernel.item(), bias.item()
        (3.0, 1.0)
    """
    scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    folded = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))  # (eq:bn-fold)
    return folded, scale * (bias - norm.running_mean) + norm.bias.detach()
