"""Mutual information from scores of pairs, and Deep InfoMax, which learns to raise it."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from zhizhi.deep_learning.softmax_cross_entropy import log_sum_exp


def mutual_information(joint: Float[Tensor, "X Y"]) -> Float[Tensor, ""]:
    r"""Return the mutual information of two discrete variables, in nats.

    $$
    I(X; Y) = \sum_{x,y} p(x, y) \log \frac{p(x, y)}{p(x)\, p(y)}
    $$

    Args:
        joint: Probabilities of the pairs, which sum to one; those that are 0 add nothing.

    Raises:
        ValueError: If a probability is negative or they do not sum to one.

    Example:
        >>> mutual_information(torch.eye(4) / 4).exp()
        tensor(4.)
    """
    if (joint < 0).any() or abs(joint.sum().item() - 1) > 1e-6:
        raise ValueError(f"joint sums to {joint.sum().item()}: probabilities sum to 1.")
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, independent)).sum()


def gaussian_mi(rho: float, *, d: int) -> float:
    r"""Return the mutual information of d independent pairs of Gaussians with correlation rho.

    $$
    I = -\frac{d}{2} \log (1 - \rho^2)
    $$

    Args:
        rho: Correlation of each pair, between -1 and 1.
        d: Number of pairs.

    Raises:
        ValueError: If the correlation is 1 or more in size.

    Example:
        >>> round(gaussian_mi(0.9, d=5), 3)
        4.152
    """
    if not -1 < rho < 1:
        raise ValueError(f"rho is {rho}: -1 < rho < 1.")
    return -d / 2 * math.log1p(-(rho**2))


def gaussian_log_ratio(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], *, rho: float
) -> Float[Tensor, "N M"]:
    r"""Return $\log p(x_i, y_j) / (p(x_i)\, p(y_j))$ for such Gaussians: the best critic.

    Args:
        x: Samples of the one variable.
        y: Samples of the other.
        rho: Their correlation, component by component.

    Raises:
        ValueError: If the correlation is 1 or more in size.
    """
    per_pair = gaussian_mi(rho, d=1)
    a, b = x[:, None], y[None]
    quadratic = (rho**2 * (a**2 + b**2) - 2 * rho * a * b) / (2 * (1 - rho**2))
    return (per_pair - quadratic).sum(dim=-1)


def _pairs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the true pairs, and those of all others."""
    off = ~torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.diagonal(dim1=-2, dim2=-1), scores[..., off]


def _check(scores: Tensor) -> None:
    N, M = scores.shape[-2:]
    if N != M or N < 2:
        raise ValueError(
            f"scores are {N} by {M}: a square of at least 2, true pairs on its diagonal."
        )


def dv_bound(scores: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    r"""Donsker and Varadhan's lower bound on the mutual information.

    $$
    I \ge \mathbb E_p[T] - \log \mathbb E_{p \otimes p}[e^T]
    $$

    Args:
        scores: T of row i with column j; the pairs on the diagonal are true.

    Returns:
        An estimate of the bound. The logarithm of a mean over few samples is too small on average,
        so that it can lie above the truth.

    Raises:
        ValueError: If the scores are no square of at least 2.

    Reference:
        Belghazi et al. (2018), arXiv:1801.04062, Theorem 1.
    """
    _check(scores)
    true, others = _pairs(scores)
    return true.mean(dim=-1) - (log_sum_exp(others) - math.log(others.shape[-1]))  # (eq:dim-dv)


def nwj_bound(scores: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    r"""The lower bound of Nguyen, Wainwright and Jordan; its estimate has no bias.

    $$
    I \ge \mathbb E_p[T] - e^{-1}\, \mathbb E_{p \otimes p}[e^T]
    $$

    Args:
        scores: T of row i with column j. The best is one more than the log ratio.

    Raises:
        ValueError: If the scores are no square of at least 2.

    Reference:
        Poole et al. (2019), arXiv:1905.06922, Eq. (6).
    """
    _check(scores)
    true, others = _pairs(scores)
    return true.mean(dim=-1) - (others - 1).exp().mean(dim=-1)  # (eq:dim-nwj)


def infonce_bound(scores: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    r"""How well each row picks its own column out of N; at most log N.

    $$
    I \ge \mathbb E \Big[ \log \frac{e^{T_{ii}}}{\frac1N \sum_j e^{T_{ij}}} \Big]
    $$

    Args:
        scores: T of row i with column j. A function of the row alone changes nothing.

    Raises:
        ValueError: If the scores are no square of at least 2.

    Reference:
        van den Oord et al. (2018), arXiv:1807.03748, Eq. (4).
    """
    _check(scores)
    true, _ = _pairs(scores)
    N = scores.shape[-1]
    return (true - log_sum_exp(scores)).mean(dim=-1) + math.log(N)  # (eq:dim-nce)


def jsd_objective(scores: Float[Tensor, "*batch N M"]) -> Float[Tensor, "*batch"]:
    r"""A stable objective with the same best critic, which is no bound on the information.

    $$
    \mathbb E_p[-\operatorname{sp}(-T)] - \mathbb E_{p \otimes p}[\operatorname{sp}(T)],
        \qquad \operatorname{sp}(t) = \log(1 + e^t)
    $$

    Args:
        scores: T of row i with column j. The best is the log ratio.

    Returns:
        Between $-\infty$ and 0; at its best twice the Jensen-Shannon divergence less log 4.

    Raises:
        ValueError: If the scores are no square of at least 2.

    Reference:
        Hjelm et al. (2019), arXiv:1808.06670, Eq. (4).
    """
    _check(scores)
    true, others = _pairs(scores)
    return -F.softplus(-true).mean(dim=-1) - F.softplus(others).mean(dim=-1)  # (eq:dim-jsd)


class QuadraticCritic(nn.Module):
    r"""Scores $x^\top A x + x^\top W y + y^\top B y + c$ of all pairs; Gaussians need no more."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.a, self.b, self.w = (nn.Parameter(torch.zeros(d, d)) for _ in range(3))
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "N M"]:
        """Return the score of every x with every y."""
        own_x = einsum(x, self.a, x, "N D, D E, N E -> N")
        own_y = einsum(y, self.b, y, "M D, D E, M E -> M")
        return own_x[:, None] + x @ self.w @ y.T + own_y[None] + self.c


class Mosaics(NamedTuple):
    """Pictures of four tiles that show the same class, and the classes."""

    tiles: Float[Tensor, "N 4 64"]
    label: Int[Tensor, " N"]


def mosaics(
    x: Float[Tensor, "M 64"],
    y: Int[Tensor, " M"],
    *,
    n: int,
    generator: torch.Generator | None = None,
) -> Mosaics:
    r"""Draw pictures of four tiles: different images of one class.

    What the tiles of a picture have in common is the class and nothing else. The labels are used
    to build the pictures, and not to learn from them.

    Args:
        x: Images, at least four of each class.
        y: Their classes.
        n: Number of pictures.
        generator: Source of the draws.

    Raises:
        ValueError: If a class has fewer than four images.
    """
    classes, counts = y.unique(return_counts=True)
    if counts.min() < 4:
        rare = classes[counts.argmin()].item()
        raise ValueError(f"class {rare} has {counts.min().item()} images: four make a mosaic.")
    label = classes[torch.randint(len(classes), (n,), generator=generator)]
    tiles = x.new_empty(n, 4, x.shape[1])
    for c in classes.tolist():
        rows, members = (label == c).nonzero()[:, 0], (y == c).nonzero()[:, 0]
        order = torch.rand(len(rows), len(members), generator=generator).argsort(dim=1)[:, :4]
        tiles[rows] = x[members[order]]
    return Mosaics(tiles, label)


class DeepInfoMax(nn.Module):
    r"""An encoder of tiles, and the scores of its code with whole pictures and with single tiles.

    A tile becomes features, the same way everywhere; all features of a picture become its code. The
    critics compare the code with the features by an inner product after one layer each.

    Args:
        n_code: Width D of the code.
        n_features: Width of the features of a tile, and of the space of comparison.
        n_tiles: Tiles of a picture.
        n_pixels: Pixels of a tile.
    """

    def __init__(
        self, n_code: int, *, n_features: int = 64, n_tiles: int = 4, n_pixels: int = 64
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(n_pixels, n_features), nn.ReLU())
        self.code = nn.Linear(n_tiles * n_features, n_code)
        self.ask = nn.Linear(n_code, n_features)
        self.answer_tile = nn.Linear(n_features, n_features)
        self.answer_picture = nn.Linear(n_tiles * n_features, n_features)

    def encode(self, tiles: Float[Tensor, "B M P"]) -> Float[Tensor, "B D"]:
        """Return the codes of pictures."""
        return self.code(rearrange(self.features(tiles), "B M F -> B (M F)"))

    def global_scores(self, tiles: Float[Tensor, "B M P"]) -> Float[Tensor, "B B"]:
        """Return the score of each code with each whole picture."""
        flat = rearrange(self.features(tiles), "B M F -> B (M F)")
        return self.ask(self.code(flat)) @ self.answer_picture(flat).T

    def local_scores(self, tiles: Float[Tensor, "B M P"]) -> Float[Tensor, "M B B"]:
        """Return the score of each code with each tile of each picture, place by place."""
        features = self.features(tiles)
        asked = self.ask(self.code(rearrange(features, "B M F -> B (M F)")))
        return einsum(asked, self.answer_tile(features), "B F, C M F -> M B C")


def linear_probe(
    x_train: Float[Tensor, "N D"],
    y_train: Int[Tensor, " N"],
    x_test: Float[Tensor, "M D"],
    y_test: Int[Tensor, " M"],
) -> float:
    r"""Return the accuracy of a linear classifier on frozen features.

    Features are brought to mean 0 and variance 1 on the training part; the classifier is logistic
    regression with scikit-learn's default penalty.

    Args:
        x_train: Features to fit to.
        y_train: Their classes.
        x_test: Features to classify.
        y_test: Their classes.
    """
    mean, std = x_train.mean(dim=0), x_train.std(dim=0).clamp_min(1e-6)
    fitted = LogisticRegression(max_iter=2000).fit(
        ((x_train - mean) / std).numpy(), y_train.numpy()
    )
    return float(fitted.score(((x_test - mean) / std).numpy(), y_test.numpy()))
