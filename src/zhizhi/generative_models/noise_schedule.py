"""Noise schedules of the variance-preserving chain: from beta_t to alpha-bar_t and the SNR.

Everything is float64 unless asked otherwise: 1 - alpha_bar_t cancels at small t.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def linear_beta(
    *,
    n_steps: int,
    start: float = 1e-4,
    end: float = 0.02,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " steps"]:
    r"""Return variances that grow linearly, the schedule of DDPM.

    $$
    \beta_t = \beta_1 + \frac{t-1}{T-1}\,(\beta_T - \beta_1)
    $$

    Args:
        n_steps: The number T of steps.
        start: The first variance.
        end: The last variance; smaller than `start` is allowed.
        dtype: Of the result.

    Returns:
        The variances in the order t = 1 to T.

    Raises:
        ValueError: If there is no step, or a variance is outside (0, 1).

    Example:
        >>> linear_beta(n_steps=3, start=0.1, end=0.3)
        tensor([0.1000, 0.2000, 0.3000], dtype=torch.float64)

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Sec. 4: T = 1000, 1e-4 to 0.02.
    """
    _check(n_steps, start=start, end=end)
    return torch.linspace(start, end, n_steps, dtype=torch.float64).to(dtype)


def scaled_linear_beta(
    *,
    n_steps: int,
    start: float = 0.00085,
    end: float = 0.012,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " steps"]:
    r"""Return variances whose square roots grow linearly, the schedule of Stable Diffusion.

    $$
    \sqrt{\beta_t} = \sqrt{\beta_1} + \frac{t-1}{T-1}\,\big(\sqrt{\beta_T} - \sqrt{\beta_1}\big)
    $$

    Args:
        n_steps: The number T of steps.
        start: The first variance.
        end: The last variance.
        dtype: Of the result.

    Returns:
        The variances in the order t = 1 to T.

    Raises:
        ValueError: If there is no step, or a variance is outside (0, 1).

    Example:
        >>> scaled_linear_beta(n_steps=3, start=0.01, end=0.09)
        tensor([0.0100, 0.0400, 0.0900], dtype=torch.float64)

    Reference:
        Rombach et al. (2022), arXiv:2112.10752: the values are those of the released code.
    """
    _check(n_steps, start=start, end=end)
    root = torch.linspace(math.sqrt(start), math.sqrt(end), n_steps, dtype=torch.float64)
    return root.square().to(dtype)


def cosine_beta(
    *,
    n_steps: int,
    s: float = 0.008,
    beta_max: float = 0.999,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " steps"]:
    r"""Return the variances that make alpha-bar a squared cosine.

    $$
    \beta_t = \min\Big(1 - \frac{f(t)}{f(t-1)},\ \beta_{\max}\Big), \qquad
    f(t) = \cos^2\Big(\frac{t/T + s}{1 + s}\cdot\frac{\pi}{2}\Big)
    $$

    Args:
        n_steps: The number T of steps.
        s: Offset that keeps the first variances away from 0.
        beta_max: Upper limit; without it beta_T = 1 and 1 / alpha_T is infinite.
        dtype: Of the result.

    Returns:
        The variances in the order t = 1 to T.

    Raises:
        ValueError: If there is no step, s is negative, or `beta_max` is outside (0, 1).

    Example:
        >>> alpha_bar(cosine_beta(n_steps=4, s=0.0))[2]  # cos(pi/4)^2
        tensor(0.5000, dtype=torch.float64)

    Reference:
        Nichol & Dhariwal (2021), arXiv:2102.09672, Sec. 3.2, Eq. (17): s = 0.008, limit 0.999.
    """
    _check(n_steps, beta_max=beta_max)
    if s < 0:
        raise ValueError(f"s is {s}: s >= 0.")
    t = torch.arange(n_steps + 1, dtype=torch.float64)
    f = torch.cos((t / n_steps + s) / (1 + s) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max).to(dtype)  # (eq:noise-cosine)


def alpha_bar(beta: Float[Tensor, " steps"]) -> Float[Tensor, " steps+1"]:
    r"""Return the share of signal variance after t steps, for t = 0 to T.

    $$
    \bar\alpha_t = \prod_{s=1}^{t} (1 - \beta_s), \qquad \bar\alpha_0 = 1
    $$

    Index t of the result is the t of the papers; diffusers' `alphas_cumprod` starts at t = 1.

    Args:
        beta: Variances in the order t = 1 to T.

    Returns:
        T + 1 numbers from 1 downwards.

    Example:
        >>> alpha_bar(torch.tensor([0.5, 0.5]))
        tensor([1.0000, 0.5000, 0.2500])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (4).
    """
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(dim=0)])  # (eq:noise-alpha-bar)


def snr(alpha_bar: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    r"""Return the signal-to-noise ratio of x_t; infinite without noise.

    $$
    \operatorname{SNR}(t) = \frac{\bar\alpha_t}{1 - \bar\alpha_t}
    $$

    Args:
        alpha_bar: Share of signal variance at any times.

    Returns:
        One ratio for each time.

    Example:
        >>> snr(torch.tensor([1.0, 0.75, 0.0]))
        tensor([inf, 3., 0.])

    Reference:
        Kingma et al. (2021), arXiv:2107.00630, Eq. (2), with data of unit variance.
    """
    return alpha_bar / (1 - alpha_bar)  # (eq:noise-snr)


def min_snr_weight(snr: Float[Tensor, " n"], *, gamma: float = 5.0) -> Float[Tensor, " n"]:
    r"""Return the weight of the squared error of the noise that keeps small t from dominating.

    $$
    w = \frac{\min(\operatorname{SNR}, \gamma)}{\operatorname{SNR}}
    $$

    In terms of the data the weight is min(SNR, gamma); `prediction.error_weight` turns it into the
    weight of any other prediction.

    Args:
        snr: Signal-to-noise ratios, above 0.
        gamma: Ratio above which the data count alike.

    Returns:
        Weights between 0 and 1.

    Raises:
        ValueError: If `gamma` is not positive.

    Example:
        >>> min_snr_weight(torch.tensor([50.0, 5.0, 0.1]))
        tensor([0.1000, 1.0000, 1.0000])

    Reference:
        Hang et al. (2023), arXiv:2303.09556, Sec. 3.4, with gamma = 5.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: gamma > 0.")
    return (gamma / snr).clamp(max=1)  # (eq:noise-min-snr)


def zero_terminal_snr(beta: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    r"""Shift and scale a schedule so that nothing of the signal is left at t = T.

    $$
    \sqrt{\bar\alpha_t'} = \frac{\sqrt{\bar\alpha_1}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}
        \big(\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_T}\big)
    $$

    The first step stays as it was. The last variance becomes 1, where the noise no longer
    determines x_0: predict v or x_0 with such a schedule.

    Args:
        beta: Variances in the order t = 1 to T.

    Returns:
        The new variances.

    Raises:
        ValueError: If there are fewer than two steps.

    Example:
        >>> alpha_bar(zero_terminal_snr(linear_beta(n_steps=1000)))[-1].item()
        0.0

    Reference:
        Lin et al. (2023), arXiv:2305.08891, Algorithm 1.
    """
    if len(beta) < 2:
        raise ValueError(f"beta has {len(beta)} steps: the first and the last must differ, T >= 2.")
    root = alpha_bar(beta)[1:].sqrt()
    scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))  # (eq:noise-zero-snr)
    signal = torch.cat([beta.new_ones(1), scaled.square()])
    return 1 - signal[1:] / signal[:-1]


def _check(n_steps: int, **variances: float) -> None:
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}: n_steps >= 1.")
    for name, value in variances.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}: 0 < {name} < 1.")
