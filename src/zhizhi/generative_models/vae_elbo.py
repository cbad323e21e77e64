"""The variational autoencoder: bounds on log p(x), and a linear model in which p(x) is known.

A likelihood is a function of z [K, B, Z] with values log p(x | z) [K, B]: K draws for each of B
images. Whatever has such a function has the bounds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from zhizhi.generative_models.autoencoder import kl_to_standard_normal, reparameterise
from zhizhi.generative_models.autoregressive_models import bernoulli_log_likelihood

Likelihood = Callable[[Tensor], Tensor]


def gaussian_log_prob(
    x: Float[Tensor, "*#batch D"],
    mean: Float[Tensor, "*#batch D"],
    log_variance: Float[Tensor, "*#batch D"] | float,
) -> Float[Tensor, "*batch"]:
    r"""Return the log density of independent Gaussian coordinates.

    $$
    -\tfrac12\sum_d\Big(\frac{(x_d-\mu_d)^2}{s_d^2} + \log s_d^2 + \log 2\pi\Big)
    $$

    Args:
        x: Where.
        mean: Means.
        log_variance: Logarithms of the variances.

    Returns:
        One number a vector.

    Example:
        >>> gaussian_log_prob(torch.ones(2), torch.zeros(2), 0.0)  # -1 - log(2 pi)
        tensor(-2.8379)
    """
    log_variance = torch.as_tensor(log_variance, dtype=x.dtype, device=x.device)
    squares = (x - mean).square() / log_variance.exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(dim=-1)


def gaussian_likelihood(
    decode: Callable[[Tensor], Tensor], x: Float[Tensor, "B D"], *, std: float
) -> Likelihood:
    r"""Return z -> log N(x; decode(z), std^2 I), the likelihood whose loss is a weighted square.

    Args:
        decode: z [K, B, Z] to means [K, B, D].
        x: Images.
        std: Of every pixel.

    Returns:
        The likelihood of these images.

    Raises:
        ValueError: If std is not positive.

    Example:
        >>> likelihood = gaussian_likelihood(lambda z: z, torch.zeros(1, 2), std=1.0)
        >>> likelihood(torch.ones(1, 1, 2))  # -1 - log(2 pi)
        tensor([[-2.8379]])
    """
    if std <= 0:
        raise ValueError(f"std is {std}: std > 0.")
    return lambda z: gaussian_log_prob(x, decode(z), 2 * math.log(std))


def bernoulli_likelihood(decode: Callable[[Tensor], Tensor], x: Float[Tensor, "B D"]) -> Likelihood:
    r"""Return z -> log p(x | z) for pixels that are 0 or 1.

    Args:
        decode: z [K, B, Z] to logits [K, B, D].
        x: Zeros and ones; grey pixels are refused when the likelihood is called.

    Returns:
        The likelihood of these images.

    Example:
        >>> likelihood = bernoulli_likelihood(lambda z: z, torch.tensor([[1.0, 0.0]]))
        >>> likelihood(torch.zeros(3, 1, 2)).exp()[:, 0]
        tensor([0.2500, 0.2500, 0.2500])
    """

    def likelihood(z: Tensor) -> Tensor:
        logits, pixels = (
            rearrange(decode(z), "K B D -> (K B) D"),
            repeat(x, "B D -> (K B) D", K=len(z)),
        )
        return rearrange(bernoulli_log_likelihood(logits, pixels), "(K B) -> K B", K=len(z))

    return likelihood


def elbo(
    likelihood: Likelihood,
    mean: Float[Tensor, "B Z"],
    log_variance: Float[Tensor, "B Z"],
    *,
    n_samples: int = 1,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " B"]:
    r"""Estimate the evidence lower bound, with the divergence in closed form.

    $$
    \mathbb E_{q(z\mid x)}\big[\log p(x\mid z)\big]
        - \beta\,\mathrm{KL}\big(q(z\mid x)\,\big\|\,\mathcal N(0, I)\big)
    $$

    Args:
        likelihood: log p(x | z).
        mean: Means of q.
        log_variance: Logarithms of its variances.
        n_samples: K, draws for the first term.
        beta: Weight of the divergence; a bound on log p(x) if at least 1.
        generator: Draws z.

    Returns:
        An unbiased estimate for each image, differentiable in everything.

    Raises:
        ValueError: If n_samples is less than 1 or beta is negative.

    Example:
        >>> likelihood = gaussian_likelihood(torch.zeros_like, torch.zeros(1, 2), std=1.0)
        >>> elbo(likelihood, torch.zeros(1, 2), torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])

    Reference:
        Kingma & Welling (2013), arXiv:1312.6114, Eqs. (3) and (7); Higgins et al. (2017), ICLR,
        for beta.
    """
    if beta < 0:
        raise ValueError(f"beta is {beta}: beta >= 0.")
    z = reparameterise(mean, log_variance, n_samples=n_samples, generator=generator)
    kl = kl_to_standard_normal(mean, log_variance).sum(dim=-1)
    return likelihood(z).mean(dim=0) - beta * kl  # (eq:vae-elbo)


def log_weights(
    likelihood: Likelihood,
    mean: Float[Tensor, "B Z"],
    log_variance: Float[Tensor, "B Z"],
    *,
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "K B"]:
    r"""Draw z from q and return the logarithms of its importance weights.

    $$
    \log w = \log p(x \mid z) + \log p(z) - \log q(z \mid x)
    $$

    Args:
        likelihood: log p(x | z).
        mean: Means of q.
        log_variance: Logarithms of its variances.
        n_samples: K.
        generator: Draws z.

    Returns:
        K numbers for each image; the mean of exp is p(x), their own mean the ELBO.

    Raises:
        ValueError: If n_samples is less than 1.

    Example:
        >>> likelihood = gaussian_likelihood(torch.zeros_like, torch.zeros(1, 2), std=1.0)
        >>> log_w = log_weights(likelihood, torch.zeros(1, 2), torch.zeros(1, 2), n_samples=3)
        >>> log_w[:, 0]  # q is the posterior: all weights are p(x), here 1 / (2 pi)
        tensor([-1.8379, -1.8379, -1.8379])
    """
    z = reparameterise(mean, log_variance, n_samples=n_samples, generator=generator)
    prior = gaussian_log_prob(z, torch.zeros_like(mean), 0.0)
    return likelihood(z) + prior - gaussian_log_prob(z, mean, log_variance)


def importance_weighted_bound(log_w: Float[Tensor, "K *batch"]) -> Float[Tensor, "*batch"]:
    r"""Return the logarithm of the mean weight, a bound that tightens with K.

    $$
    \log \frac1K\sum_{k=1}^{K} w_k
    $$

    Args:
        log_w: Of `log_weights`.

    Returns:
        One estimate for each image; K = 1 is the ELBO.

    Example:
        >>> importance_weighted_bound(torch.tensor([0.0, 3.0]).log())
        tensor(0.4055)

    Reference:
        Burda, Grosse & Salakhutdinov (2015), arXiv:1509.00519, Eq. (8) and Theorem 1.
    """
    return log_w.logsumexp(dim=0) - math.log(len(log_w))  # (eq:vae-iwae)


def reparameterised_gradient(
    f: Callable[[Tensor], Tensor],
    mean: Float[Tensor, " Z"],
    log_variance: Float[Tensor, " Z"],
    *,
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "K Z"]:
    r"""Return K estimates of the gradient of E f(z) by the mean, through the draw.

    $$
    \nabla_\mu f(\mu + s \odot \epsilon)
    $$

    Args:
        f: z [K, Z] to [K], differentiable.
        mean: Mean of z.
        log_variance: Logarithms of the variances.
        n_samples: K.
        generator: Draws z.

    Returns:
        One unbiased estimate for each draw.

    Raises:
        ValueError: If n_samples is less than 1.

    Example:
        >>> reparameterised_gradient(lambda z: 3 * z.sum(-1), torch.zeros(2), torch.zeros(2),
        ...                          n_samples=1)
        tensor([[3., 3.]])

    Reference:
        Kingma & Welling (2013), arXiv:1312.6114, Sec. 2.4.
    """
    z = reparameterise(mean, log_variance, n_samples=n_samples, generator=generator)
    z = z.detach().requires_grad_()
    return torch.autograd.grad(f(z).sum(), z)[0]  # d z / d mean is the identity


def score_function_gradient(
    f: Callable[[Tensor], Tensor],
    mean: Float[Tensor, " Z"],
    log_variance: Float[Tensor, " Z"],
    *,
    n_samples: int,
    baseline: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "K Z"]:
    r"""Return K estimates of the same gradient from values of f alone.

    $$
    \big(f(z) - b\big)\,\nabla_\mu \log q(z) = \big(f(z) - b\big)\,\frac{z-\mu}{s^2}
    $$

    Args:
        f: z [K, Z] to [K]; any function.
        mean: Mean of z.
        log_variance: Logarithms of the variances.
        n_samples: K.
        baseline: b, any number that does not depend on z.
        generator: Draws z.

    Returns:
        One unbiased estimate for each draw.

    Raises:
        ValueError: If n_samples is less than 1.

    Example:
        >>> score_function_gradient(lambda z: torch.full((2,), 5.0), torch.zeros(3), torch.zeros(3),
        ...                         n_samples=2, baseline=5.0).abs().max()
        tensor(0.)

    Reference:
        Williams (1992), Machine Learning 8, REINFORCE.
    """
    z = reparameterise(mean, log_variance, n_samples=n_samples, generator=generator)
    score = (z - mean) / log_variance.exp()
    return (f(z) - baseline)[:, None] * score  # (eq:vae-score)


class LinearGaussian(NamedTuple):
    r"""A latent variable model with an exact answer: $x = W z + \mu + \sigma\epsilon$.

    Attributes:
        weight: W.
        mean: The mean of x.
        variance: $\sigma^2$.
    """

    weight: Float[Tensor, "D Z"]
    mean: Float[Tensor, " D"]
    variance: Float[Tensor, ""]


def ppca_log_prob(x: Float[Tensor, "B D"], model: LinearGaussian) -> Float[Tensor, " B"]:
    r"""Return the exact log density of the linear model, the integral over z done by hand.

    $$
    \log \mathcal N\big(x;\ \mu,\ W W^\top + \sigma^2 I\big)
    $$

    Args:
        x: Where.
        model: The model.

    Returns:
        One number a row.

    Example:
        >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), torch.tensor(3.0))
        >>> ppca_log_prob(torch.zeros(1, 1), model)  # -log(2 pi 4) / 2
        tensor([-1.6121])

    Reference:
        Tipping & Bishop (1999), J. R. Stat. Soc. B 61(3), Sec. 3.1.
    """
    W, mean, variance = model
    covariance = W @ W.T + variance * torch.eye(
        len(W), dtype=W.dtype, device=W.device
    )  # (eq:vae-marginal)
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)


def ppca_posterior(
    x: Float[Tensor, "B D"], model: LinearGaussian
) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "Z Z"]]:
    r"""Return mean and covariance of z given x; the covariance is the same for all x.

    $$
    p(z\mid x) = \mathcal N\big(M^{-1}W^\top(x-\mu),\ \sigma^2 M^{-1}\big), \qquad
    M = W^\top W + \sigma^2 I
    $$

    Args:
        x: Observations.
        model: The model.

    Returns:
        Mean and covariance.

    Example:
        >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), torch.tensor(1.0))
        >>> ppca_posterior(torch.ones(1, 1), model)
        (tensor([[0.5000]]), tensor([[0.5000]]))

    Reference:
        Tipping & Bishop (1999), J. R. Stat. Soc. B 61(3), Sec. 3.1.
    """
    W, mean, variance = model
    M = W.T @ W + variance * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    M_inverse = torch.linalg.inv(M)
    return (x - mean) @ W @ M_inverse, variance * M_inverse  # (eq:vae-posterior)


def ppca_fit(
    x: Float[Tensor, "N D"], *, n_latents: int, variance: float | None = None
) -> LinearGaussian:
    r"""Return the linear model of greatest likelihood: principal components, shrunk.

    $$
    W = U_Z(\Lambda_Z - \sigma^2 I)_+^{1/2}, \qquad
    \sigma^2 = \frac{1}{D - Z}\sum_{i > Z}\lambda_i
    $$

    Args:
        x: Data; the eigenvalues are those of their covariance, divided by N.
        n_latents: Z.
        variance: sigma^2 if it is given and not estimated; directions below it get a zero column.

    Returns:
        The model.

    Raises:
        ValueError: If Z is not from 1 to D - 1, or the variance is not positive.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> model = ppca_fit(x, n_latents=1)
        >>> model.weight.abs(), model.variance  # eigenvalues 2 and 1/2
        (tensor([[1.2247],
                [0.0000]]), tensor(0.5000))

    Reference:
        Tipping & Bishop (1999), J. R. Stat. Soc. B 61(3), Sec. 3.2; Lucas et al. (2019),
        arXiv:1911.02469, for a variance that is given.
    """
    D = x.shape[1]
    if not 1 <= n_latents < D:
        raise ValueError(f"n_latents is {n_latents} of {D}: 1 <= n_latents < {D}.")
    if variance is not None and variance <= 0:
        raise ValueError(f"variance is {variance}: variance > 0.")
    mean = x.mean(dim=0)
    eigenvalues, U = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    eigenvalues, U = eigenvalues.flip(0), U.flip(1)
    rest = eigenvalues[n_latents:].mean()
    sigma_squared = rest if variance is None else torch.full_like(rest, variance)
    scale = (eigenvalues[:n_latents] - sigma_squared).clamp_min(0).sqrt()
    return LinearGaussian(U[:, :n_latents] * scale, mean, sigma_squared)  # (eq:vae-ppca)


def linear_elbo(
    x: Float[Tensor, "B D"],
    model: LinearGaussian,
    mean: Float[Tensor, "B Z"],
    log_variance: Float[Tensor, "#B Z"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, " B"]:
    r"""Return the ELBO of the linear model without drawing anything.

    $$
    \log\mathcal N\big(x;\ \mu + Wm,\ \sigma^2 I\big)
        - \frac{1}{2\sigma^2}\sum_k s_k^2\,\|w_k\|^2 - \beta\,\mathrm{KL}(q\,\|\,p)
    $$

    Args:
        x: Observations.
        model: The model.
        mean: Means m of q.
        log_variance: Logarithms of its variances.
        beta: Weight of the divergence.

    Returns:
        One number a row.

    Example:
        >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), torch.tensor(1.0))
        >>> x, half = torch.ones(1, 1), torch.full((1, 1), 0.5)  # q is the posterior
        >>> linear_elbo(x, model, half, half.log()), ppca_log_prob(x, model)
        (tensor([-1.5155]), tensor([-1.5155]))

    Reference:
        Lucas et al. (2019), arXiv:1911.02469.
    """
    W, centre, variance = model
    fitted = gaussian_log_prob(x, centre + mean @ W.T, variance.log().expand(len(W)))
    spread = log_variance.exp() @ W.square().sum(dim=0) / (2 * variance)
    kl = kl_to_standard_normal(mean, log_variance.expand_as(mean)).sum(dim=-1)
    return fitted - spread - beta * kl  # (eq:vae-linear-elbo)


def aggregate_log_prob(
    z: Float[Tensor, "M Z"], mean: Float[Tensor, "N Z"], log_variance: Float[Tensor, "N Z"]
) -> Float[Tensor, " M"]:
    r"""Return the log density of the aggregate posterior, a mixture of one Gaussian an image.

    $$
    q(z) = \frac1N\sum_{n=1}^{N} q(z\mid x_n)
    $$

    Args:
        z: Where.
        mean: Means of the N posteriors.
        log_variance: Logarithms of their variances.

    Returns:
        M numbers.

    Example:
        >>> z, both = torch.tensor([[0.0]]), torch.tensor([[3.0], [-3.0]])
        >>> aggregate_log_prob(z, both, torch.zeros(2, 1))  # -9 / 2 - log(2 pi) / 2
        tensor([-5.4189])

    Reference:
        Hoffman & Johnson (2016), ELBO surgery, NIPS workshop on approximate inference.
    """
    terms = gaussian_log_prob(z[:, None], mean, log_variance)
    return terms.logsumexp(dim=1) - math.log(len(mean))  # (eq:vae-aggregate)


def mutual_information(
    mean: Float[Tensor, "N Z"],
    log_variance: Float[Tensor, "N Z"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Estimate how much z tells about which of the N images it was drawn for.

    $$
    I_q = \frac1N\sum_n \mathbb E_{q(z\mid x_n)}\big[\log q(z\mid x_n) - \log q(z)\big]
        \le \log N
    $$

    The mean KL to the prior less this is the divergence of the aggregate posterior from the prior.

    Args:
        mean: Means of the N posteriors.
        log_variance: Logarithms of their variances.
        generator: Draws one z an image.

    Returns:
        Nats; never above log N.

    Example:
        >>> far_apart = 100 * torch.eye(4)
        >>> mutual_information(far_apart, torch.zeros(4, 4)).exp().round()  # four images
        tensor(4.)

    Reference:
        Hoffman & Johnson (2016), ELBO surgery, NIPS workshop on approximate inference.
    """
    z = reparameterise(mean, log_variance, n_samples=1, generator=generator)[0]
    own = gaussian_log_prob(z, mean, log_variance)
    return (own - aggregate_log_prob(z, mean, log_variance)).mean()  # (eq:vae-surgery)


def active_units(mean: Float[Tensor, "N Z"], *, threshold: float = 0.01) -> Bool[Tensor, " Z"]:
    r"""Return which latents move with the image at all.

    $$
    \operatorname{Var}_{x}\big(\mathbb E_{q(z\mid x)}[z_k]\big) > 0.01
    $$

    Args:
        mean: Means of the N posteriors.
        threshold: Variance below which a latent counts as collapsed.

    Returns:
        True for active ones.

    Example:
        >>> active_units(torch.tensor([[1.0, 0.01], [-1.0, -0.01]]))
        tensor([ True, False])

    Reference:
        Burda, Grosse & Salakhutdinov (2015), arXiv:1509.00519, Sec. 5.
    """
    return mean.var(dim=0) > threshold
