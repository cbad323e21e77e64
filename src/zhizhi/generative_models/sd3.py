"""Stable Diffusion 3: which times a rectified flow trains on, and how they move with resolution.

Times run from 0 at the data to 1 at the noise. A density of training times is a weight of the loss:
what counts of any diffusion loss is its weight as a function of the log signal-to-noise ratio.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.paths import linear_sde
from zhizhi.generative_models.prediction import Path

MODE_SCALE_MAX = 2 / (math.pi - 2)  # beyond it the map of `mode_map` turns back


def flow_weight(path: Path) -> Float[Tensor, "*times"]:
    r"""Return the weight that the flow matching loss gives to the error of the noise.

    $$
    w_t = -\tfrac12 \dot\lambda_t b_t^2 = \tfrac12 g_t^2, \qquad
    \mathbb E\|\hat u - u\|^2 = -\tfrac12\,w_t\dot\lambda_t\,\mathbb E\|\hat\epsilon - \epsilon\|^2
    $$

    With lambda = log(a^2 / b^2), the weight is half the squared diffusion coefficient of the path's
    SDE. On the straight path it is t / (1 - t).

    Args:
        path: Coefficients and derivatives as tensors.

    Returns:
        One weight for each time.

    Example:
        >>> from zhizhi.generative_models.paths import straight_path
        >>> flow_weight(straight_path(torch.tensor([0.5, 0.75])))
        tensor([1., 3.])

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 2.
    """
    return linear_sde(path)[1] / 2  # (eq:sd3-flow-weight)


def logit_normal_timesteps(
    n: int, *, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Float[Tensor, " n"]:
    r"""Draw training times whose logit is normal, the choice of Stable Diffusion 3.

    $$
    t = \frac{1}{1 + e^{-(m + s z)}}, \qquad z \sim \mathcal N(0, 1)
    $$

    Args:
        n: How many.
        mean: m; below 0 leans to the data, above 0 to the noise.
        std: s, above 0.
        generator: Draws z.

    Returns:
        Times; 0 and 1 have density 0.

    Raises:
        ValueError: If std is not positive.

    Example:
        >>> times = logit_normal_timesteps(1000, generator=torch.Generator().manual_seed(0))
        >>> (times.logit().std() - 1).abs() < 0.1
        tensor(True)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 3.1, "Logit-Normal Sampling".
    """
    _check_std(std)
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def logit_normal_density(
    t: Float[Tensor, "*times"], *, mean: float = 0.0, std: float = 1.0
) -> Float[Tensor, "*times"]:
    r"""Return the density of `logit_normal_timesteps`.

    $$
    \pi_{\mathrm{ln}}(t; m, s) = \frac{1}{s\sqrt{2\pi}}\,\frac{1}{t(1 - t)}
        \exp\Big(-\frac{(\operatorname{logit} t - m)^2}{2 s^2}\Big)
    $$

    Args:
        t: Times strictly between 0 and 1.
        mean: As in `logit_normal_timesteps`.
        std: As in `logit_normal_timesteps`.

    Returns:
        The density.

    Raises:
        ValueError: If std is not positive.

    Example:
        >>> logit_normal_density(torch.tensor(0.5))
        tensor(1.5958)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 3.1; Atchison & Shen (1980).
    """
    _check_std(std)
    z = (t.logit() - mean) / std
    return (-z.square() / 2).exp() / (std * math.sqrt(2 * math.pi) * t * (1 - t))  # (eq:sd3-logit)


def mode_map(u: Float[Tensor, "*times"], *, scale: float) -> Float[Tensor, "*times"]:
    r"""Map uniform numbers to times with a mode, or a hollow, in the middle.

    $$
    f(u; s) = 1 - u - s\Big(\cos^2\frac{\pi u}{2} - 1 + u\Big), \qquad
    -1 \le s \le \frac{2}{\pi - 2}
    $$

    The density of f(u) is 1 / |f'(u)|, with f' = -1 - s (1 - pi/2 sin(pi u)).

    Args:
        u: Numbers from 0 to 1.
        scale: s; above 0 favours the middle, below 0 the ends, 0 is uniform.

    Returns:
        Times; falling in u, and unlike the logit-normal they reach 0 and 1.

    Raises:
        ValueError: If f would turn back, for s outside the bounds.

    Example:
        >>> mode_map(torch.tensor([0.0, 0.25, 0.5, 1.0]), scale=1.0)
        tensor([1.0000, 0.6464, 0.5000, 0.0000])

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 3.1, "Mode Sampling with Heavy Tails".
    """
    if not -1 <= scale <= MODE_SCALE_MAX:
        raise ValueError(f"scale is {scale}: -1 <= scale <= 2 / (pi - 2) = {MODE_SCALE_MAX:.4f}.")
    return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)  # (eq:sd3-mode)


def mode_timesteps(
    n: int, *, scale: float, generator: torch.Generator | None = None
) -> Float[Tensor, " n"]:
    """Draw training times with `mode_map`.

    Args:
        n: How many.
        scale: As in `mode_map`; 1.29 ranks best among those of the paper.
        generator: Draws uniform numbers.

    Returns:
        Times from 0 to 1.

    Raises:
        ValueError: As in `mode_map`.

    Example:
        >>> times = mode_timesteps(4, scale=1.0, generator=torch.Generator().manual_seed(0))
        >>> ((times > 0) & (times < 1)).all()
        tensor(True)
    """
    return mode_map(torch.rand(n, generator=generator), scale=scale)


def cosmap_density(t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    r"""Return the density of times whose log-SNR is distributed as under the cosine schedule.

    $$
    \pi(t) = \frac{2}{\pi - 2\pi t + 2\pi t^2}
    $$

    Args:
        t: Times from 0 to 1.

    Returns:
        The density.

    Example:
        >>> cosmap_density(torch.tensor([0.0, 0.5, 1.0])) * torch.pi
        tensor([2., 4., 2.])

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 3.1, "CosMap".
    """
    return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))  # (eq:sd3-cosmap)


def cosmap_timesteps(n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
    r"""Draw times at which the straight path has the log-SNR of the cosine schedule at uniform u.

    $$
    \frac{1 - t}{t} = \cot\frac{\pi u}{2}
    \quad\Longrightarrow\quad t = 1 - \frac{1}{1 + \tan\frac{\pi u}{2}}
    $$

    Args:
        n: How many.
        generator: Draws u.

    Returns:
        Times from 0 to 1.

    Example:
        >>> times = cosmap_timesteps(1000, generator=torch.Generator().manual_seed(0))
        >>> (times.median() - 0.5).abs() < 0.05
        tensor(True)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Sec. 3.1, "CosMap".
    """
    u = torch.rand(n, generator=generator)
    return 1 - 1 / (1 + (math.pi / 2 * u).tan())


def shift_timesteps(t: Float[Tensor, "*times"], *, alpha: float) -> Float[Tensor, "*times"]:
    r"""Move times to where a resolution with more pixels is as uncertain.

    $$
    t_m = \frac{\alpha t_n}{1 + (\alpha - 1)\,t_n}, \qquad
    \operatorname{logit} t_m = \operatorname{logit} t_n + \log\alpha, \qquad
    \alpha = \sqrt{m / n}
    $$

    Args:
        t: Times for n pixels, from 0 to 1.
        alpha: Above 1 moves towards the noise; 3 in Stable Diffusion 3 at 1024 x 1024.

    Returns:
        Times for m pixels; 0 and 1 stay where they are.

    Raises:
        ValueError: If alpha is not positive.

    Example:
        >>> shift_timesteps(torch.tensor([0.0, 0.5, 1.0]), alpha=3.0)
        tensor([0.0000, 0.7500, 1.0000])

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Eq. (23).
    """
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}: alpha > 0.")
    return alpha * t / (1 + (alpha - 1) * t)  # (eq:sd3-shift)


def _check_std(std: float) -> None:
    if std <= 0:
        raise ValueError(f"std is {std}: std > 0.")
