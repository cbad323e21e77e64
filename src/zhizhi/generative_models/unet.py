"""The U-Net of Stable Diffusion 1 and 2, in any size; the encoder half is a module of its own.

Parameters are those of the released networks, one by one. ControlNet copies `UNetEncoder`.
"""

import math
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(
    t: Shaped[Tensor, " B"], *, dim: int, max_period: float = 10_000.0
) -> Float[Tensor, "B dim"]:
    r"""Turn times into waves of geometrically falling frequencies.

    $$
    \gamma(t) = \big[\cos\omega_0 t, \dots, \cos\omega_{d/2-1} t,\
        \sin\omega_0 t, \dots, \sin\omega_{d/2-1} t\big], \qquad \omega_i = P^{-2i/d}
    $$

    Args:
        t: Times, whole numbers or not.
        dim: Length d of the result, even.
        max_period: P; the slowest wave has nearly this period over 2 pi.

    Returns:
        One vector of norm sqrt(d / 2) for each time.

    Raises:
        ValueError: If `dim` is odd or not positive.

    Example:
        >>> timestep_embedding(torch.tensor([0]), dim=4)
        tensor([[1., 1., 0., 0.]])

    Reference:
        Vaswani et al. (2017), arXiv:1706.03762, Sec. 3.5, with sine and cosine not interleaved;
        the cosines stand first in Stable Diffusion and DiT.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim is {dim}: an even number above 0.")
    index = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(max_period) * index / (dim // 2))
    angle = t.float()[:, None] * frequency  # (eq:unet-time)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ResBlock(nn.Module):
    r"""Two convolutions beside a shortcut; the time is added between them.

    $$
    h = \operatorname{conv}_1(\phi(\operatorname{GN}(x))) + W\,\phi(e), \qquad
    y = \operatorname{skip}(x) + \operatorname{conv}_2(\phi(\operatorname{GN}(h))), \qquad
    \phi = \operatorname{SiLU}
    $$

    Args:
        d_in: Channels of the input.
        d_out: Channels of the output; where they differ, the shortcut is a 1x1 convolution.
        d_time: Length of the time embedding e.
        n_groups: Groups of the group norms; divides both numbers of channels.

    Example:
        >>> ResBlock(32, 64, d_time=8)(torch.zeros(2, 32, 4, 4), torch.zeros(2, 8)).shape
        torch.Size([2, 64, 4, 4])

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, App. B.
    """

    def __init__(self, d_in: int, d_out: int, *, d_time: int, n_groups: int = 32) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(n_groups, d_in)
        self.conv_1 = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.time = nn.Linear(d_time, d_out)
        self.norm_2 = nn.GroupNorm(n_groups, d_out)
        self.conv_2 = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.skip = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)

    def forward(
        self, x: Float[Tensor, "B d_in H W"], e: Float[Tensor, "B d_time"]
    ) -> Float[Tensor, "B d_out H W"]:
        """Return y of the same height and width."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.time(F.silu(e))[:, :, None, None]  # (eq:unet-res)
        return self.skip(x) + self.conv_2(F.silu(self.norm_2(h)))


class CrossAttention(nn.Module):
    r"""Let each position of x look into a context; without one, into x itself.

    $$
    \operatorname{softmax}\Big(\frac{(x W_Q)(c W_K)^\top}{\sqrt{d_h}}\Big)\,(c W_V)\,W_O + b_O
    $$

    Args:
        d_model: Channels of x.
        d_context: Channels of the context.
        n_heads: Heads; divides `d_model`.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> attend = CrossAttention(16, d_context=12, n_heads=2)
        >>> attend(torch.zeros(2, 64, 16), torch.zeros(2, 7, 12)).shape
        torch.Size([2, 64, 16])

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, Sec. 3.3.
    """

    def __init__(self, d_model: int, *, d_context: int, n_heads: int) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {d_model} channels.")
        self.n_heads = n_heads
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_context, d_model, bias=False)
        self.v = nn.Linear(d_context, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)

    def forward(
        self, x: Float[Tensor, "B N d"], context: Float[Tensor, "B S c"] | None = None
    ) -> Float[Tensor, "B N d"]:
        """Return what each position has gathered."""
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "B N (heads d) -> B heads N d", heads=self.n_heads)
            for t in (self.q(x), self.k(context), self.v(context))
        )
        o = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(o, "B heads N d -> B N (heads d)"))


class GEGLU(nn.Module):
    r"""Expand to twice four times the width, and let one half gate the other.

    $$
    (u \odot \operatorname{GELU}(g))\,W_2 + b_2, \qquad (u, g) = x W_1 + b_1
    $$

    Args:
        d_model: Channels of x.

    Example:
        >>> GEGLU(16)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Reference:
        Shazeer (2020), arXiv:2002.05202, Eq. (6), with biases.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 8 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Float[Tensor, "B N d"]) -> Float[Tensor, "B N d"]:
        """Return the new channels of each position."""
        u, gate = self.up(x).chunk(2, dim=-1)
        return self.down(u * F.gelu(gate))


class SpatialTransformer(nn.Module):
    r"""Read an image as a sequence of its pixels: self-attention, cross-attention, GEGLU.

    Args:
        d_model: Channels of the image.
        d_context: Channels of the context.
        n_heads: Heads.
        n_groups: Groups of the group norm.

    Example:
        >>> block = SpatialTransformer(32, d_context=12, n_heads=4)
        >>> block(torch.zeros(2, 32, 4, 4), torch.zeros(2, 7, 12)).shape
        torch.Size([2, 32, 4, 4])

    Reference:
        Rombach et al. (2022), arXiv:2112.10752, App. E.2.1.
    """

    def __init__(self, d_model: int, *, d_context: int, n_heads: int, n_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(n_groups, d_model, eps=1e-6)
        self.proj_in = nn.Conv2d(d_model, d_model, 1)
        self.norm_1 = nn.LayerNorm(d_model)
        self.self_attention = CrossAttention(d_model, d_context=d_model, n_heads=n_heads)
        self.norm_2 = nn.LayerNorm(d_model)
        self.cross_attention = CrossAttention(d_model, d_context=d_context, n_heads=n_heads)
        self.norm_3 = nn.LayerNorm(d_model)
        self.feed_forward = GEGLU(d_model)
        self.proj_out = nn.Conv2d(d_model, d_model, 1)

    def forward(
        self, x: Float[Tensor, "B d H W"], context: Float[Tensor, "B S c"]
    ) -> Float[Tensor, "B d H W"]:
        """Return the image with what its pixels and the context told each other."""
        height = x.shape[-2]
        h = rearrange(self.proj_in(self.norm(x)), "B d H W -> B (H W) d")
        h = h + self.self_attention(self.norm_1(h))
        h = h + self.cross_attention(self.norm_2(h), context)
        h = h + self.feed_forward(self.norm_3(h))
        return x + self.proj_out(rearrange(h, "B (H W) d -> B d H W", H=height))


class Stage(nn.Module):
    """A residual block, and where there is attention, a spatial transformer behind it."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_time: int,
        d_context: int | None,
        n_heads: int,
        n_groups: int,
    ) -> None:
        super().__init__()
        self.res = ResBlock(d_in, d_out, d_time=d_time, n_groups=n_groups)
        self.attention = None
        if d_context is not None:
            self.attention = SpatialTransformer(
                d_out, d_context=d_context, n_heads=n_heads, n_groups=n_groups
            )

    def forward(
        self,
        x: Float[Tensor, "B d_in H W"],
        e: Float[Tensor, "B d_time"],
        context: Float[Tensor, "B S c"] | None,
    ) -> Float[Tensor, "B d_out H W"]:
        """Return the image with the new number of channels."""
        h = self.res(x, e)
        if self.attention is None:
            return h
        if context is None:
            raise ValueError("this U-Net attends to a context: pass one.")
        return self.attention(h, context)


class UNetEncoder(nn.Module):
    r"""The way down: from the image to the smallest resolution, keeping every picture on the way.

    Args:
        d_in: Channels of the image.
        widths: Channels of each resolution; each is half as high and wide as the one before.
        attention: Whether the stages of each resolution have a transformer.
        n_stages: Stages of each resolution.
        d_context: Channels of the context; None leaves out all transformers.
        n_heads: Heads.
        n_groups: Groups of the group norms.

    Raises:
        ValueError: If `widths` and `attention` differ in length.

    Example:
        >>> encoder = UNetEncoder(d_in=1, widths=(32, 64), attention=(False, False))
        >>> skips, h, e = encoder(torch.zeros(2, 1, 8, 8), torch.tensor([1, 5]))
        >>> [tuple(s.shape[1:]) for s in skips[2:5]], tuple(h.shape[1:]), tuple(e.shape)
        ([(32, 8, 8), (32, 4, 4), (64, 4, 4)], (64, 4, 4), (2, 128))

    Reference:
        Ronneberger et al. (2015), arXiv:1505.04597, Fig. 1; Rombach et al. (2022),
        arXiv:2112.10752, whose released code fixes the details.
    """

    def __init__(
        self,
        *,
        d_in: int,
        widths: tuple[int, ...],
        attention: tuple[bool, ...],
        n_stages: int = 2,
        d_context: int | None = None,
        n_heads: int = 8,
        n_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(widths) != len(attention):
            raise ValueError(
                f"{len(widths)} widths and {len(attention)} entries of attention: one a resolution."
            )
        d_time = 4 * widths[0]
        self.width = widths[0]
        self.time = nn.Sequential(
            nn.Linear(widths[0], d_time), nn.SiLU(), nn.Linear(d_time, d_time)
        )
        self.conv_in = nn.Conv2d(d_in, widths[0], 3, padding=1)
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        keep = {"d_time": d_time, "n_heads": n_heads, "n_groups": n_groups}
        for (before, width), attends in zip(pairwise((widths[0], *widths)), attention, strict=True):
            context = d_context if attends else None
            self.stages.append(
                nn.ModuleList(
                    Stage(before if i == 0 else width, width, d_context=context, **keep)
                    for i in range(n_stages)
                )
            )
        for width in widths[:-1]:
            self.downs.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = Stage(widths[-1], widths[-1], d_context=d_context, **keep)
        self.middle_res = ResBlock(widths[-1], widths[-1], d_time=d_time, n_groups=n_groups)

    def forward(
        self,
        x: Float[Tensor, "B d_in H W"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "B S c"] | None = None,
        *,
        added: Float[Tensor, "B d H W"] | None = None,
    ) -> tuple[list[Tensor], Tensor, Float[Tensor, "B d_time"]]:
        """Return the pictures on the way, the last one, and the time embedding.

        Args:
            x: Noised images; height and width are multiples of 2 ** (resolutions - 1).
            t: Times.
            context: What the transformers look into.
            added: Added behind the first convolution: the way a ControlNet sees its condition.

        Returns:
            (stages + 1) * resolutions skips, the middle, and e.

        Raises:
            ValueError: If the size is no such multiple, or a context is missing.
        """
        unit = 2 ** len(self.downs)
        if x.shape[-1] % unit or x.shape[-2] % unit:
            raise ValueError(f"images of {tuple(x.shape[-2:])}: sides are multiples of {unit}.")
        e = self.time(timestep_embedding(t, dim=self.width).to(x.dtype))
        h = self.conv_in(x)
        if added is not None:
            h = h + added
        skips = [h]
        for level, stages in enumerate(self.stages):
            for stage in stages:
                h = stage(h, e, context)
                skips.append(h)
            if level < len(self.downs):
                h = self.downs[level](h)
                skips.append(h)
        return skips, self.middle_res(self.middle(h, e, context), e), e


class UNet(nn.Module):
    r"""Predict noise, v or data of the shape of the image: the way down, and up again.

    Each stage of the way up takes the picture of its resolution from the way down beside its input.

    Args:
        d_in: Channels of the image.
        d_out: Channels of the prediction.
        widths: Channels of each resolution.
        attention: Whether the stages of each resolution have a transformer.
        n_stages: Stages of each resolution on the way down; one more on the way up.
        d_context: Channels of the context; None leaves out all transformers.
        n_heads: Heads.
        n_groups: Groups of the group norms.

    Raises:
        ValueError: If `widths` and `attention` differ in length.

    Example:
        >>> net = UNet(d_in=1, d_out=1, widths=(32, 64), attention=(False, True), d_context=8)
        >>> net(torch.zeros(2, 1, 8, 8), torch.tensor([1, 5]), torch.zeros(2, 3, 8)).shape
        torch.Size([2, 1, 8, 8])

    Reference:
        Ronneberger et al. (2015), arXiv:1505.04597; Rombach et al. (2022), arXiv:2112.10752.
    """

    def __init__(
        self,
        *,
        d_in: int,
        d_out: int,
        widths: tuple[int, ...],
        attention: tuple[bool, ...],
        n_stages: int = 2,
        d_context: int | None = None,
        n_heads: int = 8,
        n_groups: int = 32,
    ) -> None:
        super().__init__()
        self.encoder = UNetEncoder(
            d_in=d_in,
            widths=widths,
            attention=attention,
            n_stages=n_stages,
            d_context=d_context,
            n_heads=n_heads,
            n_groups=n_groups,
        )
        # The channels of the skips, in the order in which the way up takes them: last first.
        kept = [widths[0]]
        for level, width in enumerate(widths):
            kept += [width] * (n_stages + (level < len(widths) - 1))
        keep = {"d_time": 4 * widths[0], "n_heads": n_heads, "n_groups": n_groups}
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        before = widths[-1]
        for level in reversed(range(len(widths))):
            context = d_context if attention[level] else None
            stages = nn.ModuleList()
            for _ in range(n_stages + 1):
                stages.append(Stage(before + kept.pop(), widths[level], d_context=context, **keep))
                before = widths[level]
            self.stages.append(stages)
            if level:
                self.ups.append(nn.Conv2d(widths[level], widths[level], 3, padding=1))
        self.norm = nn.GroupNorm(n_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], d_out, 3, padding=1)

    def decode(
        self,
        skips: list[Tensor],
        h: Float[Tensor, "B d H W"],
        e: Float[Tensor, "B d_time"],
        context: Float[Tensor, "B S c"] | None = None,
    ) -> Float[Tensor, "B d_out H2 W2"]:
        """Return the prediction from what the encoder returned, or a ControlNet has changed."""
        skips = list(skips)
        for level, stages in enumerate(self.stages):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), e, context)  # (eq:unet-skip)
            if level < len(self.ups):
                h = self.ups[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm(h)))

    def forward(
        self,
        x: Float[Tensor, "B d_in H W"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "B S c"] | None = None,
    ) -> Float[Tensor, "B d_out H W"]:
        """Return the prediction for noised images at times t."""
        skips, h, e = self.encoder(x, t, context)
        return self.decode(skips, h, e, context)


def stable_diffusion_1() -> UNet:
    """Return the U-Net of Stable Diffusion 1.1 to 1.5 with random weights.

    Inside `torch.device("meta")` it takes no memory.

    Returns:
        859,520,964 parameters, for latents [B, 4, 64, 64] and CLIP states [B, 77, 768].

    Example:
        >>> with torch.device("meta"):
        ...     net = stable_diffusion_1()
        >>> sum(p.numel() for p in net.parameters())
        859520964

    Reference:
        Rombach et al. (2022), arXiv:2112.10752; `v1-inference.yaml` of the released code.
    """
    return UNet(
        d_in=4,
        d_out=4,
        widths=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        d_context=768,
    )
