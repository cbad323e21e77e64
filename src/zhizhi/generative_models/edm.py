"""EDM: every path with Gaussian noise is one denoiser D(x; sigma), seen in other coordinates.

A point x_t = a x_0 + b eps of any path becomes x = x_t / a with noise of standard deviation
sigma = b / a. What is left to choose is independent: the levels, the solver, how the network is
wrapped, and what it is trained on.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.ode_solver import Field
from zhizhi.generative_models.prediction import Path

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], sigma [B]) -> x_0 hat [B, ...]
Network = Callable[[Tensor, Tensor], Tensor]  # (c_in x [B, ...], c_noise [B]) -> F [B, ...]


def to_edm(
    x_t: Float[Tensor, "*batch"], path: Path
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, ""]]:
    r"""Divide the scale out: a point of any path as data plus noise.

    $$
    x = \frac{x_t}{a}, \qquad \sigma = \frac{b}{a}
    $$

    Args:
        x_t: Points of the path.
        path: Where on it, with one a and one b for all points.

    Returns:
        x, and sigma in float64.

    Raises:
        ValueError: If a is 0, where sigma is infinite: flow matching at t = 1.

    Example:
        >>> x, sigma = to_edm(torch.tensor([3.0]), Path(0.25, 0.75))  # flow matching, t = 3/4
        >>> x, sigma.item()
        (tensor([12.]), 3.0)

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Sec. 2 and Table 1: s(t) and sigma(t).
    """
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (path.a, path.b))
    if a == 0:
        raise ValueError(f"a is {a.item():g} and b is {b.item():g}: sigma = b / a needs a > 0.")
    return x_t / a, b / a  # (eq:edm-coordinates)


def denoise_on_path(
    denoise: Denoiser, x_t: Float[Tensor, "B *pixels"], path: Path
) -> Float[Tensor, "B *pixels"]:
    r"""Ask one denoiser for the data at any point of any path.

    $$
    \hat x_0(x_t) = D\!\Big(\frac{x_t}{a};\ \frac{b}{a}\Big)
    $$

    `prediction.convert(..., source="data")` turns the answer into noise, v, score or velocity.

    Args:
        denoise: D.
        x_t: Points of the path.
        path: Where on it.

    Returns:
        The estimate of x_0.

    Raises:
        ValueError: If a is 0.

    Example:
        >>> def denoise(x, sigma):  # exact for standard normal data
        ...     return x / (1 + sigma[:, None] ** 2)
        >>> denoise_on_path(denoise, torch.tensor([[2.0]]), Path(0.6, 0.8))
        tensor([[1.2000]])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Sec. 2.
    """
    x, sigma = to_edm(x_t, path)
    return denoise(x, sigma.to(x).expand(len(x)))  # (eq:edm-one-denoiser)


def edm_field(denoise: Denoiser) -> Field:
    r"""Return the right-hand side of the one equation, with sigma for time.

    $$
    \frac{\mathrm dx}{\mathrm d\sigma} = \frac{x - D(x; \sigma)}{\sigma}
    $$

    With `ode_solver.euler` and sigma falling to 0 this is DDIM; the last step lands on D.

    Args:
        denoise: D.

    Returns:
        A field (x [B, ...], sigma []) for the solvers; not defined at sigma = 0.

    Example:
        >>> field = edm_field(lambda x, sigma: 0 * x)  # the data are always 0
        >>> field(torch.tensor([[6.0]]), torch.tensor(2.0))
        tensor([[3.]])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Eq. (1) and (3) with sigma(t) = t.
    """

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoise(x, sigma.to(x).expand(len(x)))) / sigma  # (eq:edm-ode)

    return field


def karras_sigmas(
    n_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " levels"]:
    r"""Choose the levels that a run of N steps visits; the last is 0.

    $$
    \sigma_i = \Big(\sigma_{\max}^{1/\rho} + \tfrac{i}{N-1}
        \big(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\big)\Big)^{\rho},
    \quad i < N, \qquad \sigma_N = 0
    $$

    Args:
        n_steps: N.
        sigma_min: The last level before 0.
        sigma_max: The first.
        rho: 1 is uniform in sigma; towards infinity it becomes uniform in log sigma.

    Returns:
        N + 1 levels in float64.

    Raises:
        ValueError: If N < 1, rho <= 0, or not 0 < sigma_min < sigma_max.

    Example:
        >>> karras_sigmas(3, sigma_min=1.0, sigma_max=9.0, rho=2.0)
        tensor([9., 4., 1., 0.], dtype=torch.float64)

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Eq. (5).
    """
    if n_steps < 1 or rho <= 0:
        raise ValueError(f"n_steps is {n_steps} and rho is {rho}: n_steps >= 1 and rho > 0.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"the levels go from {sigma_max} to {sigma_min}: 0 < min < max.")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = torch.linspace(*ends, n_steps, dtype=torch.float64) ** rho  # (eq:edm-levels)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


class Preconditioning(NamedTuple):
    """How a network is wrapped at one level of noise.

    Attributes:
        c_skip: Share of the input that goes straight to the output.
        c_out: Scale of what the network adds.
        c_in: Scale of what the network sees.
        c_noise: What it is told of sigma.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(
    sigma: Float[Tensor, "*shape"], *, sigma_data: float = 0.5
) -> Preconditioning:
    r"""Return the wrapping that gives the network inputs and targets of variance 1.

    $$
    c_{\text{skip}} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
    c_{\text{out}} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{\text{in}} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{\text{noise}} = \tfrac14 \ln \sigma
    $$

    Args:
        sigma: Levels of noise.
        sigma_data: Standard deviation of the data; 0.5 was chosen for images in [-1, 1].

    Returns:
        Four tensors of the shape of sigma.

    Raises:
        ValueError: If a level or sigma_data is not positive.

    Example:
        >>> c = edm_preconditioning(torch.tensor(2.0), sigma_data=2.0)
        >>> c.c_skip, c.c_out, c.c_in
        (tensor(0.5000), tensor(1.4142), tensor(0.3536))

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Table 1 and App. B.6.
    """
    if sigma_data <= 0 or (sigma <= 0).any():
        least = sigma.min().item()
        raise ValueError(
            f"the least sigma is {least:g} and sigma_data is {sigma_data:g}: both must be positive."
        )
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total,  # (eq:edm-skip)
        c_out=sigma * sigma_data / total.sqrt(),  # (eq:edm-out)
        c_in=1 / total.sqrt(),  # (eq:edm-in)
        c_noise=sigma.log() / 4,
    )


def edm_denoise(
    network: Network,
    x: Float[Tensor, "B *pixels"],
    sigma: Float[Tensor, " B"],
    *,
    sigma_data: float = 0.5,
) -> Float[Tensor, "B *pixels"]:
    r"""Make a denoiser of a network.

    $$
    D(x; \sigma) = c_{\text{skip}}\, x + c_{\text{out}}\, F(c_{\text{in}}\, x;\ c_{\text{noise}})
    $$

    Args:
        network: F.
        x: Data plus noise.
        sigma: Level of each row.
        sigma_data: Standard deviation of the data.

    Returns:
        The estimate of the data.

    Raises:
        ValueError: If a level or sigma_data is not positive.

    Example:
        >>> def network(x, c_noise):  # for Gaussian data there is nothing left to learn
        ...     return 0 * x
        >>> edm_denoise(network, torch.tensor([[5.0]]), torch.tensor([2.0]), sigma_data=1.0)
        tensor([[1.]])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Eq. (7).
    """
    c = edm_preconditioning(sigma, sigma_data=sigma_data)
    c_skip, c_out, c_in = (_column(value, x) for value in (c.c_skip, c.c_out, c.c_in))
    return c_skip * x + c_out * network(c_in * x, c.c_noise)  # (eq:edm-wrap)


def log_normal_sigmas(
    n_levels: int,
    *,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " levels"]:
    r"""Draw the levels of noise to train on.

    $$
    \ln \sigma \sim \mathcal N(P_{\text{mean}}, P_{\text{std}}^2)
    $$

    Args:
        n_levels: How many.
        p_mean: Mean of ln sigma.
        p_std: Its standard deviation.
        generator: Draws them.

    Returns:
        The levels.

    Example:
        >>> log_normal_sigmas(3, p_mean=0.0, p_std=0.0)
        tensor([1., 1., 1.])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Table 1 and Sec. 5.
    """
    return (p_mean + p_std * torch.randn(n_levels, generator=generator)).exp()


def edm_loss(
    network: Network,
    x_0: Float[Tensor, "B *pixels"],
    sigma: Float[Tensor, " B"],
    *,
    sigma_data: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    r"""Weight the error of the denoiser so that a network that says 0 has loss 1 at every level.

    $$
    \lambda(\sigma)\, \| D(x_0 + \sigma\epsilon; \sigma) - x_0 \|^2, \qquad
    \lambda = \frac{1}{c_{\text{out}}^2} = \frac{\sigma^2 + \sigma_d^2}{(\sigma\sigma_d)^2}
    $$

    Args:
        network: F.
        x_0: Data.
        sigma: Level of each row, of `log_normal_sigmas`.
        sigma_data: Standard deviation of the data.
        generator: Draws the noise.

    Returns:
        One loss a row, a mean over its pixels.

    Raises:
        ValueError: If a level or sigma_data is not positive.

    Example:
        >>> sigma, g = torch.tensor([0.01, 1.0, 100.0]), torch.Generator().manual_seed(0)
        >>> x_0 = torch.randn(3, 50_000, generator=g)
        >>> edm_loss(lambda x, c: 0 * x, x_0, sigma, sigma_data=1.0, generator=g).round(decimals=1)
        tensor([1., 1., 1.])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Eq. (2) and (8), Table 1; `EDMLoss` of NVlabs/edm.
    """
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
    x = x_0 + _column(sigma, x_0) * noise
    error = edm_denoise(network, x, sigma, sigma_data=sigma_data) - x_0
    weight = 1 / edm_preconditioning(sigma, sigma_data=sigma_data).c_out ** 2  # (eq:edm-loss)
    return weight * error.square().flatten(start_dim=1).mean(dim=1)


def edm_heun_sample(
    denoise: Denoiser,
    x: Float[Tensor, "B *pixels"],
    sigmas: Float[Tensor, " levels"],
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "levels B *pixels"]:
    r"""Walk down the levels by Heun's rule, each step after a little fresh noise.

    $$
    \hat\sigma = (1 + \gamma)\,\sigma_i, \qquad
    \hat x = x + \sqrt{\hat\sigma^2 - \sigma_i^2}\; S_{\text{noise}}\, z, \qquad
    \gamma = \min\!\Big(\frac{S_{\text{churn}}}{N}, \sqrt2 - 1\Big)
    $$

    A step that ends at 0 is Euler's, since the field is not defined there: N steps ask the denoiser
    2N - 1 times.

    Args:
        denoise: D.
        x: Noise of standard deviation sigmas[0].
        sigmas: Of `karras_sigmas`, or others that fall to 0.
        s_churn: 0 for none: the way is deterministic.
        s_min: Least level that gets fresh noise.
        s_max: Greatest.
        s_noise: Factor of the fresh noise.
        generator: Draws it.

    Returns:
        x at all levels.

    Raises:
        ValueError: If the levels do not fall, or s_churn is negative.

    Example:
        >>> x = edm_heun_sample(lambda x, s: 0 * x, torch.tensor([[8.0]]), karras_sigmas(4))
        >>> x[-1]  # the data are always 0
        tensor([[0.]])

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Alg. 2; `edm_sampler` of NVlabs/edm.
    """
    if len(sigmas) < 2 or (sigmas.diff() >= 0).any() or sigmas[-1] < 0:
        raise ValueError(f"the levels are {sigmas.tolist()}: at least 2, falling, not below 0.")
    if s_churn < 0:
        raise ValueError(f"s_churn is {s_churn}: s_churn >= 0.")
    field, chain = edm_field(denoise), [x]
    for sigma, after in itertools.pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)  # (eq:edm-churn)
        sigma_hat, x_hat = sigma, chain[-1]
        if gamma > 0 and s_min <= sigma <= s_max:
            sigma_hat = sigma * (1 + gamma)
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x_hat = x_hat + (sigma_hat**2 - sigma**2).sqrt() * s_noise * z
        slope = field(x_hat, sigma_hat)
        x_next = x_hat + (after - sigma_hat) * slope
        if after > 0:
            slope = (slope + field(x_next, after)) / 2  # (eq:edm-heun)
            x_next = x_hat + (after - sigma_hat) * slope
        chain.append(x_next)
    return torch.stack(chain)


def _column(value: Tensor, x: Tensor) -> Tensor:
    """Give one number a row the axes of x."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1))
