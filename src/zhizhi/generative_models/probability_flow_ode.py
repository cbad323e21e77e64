"""The probability-flow ODE: the marginals of a diffusion without its randomness, and likelihoods.

A path x_t = a x_0 + b eps carries the density p_t along; so does the ODE whose velocity is computed
here from the score. What it carries can be followed in both directions, and its density with it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.divergence import value_and_divergence, value_and_hutchinson
from zhizhi.generative_models.ode_solver import rk4
from zhizhi.generative_models.paths import linear_sde
from zhizhi.generative_models.prediction import Path

Velocity = Callable[[Tensor, Tensor], Tensor]  # of x [N, D] and one time


def probability_flow_velocity(
    x: Float[Tensor, "*batch D"], score: Float[Tensor, "*batch D"], path: Path
) -> Float[Tensor, "*batch D"]:
    r"""Return the velocity that moves x_t so that its density is p_t at all times.

    $$
    u_t(x) = f_t\,x - \tfrac12 g_t^2\,\nabla\log p_t(x), \qquad
        f = \frac{\dot a}{a},\quad g^2 = 2b\dot b - 2fb^2
    $$

    Args:
        x: Where.
        score: Gradient of log p_t there.
        path: Coefficients and derivatives at this time, as tensors of no or of the batch's axes.

    Returns:
        The velocity; the mean of a' x_0 + b' eps given x_t, which flow matching learns directly.

    Raises:
        ValueError: If the path has no derivatives, or its signal-to-noise ratio grows.

    Example:
        >>> from zhizhi.generative_models.paths import straight_path
        >>> x, half = torch.tensor([2.0, 4.0]), torch.tensor(0.5)
        >>> probability_flow_velocity(x, -2 * x, straight_path(half))  # standard normal data
        tensor([0., 0.])

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (13).
    """
    f, g_squared = linear_sde(path)
    return f[..., None] * x - 0.5 * g_squared[..., None] * score  # (eq:pfode-ode)


def log_likelihood(
    velocity: Velocity,
    x: Float[Tensor, "N D"],
    times: Float[Tensor, " T"],
    *,
    log_prior: Callable[[Tensor], Tensor],
    probes: Float[Tensor, "N D"] | None = None,
) -> Float[Tensor, " N"]:
    r"""Return the log density of data: carry them to the prior, and add up how the flow spreads.

    $$
    \log p_{t_0}(x_{t_0}) = \log p_{t_1}(x_{t_1})
        + \int_{t_0}^{t_1} \nabla\cdot u_t(x_t)\,\mathrm dt, \qquad \dot x_t = u_t(x_t)
    $$

    Position and integral are advanced together by `rk4`. Under `torch.no_grad()` the result is a
    plain number; otherwise all steps are kept for training through them.

    Args:
        velocity: u; each row by itself, with gradients by x.
        x: Data at times[0].
        times: From the data to the prior, finely enough: the grid is the only error.
        log_prior: Log density at times[-1], of all rows.
        probes: None for the exact divergence, D backward passes an evaluation; or one vector a
            row of mean 0 and covariance I, kept for the whole way, for an unbiased estimate with
            one.

    Returns:
        One number a row, in nats.

    Raises:
        ValueError: If the grid has no step.

    Example:
        >>> def log_prior(y):  # a standard normal
        ...     return -0.5 * (y.square() + math.log(2 * math.pi)).sum(dim=1)
        >>> import math
        >>> x, times = torch.zeros(1, 3), torch.linspace(0, 1, 9)
        >>> with torch.no_grad():  # at time 1 all is twice as wide: density is 8 times as high here
        ...     p = log_likelihood(lambda x, t: math.log(2) * x, x, times, log_prior=log_prior)
        >>> (p - log_prior(x)).exp()
        tensor([8.0000])

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (39), App. D.2; Chen et al. (2018),
        arXiv:1806.07366, Theorem 1, for the derivative; Grathwohl et al. (2019), arXiv:1810.01367,
        for the probes.
    """

    def spread(state: Tensor, t: Tensor) -> Tensor:
        def field(y: Tensor) -> Tensor:
            return velocity(y, t)

        if probes is None:
            value, divergence = value_and_divergence(field, state[:, :-1])
        else:
            value, divergence = value_and_hutchinson(field, state[:, :-1], probes)
        return torch.cat([value, divergence[:, None]], dim=1)

    start = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    end = rk4(spread, start, times)[-1]
    return log_prior(end[:, :-1]) + end[:, -1]  # (eq:pfode-likelihood)


def gaussian_flow(
    x: Float[Tensor, "*batch D"],
    *,
    mean: Float[Tensor, "*#batch D"],
    std: Float[Tensor, "*#batch D"],
    start: Path,
    end: Path,
) -> Float[Tensor, "*batch D"]:
    r"""Solve the ODE exactly where the data are Gaussian with independent coordinates.

    $$
    x_t = a_t\mu + \sqrt{\frac{a_t^2 s^2 + b_t^2}{a_s^2 s^2 + b_s^2}}\;(x_s - a_s\mu)
    $$

    In other coordinates the covariance may be any: a^2 C + b^2 I has the eigenvectors of C.

    Args:
        x: Where the way begins.
        mean: Of the data.
        std: Of the data.
        start: Coefficients at the beginning, as tensors or numbers.
        end: Coefficients at the end; derivatives are not needed.

    Returns:
        Where it ends.

    Raises:
        ValueError: If x has no width at the beginning: a point cannot be stretched.

    Example:
        >>> noise, data = Path(0.0, 1.0), Path(1.0, 0.0)
        >>> mean, std = torch.tensor([5.0]), torch.tensor([0.1])
        >>> gaussian_flow(torch.tensor([2.0]), mean=mean, std=std, start=noise, end=data)
        tensor([5.2000])

    Reference:
        Song et al. (2021), arXiv:2011.13456, Sec. 4.3, solved for this case.
    """
    variance = (start.a * std).square() + start.b**2
    if variance.min() <= 0:
        raise ValueError(
            f"the smallest variance at the start is {variance.min().item():.6g}: "
            "it must be positive."
        )
    stretch = (((end.a * std).square() + end.b**2) / variance).sqrt()
    return end.a * mean + stretch * (x - start.a * mean)  # (eq:pfode-gaussian)
