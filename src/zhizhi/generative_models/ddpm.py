"""DDPM: noise an image in T Gaussian steps, learn the noise, and walk the steps back.

Index t of `alpha_bar` is the t of the paper: 0 is data, T is noise (`noise_schedule.alpha_bar`).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Level = Float[Tensor, ""] | Float[Tensor, " B"]  # one time for all images, or one for each
NoiseModel = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> noise_hat [B, ...]


def q_sample(
    x_0: Float[Tensor, "B *pixels"],
    noise: Float[Tensor, "B *pixels"],
    *,
    alpha_bar_t: Level,
) -> Float[Tensor, "B *pixels"]:
    r"""Jump from data to time t in one step.

    $$
    x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon
    $$

    Args:
        x_0: Data.
        noise: Standard normal.
        alpha_bar_t: Share of signal variance.

    Returns:
        A sample of q(x_t | x_0).

    Example:
        >>> q_sample(torch.ones(1, 2), torch.zeros(1, 2), alpha_bar_t=torch.tensor(0.25))
        tensor([[0.5000, 0.5000]])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (4).
    """
    # (eq:ddpm-forward)
    return _as(alpha_bar_t.sqrt(), x_0) * x_0 + _as((1 - alpha_bar_t).sqrt(), x_0) * noise


def q_posterior(
    x_0: Float[Tensor, "B *pixels"],
    x_t: Float[Tensor, "B *pixels"],
    *,
    alpha_bar_t: Level,
    alpha_bar_prev: Level,
) -> tuple[Float[Tensor, "B *pixels"], Float[Tensor, "*#per_image"]]:
    r"""Return mean and variance of the step back when the data are known.

    $$
    \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0
        + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t, \qquad
    \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t
    $$

    Args:
        x_0: Data.
        x_t: The noised data.
        alpha_bar_t: Share of signal variance at t.
        alpha_bar_prev: The same at t - 1.

    Returns:
        Mean of q(x_{t-1} | x_t, x_0), and its variance in a shape that broadcasts against it.

    Example:
        >>> one = torch.tensor(1.0)  # t = 1: the step ends in x_0, with certainty
        >>> q_posterior(torch.ones(1), torch.zeros(1), alpha_bar_t=one / 2, alpha_bar_prev=one)
        (tensor([1.]), tensor(0.))

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (7).
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    beta_t = 1 - alpha_t
    # (eq:ddpm-posterior)
    from_data = alpha_bar_prev.sqrt() * beta_t / (1 - alpha_bar_t)
    from_noisy = alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    beta_tilde = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t
    return _as(from_data, x_0) * x_0 + _as(from_noisy, x_0) * x_t, _as(beta_tilde, x_0)


def gaussian_kl(
    mean: Float[Tensor, "..."],
    variance: Float[Tensor, "..."],
    *,
    mean_p: Float[Tensor, "..."],
    variance_p: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    r"""Return KL(N(mean, variance) || N(mean_p, variance_p)) for each coordinate, in nats.

    $$
    \tfrac12\Big(\frac{v}{v_p} - 1 - \log\frac{v}{v_p} + \frac{(\mu-\mu_p)^2}{v_p}\Big)
    $$

    Args:
        mean: Mean of the first Gaussian, the one that is averaged over.
        variance: Its variance.
        mean_p: Mean of the second.
        variance_p: Its variance.

    Returns:
        Numbers of the broadcast shape; independent coordinates add.

    Example:
        >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)
        >>> gaussian_kl(zero, one, mean_p=torch.tensor(2.0), variance_p=one)
        tensor(2.)
    """
    ratio = variance / variance_p
    # (eq:ddpm-kl)
    return 0.5 * (ratio - 1 - ratio.log() + (mean - mean_p).square() / variance_p)


def mean_from_noise(
    x_t: Float[Tensor, "B *pixels"],
    noise_hat: Float[Tensor, "B *pixels"],
    *,
    alpha_bar_t: Level,
    alpha_bar_prev: Level,
) -> Float[Tensor, "B *pixels"]:
    r"""Turn a noise prediction into the mean of the reverse step.

    $$
    \mu_\theta = \frac{1}{\sqrt{\alpha_t}}
        \Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta\Big)
    $$

    Args:
        x_t: The noised data.
        noise_hat: Predicted noise.
        alpha_bar_t: Share of signal variance at t; not 0, where the noise says nothing of x_0.
        alpha_bar_prev: The same at t - 1.

    Returns:
        The mean of p(x_{t-1} | x_t).

    Example:
        >>> quarter, one = torch.tensor(0.25), torch.tensor(1.0)
        >>> mean_from_noise(torch.ones(1), torch.zeros(1), alpha_bar_t=quarter, alpha_bar_prev=one)
        tensor([2.])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (11).
    """
    alpha_t = alpha_bar_t / alpha_bar_prev
    shift = (1 - alpha_t) / (1 - alpha_bar_t).sqrt()
    return (x_t - _as(shift, x_t) * noise_hat) / _as(alpha_t.sqrt(), x_t)  # (eq:ddpm-mean)


def elbo_weights(
    alpha_bar: Float[Tensor, " n"], *, variance: str = "small"
) -> Float[Tensor, "n-2"]:
    r"""Return the weight of the squared noise error in each KL term of the bound, t = 2 to T.

    $$
    w_t = \frac{\beta_t^2}{2\,\sigma_t^2\,\alpha_t\,(1-\bar\alpha_t)}
    $$

    Args:
        alpha_bar: T + 1 shares of signal variance from t = 0.
        variance: "small" is the posterior variance, "large" is beta_t.

    Returns:
        T - 1 weights; the term of t = 1 is a likelihood, not a KL divergence.

    Raises:
        ValueError: If the first share is not 1, or `variance` has another value.

    Example:
        >>> elbo_weights(torch.tensor([1.0, 0.8, 0.5]))  # (4 - 1) / (2 * 1), from the SNRs
        tensor([1.5000])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (12).
    """
    _check_starts_at_one(alpha_bar)
    alpha_bar_t, alpha_bar_prev = alpha_bar[2:], alpha_bar[1:-1]
    alpha_t = alpha_bar_t / alpha_bar_prev
    sigma_squared = _reverse_variance(alpha_bar_t, alpha_bar_prev, variance)
    # (eq:ddpm-weight)
    return (1 - alpha_t).square() / (2 * sigma_squared * alpha_t * (1 - alpha_bar_t))


def ddpm_loss(
    model: NoiseModel,
    x_0: Float[Tensor, "B *pixels"],
    *,
    alpha_bar: Float[Tensor, " n"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Return the simple loss: the mean squared error of the predicted noise at random times.

    $$
    L_{\text{simple}} = \mathbb{E}_{t,x_0,\epsilon}
        \big\|\epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\,x_0
        + \sqrt{1-\bar\alpha_t}\,\epsilon,\ t)\big\|^2
    $$

    The mean runs over pixels too, so an untrained model that answers 0 has a loss of 1.

    Args:
        model: Predicts the noise from x_t and t, with t from 1 to T.
        x_0: Data, scaled to about [-1, 1].
        alpha_bar: T + 1 shares of signal variance from t = 0.
        generator: Draws the times and the noise.

    Returns:
        A scalar.

    Raises:
        ValueError: If the first share is not 1.

    Example:
        >>> x_0, alpha_bar = torch.zeros(4, 2), torch.tensor([1.0, 0.75])
        >>> ddpm_loss(lambda x_t, t: x_t / 0.5, x_0, alpha_bar=alpha_bar)  # x_t is 0.5 noise
        tensor(0.)

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (14) and Algorithm 1.
    """
    _check_starts_at_one(alpha_bar)
    B, device = len(x_0), x_0.device
    t = torch.randint(1, len(alpha_bar), (B,), generator=generator, device=device)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=device)
    x_t = q_sample(x_0, noise, alpha_bar_t=alpha_bar[t])
    return (noise - model(x_t, t)).square().mean()  # (eq:ddpm-simple)


def ddpm_step(
    x_t: Float[Tensor, "B *pixels"],
    noise_hat: Float[Tensor, "B *pixels"],
    *,
    alpha_bar_t: Level,
    alpha_bar_prev: Level,
    variance: str = "small",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *pixels"]:
    r"""Draw x_{t-1} from the learned reverse step.

    $$
    x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \qquad z \sim \mathcal N(0, I)
    $$

    Nothing is added at the last step, t = 1, where alpha_bar_prev is 1.

    Args:
        x_t: Where the chain is.
        noise_hat: Predicted noise.
        alpha_bar_t: Share of signal variance at t.
        alpha_bar_prev: The same at t - 1.
        variance: "small" is the posterior variance, "large" is beta_t.
        generator: Draws z.

    Returns:
        Where the chain goes.

    Raises:
        ValueError: If `variance` has another value.

    Example:
        >>> quarter, one = torch.tensor(0.25), torch.tensor(1.0)
        >>> ddpm_step(torch.ones(1), torch.zeros(1), alpha_bar_t=quarter, alpha_bar_prev=one)
        tensor([2.])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Algorithm 2.
    """
    sigma = _reverse_variance(alpha_bar_t, alpha_bar_prev, variance).sqrt()
    sigma = torch.where(alpha_bar_prev < 1, sigma, 0.0)
    mean = mean_from_noise(x_t, noise_hat, alpha_bar_t=alpha_bar_t, alpha_bar_prev=alpha_bar_prev)
    z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
    return mean + _as(sigma, x_t) * z  # (eq:ddpm-step)


@torch.no_grad()
def ddpm_sample(
    model: NoiseModel,
    x_T: Float[Tensor, "B *pixels"],
    *,
    alpha_bar: Float[Tensor, " n"],
    variance: str = "small",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n B *pixels"]:
    r"""Walk from noise to data with all T steps, and keep the way.

    Args:
        model: Predicts the noise from x_t and t.
        x_T: Standard normal.
        alpha_bar: T + 1 shares of signal variance from t = 0.
        variance: "small" is the posterior variance, "large" is beta_t.
        generator: Draws the noise of the steps.

    Returns:
        The whole chain: entry t is x_t, so entry 0 holds the samples.

    Raises:
        ValueError: If the first share is not 1, or `variance` has another value.

    Example:
        >>> def model(x_t, t):  # exact for data that are always 0
        ...     return x_t / (1 - alpha_bar[t, None]).sqrt()
        >>> alpha_bar = torch.tensor([1.0, 0.75, 0.5])
        >>> ddpm_sample(model, torch.randn(2, 3), alpha_bar=alpha_bar)[0].abs() < 1e-6
        tensor([[True, True, True],
                [True, True, True]])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Algorithm 2.
    """
    _check_starts_at_one(alpha_bar)
    x_t, chain = x_T, [x_T]
    for t in range(len(alpha_bar) - 1, 0, -1):
        noise_hat = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_t = ddpm_step(
            x_t,
            noise_hat,
            alpha_bar_t=alpha_bar[t],
            alpha_bar_prev=alpha_bar[t - 1],
            variance=variance,
            generator=generator,
        )
        chain.append(x_t)
    return torch.stack(chain[::-1])


class NoiseMLP(nn.Module):
    r"""Predict the noise in flat data with three hidden layers.

    $$
    \epsilon_\theta(x_t, t) = c + g \odot x_t, \qquad (c, g) = \operatorname{MLP}(x_t, \sin, \cos)
    $$

    The gated copy of the input spares the layers the easy part: at large t, x_t is the noise.

    Args:
        n_pixels: Width of the data.
        width: Width of the hidden layers.
        n_frequencies: Frequencies of t, from 1 down to 1e-4; each gives a sine and a cosine.

    Example:
        >>> model = NoiseMLP(n_pixels=64)
        >>> model(torch.zeros(3, 64), torch.tensor([1, 50, 200])).shape
        torch.Size([3, 64])

    Reference:
        Vaswani et al. (2017), arXiv:1706.03762, Sec. 3.5, for the embedding of t.
    """

    def __init__(self, *, n_pixels: int, width: int = 256, n_frequencies: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.logspace(0, -4, n_frequencies))
        sizes = [n_pixels + 2 * n_frequencies, width, width, width, 2 * n_pixels]
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*(m for f in linear[:-1] for m in (f, nn.SiLU())), linear[-1])

    def forward(
        self, x_t: Float[Tensor, "B pixels"], t: Int[Tensor, " B"]
    ) -> Float[Tensor, "B pixels"]:
        """Return the predicted noise."""
        angle = t[:, None] * self.frequency
        out = self.layers(torch.cat([x_t, angle.sin(), angle.cos()], dim=-1))
        shift, gain = out.chunk(2, dim=-1)
        return shift + gain * x_t


def _as(coefficient: Tensor, x: Tensor) -> Tensor:
    """Give a [] or [B] coefficient the dtype of x, and axes to broadcast against [B, ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1) * coefficient.ndim).to(x)


def _reverse_variance(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, variance: str) -> Tensor:
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    if variance == "large":
        return beta_t
    if variance == "small":
        return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t
    raise ValueError(f'variance is {variance!r}: "small" or "large".')


def _check_starts_at_one(alpha_bar: Tensor) -> None:
    if alpha_bar[0] != 1:
        raise ValueError(f"alpha_bar[0] is {alpha_bar[0].item()}: time 0 has no noise, so it is 1.")
