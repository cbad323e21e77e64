"""Solve dx = f(x, t) dt + g(x, t) dw on a grid that is given: Euler-Maruyama, and its moments.

The diffusion multiplies each coordinate of the noise by itself, and is read at the start of a step
(Itô). The grid may run backwards: then dt is negative, and the variance of a step is g^2 |dt|.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Drift = Callable[[Tensor, Tensor], Tensor]
Diffusion = Callable[[Tensor, Tensor], Tensor]  # broadcasts against x


def brownian_increments(
    x: Float[Tensor, "*batch"],
    times: Float[Tensor, " T"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "steps *batch"]:
    r"""Draw what a Brownian motion adds in each step of a grid.

    $$
    \Delta w_i = \sqrt{|t_{i+1} - t_i|}\; z_i, \qquad z_i \sim \mathcal N(0, I)
    $$

    Neighbours may be added up: the sum of two is the increment over both steps, so that grids of
    different steps can follow one and the same path.

    Args:
        x: Gives shape, dtype and device.
        times: The grid; it may run backwards.
        generator: Draws z.

    Returns:
        One increment for each step, one fewer than times.

    Example:
        >>> fine = brownian_increments(torch.zeros(3), torch.linspace(0, 1, 5))
        >>> coarse = fine.unflatten(0, (2, 2)).sum(dim=1)  # over the grid 0, 1/2, 1
        >>> fine.shape, coarse.shape
        (torch.Size([4, 3]), torch.Size([2, 3]))

    Reference:
        Kloeden & Platen (1992), Numerical Solution of Stochastic Differential Equations.
    """
    steps = times.diff().abs().sqrt().to(x)
    z = torch.randn((len(steps), *x.shape), generator=generator, dtype=x.dtype, device=x.device)
    return steps.reshape(-1, *[1] * x.ndim) * z  # (eq:score-sde-increment)


def euler_maruyama(
    drift: Drift,
    diffusion: Diffusion,
    x: Float[Tensor, "*batch"],
    times: Float[Tensor, " T"],
    *,
    increments: Float[Tensor, "steps *batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "T *batch"]:
    r"""Follow drift and noise as they are at the start of each step.

    $$
    x_{i+1} = x_i + f(x_i, t_i)\, h + g(x_i, t_i)\, \Delta w_i, \qquad
    h = t_{i+1} - t_i, \quad \Delta w_i \sim \mathcal N(0, |h| I)
    $$

    Args:
        drift: f; takes x and one time.
        diffusion: g; takes x and one time.
        x: Where to start.
        times: The grid; on one that runs backwards h is negative.
        increments: Of `brownian_increments`, if the path of the noise is given.
        generator: Draws the increments, if it is not.

    Returns:
        The whole trajectory. Its law errs by the order of h, its path by the order of the square
        root of h (of h, where g does not depend on x).

    Raises:
        ValueError: If the grid has no step, or the increments are not one for each step.

    Example:
        >>> times = torch.tensor([0.0, 0.5, 1.0])
        >>> w = torch.tensor([[0.1], [-0.1]])
        >>> args = (lambda x, t: -x, lambda x, t: torch.tensor(2.0), torch.ones(1), times)
        >>> euler_maruyama(*args, increments=w).flatten()
        tensor([1.0000, 0.7000, 0.1500])

    Reference:
        Maruyama (1955), Rendiconti del Circolo Matematico di Palermo 4.
    """
    _check_grid(times)
    if increments is None:
        increments = brownian_increments(x, times, generator=generator)
    if len(increments) != len(times) - 1:
        raise ValueError(
            f"there are {len(increments)} increments and {len(times)} times: one a step, "
            f"{len(times) - 1}."
        )
    trajectory = [x]
    for (t, after), dw in zip(itertools.pairwise(times), increments, strict=True):
        now = trajectory[-1]
        # (eq:score-sde-euler-maruyama)
        trajectory.append(now + (after - t) * drift(now, t) + diffusion(now, t) * dw)
    return torch.stack(trajectory)


def affine_moments(
    step: Callable[[Tensor], Tensor],
    mean: Float[Tensor, "*batch"],
    variance: Float[Tensor, "*batch"],
    *,
    noise_variance: Float[Tensor, "*#batch"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    r"""Push mean and variance through a noisy step that is affine in each coordinate.

    $$
    x' = k x + c + \sigma z: \qquad \operatorname{E} x' = k \operatorname{E} x + c, \quad
    \operatorname{Var} x' = k^2 \operatorname{Var} x + \sigma^2
    $$

    A Gaussian stays one, so that nothing needs to be drawn to know the law of a sampler.

    Args:
        step: The step without its noise, k x + c.
        mean: Of x.
        variance: Of x.
        noise_variance: Of the noise that the step adds.

    Returns:
        Mean and variance of x'.

    Raises:
        ValueError: If the step is not affine.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> affine_moments(lambda x: 3 * x + 1, one, one, noise_variance=one)
        (tensor([4.], dtype=torch.float64), tensor([10.], dtype=torch.float64))
    """
    here, up, down = step(mean), step(mean + 1), step(mean - 1)
    k = (up - down) / 2
    bend = (up - 2 * here + down).abs().max().item()
    if bend > 1e-6 * (1 + here.abs().max().item() + k.abs().max().item()):
        raise ValueError(f"the step bends by {bend:.3g}: it must be affine in x.")
    return here, k.square() * variance + noise_variance  # (eq:score-sde-affine)


def euler_maruyama_moments(
    drift: Drift,
    diffusion: Diffusion,
    mean: Float[Tensor, "*batch"],
    variance: Float[Tensor, "*batch"],
    times: Float[Tensor, " T"],
) -> tuple[Float[Tensor, "T *batch"], Float[Tensor, "T *batch"]]:
    r"""Return the moments of `euler_maruyama` for an affine drift, with no sampling at all.

    Args:
        drift: f, affine in each coordinate of x.
        diffusion: g, which must not depend on x.
        mean: At the first time.
        variance: At the first time.
        times: The grid.

    Returns:
        Mean and variance at all times, of the steps and not of the equation: what differs from
        the solution is the error of the grid.

    Raises:
        ValueError: If the grid has no step, or the drift is not affine.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> grid = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        >>> one = lambda x, t: torch.ones_like(x)
        >>> euler_maruyama_moments(lambda x, t: -x, one, zero + 1, zero, grid)[1].flatten()
        tensor([0.0000, 0.5000, 0.6250], dtype=torch.float64)
    """
    _check_grid(times)
    means, variances = [mean], [variance]
    for t, after in itertools.pairwise(times):
        h = after - t

        def step(x: Tensor, t: Tensor = t, h: Tensor = h) -> Tensor:
            return x + h * drift(x, t)

        fresh = diffusion(means[-1], t).square() * h.abs()
        now = affine_moments(step, means[-1], variances[-1], noise_variance=fresh)
        means.append(now[0])
        variances.append(now[1])
    return torch.stack(means), torch.stack(variances)


def _check_grid(times: Tensor) -> None:
    if len(times) < 2:
        raise ValueError(f"the grid has {len(times)} times: at least 2.")
