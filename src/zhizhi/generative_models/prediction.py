"""What a network may predict of x_t = a x_0 + b eps, and how one prediction becomes another.

Noise, data, v, score and flow velocity are five names of one vector: with x_t, any of them says
where x_t came from and where it goes. A path is named by its coefficients at one time. At its ends
a name may fall silent: with a = 0 noise and score do not tell the data, but v and velocity do.
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
        The noise; not finite for "data" where b is 0.

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


def to_data(
    prediction: Float[Tensor, "*batch"], x_t: Float[Tensor, "*batch"], path: Path, *, kind: str
) -> Float[Tensor, "*batch"]:
    r"""Return the data that a prediction of any kind stands for.

    $$
    \hat x_0 = \frac{x_t - b \hat\epsilon}{a} = \frac{x_t + b^2 s}{a}
        = \frac{a x_t - b \hat v}{a^2 + b^2}
        = \frac{\dot b x_t - b \hat u}{a \dot b - \dot a b}
    $$

    Only the first two divide by a: v and velocity know the data at pure noise, too.

    Args:
        prediction: Output of a network.
        x_t: Its input.
        path: a and b, and for "velocity" their derivatives.
        kind: As in `to_noise`.

    Returns:
        The data; not finite for "noise" and "score" where a is 0.

    Raises:
        ValueError: If the kind has another name, or the derivatives are missing.

    Example:
        >>> import torch
        >>> pure_noise = Path(0.0, 1.0, d_a=-1.0, d_b=1.0)  # x_t is eps, the velocity eps - x_0
        >>> to_data(torch.tensor([1.0]), torch.tensor([3.0]), pure_noise, kind="velocity")
        tensor([2.])

    Reference:
        Salimans & Ho (2022), arXiv:2202.00512, App. D, for v.
    """
    a, b = path.a, path.b
    if kind == "data":
        return prediction
    if kind == "noise":
        return (x_t - b * prediction) / a  # (eq:ddim-data)
    if kind == "score":
        return (x_t + b**2 * prediction) / a
    if kind == "v":
        return (a * x_t - b * prediction) / (a**2 + b**2)  # (eq:ddim-v)
    if kind == "velocity":
        d_a, d_b = _speeds(path)
        return (d_b * x_t - b * prediction) / (a * d_b - d_a * b)  # (eq:ddim-velocity)
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
    return convert(noise, x_t, path, source="noise", target=kind)


def convert(
    prediction: Float[Tensor, "*batch"],
    x_t: Float[Tensor, "*batch"],
    path: Path,
    *,
    source: str,
    target: str,
) -> Float[Tensor, "*batch"]:
    """Turn a prediction of one kind into that of another.

    Data and noise are each read off the source by the formula that divides least, so that whatever
    the source determines comes out finite, at the ends of the path as well.

    Args:
        prediction: Output of a network.
        x_t: Its input.
        path: Coefficients at this time.
        source: Kind of the prediction, as in `to_noise`.
        target: Kind that is wanted.

    Returns:
        The same knowledge in other words.

    Raises:
        ValueError: If a kind has another name, or the derivatives are missing.

    Example:
        >>> import torch
        >>> x_t, path = torch.tensor([3.0]), Path(0.6, 0.8)
        >>> convert(torch.tensor([1.0]), x_t, path, source="data", target="v")
        tensor([1.])
    """
    if target == source and source in KINDS:
        return prediction
    if target == "data":
        return to_data(prediction, x_t, path, kind=source)
    noise = to_noise(prediction, x_t, path, kind=source)
    if target == "noise":
        return noise
    if target == "score":
        return -noise / path.b
    data = to_data(prediction, x_t, path, kind=source)
    if target == "v":
        return path.a * noise - path.b * data
    if target == "velocity":
        d_a, d_b = _speeds(path)
        return d_a * data + d_b * noise
    raise ValueError(f"kind is {target!r}: {', '.join(KINDS)}.")


def error_weight(path: Path, *, kind: str) -> Coefficient:
    r"""Return how much a squared error counts when the network predicts another kind than data.

    With x_t fixed, an error of the data is an error of every other kind, times a factor:

    $$
    \|\hat\epsilon - \epsilon\|^2 = \frac{a^2}{b^2}\|\hat x_0 - x_0\|^2, \qquad
    \|\hat v - v\|^2 = \frac{(a^2 + b^2)^2}{b^2}\|\cdot\|^2, \qquad
    \|\hat u - u\|^2 = \frac{(a\dot b - \dot a b)^2}{b^2}\|\cdot\|^2
    $$

    Args:
        path: a and b, and for "velocity" their derivatives.
        kind: As in `to_noise`.

    Returns:
        Squared error of that kind over the squared error of the data; the signal-to-noise ratio
        for "noise".

    Raises:
        ValueError: If the kind has another name, or the derivatives are missing.

    Example:
        >>> path = Path(0.6, 0.8)
        >>> round(error_weight(path, kind="noise"), 4), round(error_weight(path, kind="v"), 4)
        (0.5625, 1.5625)

    Reference:
        Salimans & Ho (2022), arXiv:2202.00512, Sec. 4.
    """
    a, b = path.a, path.b
    if kind == "data":
        return 1.0
    if kind == "noise":
        return (a / b) ** 2
    if kind == "score":
        return (a / b**2) ** 2
    if kind == "v":
        return ((a**2 + b**2) / b) ** 2
    if kind == "velocity":
        d_a, d_b = _speeds(path)
        return ((a * d_b - d_a * b) / b) ** 2  # (eq:noise-error)
    raise ValueError(f"kind is {kind!r}: {', '.join(KINDS)}.")


KINDS = ("noise", "data", "v", "score", "velocity")


def _speeds(path: Path) -> tuple[Coefficient, Coefficient]:
    if path.d_a is None or path.d_b is None:
        raise ValueError("the velocity needs d_a and d_b of the path.")
    return path.d_a, path.d_b
