"""A mixture of isotropic Gaussians, noised: every quantity that a diffusion model learns, exactly.

For all paths x_t = a x_0 + b noise with x_0 from the mixture and a standard normal noise, x_t is a
mixture, too. The coefficients a and b are numbers, or tensors that broadcast over the samples.
"""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

Coefficient = int | float | Float[Tensor, "*#batch"]  # one for all samples, or one for each


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""Hold the distribution of the data, K Gaussian balls.

    $$
    p(x_0) = \sum_k w_k\, \mathcal N(x_0;\ \mu_k,\ s_k^2 I)
    $$

    A component of standard deviation 0 is a point, so a finite data set is a mixture as well.

    Args:
        weights: Probabilities w_k.
        means: Centres.
        std: Standard deviations s_k.

    Raises:
        ValueError: If `weights` is no distribution, or a standard deviation is negative.

    Example:
        >>> mixture = GaussianMixture(torch.tensor([0.2, 0.8]), torch.eye(2), torch.ones(2))
        >>> mixture.means.shape
        torch.Size([2, 2])
    """

    weights: Float[Tensor, " K"]
    means: Float[Tensor, "K D"]
    std: Float[Tensor, " K"]

    def __post_init__(self) -> None:
        least, total = self.weights.min().item(), self.weights.sum().item()
        if least < 0 or abs(total - 1) > 1e-5:
            raise ValueError(
                f"the smallest weight is {least:.6g} and the sum is {total:.6g}: "
                "weights are non-negative and sum to 1."
            )
        if self.std.min() < 0:
            raise ValueError(f"the smallest std is {self.std.min().item():.6g}: std >= 0.")


def sample_components(
    mixture: GaussianMixture, n_samples: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, " N"]:
    r"""Draw which component each sample comes from: its class, where components are classes.

    Args:
        mixture: The distribution.
        n_samples: How many.
        generator: Draws them.

    Returns:
        Indices of components.

    Example:
        >>> mixture = GaussianMixture(torch.tensor([0.0, 1.0]), torch.eye(2), torch.ones(2))
        >>> sample_components(mixture, 3)
        tensor([1, 1, 1])
    """
    return torch.multinomial(mixture.weights, n_samples, replacement=True, generator=generator)


def sample_given(
    mixture: GaussianMixture,
    component: Int[Tensor, " N"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N D"]:
    r"""Draw one sample from each named component.

    Args:
        mixture: The distribution.
        component: Indices of components.
        generator: Draws the noise.

    Returns:
        One x_0 for each index.

    Example:
        >>> points = GaussianMixture(torch.tensor([0.5, 0.5]), torch.eye(2), torch.zeros(2))
        >>> sample_given(points, torch.tensor([1, 0]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    mean = mixture.means[component]
    z = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + mixture.std[component, None] * z


def sample(
    mixture: GaussianMixture, n_samples: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "N D"]:
    r"""Draw independent samples of x_0.

    Args:
        mixture: The distribution.
        n_samples: How many.
        generator: Draws components and noise.

    Returns:
        Samples of the data; a x_0 + b noise is a sample of x_t.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 3), torch.ones(1))
        >>> sample(mixture, 5).shape
        torch.Size([5, 3])
    """
    component = sample_components(mixture, n_samples, generator=generator)
    return sample_given(mixture, component, generator=generator)


def log_prob(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""Return the log density of x_t = a x_0 + b noise.

    $$
    p_t(x) = \sum_k w_k\, \mathcal N(x;\ a\mu_k,\ v_k I), \qquad v_k = a^2 s_k^2 + b^2
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: Where the density is wanted.
        a: Scale of the data.
        b: Scale of the noise.

    Returns:
        One number a sample, in nats.

    Raises:
        ValueError: If a component of x_t is a point: it has no density.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> log_prob(mixture, torch.zeros(2))  # -log(2 pi)
        tensor(-1.8379)
    """
    return _log_joint(mixture, x_t, a, b).logsumexp(dim=-1)


def component_posterior(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
) -> Float[Tensor, "*batch K"]:
    r"""Return the probability of each component given x_t, the answer of a Bayes classifier.

    $$
    r_k(x) = \frac{w_k\, \mathcal N(x;\ a\mu_k,\ v_k I)}{p_t(x)}
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: What is seen.
        a: Scale of the data.
        b: Scale of the noise.

    Returns:
        Probabilities that sum to 1 over the components.

    Raises:
        ValueError: If a component of x_t is a point.

    Example:
        >>> weights, means = torch.tensor([0.2, 0.8]), torch.tensor([[-1.0], [1.0]])
        >>> component_posterior(GaussianMixture(weights, means, torch.ones(2)), torch.zeros(1))
        tensor([0.2000, 0.8000])
    """
    return _log_joint(mixture, x_t, a, b).softmax(dim=-1)


def score(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
) -> Float[Tensor, "*batch D"]:
    r"""Return the gradient of the log density of x_t.

    $$
    \nabla_x \log p_t(x) = \sum_k r_k(x)\, \frac{a\mu_k - x}{v_k}
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: Where the score is wanted.
        a: Scale of the data.
        b: Scale of the noise.

    Returns:
        One vector a sample.

    Raises:
        ValueError: If a component of x_t is a point.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> score(mixture, torch.tensor([2.0, 4.0]), b=1.0)
        tensor([-1., -2.])
    """
    r = component_posterior(mixture, x_t, a=a, b=b)
    offset, variance = _offsets_and_variances(mixture, x_t, a, b)
    return -einsum(r / variance, offset, "... K, ... K D -> ... D")  # (eq:score-mixture)


def denoise(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
) -> Float[Tensor, "*batch D"]:
    r"""Return the mean of the data given x_t, the best denoiser in the mean square.

    $$
    \mathbb E[x_0 \mid x_t = x] = \sum_k r_k(x)
        \Big(\mu_k + \frac{a s_k^2}{v_k}\,(x - a\mu_k)\Big)
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: What is seen.
        a: Scale of the data; 0 leaves nothing of them, and the mean of the mixture returns.
        b: Scale of the noise.

    Returns:
        One estimate of x_0 for each x_t.

    Raises:
        ValueError: If a component of x_t is a point.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> denoise(mixture, torch.tensor([2.0, 4.0]), b=1.0)
        tensor([1., 2.])
    """
    r = component_posterior(mixture, x_t, a=a, b=b)
    offset, variance = _offsets_and_variances(mixture, x_t, a, b)
    gain = _as(a, x_t) * mixture.std.to(x_t).square() / variance
    centre = einsum(r, mixture.means.to(x_t), "... K, K D -> ... D")
    return centre + einsum(r * gain, offset, "... K, ... K D -> ... D")


def predict_noise(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient = 1.0,
    b: Coefficient = 0.0,
) -> Float[Tensor, "*batch D"]:
    r"""Return the mean of the noise given x_t, what a noise-predicting network learns.

    $$
    \mathbb E[\epsilon \mid x_t = x] = \sum_k r_k(x)\, \frac{b}{v_k}\,(x - a\mu_k)
        = -b\, \nabla_x \log p_t(x)
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: What is seen.
        a: Scale of the data.
        b: Scale of the noise.

    Returns:
        One estimate of the noise for each x_t.

    Raises:
        ValueError: If a component of x_t is a point.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> predict_noise(mixture, torch.tensor([2.0, 4.0]), b=1.0)
        tensor([1., 2.])
    """
    return -_as(b, x_t) * score(mixture, x_t, a=a, b=b)


def velocity(
    mixture: GaussianMixture,
    x_t: Float[Tensor, "*batch D"],
    *,
    a: Coefficient,
    b: Coefficient,
    d_a: Coefficient,
    d_b: Coefficient,
) -> Float[Tensor, "*batch D"]:
    r"""Return the mean velocity of the path through x_t, what flow matching learns.

    $$
    u_t(x) = \mathbb E[\dot a\, x_0 + \dot b\, \epsilon \mid x_t = x]
    $$

    Args:
        mixture: The distribution of x_0.
        x_t: Where the velocity is wanted.
        a: Scale of the data.
        b: Scale of the noise.
        d_a: Time derivative of a; -1 for a = 1 - t.
        d_b: Time derivative of b; 1 for b = t.

    Returns:
        One vector a sample.

    Raises:
        ValueError: If a component of x_t is a point.

    Example:
        >>> mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
        >>> velocity(mixture, torch.tensor([2.0, 4.0]), a=0.5, b=0.5, d_a=-1.0, d_b=1.0)
        tensor([0., 0.])
    """
    from_data = _as(d_a, x_t) * denoise(mixture, x_t, a=a, b=b)
    return from_data + _as(d_b, x_t) * predict_noise(mixture, x_t, a=a, b=b)


def _as(coefficient: Coefficient, x: Tensor) -> Tensor:
    """Give a coefficient the dtype of x and an axis for D or K; a float must not pass float32."""
    return torch.as_tensor(coefficient, dtype=x.dtype, device=x.device)[..., None]


def _offsets_and_variances(
    mixture: GaussianMixture, x_t: Tensor, a: Coefficient, b: Coefficient
) -> tuple[Tensor, Tensor]:
    """Return x - a mu_k [..., K, D] and v_k [..., K] in the dtype of x_t."""
    a, b = _as(a, x_t), _as(b, x_t)
    variance = (a * mixture.std.to(x_t)).square() + b.square()
    if variance.min() <= 0:
        raise ValueError(
            f"the smallest a^2 s^2 + b^2 is {variance.min().item():.6g}: "
            "a point has no density, so it must be positive."
        )
    return x_t[..., None, :] - a[..., None] * mixture.means.to(x_t), variance


def _log_joint(mixture: GaussianMixture, x_t: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
    """Return log of w_k N(x; a mu_k, v_k I), [..., K]."""
    offset, variance = _offsets_and_variances(mixture, x_t, a, b)
    log_normal = -0.5 * (
        offset.square().sum(dim=-1) / variance + x_t.shape[-1] * (2 * torch.pi * variance).log()
    )
    return mixture.weights.to(x_t).log() + log_normal
