"""Latent diffusion: the chain of DDPM and the steps of DDIM, on what an autoencoder leaves.

The networks are given: an autoencoder, and a U-Net that sees the latent, the time and the text.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zhizhi.generative_models.autoencoder import reparameterise
from zhizhi.generative_models.ddim import ddim_sample
from zhizhi.generative_models.ddpm import q_sample
from zhizhi.generative_models.guidance import classifier_free_guidance

LatentModel = Callable[[Tensor, Tensor, Tensor], Tensor]  # z_t, t [B], text [B, S, D] -> noise_hat


def latent_scale(z: Float[Tensor, "B *latent"]) -> float:
    r"""Return the factor that gives latents a standard deviation of one.

    $$
    c = 1 / \operatorname{std}(z)
    $$

    Measured once, over all coordinates of a batch together, and a constant from then on.

    Args:
        z: Latents as the encoder gives them.

    Returns:
        The factor.

    Raises:
        ValueError: If all latents are the same.

    Example:
        >>> latent_scale(torch.tensor([[-4.0, 0.0, 4.0]]))
        0.25

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, App. G; 0.18215 in the released Stable Diffusion.
    """
    std = z.std().item()
    if not std > 0:
        raise ValueError(f"the latents have a standard deviation of {std}: more than 0.")
    return 1 / std  # (eq:sd-scale)


def encode(
    autoencoder: Any,
    x: Float[Tensor, "B *image"],
    *,
    scale: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *latent"]:
    r"""Draw the latents of images, in the unit of the diffusion.

    $$
    z = c\,(\mu(x) + s(x) \odot \epsilon)
    $$

    Args:
        autoencoder: Its `encode` returns a `Posterior`.
        x: Images in [-1, 1].
        scale: c.
        generator: Draws the noise.

    Returns:
        The latents.

    Example:
        >>> from zhizhi.generative_models.stable_diffusion_parts import AutoencoderKL
        >>> vae = AutoencoderKL(d_image=1, d_latent=2, widths=(8, 8), n_groups=4)
        >>> encode(vae, torch.zeros(3, 1, 8, 8), scale=0.5).shape
        torch.Size([3, 2, 4, 4])

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Sec. 3.1 and App. G.
    """
    posterior = autoencoder.encode(x)
    return scale * reparameterise(*posterior, n_samples=1, generator=generator)[0]  # (eq:sd-encode)


def decode(
    autoencoder: Any, z: Float[Tensor, "B *latent"], *, scale: float
) -> Float[Tensor, "B *image"]:
    r"""Turn latents of the diffusion into images.

    $$
    \tilde x = \mathcal D(z / c)
    $$

    Args:
        autoencoder: Has `decode`.
        z: Latents.
        scale: c, as in `encode`.

    Returns:
        Images.

    Example:
        >>> from zhizhi.generative_models.stable_diffusion_parts import AutoencoderKL
        >>> vae = AutoencoderKL(d_image=1, d_latent=2, widths=(8, 8), n_groups=4)
        >>> decode(vae, torch.zeros(3, 2, 4, 4), scale=0.5).shape
        torch.Size([3, 1, 8, 8])

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Sec. 3.1 and App. G.
    """
    return autoencoder.decode(z / scale)  # (eq:sd-encode)


def latent_diffusion_loss(
    net: LatentModel,
    z: Float[Tensor, "B *latent"],
    context: Float[Tensor, "B S D"],
    *,
    alpha_bar: Float[Tensor, " levels"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Return the error of the predicted noise, each latent at a time of its own.

    $$
    L = \mathbb E\,\big\|\epsilon - \epsilon_\theta(z_t, t, \tau(y))\big\|^2
    $$

    Args:
        net: Predicts the noise.
        z: Latents of data, in the unit of the diffusion.
        context: tau(y), what the text encoder says of each prompt; that of the empty prompt for
            the rows that are to lose theirs.
        alpha_bar: Share of signal variance at t = 0 to T.
        generator: Draws times 1 to T, then the noise.

    Returns:
        The mean over latents and their coordinates.

    Example:
        >>> z, context = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 768)
        >>> alpha_bar = torch.tensor([1.0, 0.5])
        >>> def exact(z_t, t, context):  # if all latents are 0, z_t shows the noise
        ...     return z_t / 0.5**0.5
        >>> latent_diffusion_loss(exact, z, context, alpha_bar=alpha_bar) < 1e-12
        tensor(True)

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Eq. (3).
    """
    t = torch.randint(1, len(alpha_bar), (len(z),), generator=generator, device=z.device)
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    z_t = q_sample(z, noise, alpha_bar_t=alpha_bar.to(z.device)[t])
    return (noise - net(z_t, t, context)).square().mean()  # (eq:sd-loss)


def sample_latents(
    net: LatentModel,
    z: Float[Tensor, "B *latent"],
    context: Float[Tensor, "B S D"],
    *,
    null: Float[Tensor, "N D"],
    guidance: float,
    alpha_bar: Float[Tensor, " levels"],
    times: Int[Tensor, " T"],
) -> Float[Tensor, "B *latent"]:
    r"""Walk from noise to latents with DDIM, guided by the text; eta is 0.

    $$
    \tilde\epsilon = \epsilon_\theta(z_t, t, \varnothing)
        + s\,\big(\epsilon_\theta(z_t, t, \tau(y)) - \epsilon_\theta(z_t, t, \varnothing)\big)
    $$

    Both predictions come from one call with twice the rows.

    Args:
        net: Predicts the noise.
        z: Latents at times[0]: standard normal, or of `img2img_start`.
        context: tau(y) of each prompt.
        null: What the text encoder says of the empty prompt, or of a negative one.
        guidance: s. At 1 the null is not asked, and the rows are not doubled.
        alpha_bar: Share of signal variance at t = 0 to T.
        times: Of `ddim_times`, or what `img2img_start` left of them.

    Returns:
        Latents at the last of the times.

    Raises:
        ValueError: If prompt and null have different numbers of tokens.

    Example:
        >>> alpha_bar, times = torch.tensor([1.0, 0.5]), torch.tensor([1, 0])
        >>> def net(z_t, t, context):
        ...     return context.mean(dim=2)
        >>> z, text, null = torch.zeros(1, 1), torch.ones(1, 1, 3), torch.zeros(1, 3)
        >>> sample_latents(net, z, text, null=null, guidance=2.0, alpha_bar=alpha_bar, times=times)
        tensor([[-2.]])

    Reference:
        Ho & Salimans (2022), arXiv:2207.12598, Eq. (6); Song, Meng & Ermon (2020),
        arXiv:2010.02502, Eq. (12).
    """
    if context.shape[1] != len(null):
        raise ValueError(f"prompts of {context.shape[1]} tokens, null of {len(null)}: as many.")
    both = torch.cat([context, null.expand_as(context)])

    def guided(z_t: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return net(z_t, t, context)
        noise_hat = net(torch.cat([z_t, z_t]), torch.cat([t, t]), both)
        return classifier_free_guidance(*noise_hat.chunk(2), scale=guidance)  # (eq:sd-guidance)

    return ddim_sample(guided, z, alpha_bar=alpha_bar, times=times)[-1]


def img2img_start(
    z_0: Float[Tensor, "B *latent"],
    *,
    strength: float,
    alpha_bar: Float[Tensor, " levels"],
    times: Int[Tensor, " T"],
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "B *latent"], Int[Tensor, " rest"]]:
    r"""Noise the latents of an image up to the middle of a run, and keep the rest of the run.

    $$
    z_\tau = \sqrt{\bar\alpha_\tau}\,z_0 + \sqrt{1 - \bar\alpha_\tau}\,\epsilon
    $$

    Args:
        z_0: Latents of the image.
        strength: Share of the steps that are walked, rounded down to a whole number: 0 returns
            z_0 and no step, 1 begins where a run from noise does, but not quite with noise.
        alpha_bar: Share of signal variance at t = 0 to T.
        times: Of `ddim_times`.
        generator: Draws the noise.

    Returns:
        z at the first of the remaining times, and these times.

    Raises:
        ValueError: If the strength is not from 0 to 1.

    Example:
        >>> alpha_bar, times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]), torch.arange(4, -1, -1)
        >>> z, rest = img2img_start(
        ...     torch.zeros(1, 2), strength=0.5, alpha_bar=alpha_bar, times=times)
        >>> z.shape, rest.tolist()
        (torch.Size([1, 2]), [2, 1, 0])

    Reference:
        Meng et al. (2021), arXiv:2108.01073 (SDEdit).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: 0 <= strength <= 1.")
    n_steps = len(times) - 1
    rest = times[n_steps - int(n_steps * strength) :]
    noise = torch.randn(z_0.shape, generator=generator, dtype=z_0.dtype, device=z_0.device)
    return q_sample(z_0, noise, alpha_bar_t=alpha_bar[rest[0]]), rest  # (eq:sd-img2img)
