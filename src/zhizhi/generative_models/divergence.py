"""The divergence of a vector field: exactly with D backward passes, or estimated with one.

A field maps rows to rows, each by itself: what mixes them (batch normalization) has no divergence
a row. Under `torch.no_grad()` the results are plain numbers, otherwise they can be trained through.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Field = Callable[[Tensor], Tensor]  # [N, D] -> [N, D]


def value_and_divergence(
    field: Field, x: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    r"""Evaluate a field and the trace of its Jacobian, one backward pass for each coordinate.

    $$
    \nabla\cdot f(x) = \sum_{i=1}^{D} \frac{\partial f_i}{\partial x_i}(x)
    $$

    Args:
        field: Maps rows to rows of the same width.
        x: Where.

    Returns:
        The values, and one divergence a row.

    Example:
        >>> with torch.no_grad():
        ...     value, divergence = value_and_divergence(lambda x: x**2, torch.tensor([[1.0, 3.0]]))
        >>> value, divergence
        (tensor([[1., 9.]]), tensor([8.]))
    """
    trained = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = field(x)
        diagonal = [_gradient(value[:, i], x, trained)[:, i] for i in range(x.shape[1])]
    divergence = torch.stack(diagonal).sum(dim=0)
    return (value, divergence) if trained else (value.detach(), divergence)


def value_and_hutchinson(
    field: Field, x: Float[Tensor, "N D"], v: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    r"""Evaluate a field and an unbiased estimate of its divergence, with one backward pass.

    $$
    \mathbb E\big[v^\top \nabla f(x)\, v\big] = \nabla\cdot f(x)
        \qquad\text{if } \mathbb E[v v^\top] = I
    $$

    Args:
        field: Maps rows to rows of the same width.
        x: Where.
        v: Probes of mean 0 and covariance I, such as `rademacher_like(x)` or a standard normal.

    Returns:
        The values, and one estimate a row.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> with torch.no_grad():  # a diagonal Jacobian: signs make no error
        ...     value_and_hutchinson(lambda x: x**2, x, torch.tensor([[-1.0, 1.0]]))[1]
        tensor([8.])

    Reference:
        Hutchinson (1989), Communications in Statistics 18(3), with random signs.
    """
    trained = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = field(x)
        pulled = _gradient(value * v, x, trained)  # the rows of v^T J
    estimate = (pulled * v).sum(dim=1)  # (eq:score-hutchinson)
    return (value, estimate) if trained else (value.detach(), estimate)


def rademacher_like(
    x: Float[Tensor, "*shape"], *, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Draw random signs, the probes of least variance among those with independent entries.

    Args:
        x: Gives shape, dtype and device.
        generator: Draws the signs.

    Returns:
        Entries -1 and 1.

    Example:
        >>> rademacher_like(torch.zeros(2, 3)).square()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    bits = torch.randint(2, x.shape, generator=generator, device=x.device)
    return (2 * bits - 1).to(x.dtype)


def _gradient(output: Tensor, x: Tensor, trained: bool) -> Tensor:
    """Return the gradient of the sum of `output`; a field may ignore x."""
    (gradient,) = torch.autograd.grad(
        output.sum(), x, create_graph=trained, retain_graph=True, materialize_grads=True
    )
    return gradient
