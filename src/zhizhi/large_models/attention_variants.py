"""What decoding has to keep: fewer key heads, or one latent vector that makes all of them."""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from zhizhi.large_models.attention import causal_mask
from zhizhi.large_models.llama import RMSNorm
from zhizhi.large_models.rope import rope_frequencies, rotate


class LatentConfig(NamedTuple):
    """Sizes of a multi-head latent attention.

    Attributes:
        width: D.
        n_heads: H.
        kv_latent: d_c, width of the vector that is cached for keys and values.
        q_latent: d_c', width of the compressed query; None makes queries from the input.
        head_width: d_h of the part of queries and keys that has no position.
        rope_width: d_R of the part that is rotated; its key is shared by all heads.
        value_width: d_v.
        base: Of the rotation.
        eps: Of the norms on the latent vectors.
    """

    width: int
    n_heads: int
    kv_latent: int
    q_latent: int | None
    head_width: int
    rope_width: int
    value_width: int
    base: float = 10_000.0
    eps: float = 1e-6


DEEPSEEK_V3 = LatentConfig(7168, 128, 512, 1536, 128, 64, 128)


class LatentCache:
    r"""Latent vectors and rotated shared keys of every position, d_c + d_R numbers each.

    Args:
        n_layers: Layers of the model.
        batch: Rows.
        max_length: Positions there is room for.
        kv_latent: d_c.
        rope_width: d_R.
        dtype: Dtype of the buffers.

    Attributes:
        length: Positions read so far.

    Example:
        >>> cache = LatentCache(n_layers=1, batch=1, max_length=4, kv_latent=3, rope_width=2)
        >>> c, k = cache.append(0, torch.ones(1, 2, 3), torch.ones(1, 2, 2))
        >>> cache.length, c.shape, cache.nbytes
        (2, torch.Size([1, 2, 3]), 80)
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch: int,
        max_length: int,
        kv_latent: int,
        rope_width: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = n_layers, batch, max_length, kv_latent + rope_width
        self._kept, self._split = torch.zeros(shape, dtype=dtype), kv_latent
        self._pending = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return self._kept.nbytes

    def append(
        self, layer: int, c: Float[Tensor, "B N d_c"], k: Float[Tensor, "B N d_R"]
    ) -> tuple[Float[Tensor, "B S d_c"], Float[Tensor, "B S d_R"]]:
        """Store the N new positions of a layer and return all S of them.

        Args:
            layer: Index of the layer; layers append in order.
            c: Latent vectors, normalised.
            k: Shared keys, rotated.

        Returns:
            Latent vectors and shared keys of all positions.

        Raises:
            ValueError: If a layer is out of turn or there is no room.
        """
        n_layers, _, max_length, _ = self._kept.shape
        if layer != self._pending:
            raise ValueError(f"Layer {layer} appends: it is the turn of layer {self._pending}.")
        end = self.length + c.shape[1]
        if end > max_length:
            raise ValueError(f"{end} positions: the cache has room for {max_length}.")
        self._kept[layer, :, self.length : end] = torch.cat([c, k], dim=-1)
        self._pending = (layer + 1) % n_layers
        if self._pending == 0:
            self.length = end
        kept = self._kept[layer, :, :end]
        return kept[..., : self._split], kept[..., self._split :]


class MultiHeadLatentAttention(nn.Module):
    r"""Make the keys and values of all heads from one cached vector; rotate a part beside it.

    $$
    q_{t,h}^\top k_{s,h} = (q^C_{t,h})^\top W^{UK}_h c_s + (q^R_{t,h})^\top k^R_s, \qquad
    o_{t,h} = \sum_s p_{t,s,h}\, W^{UV}_h c_s
    $$

    Args:
        config: Sizes.
        generator: Draws the weights from N(0, 0.02).

    Example:
        >>> config = LatentConfig(16, 2, 6, None, 4, 2, 4)
        >>> layer = MultiHeadLatentAttention(config)
        >>> layer(torch.zeros(1, 3, 16)).shape
        torch.Size([1, 3, 16])

    Reference:
        DeepSeek-AI (2024), arXiv:2405.04434, Eqs. (9)-(19); the norms on the latent vectors are
        Sec. 3.1.2 there, and in the code of DeepSeek-V3.
    """

    def __init__(self, config: LatentConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        D, H, d_c, d_q, d_h, d_R, d_v, base, eps = config
        if d_q is not None:
            self.q_down, self.q_norm = nn.Linear(D, d_q, bias=False), RMSNorm(d_q, eps=eps)
        self.q_up = nn.Linear(D if d_q is None else d_q, H * (d_h + d_R), bias=False)
        self.kv_down, self.kv_norm = nn.Linear(D, d_c + d_R, bias=False), RMSNorm(d_c, eps=eps)
        self.kv_up = nn.Linear(d_c, H * (d_h + d_v), bias=False)
        self.out = nn.Linear(H * d_v, D, bias=False)
        self.frequencies = rope_frequencies(d_R, base=base)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)

    def queries(
        self, x: Float[Tensor, "B N D"], positions: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "B N H d_h"], Float[Tensor, "B N H d_R"]]:
        """Return the part without position and the rotated part."""
        c = x if self.config.q_latent is None else self.q_norm(self.q_down(x))
        q = rearrange(self.q_up(c), "B N (H d) -> B N H d", H=self.config.n_heads)
        plain, turned = q.split([self.config.head_width, self.config.rope_width], dim=-1)
        return plain, rotate(turned, positions, self.frequencies, layout="interleaved")

    def latents(
        self, x: Float[Tensor, "B N D"], positions: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "B N d_c"], Float[Tensor, "B N d_R"]]:
        """Return what is cached: the normalised latent vector, and the rotated shared key."""
        c, k = self.kv_down(x).split([self.config.kv_latent, self.config.rope_width], dim=-1)
        k = rotate(k[:, :, None], positions, self.frequencies, layout="interleaved")[:, :, 0]
        return self.kv_norm(c), k  # (eq:variants-latent)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        *,
        cache: LatentCache | None = None,
        layer: int = 0,
        absorb: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """Return what each position reads from those up to itself.

        Args:
            x: New positions; with a cache they follow the ones it has read.
            cache: Is filled.
            layer: Of this attention in the cache.
            absorb: Whether the up-projections go to the query and the output, so that scores are
                taken with the latent vectors themselves: the same number, cheaper for one new
                position, dearer for many.
        """
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        q, q_R = self.queries(x, positions)
        c, k_R = self.latents(x, positions)
        if cache is not None:
            c, k_R = cache.append(layer, c, k_R)
        H, d_h = self.config.n_heads, self.config.head_width
        up = rearrange(self.kv_up.weight, "(H d) d_c -> H d d_c", H=H)
        up_k, up_v = up[:, :d_h], up[:, d_h:]
        if absorb:
            q_c = einsum(q, up_k, "B N H d, H d d_c -> B N H d_c")  # (eq:variants-absorb)
            scores = einsum(q_c, c, "B N H d_c, B S d_c -> B H N S")
        else:
            k = einsum(c, up_k, "B S d_c, H d d_c -> B S H d")
            scores = einsum(q, k, "B N H d, B S H d -> B H N S")
        scores = scores + einsum(q_R, k_R, "B N H d, B S d -> B H N S")  # (eq:variants-decoupled)
        scores = scores * (d_h + self.config.rope_width) ** -0.5  # not (d_c + d_R), absorbed or not
        hidden = ~causal_mask(scores.shape[-2], scores.shape[-1], device=x.device)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        if absorb:
            mixed = einsum(weights, c, "B H N S, B S d_c -> B N H d_c")
            o = einsum(mixed, up_v, "B N H d_c, H d d_c -> B N H d")
        else:
            v = einsum(c, up_v, "B S d_c, H d d_c -> B S H d")
            o = einsum(weights, v, "B H N S, B S H d -> B N H d")
        return self.out(rearrange(o, "B N H d -> B N (H d)"))


def pool_heads(
    weight: Float[Tensor, "HDh D"], *, n_heads: int, n_groups: int
) -> Float[Tensor, "GDh D"]:
    r"""Average the key (or value) projections of the heads that are to share one.

    Args:
        weight: Projection, head by head.
        n_heads: H.
        n_groups: G; divides H. Head h goes to group floor(h G / H).

    Returns:
        The projection of G heads: where a model with fewer key heads starts from.

    Raises:
        ValueError: If G does not divide H or H the rows.

    Example:
        >>> pool_heads(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), n_heads=4, n_groups=2)
        tensor([[2.],
                [7.]])

    Reference:
        Ainslie et al. (2023), arXiv:2305.13245, Sec. 2.1 and Fig. 1.
    """
    if n_heads % n_groups or weight.shape[0] % n_heads:
        raise ValueError(
            f"{weight.shape[0]} rows, {n_heads} heads, {n_groups} groups: "
            "each must be a multiple of the next."
        )
    return reduce(weight, "(G p d) D -> (G d) D", "mean", G=n_groups, p=n_heads // n_groups)


def cached_numbers(*, n_layers: int, n_kv_heads: int, head_width: int) -> int:
    r"""Count the numbers that G heads of keys and values keep for one token.

    $$
    2\, L\, G\, d_h
    $$

    Args:
        n_layers: L.
        n_kv_heads: G: H in multi-head, 1 in multi-query attention.
        head_width: d_h.

    Returns:
        Numbers a token; times 2 for bytes in 16 bits.

    Example:
        >>> cached_numbers(n_layers=80, n_kv_heads=64, head_width=128) * 2  # LLaMA-65B
        2621440
    """
    return 2 * n_layers * n_kv_heads * head_width


def cached_latent_numbers(config: LatentConfig, *, n_layers: int) -> int:
    r"""Count the numbers that latent attention keeps for one token, whatever the number of heads.

    $$
    L\,(d_c + d_R)
    $$

    Args:
        config: Sizes.
        n_layers: L.

    Returns:
        Numbers a token.

    Example:
        >>> cached_latent_numbers(DEEPSEEK_V3, n_layers=61)
        35136

    Reference:
        DeepSeek-AI (2024), arXiv:2405.04434, Table 1.
    """
    return n_layers * (config.kv_latent + config.rope_width)


class DecodeCost(NamedTuple):
    """Work of one layer's attention for one new token, the projections of the token left out."""

    flops: float
    bytes_read: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes_read


def grouped_decode_cost(
    length: int, *, n_heads: int, n_kv_heads: int, head_width: int, itemsize: int = 2
) -> DecodeCost:
    r"""Count scores and mixing against a cache of keys and values.

    $$
    4\, T H d_h \ \text{operations}, \qquad 2\, T G d_h \ \text{numbers read}
    $$

    Args:
        length: T, positions in the cache.
        n_heads: H.
        n_kv_heads: G.
        head_width: d_h.
        itemsize: Bytes a number.

    Returns:
        Operations and bytes; their ratio is H/G in 16 bits.

    Example:
        >>> grouped_decode_cost(1000, n_heads=64, n_kv_heads=8, head_width=128).intensity
        8.0
    """
    return DecodeCost(
        4.0 * length * n_heads * head_width, 2.0 * length * n_kv_heads * head_width * itemsize
    )


def latent_decode_cost(
    length: int, config: LatentConfig, *, absorb: bool, itemsize: int = 2
) -> DecodeCost:
    r"""Count the same against a cache of latent vectors.

    $$
    2TH(2d_c + d_R) + 2H d_c (d_h + d_v) \quad\text{absorbed}, \qquad
    2THd_c(d_h+d_v) + 2TH(d_h + d_R + d_v) \quad\text{not}
    $$

    Args:
        length: T, positions in the cache.
        config: Sizes.
        absorb: As in `MultiHeadLatentAttention`. Without it, keys and values of every cached
            position are made anew for each token; their traffic is not counted, only the cache's
            and the up-projection's.
        itemsize: Bytes a number.

    Returns:
        Operations and bytes.

    Example:
        >>> short = latent_decode_cost(4096, DEEPSEEK_V3, absorb=True)
        >>> long = latent_decode_cost(4096, DEEPSEEK_V3, absorb=False)
        >>> round(long.flops / short.flops)
        117
    """
    H, d_c, d_R = config.n_heads, config.kv_latent, config.rope_width
    d_h, d_v, T = config.head_width, config.value_width, length
    if absorb:
        flops = 2.0 * T * H * (2 * d_c + d_R) + 2.0 * H * d_c * (d_h + d_v)
    else:
        flops = 2.0 * T * H * d_c * (d_h + d_v) + 2.0 * T * H * (d_h + d_R + d_v)
    return DecodeCost(flops, itemsize * (T * (d_c + d_R) + H * d_c * (d_h + d_v)))
