"""MM-DiT: two streams with weights of their own that meet in one attention.

Image tokens and text tokens pass through the same blocks. Each stream has its own modulation,
projections and MLP; only the softmax sees both. In the sizes of the released models the parameters
are theirs to the last one.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.deep_learning.normalization import rms_norm
from zhizhi.generative_models.dit import modulate, patchify, sincos_2d, unpatchify
from zhizhi.generative_models.unet import timestep_embedding
from zhizhi.large_models.attention import grouped_query_attention


def joint_attention(
    q_x: Float[Tensor, "B T H Dh"],
    k_x: Float[Tensor, "B T H Dh"],
    v_x: Float[Tensor, "B T H Dv"],
    q_c: Float[Tensor, "B S H Dh"],
    k_c: Float[Tensor, "B S H Dh"],
    v_c: Float[Tensor, "B S H Dv"],
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B S H Dv"]]:
    r"""Let image and text tokens read from both, in one softmax over all keys.

    $$
    \begin{bmatrix} o_x \\ o_c \end{bmatrix} = \operatorname{softmax}\Big(\tfrac{1}{\sqrt{d_h}}
        \begin{bmatrix} q_x \\ q_c \end{bmatrix}
        \begin{bmatrix} k_x \\ k_c \end{bmatrix}^{\!\top}\Big)
        \begin{bmatrix} v_x \\ v_c \end{bmatrix}
    $$

    Args:
        q_x: Queries of the T image tokens.
        k_x: Keys of the image tokens.
        v_x: Values of the image tokens.
        q_c: Queries of the S text tokens.
        k_c: Keys of the text tokens.
        v_c: Values of the text tokens.

    Returns:
        What the image tokens read, and what the text tokens read.

    Example:
        >>> x, c = torch.zeros(1, 1, 1, 2), torch.zeros(1, 3, 1, 2)
        >>> out_x, out_c = joint_attention(x, x, x + 4, c, c, c)
        >>> out_x.flatten(), out_c.shape  # one token in four says 4
        (tensor([1., 1.]), torch.Size([1, 3, 1, 2]))

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Fig. 2b.
    """
    q, k, v = (torch.cat(pair, dim=1) for pair in ((q_x, q_c), (k_x, k_c), (v_x, v_c)))
    out = grouped_query_attention(q, k, v)  # (eq:sd3-joint)
    return out[:, : q_x.shape[1]], out[:, q_x.shape[1] :]


def grid_places(n: int, *, n_max: int, n_base: int) -> Float[Tensor, " n"]:
    r"""Return the coordinates of n rows or columns: the middle of a grid made for n_max.

    $$
    \Big(\Big\lfloor \frac{n_{\max} - n}{2} \Big\rfloor + i\Big)\,\frac{n_{\text{base}}}{n_{\max}},
    \qquad i = 0, \dots, n - 1
    $$

    Images of all shapes share the centre of one grid, and neighbours are equally far apart in each.

    Args:
        n: Tokens along this side.
        n_max: The longest side that has places.
        n_base: Length of the whole grid in the unit of the waves.

    Returns:
        Coordinates for `sincos_2d`.

    Raises:
        ValueError: If n is larger than n_max.

    Example:
        >>> grid_places(2, n_max=8, n_base=4), grid_places(4, n_max=8, n_base=4)
        (tensor([1.5000, 2.0000]), tensor([1.0000, 1.5000, 2.0000, 2.5000]))

    Reference:
        Hugging Face diffusers, `PatchEmbed.cropped_pos_embed`; Esser et al. (2024),
        arXiv:2403.03206, Sec. 5.3.2, put the zero at the corner of the centred square.
    """
    if not 1 <= n <= n_max:
        raise ValueError(f"there are {n} tokens along a side and {n_max} places: 1 <= n <= n_max.")
    return ((n_max - n) // 2 + torch.arange(n)) * (n_base / n_max)  # (eq:sd3-places)


class Projections(nn.Module):
    r"""The weights around an attention: queries, keys and values of one stream, and its output.

    Args:
        d_model: Channels of a token.
        n_heads: Heads; divides `d_model`.
        qk_norm: Whether each query and key is divided by its root mean square and given a gain.
        writes: Whether the stream is written; if not, there is no output layer.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> q, k, v = Projections(8, n_heads=2, qk_norm=True)(torch.randn(3, 5, 8))
        >>> q.shape, q.square().mean(dim=-1).allclose(torch.ones(3, 5, 2), atol=1e-3)
        (torch.Size([3, 5, 2, 4]), True)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Fig. 2b, and Sec. 5.3.2 for the norm.
    """

    def __init__(
        self, d_model: int, *, n_heads: int, qk_norm: bool = False, writes: bool = True
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {d_model} channels.")
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        gain = torch.ones(d_model // n_heads)
        self.gain_q = nn.Parameter(gain) if qk_norm else None
        self.gain_k = nn.Parameter(gain.clone()) if qk_norm else None
        self.out = nn.Linear(d_model, d_model) if writes else None

    def forward(self, h: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [B, T, H, Dh]."""
        heads = rearrange(self.qkv(h), "B T (n H Dh) -> n B T H Dh", n=3, H=self.n_heads)
        q, k, v = heads.unbind()
        if self.gain_q is not None and self.gain_k is not None:  # (eq:sd3-qk-norm)
            q, k = rms_norm(q, self.gain_q, eps=1e-6), rms_norm(k, self.gain_k, eps=1e-6)
        return q, k, v

    def back(self, o: Float[Tensor, "B T H Dh"]) -> Float[Tensor, "B T D"]:
        """Put the heads together and return the output layer of them."""
        assert self.out is not None
        return self.out(rearrange(o, "B T H Dh -> B T (H Dh)"))


class Stream(nn.Module):
    r"""What one modality has for itself in a block: modulation, projections and MLP.

    Args:
        d_model: Channels of a token, and of the condition.
        n_heads: Heads; divides `d_model`.
        qk_norm: As in `Projections`.
        writes: False for the text in the last block, which is read and ends there.
        dual: Whether the stream has an attention to itself besides, as in SD3.5-medium.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> stream = Stream(8, n_heads=2)
        >>> sum(p.numel() for p in stream.parameters() if p.ndim == 2) == 18 * 8**2
        True

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Fig. 2b; diffusers' `JointTransformerBlock`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        qk_norm: bool = False,
        writes: bool = True,
        dual: bool = False,
    ) -> None:
        super().__init__()
        self.n_vectors = 2 + 4 * writes + 3 * dual
        self.condition = nn.Linear(d_model, self.n_vectors * d_model)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.joint = Projections(d_model, n_heads=n_heads, qk_norm=qk_norm, writes=writes)
        self.alone = Projections(d_model, n_heads=n_heads, qk_norm=qk_norm) if dual else None
        if writes:
            self.mlp = nn.Sequential(
                nn.Linear(d_model, 4 * d_model),
                nn.GELU(approximate="tanh"),
                nn.Linear(4 * d_model, d_model),
            )

    def vectors(self, e: Float[Tensor, "B D"]) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of the attention, of the MLP, and of the dual attention."""
        return self.condition(F.silu(e)).chunk(self.n_vectors, dim=-1)

    def write(
        self, x: Float[Tensor, "B T D"], o: Float[Tensor, "B T H Dh"], vectors: tuple[Tensor, ...]
    ) -> Float[Tensor, "B T D"]:
        """Add what the tokens read, and then the MLP, each through its gate."""
        _, _, gate_1, shift_2, scale_2, gate_2 = vectors[:6]
        h = x + gate_1[:, None] * self.joint.back(o)
        if self.alone is not None:
            shift_3, scale_3, gate_3 = vectors[6:]
            own = grouped_query_attention(*self.alone(modulate(self.norm(x), shift_3, scale_3)))
            h = h + gate_3[:, None] * self.alone.back(own)
        return h + gate_2[:, None] * self.mlp(modulate(self.norm(h), shift_2, scale_2))


class MMDiTBlock(nn.Module):
    r"""A transformer block for two streams: all weights apart, the attention shared.

    Args:
        d_model: Channels of a token, and of the condition.
        n_heads: Heads; divides `d_model`.
        qk_norm: As in `Projections`.
        last: Whether the text is only read and comes out as it went in.
        dual: Whether the image has an attention to itself besides.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> x, c, e = torch.randn(2, 16, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
        >>> y, d = MMDiTBlock(8, n_heads=2)(x, c, e)  # the gates begin at 0
        >>> torch.equal(y, x), torch.equal(d, c)
        (True, True)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Fig. 2b.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        qk_norm: bool = False,
        last: bool = False,
        dual: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.image = Stream(d_model, n_heads=n_heads, qk_norm=qk_norm, dual=dual)
        self.text = Stream(d_model, n_heads=n_heads, qk_norm=qk_norm, writes=not last)

    def forward(
        self, x: Float[Tensor, "B T D"], c: Float[Tensor, "B S D"], e: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"]]:
        """Return the image tokens and the text tokens after attention and MLPs."""
        for_x, for_c = self.image.vectors(e), self.text.vectors(e)
        read_x = self.image.joint(modulate(self.image.norm(x), *for_x[:2]))
        read_c = self.text.joint(modulate(self.text.norm(c), *for_c[:2]))
        o_x, o_c = joint_attention(*read_x, *read_c)
        x = self.image.write(x, o_x, for_x)  # (eq:sd3-block)
        return x, c if self.last else self.text.write(c, o_c, for_c)


class MMDiT(nn.Module):
    r"""Predict the velocity of a noised latent from time, text tokens and a pooled text vector.

    Args:
        d_in: Channels of the latent.
        d_text: Channels of a text token.
        d_pooled: Length of the pooled text vector.
        d_model: Channels of a token.
        n_blocks: Depth.
        n_heads: Heads; divides `d_model`.
        patch: Side of a patch.
        n_max: Longest side of the grid of patches.
        n_base: Length of the grid in the unit of the waves; see `grid_places`.
        qk_norm: As in `Projections`.
        n_dual: The first so many blocks give the image an attention to itself besides.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> net = MMDiT(d_in=1, d_text=6, d_pooled=3, d_model=16, n_blocks=2, n_heads=2)
        >>> z, text = torch.randn(3, 1, 8, 4), torch.randn(3, 5, 6)
        >>> net(z, torch.rand(3), text, torch.randn(3, 3)).abs().max()  # the head begins at 0
        tensor(0., grad_fn=<MaxBackward1>)

    Reference:
        Esser et al. (2024), arXiv:2403.03206, Fig. 2a; diffusers' `SD3Transformer2DModel`.
    """

    def __init__(
        self,
        *,
        d_in: int = 16,
        d_text: int = 4096,
        d_pooled: int = 2048,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        patch: int = 2,
        n_max: int = 192,
        n_base: int = 64,
        qk_norm: bool = False,
        n_dual: int = 0,
    ) -> None:
        super().__init__()
        self.patch, self.n_max, self.n_base = patch, n_max, n_base
        self.embed = nn.Linear(patch * patch * d_in, d_model)
        self.time = nn.Sequential(nn.Linear(256, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        self.pooled = nn.Sequential(
            nn.Linear(d_pooled, d_model), nn.SiLU(), nn.Linear(d_model, d_model)
        )
        self.words = nn.Linear(d_text, d_model)
        self.blocks = nn.ModuleList(
            MMDiTBlock(
                d_model, n_heads=n_heads, qk_norm=qk_norm, last=i == n_blocks - 1, dual=i < n_dual
            )
            for i in range(n_blocks)
        )
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.condition = nn.Linear(d_model, 2 * d_model)
        self.head = nn.Linear(d_model, patch * patch * d_in)
        for layer in (self.condition, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def positions(self, height: int, width: int) -> Float[Tensor, "T D"]:
        """Return the vectors added to the patches of a grid of that height and width."""
        rows, columns = (
            grid_places(n, n_max=self.n_max, n_base=self.n_base) for n in (height, width)
        )
        return sincos_2d(rows, columns, dim=self.embed.out_features).to(self.embed.weight)

    def forward(
        self,
        z: Float[Tensor, "B C Y X"],
        t: Float[Tensor, " B"],
        text: Float[Tensor, "B S E"],
        pooled: Float[Tensor, "B P"],
    ) -> Float[Tensor, "B C Y X"]:
        """Return the velocity noise - data.

        Args:
            z: Noised latents; their sides are multiples of the patch.
            t: Times from 0 at the data to 1 at the noise; 1000 of the unit of the waves.
            text: Tokens of the text encoders.
            pooled: One vector for each text.

        Returns:
            One velocity for each latent.
        """
        height, width = z.shape[-2] // self.patch, z.shape[-1] // self.patch
        x = self.embed(patchify(z, size=self.patch)) + self.positions(height, width)
        c = self.words(text)
        e = self.time(timestep_embedding(1000 * t, dim=256).to(z.dtype)) + self.pooled(pooled)
        for block in self.blocks:
            x, c = block(x, c, e)
        shift, scale = self.condition(F.silu(e)).chunk(2, dim=-1)
        x = self.head(modulate(self.norm(x), shift, scale))
        return unpatchify(x, size=self.patch, height=z.shape[-2])


def sd3_medium() -> MMDiT:
    """Return Stable Diffusion 3 medium, d = 24, with random weights.

    Inside `torch.device("meta")` it takes no memory. The released weights have no norm of queries
    and keys.

    Returns:
        2.03 billion parameters.

    Example:
        >>> with torch.device("meta"):
        ...     net = sd3_medium()
        >>> sum(p.numel() for p in net.parameters())
        2028328000

    Reference:
        The released configuration, read by diffusers' `SD3Transformer2DModel`.
    """
    return MMDiT(d_model=64 * 24, n_blocks=24, n_heads=24)


def sd3_5_large() -> MMDiT:
    """Return Stable Diffusion 3.5 large, d = 38, with random weights.

    Returns:
        8.06 billion parameters; queries and keys are normalised.

    Example:
        >>> with torch.device("meta"):
        ...     net = sd3_5_large()
        >>> sum(p.numel() for p in net.parameters())
        8056627520

    Reference:
        The released configuration, read by diffusers' `SD3Transformer2DModel`.
    """
    return MMDiT(d_model=64 * 38, n_blocks=38, n_heads=38, qk_norm=True)


def sd3_5_medium() -> MMDiT:
    """Return Stable Diffusion 3.5 medium: d = 24, and a second attention in the first 13 blocks.

    Returns:
        2.24 billion parameters; queries and keys are normalised.

    Example:
        >>> with torch.device("meta"):
        ...     net = sd3_5_medium()
        >>> sum(p.numel() for p in net.parameters())
        2243171520

    Reference:
        The released configuration, read by diffusers' `SD3Transformer2DModel`.
    """
    return MMDiT(d_model=64 * 24, n_blocks=24, n_heads=24, n_max=384, qk_norm=True, n_dual=13)
