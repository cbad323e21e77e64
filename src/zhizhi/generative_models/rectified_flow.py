"""Rectified flow: regress the velocity of straight lines, follow it, and straighten what is left.

Time runs as in the whole wing: t = 0 is data, t = 1 is noise, and sampling walks from 1 down to 0.
The paper counts the other way; its velocity is the negative of ours.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.ode_solver import Field, euler

Time = float | Float[Tensor, ""] | Float[Tensor, " B"]  # one for all rows, or one for each
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> velocity [B, ...]
Solver = Callable[[Field, Tensor, Tensor], Tensor]  # one of `ode_solver`


def interpolate(
    x_0: Float[Tensor, "B *pixels"], noise: Float[Tensor, "B *pixels"], *, t: Time
) -> Float[Tensor, "B *pixels"]:
    r"""Stand on the straight line from the data to the noise.

    $$
    X_t = (1 - t)\, x_0 + t\, \epsilon
    $$

    Args:
        x_0: Data, at t = 0.
        noise: What is paired with them, at t = 1.
        t: Where on the line.

    Returns:
        Points on the lines.

    Raises:
        ValueError: If a time leaves [0, 1].

    Example:
        >>> interpolate(torch.zeros(1, 2), torch.ones(1, 2), t=0.25)
        tensor([[0.2500, 0.2500]])

    Reference:
        Liu, Gong & Liu (2022), arXiv:2209.03003, Sec. 2.1, with t reversed.
    """
    t = torch.as_tensor(t, dtype=x_0.dtype, device=x_0.device)
    low, high = t.min().item(), t.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"t runs from {low:.6g} to {high:.6g}: 0 <= t <= 1.")
    t = t.reshape(t.shape + (1,) * (x_0.ndim - 1) * t.ndim)
    return (1 - t) * x_0 + t * noise  # (eq:rectified-flow-line)


def rectified_flow_loss(
    velocity: Velocity,
    x_0: Float[Tensor, "B *pixels"],
    noise: Float[Tensor, "B *pixels"],
    *,
    t: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    r"""Compare the velocity at a point of the line with the direction of the line.

    $$
    \big\| v_\theta(X_t, t) - (\epsilon - x_0) \big\|^2
    $$

    The coupling is the caller's: independent rows make the first flow, the pairs of `reflow_pairs`
    the next one, and t = 1 throughout distils one step.

    Args:
        velocity: The model.
        x_0: Data.
        noise: Noise, row by row the partner of the data.
        t: Times.

    Returns:
        One squared distance a row.

    Raises:
        ValueError: If a time leaves [0, 1].

    Example:
        >>> x_0, noise = torch.zeros(1, 2), torch.ones(1, 2)
        >>> rectified_flow_loss(lambda x, t: 0 * x, x_0, noise, t=torch.tensor([0.5]))
        tensor([2.])

    Reference:
        Liu, Gong & Liu (2022), arXiv:2209.03003, Eq. (1), with t reversed.
    """
    x_t = interpolate(x_0, noise, t=t)
    off = velocity(x_t, t) - (noise - x_0)  # (eq:rectified-flow-loss)
    return off.square().flatten(1).sum(dim=1)


def trajectory(
    velocity: Velocity,
    x: Float[Tensor, "B *pixels"],
    *,
    times: Float[Tensor, " T"],
    solver: Solver = euler,
) -> Float[Tensor, "T B *pixels"]:
    r"""Follow the velocity along a grid of times.

    $$
    \frac{\mathrm d Z_t}{\mathrm dt} = v(Z_t, t)
    $$

    Args:
        velocity: The model.
        x: Where to start: noise for times that fall from 1, data for times that rise from 0.
        times: The grid.
        solver: `euler`, `heun` or `rk4` of `ode_solver`.

    Returns:
        Where the rows stand at each time.

    Example:
        >>> times = torch.tensor([1.0, 0.5, 0.0])
        >>> trajectory(lambda x, t: torch.ones_like(x), torch.ones(1, 1), times=times).flatten()
        tensor([1.0000, 0.5000, 0.0000])
    """
    return solver(lambda y, t: velocity(y, t.to(y).expand(len(y))), x, times)


def reflow_pairs(
    velocity: Velocity,
    noise: Float[Tensor, "B *pixels"],
    *,
    times: Float[Tensor, " T"],
    solver: Solver = euler,
) -> tuple[Float[Tensor, "B *pixels"], Float[Tensor, "B *pixels"]]:
    r"""Pair each noise with the sample that it becomes: the coupling of the next flow.

    Args:
        velocity: A trained flow.
        noise: Z_1.
        times: A grid that falls from 1 to 0.
        solver: As in `trajectory`; errors made here are what the next flow learns.

    Returns:
        Z_0 and Z_1, in the order of `rectified_flow_loss`.

    Raises:
        ValueError: If the grid does not fall from 1 to 0.

    Example:
        >>> times = torch.tensor([1.0, 0.5, 0.0])
        >>> reflow_pairs(lambda x, t: x, torch.ones(1, 1), times=times)
        (tensor([[0.2500]]), tensor([[1.]]))

    Reference:
        Liu, Gong & Liu (2022), arXiv:2209.03003, Sec. 2.1.
    """
    first, last = times[0].item(), times[-1].item()
    if (first, last) != (1, 0) or not (times.diff() < 0).all():
        raise ValueError(f"times go from {first:.6g} to {last:.6g}: they fall from 1 to 0.")
    with torch.no_grad():
        return trajectory(velocity, noise, times=times, solver=solver)[-1], noise


def straightness(
    path: Float[Tensor, "T B *pixels"], *, times: Float[Tensor, " T"]
) -> Float[Tensor, " B"]:
    r"""Return how far the velocity of a path is from constant; 0 where one Euler step is exact.

    $$
    S = \int_0^1 \big\| (Z_1 - Z_0) - \dot Z_t \big\|^2\, \mathrm dt
    $$

    The path is taken as straight between the given times; for a smooth one the error falls like the
    square of the step.

    Args:
        path: Positions, as `trajectory` returns them.
        times: Their times, all falling or all rising.

    Returns:
        One number a row.

    Raises:
        ValueError: If the times turn back.

    Example:
        >>> path = torch.tensor([[[0.0]], [[1.0]], [[1.0]]])
        >>> straightness(path, times=torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.])

    Reference:
        Liu, Gong & Liu (2022), arXiv:2209.03003, Sec. 2.2.
    """
    steps = times.diff()
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"times are {times.tolist()}: all falling or all rising.")
    steps = steps.to(path)
    speed = path.diff(dim=0).flatten(2) / steps[:, None, None]
    mean_speed = (path[-1] - path[0]).flatten(1) / steps.sum()
    off = (speed - mean_speed).square().sum(dim=2)
    return (steps.abs()[:, None] * off).sum(dim=0)  # (eq:rectified-flow-straightness)


def transport_cost(
    x_0: Float[Tensor, "B *pixels"], noise: Float[Tensor, "B *pixels"], *, p: float = 2.0
) -> Float[Tensor, " B"]:
    r"""Return what it costs to carry each noise to its data, for a convex cost.

    $$
    c(\epsilon - x_0) = \|\epsilon - x_0\|^p, \qquad p \ge 1
    $$

    Args:
        x_0: Where the rows end.
        noise: Where they begin.
        p: Exponent.

    Returns:
        One cost a row; the mean is the cost of the coupling.

    Raises:
        ValueError: If p is less than 1: the cost is not convex.

    Example:
        >>> transport_cost(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([25.])

    Reference:
        Liu, Gong & Liu (2022), arXiv:2209.03003, Sec. 3.2.
    """
    if p < 1:
        raise ValueError(f"p is {p}: the cost is convex for p >= 1.")
    return (noise - x_0).flatten(1).norm(dim=1) ** p
