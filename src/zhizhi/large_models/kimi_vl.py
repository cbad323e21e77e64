"""Kimi-VL: images in their own resolution, packed like texts, read by a mixture of experts."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from zhizhi.large_models.attention_variants import LatentConfig
from zhizhi.large_models.deepseek_v3 import V3Config
from zhizhi.large_models.flash_attention import flash_attention_varlen
from zhizhi.large_models.rope import grid_angles, rotate_by

Grid = tuple[int, int]  # rows and columns of patches of one image

MOONLIGHT = V3Config(
    vocab_size=163_840,
    n_layers=27,
    n_dense=1,
    dense_hidden=11_264,
    expert_hidden=1408,
    n_experts=64,
    k=6,
    attention=LatentConfig(2048, 16, 512, None, 128, 64, 128),
    n_shared=2,
    scale=2.446,
)


class VisionConfig(NamedTuple):
    """Sizes of a MoonViT; the defaults are those of the published one.

    Attributes:
        width: D.
        n_layers: L.
        n_heads: H.
        hidden: Width inside of the feed-forward networks.
        patch: Side of a patch, in pixels.
        side: Rows and columns of the table of positions.
        channels: Of an image.
    """

    width: int = 1152
    n_layers: int = 27
    n_heads: int = 16
    hidden: int = 4304
    patch: int = 14
    side: int = 64
    channels: int = 3


def patchify(
    image: Float[Tensor, "C Y X"], *, patch: int
) -> tuple[Float[Tensor, "N pixels"], Grid]:
    """Cut an image into patches, row by row.

    Args:
        image: An image whose sides are multiples of the patch.
        patch: Side of a patch.

    Returns:
        A row of C p p numbers for each patch, in the order of a convolution's weights, and how many
        rows and columns of patches there are.

    Raises:
        ValueError: If the patch does not divide both sides.

    Example:
        >>> rows, grid = patchify(torch.arange(8.0).reshape(1, 2, 4), patch=2)
        >>> rows.tolist(), grid
        ([[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]], (1, 2))
    """
    _, Y, X = image.shape
    if Y % patch or X % patch:
        raise ValueError(f"the image is {Y} by {X}: {patch} must divide both sides, pad it.")
    rows = rearrange(image, "C (h p) (w q) -> (h w) (C p q)", p=patch, q=patch)
    return rows, (Y // patch, X // patch)


def interpolate_positions(
    table: Float[Tensor, "side side D"], grids: Sequence[Grid]
) -> Float[Tensor, "N D"]:
    """Stretch a square table of learnt positions over the grid of each image.

    Args:
        table: What was learnt on images of one size.
        grids: Rows and columns of each image.

    Returns:
        One vector for each patch, the images one after the other (bicubic, pixels as areas).

    Example:
        >>> interpolate_positions(torch.ones(4, 4, 2), [(2, 3)]).shape
        torch.Size([6, 2])

    Reference:
        Kimi Team (2025), arXiv:2504.07491, Sec. 2.1, on SigLIP's table.
    """
    plane = rearrange(table, "y x D -> 1 D y x")
    stretched = {}
    for grid in set(grids):
        part = F.interpolate(plane, grid, mode="bicubic", align_corners=False)
        stretched[grid] = rearrange(part, "1 D h w -> (h w) D")
    return torch.cat([stretched[grid] for grid in grids])


def pixel_shuffle(
    x: Float[Tensor, "N D"], grids: Sequence[Grid], *, factor: int = 2
) -> Float[Tensor, "M FFD"]:
    r"""Lay the vectors of neighbouring patches side by side: fewer tokens, nothing lost.

    $$
    [h, w, D] \to [h/f,\ w/f,\ f^2 D]
    $$

    Args:
        x: Patches of all images.
        grids: Their rows and columns.
        factor: f.

    Returns:
        One vector for each square of f by f patches.

    Raises:
        ValueError: If the grids do not have N patches, or f does not divide a side.

    Example:
        >>> pixel_shuffle(torch.arange(8.0).reshape(8, 1), [(2, 4)])
        tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]])

    Reference:
        Kimi Team (2025), arXiv:2504.07491, Sec. 2.1: 2 by 2, then the projector.
    """
    _check_grids(len(x), grids)
    if any(h % factor or w % factor for h, w in grids):
        raise ValueError(f"grids are {list(grids)}: {factor} must divide rows and columns.")
    parts = x.split([h * w for h, w in grids])
    merged = [
        rearrange(p, "(h f w g) D -> (h w) (f g D)", w=w // factor, f=factor, g=factor)
        for p, (_, w) in zip(parts, grids, strict=True)
    ]
    return torch.cat(merged)  # (eq:kimi-shuffle)


def image_tokens(height: int, width: int, *, patch: int = 14, factor: int = 2) -> int:
    r"""Count the tokens that an image takes in the language model.

    $$
    \lceil H / (p f) \rceil \, \lceil W / (p f) \rceil
    $$

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        patch: p.
        factor: f of the pixel shuffle.

    Returns:
        The count after padding to whole squares of patches.

    Example:
        >>> image_tokens(1792, 1792), image_tokens(15, 15)
        (4096, 1)
    """
    side = patch * factor
    return math.ceil(height / side) * math.ceil(width / side)  # (eq:kimi-tokens)


def merge_image_tokens(
    text: Float[Tensor, "T D"], ids: Int[Tensor, " T"], image: Float[Tensor, "M D"], *, token: int
) -> Float[Tensor, "T D"]:
    """Put image vectors in the places that the text has kept for them, in order.

    Args:
        text: Embedded tokens.
        ids: The tokens.
        image: Projected vectors of all images of the text.
        token: The token that keeps a place.

    Returns:
        The mixed sequence.

    Raises:
        ValueError: If there are not as many places as vectors.

    Example:
        >>> ids, place = torch.tensor([5, 0, 0]), 0
        >>> merge_image_tokens(torch.zeros(3, 1), ids, torch.tensor([[1.0], [2.0]]), token=place)
        tensor([[0.],
                [1.],
                [2.]])
    """
    places = ids == token
    if int(places.sum()) != len(image):
        raise ValueError(f"{int(places.sum())} places for {len(image)} image vectors.")
    return text.masked_scatter(places[:, None], image.to(text.dtype))


class VisionBlock(nn.Module):
    r"""Let the patches of one image read each other, then think about each alone.

    Args:
        config: Sizes.

    Example:
        >>> block = VisionBlock(VisionConfig(8, 1, 2, 16))
        >>> angles, bounds = torch.zeros(3, 2), torch.tensor([0, 1, 3])
        >>> block(torch.zeros(3, 8), angles, bounds).shape
        torch.Size([3, 8])

    Reference:
        Zhai et al. (2023), arXiv:2303.15343 (SigLIP), for the block; Kimi Team (2025),
        arXiv:2504.07491, Sec. 2.1, for the rotations.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.width
        self.n_heads = config.n_heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, config.hidden), nn.Linear(config.hidden, D)

    def forward(
        self,
        x: Float[Tensor, "N D"],
        angles: Float[Tensor, "N pairs"],
        cu_seqlens: Int[Tensor, " J"],
    ) -> Float[Tensor, "N D"]:
        """Return the stream after this block."""
        qkv = rearrange(self.qkv(self.norm1(x)), "N (c H Dh) -> c N H Dh", c=3, H=self.n_heads)
        q, k = (rotate_by(y, angles) for y in qkv[:2])
        mixed = flash_attention_varlen(q, k, qkv[2], cu_seqlens, causal=False)  # (eq:kimi-packed)
        x = x + self.out(mixed.flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class MoonViT(nn.Module):
    r"""Encode images of any size in one packed row.

    Positions are told twice: by a learnt table that is stretched over each image, and by rotations
    of which half follow the row and half the column.

    Args:
        config: Sizes.
        generator: Draws the weights, N(0, 0.02).

    Example:
        >>> model = MoonViT(VisionConfig(8, 1, 2, 16, patch=2, side=4, channels=1))
        >>> rows, grid = patchify(torch.zeros(1, 4, 8), patch=2)
        >>> model(rows, [grid]).shape
        torch.Size([8, 8])

    Reference:
        Kimi Team (2025), arXiv:2504.07491, Sec. 2.1.
    """

    def __init__(self, config: VisionConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(config.channels * config.patch**2, config.width)
        self.position = nn.Parameter(torch.empty(config.side, config.side, config.width))
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.n_layers)])
        self.norm = nn.LayerNorm(config.width)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02, generator=generator)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(
        self, patches: Float[Tensor, "N pixels"], grids: Sequence[Grid]
    ) -> Float[Tensor, "N D"]:
        """Return a vector for each patch.

        Args:
            patches: Of all images, one after the other, as `patchify` cuts them.
            grids: Rows and columns of each image.

        Raises:
            ValueError: If the grids do not have N patches.
        """
        _check_grids(len(patches), grids)
        place = torch.cat(
            [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grids]
        )
        place = place.to(patches.device)
        d = self.config.width // self.config.n_heads
        angles = grid_angles(place[:, 0], place[:, 1], d=d).to(patches.device)
        bounds = torch.tensor([0, *accumulate(h * w for h, w in grids)], device=patches.device)
        x = self.patch(patches) + interpolate_positions(self.position, grids)
        for block in self.blocks:
            x = block(x, angles, bounds)
        return self.norm(x)


class Projector(nn.Module):
    """Bring the patches of each square into the width of the language model.

    Args:
        width: D of the encoder.
        text_width: Of the language model.
        factor: f of the pixel shuffle.

    Example:
        >>> Projector(width=8, text_width=6)(torch.zeros(4, 8), [(2, 2)]).shape
        torch.Size([1, 6])

    Reference:
        Kimi Team (2025), arXiv:2504.07491, Sec. 2.1: a two-layer network after the pixel shuffle.
    """

    def __init__(self, *, width: int, text_width: int, factor: int = 2) -> None:
        super().__init__()
        self.factor, inner = factor, width * factor**2
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(inner, inner), nn.Linear(inner, text_width)

    def forward(self, x: Float[Tensor, "N D"], grids: Sequence[Grid]) -> Float[Tensor, "M W"]:
        """Return image tokens for the language model."""
        merged = pixel_shuffle(self.norm(x), grids, factor=self.factor)
        return self.down(F.gelu(self.up(merged)))


def vision_parameters(config: VisionConfig) -> int:
    r"""Count the parameters of a `MoonViT` without building it.

    $$
    (3 p^2 + 1) D + S^2 D + L (4 D^2 + 2 D F + 9 D + F) + 2 D
    $$

    Args:
        config: Sizes.

    Returns:
        The count; the 3 is the channels.

    Example:
        >>> vision_parameters(VisionConfig())
        416866032
    """
    D, hidden = config.width, config.hidden
    layer = 4 * D * D + 2 * D * hidden + 9 * D + hidden
    embed = (config.channels * config.patch**2 + 1) * D + config.side**2 * D
    return embed + config.n_layers * layer + 2 * D


def siglip_loss(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "B D"],
    *,
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""Decide for each of B x B pairs alone whether image and text belong together.

    $$
    -\frac1B \sum_{i,j} \log \sigma\big(z_{ij} (e^{t}\, x_i \cdot y_j + b)\big), \qquad
    z_{ij} = 2\,[i = j] - 1
    $$

    Args:
        image: x; is normalised here.
        text: y; is normalised here.
        log_scale: t; log 10 at the start.
        bias: b; -10 at the start, because nearly all pairs do not belong together.

    Returns:
        The loss, a sum over pairs divided by B.

    Example:
        >>> x = torch.eye(2)
        >>> siglip_loss(x, x, log_scale=torch.tensor(10.0).log(), bias=torch.tensor(-5.0))
        tensor(0.0134)

    Reference:
        Zhai et al. (2023), arXiv:2303.15343, Algorithm 1.
    """
    scores = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    together = 2 * torch.eye(len(scores), device=scores.device) - 1
    return -F.logsigmoid(together * scores).sum() / len(scores)  # (eq:kimi-siglip)


def _check_grids(n: int, grids: Sequence[Grid]) -> None:
    cells = sum(h * w for h, w in grids)
    if cells != n:
        raise ValueError(f"grids {list(grids)} have {cells} patches, but there are {n}.")
