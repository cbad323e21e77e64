"""Stochastic approximation: roots of functions that can only be seen through noise."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def step_sizes(
    n: int, *, scale: float = 1.0, power: float = 1.0, offset: float = 0.0
) -> Float[Tensor, " n"]:
    r"""Return the step sizes $a_k = c\,(k + k_0)^{-p}$ for $k = 1, \dots, n$.

    $\sum a_k = \infty$ needs $p \le 1$, $\sum a_k^2 < \infty$ needs $p > \tfrac12$; a constant has
    p = 0.

    Args:
        n: How many.
        scale: The factor c.
        power: The exponent p.
        offset: The shift k_0, which makes the first steps smaller.

    Returns:
        Step sizes in float64.

    Raises:
        ValueError: If n is negative, or the offset makes the first step infinite.

    Example:
        >>> step_sizes(3)
        tensor([1.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    if n < 0 or offset <= -1:
        raise ValueError(f"n is {n} and offset {offset}: n >= 0 and offset > -1.")
    return scale * (torch.arange(1, n + 1, dtype=torch.float64) + offset) ** -power


def robbins_monro(
    g_noisy: Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]],
    w_1: Float[Tensor, "*shape"],
    steps: Float[Tensor, " n"],
) -> Float[Tensor, "n_plus_1 *shape"]:
    r"""Walk against noisy values of a function whose root is sought.

    $$
    w_{k+1} = w_k - a_k\,\tilde g(w_k, \eta_k)
    $$

    Args:
        g_noisy: Returns a noisy value of g at w; it draws its noise itself.
        w_1: Where the walk begins; many walks at once if it has axes.
        steps: The step sizes a_k.

    Returns:
        All places, the first included.

    Example:
        >>> robbins_monro(lambda w: w - 1, torch.tensor(5.0), torch.tensor([0.5, 0.5]))
        tensor([5., 3., 2.])

    Reference:
        Robbins & Monro (1951), Ann. Math. Statist. 22(3); Zhao, Mathematical Foundations of
        Reinforcement Learning, Eq. (6.5).
    """
    path = [w_1]
    for a in steps.to(w_1.dtype):
        path.append(path[-1] - a * g_noisy(path[-1]))  # (eq:sa-robbins-monro)
    return torch.stack(path)


def running_mean(
    x: Float[Tensor, "n *shape"],
    steps: Float[Tensor, " n_steps"],
    *,
    start: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "n_plus_1 *shape"]:
    r"""Estimate a mean one sample at a time.

    $$
    w_{k+1} = w_k - \alpha_k\,(w_k - x_k)
    $$

    With $\alpha_k = 1/k$ it is the average of the first k samples, wherever it started.

    Args:
        x: Samples, in the order in which they come.
        steps: The step sizes.
        start: The first guess; 0 when None.

    Returns:
        All estimates, the first guess included.

    Raises:
        ValueError: If there are not as many steps as samples.

    Example:
        >>> running_mean(torch.tensor([2.0, 4.0, 9.0]), step_sizes(3))
        tensor([0., 2., 3., 5.])

    Reference:
        Zhao, Mathematical Foundations of Reinforcement Learning, Eq. (6.4).
    """
    if len(x) != len(steps):
        raise ValueError(f"{len(x)} samples and {len(steps)} steps: they must be as many.")
    samples = iter(x)
    first = torch.zeros_like(x[0]) if start is None else start
    return robbins_monro(lambda w: w - next(samples), first, steps)  # (eq:sa-mean)


def dvoretzky_path(
    alpha: Float[Tensor, " n_alpha"],
    beta: Float[Tensor, " n_beta"],
    noise: Float[Tensor, "n *shape"],
    *,
    start: float = 1.0,
) -> Float[Tensor, "n_plus_1 *shape"]:
    r"""Follow the error of a stochastic approximation.

    $$
    \Delta_{k+1} = (1 - \alpha_k)\,\Delta_k + \beta_k\,\eta_k
    $$

    Args:
        alpha: How much of the error is taken away.
        beta: How much of the noise comes in.
        noise: The noise, of mean 0 given the past.
        start: The first error.

    Returns:
        All errors, the first included.

    Raises:
        ValueError: If the three are not as many.

    Example:
        >>> half = torch.full((2,), 0.5)
        >>> dvoretzky_path(half, half, torch.ones(2), start=4.0)
        tensor([4.0000, 2.5000, 1.7500])

    Reference:
        Dvoretzky (1956); Zhao, Mathematical Foundations of Reinforcement Learning, Theorem 6.2.
    """
    if not len(alpha) == len(beta) == len(noise):
        counts = f"{len(alpha)} alphas, {len(beta)} betas, {len(noise)} noises"
        raise ValueError(f"{counts}: they must be as many.")
    path = [torch.full_like(noise[0], start)]
    for a, b, eta in zip(alpha, beta, noise, strict=True):
        path.append((1 - a) * path[-1] + b * eta)  # (eq:sa-dvoretzky)
    return torch.stack(path)


def polyak_average(path: Float[Tensor, "n *shape"], *, burn_in: int = 0) -> Float[Tensor, "*shape"]:
    r"""Average the places of a walk instead of taking the last.

    Args:
        path: The places.
        burn_in: How many of the first ones to leave out.

    Returns:
        Their mean.

    Raises:
        ValueError: If nothing is left.

    Example:
        >>> polyak_average(torch.tensor([9.0, 1.0, 3.0]), burn_in=1)
        tensor(2.)

    Reference:
        Polyak & Juditsky (1992), SIAM J. Control Optim. 30(4).
    """
    if not 0 <= burn_in < len(path):
        raise ValueError(f"burn_in is {burn_in} of {len(path)}: 0 <= burn_in < {len(path)}.")
    return path[burn_in:].mean(dim=0)  # (eq:sa-polyak)
