"""How far two samples are apart: numbers that a page can print to say whether a sampler is right.

Each of them is 0 only for equal distributions (Fréchet: equal means and covariances). All but the
energy distance, which is unbiased here, are biased upwards for finite samples, so they are compared
with the distance of two samples of the same distribution, never with 0.
"""

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def energy_distance(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, ""]:
    r"""Return the energy distance of two samples, without bias.

    $$
    2\,\mathbb E\|X - Y\| - \mathbb E\|X - X'\| - \mathbb E\|Y - Y'\|
    $$

    The pairs inside a sample leave out each point with itself, so that the estimate may fall below
    0 for samples of one distribution.

    Args:
        x: One sample.
        y: The other.

    Returns:
        A scalar in the unit of the data.

    Raises:
        ValueError: If a sample has fewer than two points.

    Example:
        >>> energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]]))
        tensor(16.)

    Reference:
        Székely & Rizzo (2013), Energy statistics, J. Stat. Plan. Inference 143, Eq. (1).
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the samples have {len(x)} and {len(y)} points: at least 2 each.")

    def inside(z: Tensor) -> Tensor:
        return _distances(z, z).sum() / (len(z) * (len(z) - 1))

    return 2 * _distances(x, y).mean() - inside(x) - inside(y)


def wasserstein_1d(
    x: Float[Tensor, " N"], y: Float[Tensor, " M"], *, p: int = 1
) -> Float[Tensor, ""]:
    r"""Return the Wasserstein distance of two samples on a line: sorted, then compared.

    $$
    W_p = \Big(\frac1N \sum_i |x_{(i)} - y_{(i)}|^p\Big)^{1/p}
    $$

    Args:
        x: One sample.
        y: The other, of the same size.
        p: Exponent of the cost.

    Returns:
        A scalar in the unit of the data.

    Raises:
        ValueError: If the sizes differ.

    Example:
        >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0]))
        tensor(1.5000)

    Reference:
        Peyré & Cuturi (2019), arXiv:1803.00567, Remark 2.28.
    """
    _check_sizes(x, y)
    return (x.sort().values - y.sort().values).abs().pow(p).mean().pow(1 / p)


def wasserstein_2(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, ""]:
    r"""Return the 2-Wasserstein distance of two samples, by the best assignment.

    $$
    W_2^2 = \min_{\pi \in S_N} \frac1N \sum_i \|x_i - y_{\pi(i)}\|^2
    $$

    The assignment takes cubic time: some thousand points at most.

    Args:
        x: One sample.
        y: The other, of the same size.

    Returns:
        A scalar in the unit of the data.

    Raises:
        ValueError: If the sizes differ.

    Example:
        >>> wasserstein_2(torch.tensor([[0.0], [4.0]]), torch.tensor([[4.0], [0.0]]))
        tensor(0.)

    Reference:
        Peyré & Cuturi (2019), arXiv:1803.00567, Eq. (2.2).
    """
    _check_sizes(x, y)
    cost = _distances(x, y).square()
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return cost[torch.as_tensor(rows), torch.as_tensor(columns)].mean().sqrt()


def frechet_distance(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, ""]:
    r"""Return the squared 2-Wasserstein distance of the Gaussians with the samples' moments.

    $$
    \|\mu_x - \mu_y\|^2 + \operatorname{tr}\big(\Sigma_x + \Sigma_y
        - 2(\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2})^{1/2}\big)
    $$

    FID is this number of the features of an Inception network.

    Args:
        x: One sample.
        y: The other.

    Returns:
        A scalar in the squared unit of the data.

    Raises:
        ValueError: If a sample has fewer than two points.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> frechet_distance(x, x + 1).round(decimals=4)
        tensor(2.)

    Reference:
        Heusel et al. (2017), arXiv:1706.08500, Eq. (6).
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the samples have {len(x)} and {len(y)} points: at least 2 each.")
    covariance_x, covariance_y = _covariance(x), _covariance(y)
    root = _square_root(covariance_x)
    cross = torch.linalg.eigvalsh(root @ covariance_y @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    return shift + covariance_x.trace() + covariance_y.trace() - 2 * cross


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return all distances [N, M]; the exact way, for near points the fast one cancels."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    return centred.T @ centred / (len(x) - 1)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _check_sizes(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise ValueError(f"the samples have {len(x)} and {len(y)} points: the same number.")
