"""The paths of the literature, x_t = a_t x_0 + b_t eps with t = 0 at the data, and their SDEs.

Times are tensors in [0, 1]; at both ends some coefficients vanish or some rates grow without bound.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.prediction import Path


def vp_path(t: Float[Tensor, "*times"], *, beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    r"""Return the variance-preserving path, DDPM in continuous time.

    $$
    a_t = e^{-B_t/2}, \quad b_t = \sqrt{1 - e^{-B_t}}, \qquad
    B_t = \int_0^t \beta = \beta_{\min} t + \tfrac12(\beta_{\max} - \beta_{\min})\,t^2
    $$

    Args:
        t: Times from 0 to 1.
        beta_min: Rate beta at t = 0.
        beta_max: Rate at t = 1.

    Returns:
        Coefficients and their derivatives; the derivative of b is infinite at t = 0.

    Raises:
        ValueError: If a time is outside [0, 1], or the rates are not positive.

    Example:
        >>> path = vp_path(torch.tensor(1.0, dtype=torch.float64))
        >>> f"{path.a**2:.4e}"  # alpha-bar at the end
        '4.3186e-05'

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (11) and App. C.
    """
    beta, integral = _rates(t, beta_min, beta_max)
    a, b = (-integral / 2).exp(), (-(-integral).expm1()).sqrt()
    return Path(a, b, -beta / 2 * a, beta * a.square() / (2 * b))


def sub_vp_path(
    t: Float[Tensor, "*times"], *, beta_min: float = 0.1, beta_max: float = 20.0
) -> Path:
    r"""Return the path whose noise has less than the variance that the data lose.

    $$
    a_t = e^{-B_t/2}, \qquad b_t = 1 - e^{-B_t}
    $$

    Args:
        t: Times from 0 to 1.
        beta_min: Rate beta at t = 0.
        beta_max: Rate at t = 1.

    Returns:
        Coefficients and their derivatives.

    Raises:
        ValueError: If a time is outside [0, 1], or the rates are not positive.

    Example:
        >>> sub_vp_path(torch.tensor(0.0)).b
        tensor(0.)

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (12) and App. C.
    """
    beta, integral = _rates(t, beta_min, beta_max)
    a, b = (-integral / 2).exp(), -(-integral).expm1()
    return Path(a, b, -beta / 2 * a, beta * a.square())


def ve_path(
    t: Float[Tensor, "*times"], *, sigma_min: float = 0.01, sigma_max: float = 50.0
) -> Path:
    r"""Return the variance-exploding path, SMLD in continuous time.

    $$
    a_t = 1, \qquad b_t = \sigma_{\min}\,(\sigma_{\max}/\sigma_{\min})^t
    $$

    Its start is not quite the data: b_0 is sigma_min.

    Args:
        t: Times from 0 to 1.
        sigma_min: Noise at t = 0.
        sigma_max: Noise at t = 1.

    Returns:
        Coefficients and their derivatives.

    Raises:
        ValueError: If a time is outside [0, 1], or not 0 < sigma_min < sigma_max.

    Example:
        >>> ve_path(torch.tensor(0.5), sigma_min=0.1, sigma_max=10.0).b
        tensor(1.)

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (9) and App. C.
    """
    _check_times(t)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma runs from {sigma_min} to {sigma_max}: 0 < sigma_min < sigma_max.")
    ratio = torch.as_tensor(sigma_max / sigma_min, dtype=t.dtype, device=t.device)
    b = sigma_min * ratio**t
    return Path(torch.ones_like(t), b, torch.zeros_like(t), b * ratio.log())


def straight_path(t: Float[Tensor, "*times"]) -> Path:
    r"""Return the path of rectified flow, flow matching and Stable Diffusion 3.

    $$
    a_t = 1 - t, \qquad b_t = t
    $$

    Args:
        t: Times from 0 to 1.

    Returns:
        Coefficients and their derivatives.

    Raises:
        ValueError: If a time is outside [0, 1].

    Example:
        >>> straight_path(torch.tensor(0.25))[:2]
        (tensor(0.7500), tensor(0.2500))

    Reference:
        Liu, Gong & Liu (2023), arXiv:2209.03003, Sec. 2.1, with their time reversed.
    """
    _check_times(t)
    one = torch.ones_like(t)
    return Path(1 - t, t, -one, one)


def log_snr(path: Path) -> Tensor:
    r"""Return the one number that tells how hard a time of any path is.

    $$
    \lambda = \log\frac{a^2}{b^2}
    $$

    Args:
        path: Coefficients as tensors.

    Returns:
        Infinite at pure data, minus infinite at pure noise. DPM-Solver's lambda is half of it.

    Example:
        >>> log_snr(straight_path(torch.tensor([0.0, 0.5, 1.0])))
        tensor([inf, 0., -inf])

    Reference:
        Kingma et al. (2021), arXiv:2107.00630, Eq. (2), for data of unit variance.
    """
    return 2 * (torch.as_tensor(path.a).log() - torch.as_tensor(path.b).log())


def linear_sde(path: Path) -> tuple[Tensor, Tensor]:
    r"""Return the SDE dx = f x dt + g dw whose conditional law at each time is the path's.

    $$
    f = \frac{\dot a}{a}, \qquad g^2 = 2 b \dot b - 2 f b^2 = -b^2\,\frac{\mathrm d}{\mathrm dt}
        \log\frac{a^2}{b^2}
    $$

    Mean and variance of a linear SDE obey m' = f m and V' = 2 f V + g^2; with m = a x_0 and
    V = b^2 both are solved for f and g^2.

    Args:
        path: Coefficients and derivatives as tensors.

    Returns:
        f and g squared; not finite where a is 0, as at the end of the straight path, and g
        squared not a number where b is 0 and its derivative infinite, as at t = 0 of `vp_path`.

    Raises:
        ValueError: If the path has no derivatives, or its signal-to-noise ratio grows.

    Example:
        >>> linear_sde(straight_path(torch.tensor(0.5)))  # -1 / (1 - t) and 2 t / (1 - t)
        (tensor(-2.), tensor(2.))

    Reference:
        Kingma et al. (2021), arXiv:2107.00630, App. A; Karras et al. (2022), arXiv:2206.00364,
        App. B.
    """
    if path.d_a is None or path.d_b is None:
        raise ValueError("the SDE needs d_a and d_b of the path.")
    a, b, d_a, d_b = (torch.as_tensor(c) for c in path)
    f = d_a / a
    g_squared = 2 * b * (d_b - f * b)
    if (g_squared < 0).any():
        raise ValueError(
            f"the smallest g^2 is {g_squared.min().item():.6g}: noise cannot leave again, so the "
            "signal-to-noise ratio must not grow with t."
        )
    return f, g_squared


def _check_times(t: Tensor) -> None:
    if t.numel() and not (t.min() >= 0 and t.max() <= 1):
        low, high = t.min().item(), t.max().item()
        raise ValueError(f"times run from {low:.6g} to {high:.6g}: 0 <= t <= 1.")


def _rates(t: Tensor, beta_min: float, beta_max: float) -> tuple[Tensor, Tensor]:
    """Return beta at t and its integral from 0."""
    _check_times(t)
    if min(beta_min, beta_max) <= 0:
        raise ValueError(f"beta runs from {beta_min} to {beta_max}: both are positive.")
    slope = beta_max - beta_min
    return beta_min + slope * t, beta_min * t + slope / 2 * t.square()
