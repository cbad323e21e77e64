"""The two frozen networks of Stable Diffusion 1: its autoencoder and its text encoder, in any size.

Parameters are those of the released networks, one by one. The third network is `unet.UNet`.
"""

from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.generative_models.autoencoder import Posterior


class AutoencoderKL(nn.Module):
    r"""Convolutions to a small Gaussian image and back.

    Each resolution but the last is halved, so that f = 2 ** (resolutions - 1); the sizes of Stable
    Diffusion, which are the defaults, have f = 8. In the middle of either side every position looks
    at all others once.

    Args:
        d_image: Channels of the image.
        d_latent: Channels of the latent.
        widths: Channels of each resolution, the finest first.
        n_blocks: Residual blocks of each resolution on the way down; one more on the way up.
        n_groups: Groups of the group norms.

    Example:
        >>> vae = AutoencoderKL(d_image=1, d_latent=2, widths=(8, 16), n_groups=4)
        >>> posterior = vae.encode(torch.zeros(3, 1, 8, 8))
        >>> posterior.mean.shape, vae.decode(posterior.mean).shape
        (torch.Size([3, 2, 4, 4]), torch.Size([3, 1, 8, 8]))

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Sec. 3.1, whose released code fixes the details.
    """

    def __init__(
        self,
        *,
        d_image: int = 3,
        d_latent: int = 4,
        widths: tuple[int, ...] = (128, 256, 512, 512),
        n_blocks: int = 2,
        n_groups: int = 32,
    ) -> None:
        super().__init__()
        self.unit = 2 ** (len(widths) - 1)
        last = widths[-1]
        down: list[nn.Module] = [nn.Conv2d(d_image, widths[0], 3, padding=1)]
        for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
            for i in range(n_blocks):
                down.append(_Residual(width if i else before, width, n_groups=n_groups))
            if level < len(widths) - 1:
                down.append(_Halve(width))
        down += _middle(last, n_groups) + _end(last, 2 * d_latent, n_groups)
        up: list[nn.Module] = [nn.Conv2d(d_latent, last, 3, padding=1), *_middle(last, n_groups)]
        for level, (before, width) in enumerate(pairwise((last, *reversed(widths)))):
            for i in range(n_blocks + 1):
                up.append(_Residual(width if i else before, width, n_groups=n_groups))
            if level < len(widths) - 1:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        up += _end(widths[0], d_image, n_groups)
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up)
        self.to_posterior = nn.Conv2d(2 * d_latent, 2 * d_latent, 1)
        self.from_latent = nn.Conv2d(d_latent, d_latent, 1)

    def encode(self, x: Float[Tensor, "B C Y X"]) -> Posterior:
        """Return the Gaussian over latents; log-variances are kept within [-30, 20].

        Args:
            x: Images.

        Returns:
            Means and log-variances, images themselves.

        Raises:
            ValueError: If a side of the images is no multiple of f.
        """
        if x.shape[-1] % self.unit or x.shape[-2] % self.unit:
            sides = tuple(x.shape[-2:])
            raise ValueError(f"images of {sides}: sides are multiples of {self.unit}.")
        mean, log_variance = self.to_posterior(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, z: Float[Tensor, "B c Yz Xz"]) -> Float[Tensor, "B C Y X"]:
        """Return the image, f times as high and wide as the latent."""
        return self.decoder(self.from_latent(z))


class ClipTextEncoder(nn.Module):
    r"""Say of each token what it means after the tokens before it.

    Pre-norm blocks, attention that looks back only, an MLP of four times the width with
    $x\,\sigma(1.702\,x)$, and a last norm. All positions are returned: a picture is to be told
    words, not a sentence in one vector. The defaults are those of CLIP ViT-L/14.

    Args:
        n_tokens: Size of the vocabulary.
        length: The most tokens of a prompt, marks of beginning and end included.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Heads.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> text = ClipTextEncoder(n_tokens=30, length=7, d_model=8, n_layers=1, n_heads=2)
        >>> text(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 8])

    Reference:
        Radford et al. (2021), arXiv:2103.00020, Sec. 2.4.
    """

    def __init__(
        self,
        *,
        n_tokens: int = 49_408,
        length: int = 77,
        d_model: int = 768,
        n_layers: int = 12,
        n_heads: int = 12,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads do not divide a width of {d_model}.")
        self.token = nn.Embedding(n_tokens, d_model)
        self.position = nn.Embedding(length, d_model)
        self.blocks = nn.Sequential(*(_TextBlock(d_model, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Return the last states of all positions, padding too.

        Args:
            tokens: Prompts; those of Stable Diffusion are padded to the full length.

        Returns:
            The context of the U-Net.

        Raises:
            ValueError: If the prompts are longer than the positions reach.
        """
        length = self.position.num_embeddings
        if tokens.shape[1] > length:
            raise ValueError(f"{tokens.shape[1]} tokens, and {length} positions: not more.")
        h = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.blocks(h))


class _Residual(nn.Module):
    """The residual block of the U-Net without time."""

    def __init__(self, d_in: int, d_out: int, *, n_groups: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(n_groups, d_in, eps=1e-6)
        self.conv_1 = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(n_groups, d_out, eps=1e-6)
        self.conv_2 = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.skip = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))


class _Halve(nn.Conv2d):
    """A convolution of stride 2; zeros stand to the right and below only, as in the release."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class _Attention(nn.Module):
    """One head as wide as the image has channels; every position looks at all."""

    def __init__(self, d_model: int, *, n_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(n_groups, d_model, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.norm(x), "B C Y X -> B (Y X) C")
        h = self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + rearrange(h, "B (Y X) C -> B C Y X", Y=x.shape[2])


class _TextBlock(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(d_model)
        self.q, self.k, self.v, self.out = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm_2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (
            rearrange(layer(h), "B S (H Dh) -> B H S Dh", H=self.n_heads)
            for layer in (self.q, self.k, self.v)
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(o, "B H S Dh -> B S (H Dh)"))
        h = self.up(self.norm_2(x))
        return x + self.down(h * torch.sigmoid(1.702 * h))


def _middle(d_model: int, n_groups: int) -> list[nn.Module]:
    return [
        _Residual(d_model, d_model, n_groups=n_groups),
        _Attention(d_model, n_groups=n_groups),
        _Residual(d_model, d_model, n_groups=n_groups),
    ]


def _end(d_in: int, d_out: int, n_groups: int) -> list[nn.Module]:
    return [nn.GroupNorm(n_groups, d_in, eps=1e-6), nn.SiLU(), nn.Conv2d(d_in, d_out, 3, padding=1)]
