"""Solve dx/dt = f(x, t) on a grid that is given: Euler, Heun, and the classical Runge-Kutta."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def euler(
    field: Field, x: Float[Tensor, "*batch"], times: Float[Tensor, " T"]
) -> Float[Tensor, "T *batch"]:
    r"""Follow the direction at the start of each step.

    $$
    x_{i+1} = x_i + h f(x_i, t_i), \qquad h = t_{i+1} - t_i
    $$

    Args:
        field: f; takes x and one time.
        x: Where to start.
        times: The grid; it may run backwards.

    Returns:
        The whole trajectory; its error falls like h.

    Raises:
        ValueError: If the grid has no step.

    Example:
        >>> euler(lambda x, t: -x, torch.ones(1), torch.tensor([0.0, 0.5, 1.0])).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    return _solve(lambda x, t, h: x + h * field(x, t), x, times)


def heun(
    field: Field, x: Float[Tensor, "*batch"], times: Float[Tensor, " T"]
) -> Float[Tensor, "T *batch"]:
    r"""Average the directions at both ends of an Euler step.

    $$
    \tilde x = x_i + h f(x_i, t_i), \qquad
    x_{i+1} = x_i + \tfrac h2 \big( f(x_i, t_i) + f(\tilde x, t_{i+1}) \big)
    $$

    Args:
        field: f; takes x and one time.
        x: Where to start.
        times: The grid; it may run backwards.

    Returns:
        The whole trajectory; its error falls like h^2, at two evaluations a step.

    Raises:
        ValueError: If the grid has no step.

    Example:
        >>> heun(lambda x, t: -x, torch.ones(1), torch.tensor([0.0, 1.0])).flatten()
        tensor([1.0000, 0.5000])
    """

    def step(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        first = field(x, t)
        return x + h / 2 * (first + field(x + h * first, t + h))

    return _solve(step, x, times)


def rk4(
    field: Field, x: Float[Tensor, "*batch"], times: Float[Tensor, " T"]
) -> Float[Tensor, "T *batch"]:
    r"""Average four directions so that the error falls like h^4.

    The classical rule, with weights 1, 2, 2, 1 over 6; torchdiffeq's `rk4` is the 3/8 rule.

    Args:
        field: f; takes x and one time.
        x: Where to start.
        times: The grid; it may run backwards.

    Returns:
        The whole trajectory, at four evaluations a step.

    Raises:
        ValueError: If the grid has no step.

    Example:
        >>> rk4(lambda x, t: -x, torch.ones(1), torch.tensor([0.0, 1.0]))[-1]
        tensor([0.3750])
    """

    def step(x: Tensor, t: Tensor, h: Tensor) -> Tensor:
        k_1 = field(x, t)
        k_2 = field(x + h / 2 * k_1, t + h / 2)
        k_3 = field(x + h / 2 * k_2, t + h / 2)
        k_4 = field(x + h * k_3, t + h)
        return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)

    return _solve(step, x, times)


def _solve(
    step: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, times: Tensor
) -> Float[Tensor, "T *batch"]:
    if len(times) < 2:
        raise ValueError(f"the grid has {len(times)} times: at least 2.")
    trajectory = [x]
    for t, after in itertools.pairwise(times):
        trajectory.append(step(trajectory[-1], t, after - t))
    return torch.stack(trajectory)
