"""The diffusion transformer: an image as patches, and a condition that scales, shifts and gates."""

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.generative_models.unet import timestep_embedding


def patchify(x: Float[Tensor, "B C H W"], *, size: int) -> Float[Tensor, "B N D"]:
    r"""Cut images into squares, row by row, and lay each out flat.

    A linear layer on the result is a convolution whose kernel and stride are the size of a patch.

    Args:
        x: Images.
        size: Side p of a patch.

    Returns:
        N = (H / p) (W / p) patches of D = p p C numbers, channels last.

    Raises:
        ValueError: If a side of the image is no multiple of `size`.

    Example:
        >>> patchify(torch.arange(16.0).reshape(1, 1, 4, 4), size=2)[0, 1]
        tensor([2., 3., 6., 7.])

    Reference:
        Peebles & Xie (2023), arXiv:2212.09748, Sec. 3.2.
    """
    if x.shape[-2] % size or x.shape[-1] % size:
        raise ValueError(f"images of {tuple(x.shape[-2:])}: sides are multiples of {size}.")
    return rearrange(x, "B C (h p) (w q) -> B (h w) (p q C)", p=size, q=size)


def unpatchify(
    patches: Float[Tensor, "B N D"], *, size: int, height: int
) -> Float[Tensor, "B C H W"]:
    """Put the patches of `patchify` together again.

    Args:
        patches: N patches of D = size * size * C numbers.
        size: Side of a patch.
        height: Of the image, in pixels.

    Returns:
        Images.

    Raises:
        ValueError: If the patches do not fill rows of that height.

    Example:
        >>> x = torch.randn(2, 3, 8, 4)
        >>> torch.equal(unpatchify(patchify(x, size=2), size=2, height=8), x)
        True
    """
    rows, n = height // size, patches.shape[1]
    if height % size or n % rows:
        raise ValueError(f"{n} patches of side {size} do not fill a height of {height}.")
    return rearrange(patches, "B (h w) (p q C) -> B C (h p) (w q)", p=size, q=size, h=rows)


def sincos_2d(
    rows: Float[Tensor, " H"], columns: Float[Tensor, " W"], *, dim: int, base: float = 10_000.0
) -> Float[Tensor, "N D"]:
    r"""Turn the places of a grid into waves: half of the channels for x, half for y.

    $$
    \big[\sin(x\omega), \cos(x\omega), \sin(y\omega), \cos(y\omega)\big], \qquad
    \omega_i = P^{-4i/d}, \quad i = 0, \dots, d/4 - 1
    $$

    Args:
        rows: y of each row.
        columns: x of each column.
        dim: Channels d, a multiple of 4.
        base: P.

    Returns:
        N = H W vectors, row by row, in float64.

    Raises:
        ValueError: If `dim` is no multiple of 4.

    Example:
        >>> sincos_2d(torch.zeros(1), torch.tensor([0.0, 1.0]), dim=4).round(decimals=2)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8400, 0.5400, 0.0000, 1.0000]], dtype=torch.float64)

    Reference:
        He et al. (2022), arXiv:2111.06377, released code, which DiT and SD3 take over: x stands
        first, although the variable there is called emb_h.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(f"dim is {dim}: a multiple of 4.")
    index = torch.arange(dim // 4, dtype=torch.float64, device=rows.device)
    frequency = base ** (-index / (dim // 4))
    y, x = torch.meshgrid(rows.double(), columns.double(), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (x, y)]  # (eq:unet-sincos)
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=-1)


def modulate(
    x: Float[Tensor, "B N d"], shift: Float[Tensor, "B d"], scale: Float[Tensor, "B d"]
) -> Float[Tensor, "B N d"]:
    r"""Scale and shift all tokens of an image alike: x (1 + scale) + shift.

    Args:
        x: Normalized tokens.
        shift: One vector an image.
        scale: One vector an image; 0 leaves x as it is.

    Returns:
        Tokens of the same shape.

    Example:
        >>> modulate(torch.ones(1, 2, 1), torch.tensor([[0.5]]), torch.tensor([[1.0]]))
        tensor([[[2.5000],
                 [2.5000]]])

    Reference:
        Peebles & Xie (2023), arXiv:2212.09748, Sec. 3.2, "adaLN".
    """
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    r"""A transformer block whose norms and gates come from the condition.

    $$
    (\beta_1, \gamma_1, \alpha_1, \beta_2, \gamma_2, \alpha_2) = W\,\operatorname{SiLU}(c) + b,
    $$

    $$
    h = x + \alpha_1 \operatorname{Attn}\big((1 + \gamma_1) \operatorname{LN}(x) + \beta_1\big),
    \qquad
    y = h + \alpha_2 \operatorname{MLP}\big((1 + \gamma_2) \operatorname{LN}(h) + \beta_2\big)
    $$

    W and b begin at 0, so that the block begins as the identity: adaLN-Zero.

    Args:
        d_model: Channels of a token, and of the condition.
        n_heads: Heads; divides `d_model`.

    Raises:
        ValueError: If `n_heads` does not divide `d_model`.

    Example:
        >>> x = torch.randn(2, 5, 16)
        >>> torch.equal(DiTBlock(16, n_heads=2)(x, torch.randn(2, 16)), x)
        True

    Reference:
        Peebles & Xie (2023), arXiv:2212.09748, Fig. 3.
    """

    def __init__(self, d_model: int, *, n_heads: int) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"{n_heads} heads do not divide {d_model} channels.")
        self.n_heads = n_heads
        self.condition = nn.Linear(d_model, 6 * d_model)
        self.norm_1 = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm_2 = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * d_model, d_model),
        )
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Float[Tensor, "B N d"], c: Float[Tensor, "B d"]) -> Float[Tensor, "B N d"]:
        """Return the tokens after attention and MLP."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.condition(F.silu(c)).chunk(6, -1)
        h = self.qkv(modulate(self.norm_1(x), shift_1, scale_1))
        q, k, v = rearrange(
            h, "B N (three heads d) -> three B heads N d", three=3, heads=self.n_heads
        )
        o = rearrange(F.scaled_dot_product_attention(q, k, v), "B heads N d -> B N (heads d)")
        x = x + gate_1[:, None] * self.out(o)  # (eq:unet-adaln)
        return x + gate_2[:, None] * self.mlp(modulate(self.norm_2(x), shift_2, scale_2))


class DiT(nn.Module):
    r"""Predict noise, v or data from patches, time and class.

    Args:
        d_in: Channels of the image.
        d_out: Channels of the prediction; twice `d_in` where variances are predicted as well.
        side: Height and width of the image.
        patch: Side of a patch.
        d_model: Channels of a token.
        n_blocks: Depth.
        n_heads: Heads.
        n_classes: Classes; one more embedding stands for no class.

    Raises:
        ValueError: If `patch` does not divide `side`, or `n_heads` does not divide `d_model`.

    Example:
        >>> net = DiT(d_in=1, d_out=1, side=8, patch=2, d_model=32, n_blocks=2, n_heads=2)
        >>> x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([0, 9, 10])
        >>> net(x, t, label).abs().max()  # the head begins at 0
        tensor(0., grad_fn=<MaxBackward1>)

    Reference:
        Peebles & Xie (2023), arXiv:2212.09748.
    """

    def __init__(
        self,
        *,
        d_in: int,
        d_out: int,
        side: int,
        patch: int,
        d_model: int,
        n_blocks: int,
        n_heads: int,
        n_classes: int = 10,
    ) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"patches of {patch} do not fill a side of {side}.")
        self.patch = patch
        self.embed = nn.Linear(patch * patch * d_in, d_model)
        place = torch.arange(side // patch).float()
        self.register_buffer("position", sincos_2d(place, place, dim=d_model).float())
        self.time = nn.Sequential(nn.Linear(256, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        self.label = nn.Embedding(n_classes + 1, d_model)
        self.blocks = nn.ModuleList(DiTBlock(d_model, n_heads=n_heads) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False, eps=1e-6)
        self.condition = nn.Linear(d_model, 2 * d_model)
        self.head = nn.Linear(d_model, patch * patch * d_out)
        for layer in (self.condition, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "B d_in H W"],
        t: Shaped[Tensor, " B"],
        label: Int[Tensor, " B"],
    ) -> Float[Tensor, "B d_out H W"]:
        """Return the prediction for noised images at times t.

        Args:
            x: Noised images of the size that was promised.
            t: Times.
            label: Classes; the number of classes stands for none.

        Returns:
            One picture for each image.
        """
        h = self.embed(patchify(x, size=self.patch)) + self.position
        c = self.time(timestep_embedding(t, dim=256).to(x.dtype)) + self.label(label)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.condition(F.silu(c)).chunk(2, dim=-1)
        h = self.head(modulate(self.norm(h), shift, scale))
        return unpatchify(h, size=self.patch, height=x.shape[-2])


def dit_xl_2() -> DiT:
    """Return DiT-XL/2 for latents of 32 x 32 with random weights.

    Inside `torch.device("meta")` it takes no memory.

    Returns:
        675 million parameters; the prediction has 4 channels of noise and 4 of variance.

    Example:
        >>> with torch.device("meta"):
        ...     net = dit_xl_2()
        >>> sum(p.numel() for p in net.parameters())
        674834720

    Reference:
        Peebles & Xie (2023), arXiv:2212.09748, Table 1.
    """
    return DiT(
        d_in=4,
        d_out=8,
        side=32,
        patch=2,
        d_model=1152,
        n_blocks=28,
        n_heads=16,
        n_classes=1000,
    )
