"""Score matching: learn the gradient of a log density, and sample with Langevin dynamics.

Losses have one value a row, so that they can be averaged over data or over a density on a grid.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.divergence import (
    Field,
    value_and_divergence,
    value_and_hutchinson,
)

Sigma = float | Float[Tensor, ""] | Float[Tensor, " N"]  # one for all rows, or one for each
NoisedScore = Callable[[Tensor, Tensor], Tensor]  # (x [N, D], sigma [N]) -> score [N, D]


def explicit_score_matching_loss(
    score_fn: Field, x: Float[Tensor, "N D"], score: Float[Tensor, "N D"]
) -> Float[Tensor, " N"]:
    r"""Compare with the true score, where it is known.

    $$
    \tfrac12 \big\| s_\theta(x) - \nabla \log p(x) \big\|^2
    $$

    Args:
        score_fn: The model.
        x: Samples of p.
        score: The true score at x.

    Returns:
        One loss a row; its mean over p is half the Fisher divergence.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> explicit_score_matching_loss(lambda x: 0 * x, x, -x)
        tensor([2.5000])

    Reference:
        Hyvärinen (2005), JMLR 6, Eq. (2).
    """
    return 0.5 * (score_fn(x) - score).square().sum(dim=1)  # (eq:score-explicit)


def implicit_score_matching_loss(score_fn: Field, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    r"""Do without the true score, by D backward passes.

    $$
    \nabla\cdot s_\theta(x) + \tfrac12 \| s_\theta(x) \|^2
    $$

    Args:
        score_fn: The model.
        x: Samples of p.

    Returns:
        One loss a row; its mean is that of the explicit loss, less a constant.

    Example:
        >>> with torch.no_grad():  # the true score of a standard normal
        ...     implicit_score_matching_loss(lambda x: -x, torch.tensor([[1.0, 2.0]]))
        tensor([0.5000])

    Reference:
        Hyvärinen (2005), JMLR 6, Eq. (4).
    """
    value, divergence = value_and_divergence(score_fn, x)
    return divergence + 0.5 * value.square().sum(dim=1)  # (eq:score-implicit)


def sliced_score_matching_loss(
    score_fn: Field, x: Float[Tensor, "N D"], v: Float[Tensor, "N D"]
) -> Float[Tensor, " N"]:
    r"""Match the score along one direction a row, with one backward pass.

    $$
    v^\top \nabla s_\theta(x)\, v + \tfrac12 \big(v^\top s_\theta(x)\big)^2
    $$

    Args:
        score_fn: The model.
        x: Samples of p.
        v: Directions with covariance I.

    Returns:
        One loss a row; its mean over v is the implicit loss.

    Example:
        >>> x, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0]])
        >>> with torch.no_grad():
        ...     sliced_score_matching_loss(lambda x: -x, x, v)
        tensor([-1.5000])

    Reference:
        Song et al. (2019), arXiv:1905.07088: SSM.
    """
    value, estimate = value_and_hutchinson(score_fn, x, v)
    return estimate + 0.5 * (value * v).sum(dim=1).square()  # (eq:score-sliced)


def sliced_score_matching_vr_loss(
    score_fn: Field, x: Float[Tensor, "N D"], v: Float[Tensor, "N D"]
) -> Float[Tensor, " N"]:
    r"""Estimate only the divergence along a direction, since the other term is known exactly.

    $$
    v^\top \nabla s_\theta(x)\, v + \tfrac12 \| s_\theta(x) \|^2
    $$

    Args:
        score_fn: The model.
        x: Samples of p.
        v: Directions with covariance I; unit vectors would be wrong here.

    Returns:
        One loss a row; its mean over v is the implicit loss.

    Example:
        >>> x, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0]])
        >>> with torch.no_grad():
        ...     sliced_score_matching_vr_loss(lambda x: -x, x, v)
        tensor([0.5000])

    Reference:
        Song et al. (2019), arXiv:1905.07088: SSM-VR, with reduced variance.
    """
    value, estimate = value_and_hutchinson(score_fn, x, v)
    return estimate + 0.5 * value.square().sum(dim=1)


def denoising_score_matching_loss(
    score_fn: Field,
    x: Float[Tensor, "N D"],
    noise: Float[Tensor, "N D"],
    *,
    sigma: Sigma,
) -> Float[Tensor, " N"]:
    r"""Learn the score of noised data by guessing the noise, without second derivatives.

    $$
    \tfrac12 \Big\| s_\theta(\tilde x) + \frac{\tilde x - x}{\sigma^2} \Big\|^2, \qquad
        \tilde x = x + \sigma\epsilon
    $$

    Args:
        score_fn: The model.
        x: Data.
        noise: Standard normal.
        sigma: Standard deviation of what is added.

    Returns:
        One loss a row; the best model has the score of the noised data, and a loss above 0.

    Raises:
        ValueError: If a sigma is not positive.

    Example:
        >>> x, noise = torch.zeros(1, 2), torch.ones(1, 2)  # data at 0: the score is -x / sigma^2
        >>> denoising_score_matching_loss(lambda x: -x / 0.25, x, noise, sigma=0.5)
        tensor([0.])

    Reference:
        Vincent (2011), Neural Computation 23(7): the denoising objective.
    """
    scale = _column(sigma, x)
    # (eq:score-denoising)
    return 0.5 * (score_fn(x + scale * noise) + noise / scale).square().sum(dim=1)


def noise_conditional_loss(
    score_fn: NoisedScore,
    x: Float[Tensor, "N D"],
    *,
    sigmas: Float[Tensor, " L"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, " N"]:
    r"""Learn the scores of all noise levels at once, each weighted with its variance.

    $$
    \frac1L \sum_{i=1}^{L} \sigma_i^2\;
        \tfrac12\, \mathbb E\Big\| s_\theta(\tilde x, \sigma_i)
        + \frac{\tilde x - x}{\sigma_i^2} \Big\|^2
    $$

    Args:
        score_fn: The model; it is told the noise of each row.
        x: Data.
        sigmas: The levels; each row draws one.
        generator: Draws levels and noise.

    Returns:
        One loss a row; a model that answers 0 has D / 2 on average.

    Raises:
        ValueError: If a sigma is not positive.

    Example:
        >>> sigmas = geometric_sigmas(first=1.0, last=0.1, n_levels=5)
        >>> def exact(x, sigma):  # for data that are always 0
        ...     return -x / sigma[:, None] ** 2
        >>> noise_conditional_loss(exact, torch.zeros(3, 2), sigmas=sigmas).round(decimals=5)
        tensor([0., 0., 0.])

    Reference:
        Song & Ermon (2019), arXiv:1907.05600, Eq. (5) and (6), with weights sigma^2.
    """
    level = torch.randint(len(sigmas), (len(x),), generator=generator, device=x.device)
    sigma = sigmas.to(x)[level]
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    loss = denoising_score_matching_loss(lambda y: score_fn(y, sigma), x, noise, sigma=sigma)
    return sigma.square() * loss  # (eq:score-ncsn)


def tweedie(
    x_t: Float[Tensor, "N D"], score: Float[Tensor, "N D"], *, sigma: Sigma
) -> Float[Tensor, "N D"]:
    r"""Turn a score into the mean of the clean data.

    $$
    \mathbb E[x \mid \tilde x] = \tilde x + \sigma^2\, \nabla \log q_\sigma(\tilde x)
    $$

    Args:
        x_t: Data with noise.
        score: The score of the noised data there.
        sigma: Standard deviation of the noise.

    Returns:
        One estimate a row.

    Raises:
        ValueError: If a sigma is not positive.

    Example:
        >>> tweedie(torch.tensor([[3.0]]), torch.tensor([[-4.0]]), sigma=0.5)
        tensor([[2.]])

    Reference:
        Robbins (1956); Efron (2011), JASA 106, Eq. (1.4), named after Tweedie.
    """
    return x_t + _column(sigma, x_t).square() * score  # (eq:score-tweedie)


def geometric_sigmas(*, first: float, last: float, n_levels: int) -> Float[Tensor, " L"]:
    r"""Return noise levels with a constant ratio, in float64.

    $$
    \sigma_i = \sigma_1 \Big(\frac{\sigma_L}{\sigma_1}\Big)^{\frac{i-1}{L-1}}
    $$

    Args:
        first: The largest.
        last: The smallest.
        n_levels: How many, two at least.

    Returns:
        Levels from the largest to the smallest.

    Raises:
        ValueError: If there are fewer than two levels, or they do not fall to a positive number.

    Example:
        >>> geometric_sigmas(first=4.0, last=1.0, n_levels=3)
        tensor([4., 2., 1.], dtype=torch.float64)

    Reference:
        Song & Ermon (2019), arXiv:1907.05600, Sec. 4: ten levels from 1 to 0.01.
    """
    if n_levels < 2:
        raise ValueError(f"n_levels is {n_levels}: n_levels >= 2.")
    if not 0 < last < first:
        raise ValueError(f"first is {first} and last is {last}: 0 < last < first.")
    logs = torch.linspace(math.log(first), math.log(last), n_levels, dtype=torch.float64)
    return logs.exp()


def langevin_step(
    x: Float[Tensor, "N D"],
    score: Float[Tensor, "N D"],
    *,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N D"]:
    r"""Climb the log density a little, and shake.

    $$
    x' = x + \frac\alpha2\, \nabla\log p(x) + \sqrt\alpha\, z, \qquad z \sim \mathcal N(0, I)
    $$

    Args:
        x: Where the chains are.
        score: The score there.
        step_size: The variance alpha of the shake; programs that write x + a s + sqrt(2a) z mean
            a = alpha / 2.
        generator: Draws z.

    Returns:
        Where they go.

    Raises:
        ValueError: If the step is not positive.

    Example:
        >>> x = langevin_step(torch.zeros(10_000, 1), torch.ones(10_000, 1), step_size=0.25)
        >>> abs(x.mean() - 0.125) < 0.05
        tensor(True)

    Reference:
        Song & Ermon (2019), arXiv:1907.05600, Eq. (4).
    """
    if step_size <= 0:
        raise ValueError(f"step_size is {step_size}: step_size > 0.")
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return x + 0.5 * step_size * score + math.sqrt(step_size) * z  # (eq:score-langevin)


@torch.no_grad()
def annealed_langevin(
    score_fn: NoisedScore,
    x: Float[Tensor, "N D"],
    *,
    sigmas: Float[Tensor, " L"],
    n_steps_each: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N D"]:
    r"""Run Langevin dynamics on one noise level after the other, from coarse to fine.

    $$
    \alpha_i = \epsilon\, \frac{\sigma_i^2}{\sigma_L^2}
    $$

    Args:
        score_fn: The score of the noised data, told the noise of each row.
        x: Where the chains begin: anywhere, if the first level is wide enough.
        sigmas: Levels from the largest to the smallest.
        n_steps_each: Steps on each level.
        step_size: The step epsilon of the last level; the others are larger.
        generator: Draws the noise of the steps.

    Returns:
        Samples of the data with the noise of the last level, which `tweedie` can take away.

    Raises:
        ValueError: If the levels do not fall, or the step is not positive.

    Example:
        >>> def exact(x, sigma):  # for data that are always 0
        ...     return -x / sigma[:, None] ** 2
        >>> sigmas = geometric_sigmas(first=10.0, last=0.01, n_levels=10)
        >>> start = 20 * torch.rand(50, 2) - 10
        >>> x = annealed_langevin(exact, start, sigmas=sigmas, n_steps_each=20, step_size=2e-5)
        >>> bool(x.abs().max() < 0.06)
        True

    Reference:
        Song & Ermon (2019), arXiv:1907.05600, Algorithm 1.
    """
    if (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas are {sigmas.tolist()}: each is smaller than the one before.")
    for sigma in sigmas.to(x):
        alpha = step_size * (sigma / sigmas[-1]).item() ** 2  # (eq:score-annealed)
        for _ in range(n_steps_each):
            score = score_fn(x, sigma.expand(len(x)))
            x = langevin_step(x, score, step_size=alpha, generator=generator)
    return x


def _column(sigma: Sigma, x: Tensor) -> Tensor:
    """Return sigma as [1, 1] or [N, 1] in the dtype of x."""
    scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1)
    if scale.min() <= 0:
        raise ValueError(f"the smallest sigma is {scale.min().item():.6g}: sigma > 0.")
    return scale
