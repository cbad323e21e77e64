"""Autoencoder: to a few Gaussian numbers and back, the space in which latent models live.

The encoder answers with a mean and a log-variance, never a variance: any real number is one.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Posterior(NamedTuple):
    """What the encoder says of an image, the Gaussian q(z | x) with independent coordinates.

    Attributes:
        mean: The means.
        log_variance: Logarithms of the variances.
    """

    mean: Float[Tensor, "*batch Z"]
    log_variance: Float[Tensor, "*batch Z"]


def kl_to_standard_normal(
    mean: Float[Tensor, "*batch Z"], log_variance: Float[Tensor, "*batch Z"]
) -> Float[Tensor, "*batch Z"]:
    r"""Return KL(N(mean, variance) || N(0, 1)) of each coordinate, in nats.

    $$
    \tfrac12\big(\mu^2 + s^2 - 1 - \log s^2\big)
    $$

    Args:
        mean: Means.
        log_variance: Logarithms of the variances.

    Returns:
        One number a coordinate; sum the last axis for the divergence of the vectors.

    Example:
        >>> kl_to_standard_normal(torch.tensor([2.0, 0.0]), torch.zeros(2))
        tensor([2., 0.])

    Reference:
        Kingma & Welling (2013), arXiv:1312.6114, App. B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)  # (eq:vae-kl)


def reparameterise(
    mean: Float[Tensor, "*batch Z"],
    log_variance: Float[Tensor, "*batch Z"],
    *,
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "K *batch Z"]:
    r"""Draw z as a function of its mean and deviation, so that gradients pass.

    $$
    z = \mu + s \odot \epsilon, \qquad \epsilon \sim \mathcal N(0, I)
    $$

    Args:
        mean: Means.
        log_variance: Logarithms of the variances.
        n_samples: K, draws for each mean.
        generator: Draws the noise.

    Returns:
        The draws, on a new first axis.

    Raises:
        ValueError: If n_samples is less than 1.

    Example:
        >>> reparameterise(torch.ones(2, 3), torch.full((2, 3), -100.0), n_samples=4)[:, 0, 0]
        tensor([1., 1., 1., 1.])

    Reference:
        Kingma & Welling (2013), arXiv:1312.6114, Sec. 2.4; Rezende et al. (2014), arXiv:1401.4082.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples is {n_samples}: n_samples >= 1.")
    noise = torch.randn(
        (n_samples, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device
    )
    return mean + (0.5 * log_variance).exp() * noise  # (eq:vae-reparameterise)


class Autoencoder(nn.Module):
    r"""Two small networks: pixels to a Gaussian over latents, and a latent to pixels.

    What the decoder returns are the parameters of a likelihood: means of Gaussian pixels, or logits
    of black and white ones.

    Args:
        n_pixels: Width of the data.
        n_latents: Width of the latent.
        width: Width of the two hidden layers on each side.
        generator: Fills the weights, uniform as in nn.Linear.

    Example:
        >>> model = Autoencoder(generator=torch.Generator().manual_seed(0))
        >>> posterior = model.encode(torch.zeros(5, 64))
        >>> posterior.mean.shape, model.decode(posterior.mean).shape
        (torch.Size([5, 8]), torch.Size([5, 64]))

    Reference:
        Kingma & Welling (2013), arXiv:1312.6114, App. C.
    """

    def __init__(
        self,
        *,
        n_pixels: int = 64,
        n_latents: int = 8,
        width: int = 128,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.encoder = _mlp(n_pixels, width, width, 2 * n_latents, generator=generator)
        self.decoder = _mlp(n_latents, width, width, n_pixels, generator=generator)

    def encode(self, x: Float[Tensor, "*batch pixels"]) -> Posterior:
        """Return the Gaussian over latents; log-variances are kept within [-30, 20]."""
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, z: Float[Tensor, "*batch Z"]) -> Float[Tensor, "*batch pixels"]:
        """Return one number a pixel: a mean, or a logit."""
        return self.decoder(z)


def autoencoder_loss(
    model: Autoencoder,
    x: Float[Tensor, "B pixels"],
    *,
    kl_weight: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Return the loss of an autoencoder whose latents are only kept from drifting away.

    $$
    \mathbb E_x\Big[\tfrac12\big\|x - D(z)\big\|^2
        + w\,\mathrm{KL}\big(q(z \mid x)\,\big\|\,\mathcal N(0, I)\big)\Big]
    $$

    This is the negative ELBO of a Gaussian likelihood of variance w, times w and up to a constant.
    Latent diffusion takes a tiny w: good pictures, latents far from a standard normal.

    Args:
        model: The two networks.
        x: Images.
        kl_weight: w.
        generator: Draws z.

    Returns:
        A scalar: sums over pixels and latents, the mean over images.

    Raises:
        ValueError: If kl_weight is negative.

    Example:
        >>> model = Autoencoder(generator=torch.Generator().manual_seed(0))
        >>> autoencoder_loss(model, torch.zeros(3, 64), kl_weight=1e-3).shape
        torch.Size([])

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Sec. 3.1, there with perceptual and adversarial
        terms instead of the square alone.
    """
    if kl_weight < 0:
        raise ValueError(f"kl_weight is {kl_weight}: kl_weight >= 0.")
    posterior = model.encode(x)
    x_hat = model.decode(reparameterise(*posterior, n_samples=1, generator=generator)[0])
    kl = kl_to_standard_normal(*posterior).sum(dim=-1)
    return (0.5 * (x - x_hat).square().sum(dim=-1) + kl_weight * kl).mean()


def fit(
    model: nn.Module,
    x: Float[Tensor, "N pixels"],
    *,
    loss: Callable[[Tensor], Tensor],
    n_steps: int,
    batch_size: int = 64,
    lr: float = 5e-3,
    generator: torch.Generator | None = None,
) -> None:
    """Train in place with Adam, whose rate falls along half a cosine to zero; then freeze.

    Args:
        model: Holds the parameters.
        x: Training images.
        loss: A scalar of a batch of images.
        n_steps: Steps.
        batch_size: Images a step, drawn with replacement.
        lr: Rate of the first step.
        generator: Draws the batches.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> model, x = Autoencoder(n_pixels=2, n_latents=1, generator=g), torch.ones(16, 2)
        >>> fit(model, x, loss=lambda b: (b - model.decode(model.encode(b).mean)).square().mean(),
        ...     n_steps=100, generator=g)
        >>> (model.decode(model.encode(x).mean) - x).abs().max() < 0.1
        tensor(True)
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        chosen = torch.randint(len(x), (batch_size,), generator=generator)
        value = loss(x[chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        decay.step()
    model.requires_grad_(False)


def _mlp(*sizes: int, generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, n_in, n_out)
        for parameter in linear.parameters():
            bound = 1 / math.sqrt(n_in)
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])
