"""Softmax and cross-entropy: sums of exponentials that do not overflow and can be split at will.

The merge of two such sums is the one rule behind FlashAttention, softmax over sharded classes and
attention over several machines; it lives here.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ExpSum(NamedTuple):
    r"""A sum of exponentials $z\,e^{m}$, kept as two numbers of moderate size.

    Attributes:
        m: The largest exponent, $-\infty$ if there is none.
        z: The sum relative to it, between 1 and the number of terms; 0 if there is none.
    """

    m: Float[Tensor, "*batch"]
    z: Float[Tensor, "*batch"]


def rebase(
    m_a: Float[Tensor, "*batch"], m_b: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""Return the common base of two sums and the factor that carries each over to it.

    $$
    m = \max(m_a, m_b), \qquad e^{m_a - m}, \qquad e^{m_b - m}
    $$

    Args:
        m_a: Base of one sum; $-\infty$ for a sum without terms.
        m_b: Base of the other.

    Returns:
        The new base, and two factors in [0, 1]; two empty sums have factors 0.

    Example:
        >>> rebase(torch.tensor([0.0]), torch.tensor([-torch.inf]))
        (tensor([0.]), tensor([1.]), tensor([0.]))

    Reference:
        Milakov & Gimelshein (2018), arXiv:1805.02867, Eq. (4).
    """
    m = torch.maximum(m_a, m_b)
    base = m.masked_fill(m == -torch.inf, 0.0)  # both empty: 0 - (-inf) instead of NaN
    return m, torch.exp(m_a - base), torch.exp(m_b - base)


def exp_sum(x: Float[Tensor, "*batch C"]) -> ExpSum:
    r"""Sum the exponentials of the last axis, relative to the largest.

    $$
    m = \max_j x_j, \qquad z = \sum_j e^{x_j - m}
    $$

    Args:
        x: Exponents, at least one; $-\infty$ is a term that is not there.

    Returns:
        The sum.

    Example:
        >>> exp_sum(torch.tensor([1000.0, 1000.0, -torch.inf]))
        ExpSum(m=tensor(1000.), z=tensor(2.))
    """
    m = x.amax(dim=-1)
    base = m.masked_fill(m == -torch.inf, 0.0)
    return ExpSum(m, torch.exp(x - base[..., None]).sum(dim=-1))


def merge_exp_sums(a: ExpSum, b: ExpSum) -> ExpSum:
    r"""Add two sums of exponentials, of disjoint sets of terms.

    $$
    m = \max(m_a, m_b), \qquad z = z_a e^{m_a - m} + z_b e^{m_b - m}
    $$

    Addition is associative and commutative; so is this, and $(-\infty, 0)$ is its zero.

    Args:
        a: One sum.
        b: The other.

    Returns:
        Their sum.

    Example:
        >>> left, right = exp_sum(torch.tensor([3.0])), exp_sum(torch.tensor([3.0, 3.0]))
        >>> merge_exp_sums(left, right)
        ExpSum(m=tensor(3.), z=tensor(3.))

    Reference:
        Milakov & Gimelshein (2018), arXiv:1805.02867, Eq. (4).
    """
    m, scale_a, scale_b = rebase(a.m, b.m)
    return ExpSum(m, a.z * scale_a + b.z * scale_b)  # (eq:sce-merge)


def log_sum_exp(x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch"]:
    r"""Return $\log \sum_j e^{x_j}$ of the last axis.

    Args:
        x: Exponents, at least one.

    Returns:
        $m + \log z$, between the largest exponent and that plus $\log C$.

    Example:
        >>> log_sum_exp(torch.tensor([100.0, 100.0]))
        tensor(100.6931)
    """
    m, z = exp_sum(x)
    return m + z.log()  # (eq:sce-lse)


def softmax(
    logits: Float[Tensor, "*batch C"], *, temperature: float = 1.0
) -> Float[Tensor, "*batch C"]:
    r"""Turn scores into probabilities.

    $$
    p_j = \frac{e^{x_j / T}}{\sum_k e^{x_k / T}}
    $$

    Args:
        logits: Scores; adding a number to all of them changes nothing.
        temperature: T. Towards 0 the largest takes all, towards infinity all are equal.

    Returns:
        Probabilities over the last axis.

    Raises:
        ValueError: If the temperature is not positive.

    Example:
        >>> softmax(torch.tensor([0.0, 1000.0, 1000.0]))
        tensor([0.0000, 0.5000, 0.5000])
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: temperature > 0.")
    x = logits / temperature
    return torch.exp(x - log_sum_exp(x)[..., None])  # (eq:sce-softmax)


def cross_entropy(logits: Float[Tensor, "N C"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    r"""Return how many nats the model wasted on each label it should have foreseen.

    $$
    \ell = -\log p_y = \operatorname{LSE}(x) - x_y
    $$

    Args:
        logits: Scores of C classes.
        target: The true classes, 0 to C - 1.

    Returns:
        One loss a row, never negative.

    Raises:
        ValueError: If a target is not one of the classes.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    _check_classes(logits, target)
    picked = logits.gather(1, target[:, None])[:, 0]
    return log_sum_exp(logits) - picked  # (eq:sce-loss)


def cross_entropy_grad(
    logits: Float[Tensor, "N C"], target: Int[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    r"""Return the gradient of each row's loss with respect to that row's logits.

    $$
    \frac{\partial \ell}{\partial x_j} = p_j - [j = y]
    $$

    Args:
        logits: Scores of C classes.
        target: The true classes.

    Returns:
        Rows that sum to 0.

    Raises:
        ValueError: If a target is not one of the classes.

    Example:
        >>> cross_entropy_grad(torch.zeros(1, 4), torch.tensor([2]))
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    _check_classes(logits, target)
    grad = softmax(logits)
    return grad.scatter_add(1, target[:, None], -torch.ones_like(grad[:, :1]))  # (eq:sce-grad)


def smoothed_cross_entropy(
    logits: Float[Tensor, "N C"], target: Int[Tensor, " N"], *, smoothing: float
) -> Float[Tensor, " N"]:
    r"""Cross-entropy with a share of the label spread over all classes.

    $$
    \ell_\epsilon = -\sum_j q_j \log p_j, \qquad q_j = (1 - \epsilon)[j = y] + \epsilon / C
    $$

    Args:
        logits: Scores of C classes.
        target: The true classes.
        smoothing: The share epsilon; the true class keeps 1 - epsilon + epsilon / C.

    Returns:
        One loss a row, at least the entropy of q.

    Raises:
        ValueError: If the share is not in [0, 1], or a target is not one of the classes.

    Example:
        >>> smoothed_cross_entropy(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), smoothing=0.2)
        tensor([0.9001])

    Reference:
        Szegedy et al. (2016), arXiv:1512.00567, Section 7.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}: 0 <= smoothing <= 1.")
    spread = log_sum_exp(logits) - logits.mean(dim=-1)
    return (1 - smoothing) * cross_entropy(logits, target) + smoothing * spread  # (eq:sce-smooth)


def calibration_error(
    p: Float[Tensor, "N C"], target: Int[Tensor, " N"], *, n_bins: int = 15
) -> Float[Tensor, ""]:
    r"""Return the expected calibration error: how far confidence is from accuracy, bin by bin.

    $$
    \mathrm{ECE} = \sum_b \frac{|B_b|}{N}\,
        \big|\operatorname{acc}(B_b) - \operatorname{conf}(B_b)\big|
    $$

    Args:
        p: Probabilities of C classes.
        target: The true classes.
        n_bins: Bins of equal width; bin b holds confidences in (b / n_bins, (b + 1) / n_bins].

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no bin, or a target is not one of the classes.

    Example:
        >>> calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
        tensor(0.4000)

    Reference:
        Guo et al. (2017), arXiv:1706.04599, Section 2, ECE.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}: n_bins >= 1.")
    _check_classes(p, target)
    confidence, predicted = p.max(dim=-1)
    gap = (predicted == target).to(p.dtype) - confidence
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1
    return gap.new_zeros(n_bins).index_add(0, bins, gap).abs().sum() / len(gap)


def fit_temperature(logits: Float[Tensor, "N C"], target: Int[Tensor, " N"]) -> float:
    r"""Return the temperature under which the targets are most probable.

    The loss is convex in $\beta = 1/T$, and its slope

    $$
    \frac{1}{N}\sum_i \Big(\sum_j p_{ij}(\beta)\, x_{ij} - x_{i y_i}\Big)
    $$

    is zero where the model's mean logit equals that of the true classes; bisection finds the place.

    Args:
        logits: Scores that the model was not trained on.
        target: The true classes.

    Returns:
        T, to the precision of the logits' dtype.

    Raises:
        ValueError: If the loss falls forever as T goes to 0 or to infinity.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0]]).expand(4, 2)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)
        2.7307

    Reference:
        Guo et al. (2017), arXiv:1706.04599, Section 4.2, temperature scaling.
    """
    _check_classes(logits, target)
    picked = logits.gather(1, target[:, None])[:, 0]

    def slope(beta: float) -> float:
        expected = ((beta * logits).softmax(dim=-1) * logits).sum(dim=-1)
        return (expected - picked).mean().item()  # (eq:sce-slope)

    if bool((picked == logits.amax(dim=-1)).all()):
        raise ValueError("every target has the largest logit: the best temperature is 0.")
    if slope(0.0) >= 0:
        raise ValueError("targets have no larger logits than the average: no temperature helps.")
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high and high - low > 1e-12 * high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high


def _check_classes(scores: Tensor, target: Tensor) -> None:
    n_classes = scores.shape[-1]
    for wrong in target[(target < 0) | (target >= n_classes)][:1].tolist():
        raise ValueError(f"a target is {wrong} of {n_classes} classes: 0 <= target < {n_classes}.")
