"""What a network may predict of x_t = a x_0 + b eps, and how one prediction becomes another.

Noise, data, v, score and flow velocity are five names of one vector: two of them are enough to say
where x_t came from and where it goes. A path is named by its coefficients at one time.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Coefficient = int | float | Float[Tensor, "*#batch"]  # broadcasts against x_t


class Path(NamedTuple):
    r"""Where a path x_t = a x_0 + b eps stands at one time, and how fast it moves.

    Attributes:
        a: Factor of the data.
        b: Factor of the noise.
        d_a: Derivative of a by t; only the velocity needs it.
        d_b: Derivative of b by t.
    """

    a: Coefficient
    b: Coefficient
    d_a: Coefficient | None = None
    d_b: Coefficient | None = None


def to_noise(
    prediction: Float[Tensor, "*batch"], x_t: Float[Tensor, "*batch"], path: Path, *, kind: str
) -> Float[Tensor, "*batch"]:
    r"""Return the noise that a prediction of any kind stands for.

    $$
    \hat\epsilon = \frac{x_t - a \hat x_0}{b} = -b\,s = \frac{a \hat v + b x_t}{a^2 + b^2}
        = \frac{a \hat u - \dot a x_t}{a \dot b - \dot a b}
    $$

    Args:
        prediction: Output of a network.
        x_t: Its input.
        path: a and b, and for "velocity" their derivatives.
        kind: "noise", "data", "v" (a eps - b x_0), "score" or "velocity" (a' x_0 + b' eps).

    Returns:
        The noise.

    Raises:
        ValueError: If the kind has another name, or the derivatives are missing.

    Example:
        >>> import torch
        >>> to_noise(torch.tensor([1.0]), torch.tensor([3.0]), Path(0.6, 0.8), kind="data")
        tensor([3.])

    Reference:
        Salimans & Ho (2022), arXiv:2202.00512, App. D, for v; Lipman et al. (2023),
        arXiv:2210.02747, for the velocity.
    """
    a, b = path.a, path.b
    if kind == "noise":
        return prediction
    if kind == "data":
        return (x_t - a * prediction) / b
    if kind == "score":
        return -b * prediction
    if kind == "v":
        return (a * prediction + b * x_t) / (a**2 + b**2)
    if kind == "velocity":
        d_a, d_b = _speeds(path)
        return (a * prediction - d_a * x_t) / (a * d_b - d_a * b)  # (eq:ddim-velocity)
    raise ValueError(f"kind is {kind!r}: {', '.join(KINDS)}.")


def from_noise(
    noise: Float[Tensor, "*batch"], x_t: Float[Tensor, "*batch"], path: Path, *, kind: str
) -> Float[Tensor, "*batch"]:
    r"""Return the prediction of any kind that a noise stands for; the inverse of `to_noise`.

    $$
    \hat x_0 = \frac{x_t - b\hat\epsilon}{a}, \quad s = -\frac{\hat\epsilon}{b}, \quad
    \hat v = a\hat\epsilon - b\hat x_0, \quad \hat u = \dot a \hat x_0 + \dot b \hat\epsilon
    $$

    Args:
        noise: The noise.
        x_t: The noised data.
        path: a and b, and for "velocity" their derivatives.
        kind: As in `to_noise`.

    Returns:
        The prediction.

    Raises:
        ValueError: If the kind has another name, or the derivatives are missing.

    Example:
        >>> import torch
        >>> from_noise(torch.tensor([3.0]), torch.tensor([3.0]), Path(0.6, 0.8), kind="data")
        tensor([1.0000])

    Reference:
        Salimans & Ho (2022), arXiv:2202.00512, App. D.
    """
    data = (x_t - path.b * noise) / path.a  # (eq:ddim-data)
    if kind == "noise":
        return noise
    if kind == "data":
        return data
    if kind == "score":
        return -noise / path.b
    if kind == "v":
        return path.a * noise - path.b * data
    if kind == "velocity":
        d_a, d_b = _speeds(path)
        return d_a * data + d_b * noise
    raise ValueError(f"kind is {kind!r}: {', '.join(KINDS)}.")


def convert(
    prediction: Float[Tensor, "*batch"],
    x_t: Float[Tensor, "*batch"],
    path: Path,
    *,
    source: str,
    target: str,
) -> Float[Tensor, "*batch"]:
    """Turn a prediction of one kind into that of another, through the noise.

    Args:
        prediction: Output of a network.
        x_t: Its input.
        path: Coefficients at this time.
        source: Kind of the prediction, as in `to_noise`.
        target: Kind that is wanted.

    Returns:
        The same knowledge in other words.

    Example:
        >>> import torch
        >>> x_t, path = torch.tensor([3.0]), Path(0.6, 0.8)
        >>> convert(torch.tensor([1.0]), x_t, path, source="data", target="v")
        tensor([1.0000])
    """
    return from_noise(to_noise(prediction, x_t, path, kind=source), x_t, path, kind=target)


KINDS = ("noise", "data", "v", "score", "velocity")


def _speeds(path: Path) -> tuple[Coefficient, Coefficient]:
    if path.d_a is None or path.d_b is None:
        raise ValueError("the velocity needs d_a and d_b of the path.")
    return path.d_a, path.d_b
