"""DDIM: a whole family of reverse processes with one set of marginals, and its quiet member."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

NoiseModel = Callable[[Tensor, Tensor], Tensor]


def ddim_sigma(
    alpha_bar_t: Float[Tensor, "*shape"], alpha_bar_s: Float[Tensor, "*shape"], *, eta: float
) -> Float[Tensor, "*shape"]:
    r"""Return how much fresh noise a step from t back to s adds.

    $$
    \sigma = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}
        \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}
    $$

    Args:
        alpha_bar_t: Share of signal variance at t.
        alpha_bar_s: The same at the earlier time s.
        eta: 0 for none; 1 for the posterior of DDPM.

    Returns:
        The standard deviation.

    Raises:
        ValueError: If eta is not in [0, 1].

    Example:
        >>> ddim_sigma(torch.tensor(0.5), torch.tensor(0.8), eta=1.0) ** 2
        tensor(0.1500)

    Reference:
        Song, Meng & Ermon (2020), arXiv:2010.02502, Eq. (16).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: 0 <= eta <= 1.")
    ratio = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    return eta * ratio.sqrt()  # (eq:ddim-sigma)


def ddim_step(
    x_t: Float[Tensor, "*batch"],
    noise_hat: Float[Tensor, "*batch"],
    *,
    alpha_bar_t: Float[Tensor, ""],
    alpha_bar_s: Float[Tensor, ""],
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Step from t back to any earlier s: estimate the data, and noise it again to the level of s.

    $$
    x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\,\hat\epsilon
        + \sigma z
    $$

    Args:
        x_t: Where the step begins.
        noise_hat: Predicted noise in x_t.
        alpha_bar_t: Share of signal variance at t.
        alpha_bar_s: The same at s; s need not be t - 1, and may be later, which is inversion.
        eta: As in `ddim_sigma`; must be 0 for a step to a later time.
        generator: Draws z.

    Returns:
        x_s.

    Raises:
        ValueError: If noise is asked for on the way up.

    Example:
        >>> one, half = torch.tensor(1.0), torch.tensor(0.5)
        >>> x_t = half.sqrt() * torch.tensor([3.0]) + half.sqrt() * torch.tensor([1.0])
        >>> ddim_step(x_t, torch.tensor([1.0]), alpha_bar_t=half, alpha_bar_s=one)
        tensor([3.])

    Reference:
        Song, Meng & Ermon (2020), arXiv:2010.02502, Eq. (12).
    """
    if eta > 0 and alpha_bar_s < alpha_bar_t:
        raise ValueError(f"eta is {eta} on the way to more noise: only eta = 0 goes there.")
    data = (x_t - (1 - alpha_bar_t).sqrt() * noise_hat) / alpha_bar_t.sqrt()
    if eta == 0:
        return alpha_bar_s.sqrt() * data + (1 - alpha_bar_s).sqrt() * noise_hat
    sigma = ddim_sigma(alpha_bar_t, alpha_bar_s, eta=eta)
    z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
    direction = (1 - alpha_bar_s - sigma**2).clamp_min(0.0).sqrt()
    return alpha_bar_s.sqrt() * data + direction * noise_hat + sigma * z  # (eq:ddim-step)


def ddim_times(n_train: int, n_steps: int, *, spacing: str = "trailing") -> Int[Tensor, " T"]:
    r"""Choose the times that a short run visits, from noise to data; the last is 0.

    Args:
        n_train: T, steps of the training.
        n_steps: Steps of the run.
        spacing: "trailing" begins at T; "leading" ends one stride before it and never sees the
            noisiest level; "linspace" takes both ends.

    Returns:
        n_steps + 1 times in the counting of the papers, 1 to T, and then 0 for the data.

    Raises:
        ValueError: If n_steps is not from 1 to T, or the spacing has another name.

    Example:
        >>> ddim_times(1000, 4).tolist(), ddim_times(1000, 4, spacing="leading").tolist()
        ([1000, 750, 500, 250, 0], [751, 501, 251, 1, 0])

    Reference:
        Lin et al. (2023), arXiv:2305.08891, Table 2, for the names.
    """
    if not 1 <= n_steps <= n_train:
        raise ValueError(f"n_steps is {n_steps} of {n_train}: 1 <= n_steps <= n_train.")
    if spacing == "trailing":
        times = torch.arange(n_steps, 0, -1, dtype=torch.float64) * n_train / n_steps
    elif spacing == "leading":
        times = torch.arange(n_steps - 1, -1, -1, dtype=torch.float64) * (n_train // n_steps) + 1
    elif spacing == "linspace":
        times = torch.linspace(n_train, 1, n_steps, dtype=torch.float64)
    else:
        raise ValueError(f"spacing is {spacing!r}: 'trailing', 'leading' or 'linspace'.")
    return torch.cat([times.round().long(), torch.zeros(1, dtype=torch.long)])


def ddim_sample(
    model: NoiseModel,
    x: Float[Tensor, "B *pixels"],
    *,
    alpha_bar: Float[Tensor, " levels"],
    times: Int[Tensor, " T"],
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "T B *pixels"]:
    r"""Walk along times with a network that was trained as in DDPM.

    Args:
        model: Predicts the noise from x and t [B].
        x: Noise at times[0]; for inversion, data at times[0] = 0.
        alpha_bar: Share of signal variance at t = 0 to T.
        times: Of `ddim_times`; reversed (flip) they lead from data to noise.
        eta: As in `ddim_sigma`.
        generator: Draws the noise of the steps.

    Returns:
        x at all times.

    Raises:
        ValueError: If the times are neither all falling nor all rising.

    Example:
        >>> alpha_bar = torch.tensor([1.0, 0.75, 0.5])
        >>> def model(x, t):  # exact for data that are always 0
        ...     return x / (1 - alpha_bar[t, None]).sqrt()
        >>> times = torch.tensor([2, 0])
        >>> ddim_sample(model, torch.ones(1, 2), alpha_bar=alpha_bar, times=times)[-1].abs() < 1e-6
        tensor([[True, True]])

    Reference:
        Song, Meng & Ermon (2020), arXiv:2010.02502, Sec. 4.2 and, for the way back, Sec. 4.3.
    """
    steps = times.diff()
    if not ((steps < 0).all() or (steps > 0).all()):
        raise ValueError(f"times are {times.tolist()}: all falling or all rising.")
    chain = [x]
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        at = max(t, 1)  # a network is not trained at time 0; the first step up borrows time 1
        noise_hat = model(chain[-1], torch.full((len(x),), at, device=x.device))
        # Not in the dtype of x: in float32, 1 - alpha_bar cancels at small t.
        levels = {
            "alpha_bar_t": alpha_bar[t].to(x.device),
            "alpha_bar_s": alpha_bar[s].to(x.device),
        }
        chain.append(ddim_step(chain[-1], noise_hat, **levels, eta=eta, generator=generator))
    return torch.stack(chain)


def slerp(
    x: Float[Tensor, "*batch D"], y: Float[Tensor, "*batch D"], *, weight: float
) -> Float[Tensor, "*batch D"]:
    r"""Go from one noise to another along the sphere, so that what lies between is noise, too.

    $$
    \frac{\sin((1 - w)\theta)}{\sin\theta} x + \frac{\sin(w\theta)}{\sin\theta} y, \qquad
    \cos\theta = \frac{x \cdot y}{\|x\| \|y\|}
    $$

    Args:
        x: At weight 0.
        y: At weight 1; not parallel to x.
        weight: w.

    Returns:
        The point between.

    Raises:
        ValueError: If two vectors are parallel.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), weight=0.5)
        tensor([0.7071, 0.7071])

    Reference:
        Song, Meng & Ermon (2020), arXiv:2010.02502, App. D.5; Shoemake (1985).
    """
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    if (cosine.abs() > 1 - 1e-6).any():
        raise ValueError("two of the vectors are parallel: there is no angle between them.")
    angle = cosine.acos()[..., None]
    return (((1 - weight) * angle).sin() * x + (weight * angle).sin() * y) / angle.sin()
