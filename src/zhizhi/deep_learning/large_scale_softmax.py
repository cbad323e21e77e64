"""Cross-entropy over very many classes: in chunks, over processes, and over a sample of them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from zhizhi.deep_learning.softmax_cross_entropy import (
    ExpSum,
    cross_entropy,
    exp_sum,
    log_sum_exp,
    merge_exp_sums,
    rebase,
)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, target: Tensor, chunk: int) -> Tensor:
        total: ExpSum | None = None
        for part in w.split(chunk):
            found = exp_sum(x @ part.T)
            total = found if total is None else merge_exp_sums(total, found)
        assert total is not None
        lse = total.m + total.z.log()
        ctx.save_for_backward(x, w, target, lse)
        ctx.chunk = chunk
        return lse - (x * w[target]).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (d_loss,) = grad_outputs
        x, w, target, lse = ctx.saved_tensors
        dx, dw = -d_loss[:, None] * w[target], torch.zeros_like(w)
        dw.index_add_(0, target, -d_loss[:, None] * x)
        for first in range(0, len(w), ctx.chunk):
            part = slice(first, first + ctx.chunk)
            p = torch.exp(x @ w[part].T - lse[:, None])  # (eq:lss-chunk)
            dx += (d_loss[:, None] * p) @ w[part]
            dw[part] += (d_loss[:, None] * p).T @ x
        return dx, dw, None, None


def chunked_cross_entropy(
    x: Float[Tensor, "N D"], w: Float[Tensor, "C D"], target: Int[Tensor, " N"], *, chunk: int
) -> Float[Tensor, " N"]:
    r"""Return the cross-entropy of $x W^\top$ without ever holding all N times C logits.

    Forward keeps one sum of exponentials a row; backward makes each chunk of logits again.

    Args:
        x: Features.
        w: One weight vector a class.
        target: The true classes.
        chunk: Classes at a time.

    Returns:
        One loss a row, differentiable once in x and w.

    Raises:
        ValueError: If chunk is less than 1.

    Example:
        >>> x, w = torch.zeros(1, 2), torch.ones(4, 2)
        >>> chunked_cross_entropy(x, w, torch.tensor([3]), chunk=3).exp()
        tensor([4.])
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: chunk >= 1.")
    return _Chunked.apply(x, w, target, chunk)


def class_shard(n_classes: int, *, rank: int, world_size: int) -> slice:
    r"""Return the classes that a process holds: as even as possible, the first ones larger.

    Args:
        n_classes: Number of all classes.
        rank: The process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are more processes than classes.

    Example:
        >>> [class_shard(7, rank=r, world_size=3) for r in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    if world_size > n_classes:
        raise ValueError(f"{world_size} processes share {n_classes} classes: at least one each.")
    base, extra = divmod(n_classes, world_size)
    first = rank * base + min(rank, extra)
    return slice(first, first + base + (rank < extra))


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Tensor, target: Tensor, first: int) -> Tensor:
        logits = x @ shard.T
        own = exp_sum(logits)
        m = own.m.clone()
        dist.all_reduce(m, op=dist.ReduceOp.MAX)
        z = own.z * rebase(own.m, m)[1]
        here = (target >= first) & (target < first + len(shard))
        local = (target - first).clamp(0, len(shard) - 1)
        picked = torch.where(here, logits.gather(1, local[:, None]).squeeze(1), 0.0)
        both = torch.stack([z, picked])
        dist.all_reduce(both)  # (eq:lss-shard)
        lse = m + both[0].log()
        ctx.save_for_backward(x, shard, local, here, torch.exp(logits - lse[:, None]))
        return lse - both[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (d_loss,) = grad_outputs
        x, shard, local, here, p = ctx.saved_tensors
        d_logits = d_loss[:, None] * p
        d_logits.scatter_add_(1, local[:, None], -(d_loss * here)[:, None])
        dx = d_logits @ shard
        dist.all_reduce(dx)  # every process has seen its own classes only
        return dx, d_logits.T @ x, None, None


def sharded_cross_entropy(
    x: Float[Tensor, "N D"],
    shard: Float[Tensor, "C_local D"],
    target: Int[Tensor, " N"],
    *,
    first: int,
) -> Float[Tensor, " N"]:
    r"""Return the cross-entropy over classes whose weights lie on several processes.

    Three numbers a row cross the wire forward, and the gradient of the features backward; weights
    and logits stay where they are.

    Args:
        x: Features, the same on every process.
        shard: The weights of this process's classes.
        target: The true classes, numbered over all processes.
        first: Number of this process's first class.

    Returns:
        One loss a row, the same on every process. The gradient of x is the whole one on each; that
        of the shard is its own.

    Raises:
        ValueError: If no process group is there.

    Reference:
        An et al. (2020), arXiv:2010.05222, section 3: the classification layer in parallel.
    """
    if not dist.is_initialized():
        raise ValueError("there is no process group: call init_process_group first.")
    return _Sharded.apply(x, shard, target, first)


def sampled_cross_entropy(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    samples: Int[Tensor, " S"],
    probability: Float[Tensor, " C"],
    correct: bool = True,
) -> Float[Tensor, " N"]:
    r"""Estimate the cross-entropy from the target and a sample of the other classes.

    $$
    \hat Z = e^{x_y} + \frac1S \sum_{s} [j_s \ne y] \frac{e^{x_{j_s}}}{q_{j_s}}, \qquad
        \hat\ell = \log \hat Z - x_y
    $$

    Args:
        x: Features.
        w: Class weights.
        target: The true classes.
        samples: Classes drawn independently with the probabilities q, for all rows alike.
        probability: The probabilities q of all classes.
        correct: Whether a sampled logit is lowered by log(S q); without it the loss is another one.

    Returns:
        One loss a row. The sum is right on average, its logarithm too small.

    Reference:
        Bengio & Senécal (2008); Jean et al. (2015), arXiv:1412.2007, section 3.
    """
    own = (x * w[target]).sum(dim=1)
    others = x @ w[samples].T
    if correct:
        others = others - torch.log(len(samples) * probability[samples])  # (eq:lss-sampled)
    hit = samples == target[:, None]
    others = others.masked_fill(hit, -torch.inf)
    return log_sum_exp(torch.cat([own[:, None], others], dim=1)) - own


class Subset(NamedTuple):
    """Classes that take part in a step, and where the targets stand among them."""

    classes: Int[Tensor, " K"]
    target: Int[Tensor, " N"]


def partial_classes(
    target: Int[Tensor, " N"],
    *,
    n_classes: int,
    rate: float,
    generator: torch.Generator | None = None,
) -> Subset:
    r"""Choose the classes of a batch and as many others as make up a share of all.

    Args:
        target: The true classes.
        n_classes: Number of all classes.
        rate: The share, from 0 to 1; the classes of the batch take part even if they are more.
        generator: Source of the draws.

    Returns:
        The classes in order, and the targets renumbered.

    Raises:
        ValueError: If the rate is out of range.

    Example:
        >>> partial_classes(torch.tensor([5, 2, 5]), n_classes=6, rate=0.1)
        Subset(classes=tensor([2, 5]), target=tensor([1, 0, 1]))

    Reference:
        An et al. (2020), arXiv:2010.05222: Partial FC.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}: 0 <= rate <= 1.")
    score = torch.rand(n_classes, generator=generator)
    score[target] = 2.0  # before all others
    wanted = max(len(target.unique()), round(rate * n_classes))
    classes = score.topk(wanted).indices.sort().values
    return Subset(classes, torch.searchsorted(classes, target))


def partial_cross_entropy(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    rate: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " N"]:
    r"""Return the cross-entropy among the classes of the batch and a share of the others.

    Args:
        x: Features.
        w: Class weights.
        target: The true classes.
        rate: The share of all classes that takes part.
        generator: Source of the draws.

    Returns:
        One loss a row, smaller than the whole one by about log rate; the classes left out get no
        gradient.

    Reference:
        An et al. (2020), arXiv:2010.05222.
    """
    subset = partial_classes(target, n_classes=len(w), rate=rate, generator=generator)
    return cross_entropy(x @ w[subset.classes].T, subset.target)
