"""Margin softmax: cosine classifiers whose target must win by a margin while they train."""

import math

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zhizhi.deep_learning.softmax_cross_entropy import cross_entropy

_EDGE = 1e-7  # the slope of arccos is infinite at 1 and -1


def cosine_logits(
    x: Float[Tensor, "N D"], w: Float[Tensor, "C D"], *, scale: float = 1.0
) -> Float[Tensor, "N C"]:
    r"""Return the cosine of the angle between each feature and each class weight, times a scale.

    $$
    x_{ij} = s \cos\theta_{ij}, \qquad
        \cos\theta_{ij} = \frac{w_j^\top x_i}{\lVert w_j\rVert\,\lVert x_i\rVert}
    $$

    Args:
        x: Features.
        w: One weight vector a class.
        scale: The factor s, the inverse of a temperature.

    Returns:
        Logits between -s and s.

    Example:
        >>> cosine_logits(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor([[0.6000, 0.8000]])
    """
    return scale * einsum(F.normalize(x, dim=1), F.normalize(w, dim=1), "N D, C D -> N C")


def angle(cosine: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return the angle of a cosine, kept so far from 0 and $\pi$ that its slope is finite.

    Args:
        cosine: Cosines; what lies outside of [-1, 1] by rounding is moved inside.

    Returns:
        Radians in (0, pi).

    Example:
        >>> angle(torch.tensor([0.0, 0.5]))
        tensor([1.5708, 1.0472])
    """
    return cosine.clamp(-1 + _EDGE, 1 - _EDGE).arccos()


def psi(theta: Float[Tensor, "*shape"], *, m: int) -> Float[Tensor, "*shape"]:
    r"""Return $\cos m\theta$, continued so that it falls all the way from 1 to $1 - 2m$.

    $$
    \psi(\theta) = (-1)^k \cos m\theta - 2k, \qquad
        \theta \in \Big[\frac{k\pi}{m}, \frac{(k+1)\pi}{m}\Big]
    $$

    Args:
        theta: Angles in [0, pi].
        m: The multiplicative margin.

    Returns:
        Values in [1 - 2m, 1].

    Raises:
        ValueError: If m is less than 1.

    Example:
        >>> psi(torch.tensor([0.0, torch.pi / 3, torch.pi]), m=2)
        tensor([ 1.0000, -0.5000, -3.0000])

    Reference:
        Liu et al. (2016), arXiv:1612.02295, Eq. (6); Liu et al. (2017), arXiv:1704.08063, Eq. (7).
    """
    if m < 1:
        raise ValueError(f"m is {m}: m >= 1.")
    k = (theta.detach() * m / math.pi).floor().clamp(0, m - 1)
    return (1 - 2 * (k % 2)) * (m * theta).cos() - 2 * k  # (eq:margin-psi)


def add_cosine_margin(cosine: Float[Tensor, "*shape"], *, m: float) -> Float[Tensor, "*shape"]:
    r"""Return $\cos\theta - m$, the target logit of CosFace and AM-Softmax before its scale.

    Args:
        cosine: Cosines of the targets.
        m: The margin, in units of the cosine.

    Reference:
        Wang et al. (2018), arXiv:1801.09414, Eq. (4).
        Wang et al. (2018), arXiv:1801.05599, Eq. (6).
    """
    return cosine - m


def add_angle_margin(cosine: Float[Tensor, "*shape"], *, m: float) -> Float[Tensor, "*shape"]:
    r"""Return $\cos(\theta + m)$, the target logit of ArcFace before its scale.

    Beyond $\theta = \pi - m$ the cosine would rise again; there $\cos\theta - m\sin m$ goes on.

    Args:
        cosine: Cosines of the targets.
        m: The margin in radians.

    Raises:
        ValueError: If m is negative or greater than pi / 2.

    Example:
        >>> add_angle_margin(torch.tensor([0.0]), m=math.pi / 6)
        tensor([-0.5000])

    Reference:
        Deng et al. (2019), arXiv:1801.07698, Eq. (3); the continuation stands in the authors' code.
    """
    if not 0 <= m <= math.pi / 2:
        raise ValueError(f"m is {m}: 0 <= m <= pi / 2, in radians.")
    theta = angle(cosine)
    beyond = cosine - m * math.sin(m)
    return torch.where(theta <= math.pi - m, (theta + m).cos(), beyond)  # (eq:margin-arcface)


def with_target(
    logits: Float[Tensor, "N C"], target: Int[Tensor, " N"], value: Float[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    r"""Return logits in which each row's target has another value.

    Args:
        logits: Scores of C classes.
        target: The true classes.
        value: The new scores of the targets.

    Example:
        >>> with_target(torch.zeros(1, 3), torch.tensor([1]), torch.tensor([-2.0]))
        tensor([[ 0., -2.,  0.]])
    """
    return logits.scatter(1, target[:, None], value[:, None])


def _target(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).squeeze(1)


def normalized_softmax_loss(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    scale: float,
) -> Float[Tensor, " N"]:
    r"""Cross-entropy of scaled cosines, without a margin.

    Args:
        x: Features.
        w: Class weights.
        target: The true classes.
        scale: The factor s.

    Returns:
        One loss a row.

    Reference:
        Wang et al. (2017), arXiv:1704.06369, section 3.2.
    """
    return cross_entropy(cosine_logits(x, w, scale=scale), target)


def l_softmax_loss(
    x: Float[Tensor, "N D"], w: Float[Tensor, "C D"], target: Int[Tensor, " N"], *, m: int
) -> Float[Tensor, " N"]:
    r"""Cross-entropy with the target logit $\lVert w_y\rVert\lVert x\rVert\psi(\theta_y)$.

    Args:
        x: Features.
        w: Class weights; their length counts.
        target: The true classes.
        m: The multiplicative margin.

    Returns:
        One loss a row.

    Reference:
        Liu et al. (2016), arXiv:1612.02295, Eq. (4): large-margin softmax.
    """
    lengths = x.norm(dim=1, keepdim=True) * w.norm(dim=1)
    cosine = cosine_logits(x, w)
    value = psi(angle(_target(cosine, target)), m=m) * _target(lengths, target)
    return cross_entropy(with_target(lengths * cosine, target, value), target)


def a_softmax_loss(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    m: int,
    lam: float = 0.0,
) -> Float[Tensor, " N"]:
    r"""Cross-entropy with the target logit $\lVert x\rVert\psi(\theta_y)$: SphereFace.

    $$
    \text{target logit} = \lVert x\rVert\,\frac{\lambda\cos\theta_y + \psi(\theta_y)}{1 + \lambda}
    $$

    Args:
        x: Features; their length counts.
        w: Class weights; only their direction counts.
        target: The true classes.
        m: The multiplicative margin.
        lam: Weight of the plain cosine, large at the beginning of training.

    Returns:
        One loss a row.

    Reference:
        Liu et al. (2017), arXiv:1704.08063, Eq. (7); the annealing is that of arXiv:1612.02295.
    """
    length = x.norm(dim=1)
    cosine = cosine_logits(x, w)
    own = _target(cosine, target)
    value = length * (lam * own + psi(angle(own), m=m)) / (1 + lam)
    return cross_entropy(with_target(length[:, None] * cosine, target, value), target)


def cosface_loss(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    scale: float,
    m: float,
) -> Float[Tensor, " N"]:
    r"""Cross-entropy with the target logit $s(\cos\theta_y - m)$: CosFace, AM-Softmax.

    Args:
        x: Features.
        w: Class weights.
        target: The true classes.
        scale: The factor s; it multiplies the margin, too.
        m: The margin, in units of the cosine.

    Returns:
        One loss a row.
    """
    cosine = cosine_logits(x, w)
    value = add_cosine_margin(_target(cosine, target), m=m)
    return cross_entropy(scale * with_target(cosine, target, value), target)  # (eq:margin-cosface)


def arcface_loss(
    x: Float[Tensor, "N D"],
    w: Float[Tensor, "C D"],
    target: Int[Tensor, " N"],
    *,
    scale: float,
    m: float,
) -> Float[Tensor, " N"]:
    r"""Cross-entropy with the target logit $s\cos(\theta_y + m)$: ArcFace.

    Args:
        x: Features.
        w: Class weights.
        target: The true classes.
        scale: The factor s.
        m: The margin in radians.

    Returns:
        One loss a row.
    """
    cosine = cosine_logits(x, w)
    value = add_angle_margin(_target(cosine, target), m=m)
    return cross_entropy(scale * with_target(cosine, target, value), target)


def scale_lower_bound(n_classes: int, p: float) -> float:
    r"""Return the scale below which no cosine classifier gives every class centre probability p.

    $$
    s \ge \frac{C - 1}{C} \log \frac{(C - 1)\,p}{1 - p}
    $$

    Args:
        n_classes: The number C.
        p: A probability, more than 1 / C.

    Raises:
        ValueError: If there are fewer than two classes, or p is out of range.

    Example:
        >>> round(scale_lower_bound(10, 0.99), 3)
        6.113

    Reference:
        Wang et al. (2018), arXiv:1801.09414, section 3.3.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes is {n_classes}: n_classes >= 2.")
    if not 1 / n_classes < p < 1:
        raise ValueError(f"p is {p}: 1/{n_classes} < p < 1.")
    C = n_classes
    return (C - 1) / C * math.log((C - 1) * p / (1 - p))  # (eq:margin-scale)


def pair_scores(
    x: Float[Tensor, "N D"], label: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " P"], Bool[Tensor, " P"]]:
    r"""Return the cosine of every pair of features, and whether their labels agree.

    Args:
        x: Features.
        label: What each of them shows.

    Returns:
        N (N - 1) / 2 scores, and as many answers.
    """
    first, second = torch.triu_indices(len(x), len(x), offset=1)
    unit = F.normalize(x, dim=1)
    cosine = unit @ unit.T
    return cosine[first, second], label[first] == label[second]


def tar_at_far(score: Float[Tensor, " P"], same: Bool[Tensor, " P"], *, far: float) -> float:
    r"""Return the share of true pairs accepted where a share `far` of the false ones is, too.

    The threshold is the smallest at which at most that share of false pairs lies above.

    Args:
        score: Similarity of each pair.
        same: Whether the pair is a true one.
        far: False accept rate, from 0 to 1.

    Returns:
        True accept rate.

    Raises:
        ValueError: If far is out of range, or if there are no true or no false pairs.

    Example:
        >>> score = torch.tensor([0.9, 0.8, 0.3, 0.7, 0.2, 0.1])
        >>> same = torch.tensor([True, True, True, False, False, False])
        >>> tar_at_far(score, same, far=0.0), tar_at_far(score, same, far=0.34)
        (0.6666666865348816, 1.0)
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far is {far}: 0 <= far <= 1.")
    if same.all() or not same.any():
        raise ValueError(f"{int(same.sum())} of {len(same)} pairs are true: there must be both.")
    false = score[~same].sort(descending=True).values
    allowed = int(far * len(false))
    if allowed == len(false):
        return 1.0
    return (score[same] > false[allowed]).float().mean().item()
