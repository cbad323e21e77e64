"""Adapters: small networks between frozen layers, and the vectors that only rescale them."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.large_models.transformer_decoder import Block, KVCache

Style = Literal["houlsby", "pfeiffer", "parallel"]


class Adapter(nn.Module):
    r"""Squeeze, bend, widen, and add what came in: close to the identity at first.

    $$
    A(h) = h + W_{\uparrow}\, \sigma(W_{\downarrow} h + b_{\downarrow}) + b_{\uparrow}
    $$

    Args:
        width: D.
        bottleneck: m.
        std: Of the weights, drawn from a normal distribution cut off at two of it.
        linear: Whether to leave the bend out; then the adapter can be merged.
        generator: Draws the weights.

    Raises:
        ValueError: If the bottleneck is below 1.

    Example:
        >>> adapter = Adapter(width=32, bottleneck=8)
        >>> sum(p.numel() for p in adapter.parameters())  # 2 m D + D + m
        552

    Reference:
        Houlsby et al. (2019), arXiv:1902.00751, Sec. 2.1 and Fig. 2.
    """

    def __init__(
        self,
        *,
        width: int,
        bottleneck: int,
        std: float = 1e-2,
        linear: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck is {bottleneck}: it must be at least 1.")
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.linear = linear
        for layer in (self.down, self.up):
            cut = 2 * std
            nn.init.trunc_normal_(layer.weight, std=std, a=-cut, b=cut, generator=generator)
            nn.init.zeros_(layer.bias)

    def branch(self, h: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return what is added."""
        squeezed = self.down(h)
        return self.up(squeezed if self.linear else F.gelu(squeezed))

    def forward(self, h: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the sum."""
        return h + self.branch(h)  # (eq:adapter-bottleneck)


class AdaptedBlock(nn.Module):
    r"""A frozen block with adapters on what its two sub-layers write to the stream.

    $$
    x' = x + A_1\big(\operatorname{Attn}(\operatorname{LN} x)\big), \qquad
    y = x' + A_2\big(\operatorname{MLP}(\operatorname{LN} x')\big)
    $$

    Args:
        block: With pre-norm. Frozen but for its norms.
        bottleneck: m.
        style: "houlsby" has both adapters, "pfeiffer" A_2 alone; "parallel" adds the branch of A_2
            on the input of the MLP to its output instead.
        std: As in `Adapter`.
        scale: Of the parallel branch.
        generator: Draws the weights.

    Raises:
        ValueError: If the block has its norms on the stream.

    Example:
        >>> block = Block(width=8, n_heads=2)
        >>> adapted = AdaptedBlock(block, bottleneck=2, style="houlsby")
        >>> x = torch.randn(1, 3, 8)
        >>> (adapted(x) - block(x)).abs().max() < 1e-2
        tensor(True)

    Reference:
        Houlsby et al. (2019), arXiv:1902.00751; Pfeiffer et al. (2020), arXiv:2005.00247; He et al.
        (2021), arXiv:2110.04366, for the parallel one.
    """

    def __init__(
        self,
        block: Block,
        *,
        bottleneck: int,
        style: Style = "houlsby",
        std: float = 1e-2,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not block.pre_norm:
            raise ValueError(
                "The block has its norms on the stream: adapters here expect pre-norm."
            )
        width = block.up.in_features
        self.block, self.style, self.scale = block.requires_grad_(False), style, scale
        block.attn_norm.requires_grad_(True)
        block.mlp_norm.requires_grad_(True)
        make = [style == "houlsby", True]
        first, second = (
            Adapter(width=width, bottleneck=bottleneck, std=std, generator=generator)
            if wanted
            else None
            for wanted in make
        )
        self.attn_adapter, self.mlp_adapter = first, second

    def forward(
        self, x: Float[Tensor, "B N D"], *, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "B N D"]:
        """Return the stream after the block; each adapter acts before the addition."""
        read = self.block.attend(self.block.attn_norm(x), cache=cache, layer=layer)
        x = x + (read if self.attn_adapter is None else self.attn_adapter(read))
        normed = self.block.mlp_norm(x)
        written = self.block.think(normed)
        assert self.mlp_adapter is not None
        if self.style == "parallel":
            return x + written + self.scale * self.mlp_adapter.branch(normed)
        return x + self.mlp_adapter(written)  # (eq:adapter-block)


def inject_adapters(
    model: nn.Module,
    blocks: nn.ModuleList,
    *,
    bottleneck: int,
    style: Style = "houlsby",
    std: float = 1e-2,
    generator: torch.Generator | None = None,
) -> int:
    r"""Freeze a model and wrap its blocks in `AdaptedBlock`.

    Args:
        model: Is frozen, but for adapters and the norms of the blocks.
        blocks: Its blocks; replaced in place.
        bottleneck: m.
        style: As in `AdaptedBlock`.
        std: As in `Adapter`.
        generator: Draws the weights, block by block.

    Returns:
        How many numbers are trained now.

    Raises:
        ValueError: If an entry is no `Block`; nothing is changed then.

    Example:
        >>> from zhizhi.large_models.digits_transformer import DigitsTransformer
        >>> model = DigitsTransformer()
        >>> inject_adapters(model, model.blocks, bottleneck=8)  # 4 adapters of 552, 4 norms of 64
        2464
    """
    for i, block in enumerate(blocks):
        if not isinstance(block, Block):
            raise ValueError(f"Entry {i} is a {type(block).__name__}: adapters wrap a Block.")
    model.requires_grad_(False)
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        blocks[i] = AdaptedBlock(
            block, bottleneck=bottleneck, style=style, std=std, generator=generator
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class ScaledLinear(nn.Module):
    r"""A frozen linear map whose inputs or outputs are multiplied by a trained vector (IA3).

    $$
    l \odot (W x + b) \quad\text{or}\quad W (l \odot x) + b
    $$

    Args:
        base: The frozen map.
        on: "output" for keys and values, "input" for the map that leaves the hidden layer.

    Example:
        >>> base = nn.Linear(3, 2)
        >>> torch.equal(ScaledLinear(base, on="input")(torch.ones(3)), base(torch.ones(3)))
        True

    Reference:
        Liu et al. (2022), arXiv:2205.05638, Sec. 3.3.
    """

    def __init__(self, base: nn.Linear, *, on: Literal["input", "output"]) -> None:
        super().__init__()
        self.base, self.on = base.requires_grad_(False), on
        size = base.in_features if on == "input" else base.out_features
        self.scale = nn.Parameter(base.weight.new_ones(size))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the scaled map."""
        return self.base(x * self.scale) if self.on == "input" else self.base(x) * self.scale

    def merged(self) -> nn.Linear:
        """Return one linear map that does the same."""
        d_out, d_in = self.base.weight.shape
        linear = nn.Linear(d_in, d_out, bias=self.base.bias is not None).to(self.base.weight)
        with torch.no_grad():
            factor = self.scale if self.on == "input" else self.scale[:, None]
            linear.weight.copy_(self.base.weight * factor)
            if self.base.bias is not None:
                bias = self.base.bias
                linear.bias.copy_(bias if self.on == "input" else bias * self.scale)
        return linear


def merge_linear_adapter(base: nn.Linear, adapter: Adapter) -> nn.Linear:
    r"""Fold an adapter without a bend into the map before it.

    $$
    (I + W_\uparrow W_\downarrow)(W x + b) + W_\uparrow b_\downarrow + b_\uparrow
    $$

    The increment of the weight has rank m at most.

    Args:
        base: The map whose output the adapter takes.
        adapter: With `linear` on.

    Returns:
        One map.

    Raises:
        ValueError: If the adapter bends: no matrix does the same.

    Example:
        >>> base, adapter = nn.Linear(3, 4), Adapter(width=4, bottleneck=2, linear=True)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(merge_linear_adapter(base, adapter)(x), adapter(base(x)), atol=1e-6)
        True
    """
    if not adapter.linear:
        raise ValueError("The adapter has a GELU: it is no linear map and cannot be merged.")
    d_out, d_in = base.weight.shape
    linear = nn.Linear(d_in, d_out).to(base.weight)
    with torch.no_grad():
        whole = torch.eye(d_out).to(base.weight) + adapter.up.weight @ adapter.down.weight
        bias = base.bias if base.bias is not None else base.weight.new_zeros(d_out)
        linear.weight.copy_(whole @ base.weight)
        linear.bias.copy_(whole @ bias + adapter.up.weight @ adapter.down.bias + adapter.up.bias)
    return linear


def adapter_parameters(widths: Sequence[int], *, bottleneck: int) -> int:
    r"""Count the numbers of one adapter at each of several widths.

    $$
    \sum_D (2 m D + D + m)
    $$

    Args:
        widths: D of each adapter.
        bottleneck: m.

    Returns:
        The count, norms left out.

    Example:
        >>> adapter_parameters([768] * 24, bottleneck=64)  # BERT base, two in each of 12 layers
        2379264
    """
    return sum(2 * bottleneck * D + D + bottleneck for D in widths)
