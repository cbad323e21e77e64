"""DeepSeek LLM: what to spend compute on, and with which batch size and learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class PowerLaw(NamedTuple):
    """y = coefficient * x ** exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float) -> float:
        """Return y."""
        return self.coefficient * x**self.exponent


class ScaledRun(NamedTuple):
    """What the laws advise for a budget of compute."""

    learning_rate: float
    batch_tokens: float
    flops_per_token: float
    tokens: float


LEARNING_RATE = PowerLaw(0.3118, -0.1250)
BATCH_TOKENS = PowerLaw(0.2920, 0.3271)
MODEL_SCALE = PowerLaw(0.1715, 0.5243)
DATA_SCALE = PowerLaw(5.8316, 0.4757)


def flops_per_token(*, n_layers: int, width: int, length: int) -> int:
    r"""Return M, the operations of one token forward and backward without the vocabulary.

    $$
    M = 72\, L D^2 + 12\, L D T
    $$

    72 L D^2 is six operations for each of the 12 L D^2 weights of the layers; 12 L D T is what
    attention costs, counted for all T keys although a causal mask hides half of them.

    Args:
        n_layers: L.
        width: D.
        length: T.

    Returns:
        Operations.

    Example:
        >>> f"{flops_per_token(n_layers=30, width=4096, length=4096):.3g}"
        '4.23e+10'

    Reference:
        DeepSeek-AI (2024), arXiv:2401.02954, Sec. 3.2, Eq. (2).
    """
    return 72 * n_layers * width**2 + 12 * n_layers * width * length  # (eq:deepseek-llm-flops)


def advised(compute: float) -> ScaledRun:
    r"""Return learning rate, batch size, model and data for a budget.

    $$
    \eta = 0.3118\, C^{-0.1250}, \quad B = 0.2920\, C^{0.3271}, \quad
    M = 0.1715\, C^{0.5243}, \quad n = 5.8316\, C^{0.4757}
    $$

    Args:
        compute: C = M n, operations.

    Returns:
        The four.

    Raises:
        ValueError: If the budget is not positive.

    Example:
        >>> run = advised(8.46e22)
        >>> f"{run.learning_rate:.2e}, {run.batch_tokens / 1e6:.2f}M"
        '4.25e-04, 9.22M'

    Reference:
        DeepSeek-AI (2024), arXiv:2401.02954, Eqs. (1) and (4).
    """
    if compute <= 0:
        raise ValueError(f"compute is {compute}: it must be positive.")
    laws = LEARNING_RATE, BATCH_TOKENS, MODEL_SCALE, DATA_SCALE
    return ScaledRun(*(law(compute) for law in laws))  # (eq:deepseek-llm-laws)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    r"""Fit a straight line to logarithms by least squares.

    $$
    \log y = \log k + a \log x
    $$

    Args:
        x: Positive numbers, at least two of them different.
        y: As many.

    Returns:
        The law.

    Raises:
        ValueError: If there are too few numbers or one is not positive.

    Example:
        >>> law = fit_power_law([1.0, 2.0, 4.0], [3.0, 12.0, 48.0])
        >>> round(law.coefficient, 6), round(law.exponent, 6)
        (3.0, 2.0)
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(
            f"{len(x)} and {len(y)} numbers: as many positive y as x, two different x."
        )
    a, b = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (x, y))
    exponent = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
    return PowerLaw(math.exp(b.mean() - exponent * a.mean()), exponent.item())


def isoflop_minimum(sizes: Sequence[float], losses: Sequence[float]) -> float:
    r"""Return the size of lowest loss on a budget: the vertex of a parabola in log size.

    Args:
        sizes: Model scales that were tried, at least three.
        losses: Of each, at the same compute.

    Returns:
        A size, between the tried ones.

    Raises:
        ValueError: If the losses have no minimum inside.

    Example:
        >>> round(isoflop_minimum([1.0, 10.0, 100.0], [2.0, 1.0, 2.0]), 6)
        10.0

    Reference:
        Hoffmann et al. (2022), arXiv:2203.15556, Sec. 3.2: the second approach.
    """
    x = torch.tensor([math.log(size) for size in sizes], dtype=torch.float64)
    centre = x.mean()
    columns = torch.stack([(x - centre) ** k for k in range(3)], dim=1)
    y = torch.tensor(losses, dtype=torch.float64)
    _, slope, curve = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0].tolist()
    best = centre.item() - slope / (2 * curve) if curve > 0 else math.inf
    if not min(x) <= best <= max(x):
        raise ValueError(
            "The losses have no minimum between the sizes: try smaller or larger ones."
        )
    return math.exp(best)


def isoflop_law(
    loss: Callable[[float, float], float],
    budgets: Sequence[float],
    *,
    span: float = 4.0,
    n_sizes: int = 9,
) -> PowerLaw:
    r"""Find the best size on each budget and fit how it grows.

    Args:
        loss: Of a model scale and a number of tokens.
        budgets: Compute, C = M n.
        span: Sizes are tried from 1/span to span times a first guess.
        n_sizes: How many.

    Returns:
        Best model scale as a law of compute.

    Example:
        >>> law = isoflop_law(lambda M, n: M**-0.3 + n**-0.3, [1e18, 1e20])
        >>> round(law.exponent, 3)
        0.5

    Reference:
        DeepSeek-AI (2024), arXiv:2401.02954, Sec. 3.2, Fig. 4.
    """
    best = []
    for budget in budgets:
        steps = torch.linspace(-1, 1, n_sizes, dtype=torch.float64).tolist()
        grid = [budget**0.5 * 1000.0**k for k in torch.linspace(-2, 2, 401).tolist()]
        guess = min(grid, key=lambda size: loss(size, budget / size))
        sizes = [guess * span**k for k in steps]
        best.append(isoflop_minimum(sizes, [loss(size, budget / size) for size in sizes]))
    return fit_power_law(budgets, best)
