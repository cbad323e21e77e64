"""LLaMA: the decoder that the field settled on, its published sizes, and what training costs."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.deep_learning.normalization import rms_norm_cast_first
from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.rope import rope_frequencies, rotate
from zhizhi.large_models.transformer_decoder import KVCache


class LlamaConfig(NamedTuple):
    """Sizes of a LLaMA.

    Attributes:
        vocab_size: V.
        width: D.
        hidden: F, width inside the feed-forward network; see `swiglu_hidden`.
        n_layers: L.
        n_heads: H query heads.
        n_kv_heads: G key/value heads; H in LLaMA 1.
        base: Of the rotation.
        eps: Of the norms.
        tied: Whether the embedding also reads out; false in every LLaMA 1 and 2.
    """

    vocab_size: int
    width: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    base: float = 10_000.0
    eps: float = 1e-6
    tied: bool = False


LLAMA_1 = {
    "7B": LlamaConfig(32_000, 4096, 11_008, 32, 32, 32),
    "13B": LlamaConfig(32_000, 5120, 13_824, 40, 40, 40),
    "33B": LlamaConfig(32_000, 6656, 17_920, 60, 52, 52),
    "65B": LlamaConfig(32_000, 8192, 22_016, 80, 64, 64),
}


def swiglu_hidden(width: int, *, multiple_of: int = 256) -> int:
    r"""Return the width at which three matrices hold as much as two of width 4D did.

    $$
    3 D F = 8 D^2 \;\Rightarrow\; F = \tfrac{8}{3} D, \text{ rounded up to a multiple}
    $$

    Args:
        width: D.
        multiple_of: What F is rounded up to.

    Returns:
        F.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> [swiglu_hidden(width) for width in (4096, 5120, 6656, 8192)]
        [11008, 13824, 17920, 22016]

    Reference:
        Shazeer (2020), arXiv:2002.05202, Sec. 2; Meta's `FeedForward`, which truncates 2/3 of 4D.
    """
    if width < 1 or multiple_of < 1:
        raise ValueError(f"width is {width} and multiple_of {multiple_of}: both at least 1.")
    return -(-int(2 * 4 * width / 3) // multiple_of) * multiple_of


def llama_parameters(config: LlamaConfig) -> int:
    r"""Count the parameters of a `Llama` without building it.

    $$
    P = 2VD + L\Big(2D^2 + 2D^2 \tfrac{G}{H} + 3DF + 2D\Big) + D
    $$

    Args:
        config: Sizes; VD is counted once if tied.

    Returns:
        The count.

    Example:
        >>> llama_parameters(LLAMA_1["7B"])
        6738415616

    Reference:
        Touvron et al. (2023), arXiv:2302.13971, Table 2, gives the sizes and rounded counts.
    """
    V, D, F_, L, H, G = config[:6]
    kv = G * (D // H)
    layer = 2 * D * D + 2 * D * kv + 3 * D * F_ + 2 * D
    return (1 if config.tied else 2) * V * D + L * layer + D


class RMSNorm(nn.Module):
    r"""The gain of a root-mean-square norm.

    Args:
        width: D.
        eps: Added to the mean square.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, -3.0])).tolist()
        [1.0, -1.0]

    Reference:
        Zhang & Sennrich (2019), arXiv:1910.07467, Eq. (4); rounded as in `LlamaRMSNorm`.
    """

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the normalised vectors."""
        return rms_norm_cast_first(x, self.weight, eps=self.eps)


class SwiGLU(nn.Module):
    r"""A feed-forward network whose hidden units are gated by one another.

    $$
    W_{\text{down}} \big( \operatorname{SiLU}(W_{\text{gate}}\, x) \odot W_{\text{up}}\, x \big)
    $$

    Args:
        width: D.
        hidden: F.

    Example:
        >>> SwiGLU(width=4, hidden=6)(torch.zeros(2, 4)).shape
        torch.Size([2, 4])

    Reference:
        Shazeer (2020), arXiv:2002.05202, Eq. (6).
    """

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the outputs, vector by vector."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (eq:llama-swiglu)


class LlamaBlock(nn.Module):
    r"""One layer: attention with rotated queries and keys, then SwiGLU, both behind an RMSNorm.

    Args:
        config: Sizes.

    Example:
        >>> config = LlamaConfig(10, 8, 16, 1, 2, 1)
        >>> frequencies = rope_frequencies(4)
        >>> LlamaBlock(config)(torch.zeros(1, 3, 8), torch.arange(3), frequencies).shape
        torch.Size([1, 3, 8])

    Reference:
        Touvron et al. (2023), arXiv:2302.13971, Sec. 2.2.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, Dh = config.width, config.width // config.n_heads
        self.head_width = Dh
        self.attn_norm = RMSNorm(D, eps=config.eps)
        self.q = nn.Linear(D, config.n_heads * Dh, bias=False)
        self.k = nn.Linear(D, config.n_kv_heads * Dh, bias=False)
        self.v = nn.Linear(D, config.n_kv_heads * Dh, bias=False)
        self.o = nn.Linear(config.n_heads * Dh, D, bias=False)
        self.mlp_norm = RMSNorm(D, eps=config.eps)
        self.mlp = SwiGLU(width=D, hidden=config.hidden)

    def attend(
        self,
        x: Float[Tensor, "B N D"],
        positions: Int[Tensor, "*rows N"],
        frequencies: Float[Tensor, " pairs"],
        *,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B N D"]:
        """Return what each position reads; the cache keeps rotated keys."""
        q, k, v = (
            rearrange(f(x), "B N (H Dh) -> B N H Dh", Dh=self.head_width)
            for f in (self.q, self.k, self.v)
        )
        q, k = (rotate(z, positions, frequencies) for z in (q, k))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = grouped_query_attention(q, k, v, causal=True)
        return self.o(rearrange(mixed, "B N H Dh -> B N (H Dh)"))

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Int[Tensor, "*rows N"],
        frequencies: Float[Tensor, " pairs"],
        *,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B N D"]:
        """Return the stream after this layer."""
        read = self.attend(self.attn_norm(x), positions, frequencies, cache=cache, layer=layer)
        x = x + read  # (eq:llama-attn)
        return x + self.mlp(self.mlp_norm(x))  # (eq:llama-mlp)


class Llama(nn.Module):
    r"""Score the next token at every position.

    Args:
        config: Sizes.
        generator: Draws the weights, all from N(0, 0.02).

    Attributes:
        frequencies: Of the rotation, in float64; replace them to stretch the context.

    Raises:
        ValueError: If the heads do not divide the width, or the key heads the query heads.

    Example:
        >>> model = Llama(LlamaConfig(10, 8, 16, 2, 2, 1))
        >>> model(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 10])

    Reference:
        Touvron et al. (2023), arXiv:2302.13971, Sec. 2.2; the initialisation is not in the paper
        and follows transformers.
    """

    def __init__(self, config: LlamaConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.width % config.n_heads or config.n_heads % config.n_kv_heads:
            raise ValueError(
                f"width is {config.width}, n_heads {config.n_heads} and n_kv_heads "
                f"{config.n_kv_heads}: each must divide the one before it."
            )
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([LlamaBlock(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.token.weight
        self.frequencies = rope_frequencies(config.width // config.n_heads, base=config.base)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02, generator=generator)

    def new_cache(self, *, batch: int, max_length: int | None = None) -> KVCache:
        """Return an empty cache that fits this model.

        Args:
            batch: Rows.
            max_length: Positions; the model itself has no limit, so one must be named.

        Raises:
            ValueError: If no length is named.
        """
        if max_length is None:
            raise ValueError("max_length is None: rotations have no last position, name one.")
        return KVCache(
            n_layers=self.config.n_layers,
            batch=batch,
            max_length=max_length,
            n_kv_heads=self.config.n_kv_heads,
            head_width=self.config.width // self.config.n_heads,
            dtype=self.token.weight.dtype,
            device=self.token.weight.device,
        )

    def hidden_states(
        self,
        ids: Int[Tensor, "B N"],
        *,
        cache: KVCache | None = None,
        positions: Int[Tensor, "*rows N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Return the normalised stream before it is read out.

        Args:
            ids: New tokens.
            cache: Is filled.
            positions: Of the new tokens; None counts on from what the cache has read.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        frequencies = self.frequencies.to(ids.device)
        x = self.token(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, frequencies, cache=cache, layer=layer)
        return self.norm(x)

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        *,
        cache: KVCache | None = None,
        positions: Int[Tensor, "*rows N"] | None = None,
    ) -> Float[Tensor, "B N V"]:
        """Return unnormalised log-probabilities of the token after each position."""
        return self.head(self.hidden_states(ids, cache=cache, positions=positions))


def load_hf_weights(model: Llama, state: Mapping[str, Tensor]) -> None:
    r"""Copy the weights of a `LlamaForCausalLM` of transformers, whose pairs are split halves too.

    Args:
        model: Is overwritten.
        state: Its `state_dict()`.

    Raises:
        ValueError: If names are missing or left over; nothing is copied then.

    Example:
        >>> model = Llama(LlamaConfig(10, 8, 16, 1, 2, 1))
        >>> load_hf_weights(model, {"lm_head.weight": torch.zeros(10, 8)})
        Traceback (most recent call last):
        ...
        ValueError: missing 11: blocks.0.attn_norm.weight, ...; unknown 0: .
    """
    names = {
        "model.embed_tokens": "token", "model.layers": "blocks", "model.norm": "norm",
        "lm_head": "head", "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
        "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
        "self_attn.o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    }  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    wanted = set(model.state_dict())
    missing, unknown = sorted(wanted - set(renamed)), sorted(set(renamed) - wanted)
    if missing or unknown:
        raise ValueError(
            f"missing {len(missing)}: {', '.join(missing[:1])}, ...; "
            f"unknown {len(unknown)}: {', '.join(unknown[:3])}."
        )
    model.load_state_dict(renamed)


def training_flops(n_parameters: float, n_tokens: float) -> float:
    r"""Return the usual estimate of what one pass over the tokens costs.

    $$
    C \approx 6 P n
    $$

    A token costs two operations a parameter forward and four backward; attention scores are left
    out.

    Args:
        n_parameters: P.
        n_tokens: n.

    Returns:
        Floating-point operations.

    Example:
        >>> f"{training_flops(175e9, 300e9):.3g}"
        '3.15e+23'

    Reference:
        Kaplan et al. (2020), arXiv:2001.08361, Sec. 2.1.
    """
    return 6 * n_parameters * n_tokens  # (eq:llama-flops)


def chinchilla_loss(
    n_parameters: float,
    n_tokens: float,
    *,
    E: float = 1.69,
    A: float = 406.4,
    B: float = 410.7,
    alpha: float = 0.34,
    beta: float = 0.28,
) -> float:
    r"""Return the loss that a fitted law expects of a model and an amount of data.

    $$
    \hat L(P, n) = E + \frac{A}{P^\alpha} + \frac{B}{n^\beta}
    $$

    Args:
        n_parameters: P.
        n_tokens: n.
        E: Loss of a perfect model of the data.
        A: Of the term for parameters.
        B: Of the term for data.
        alpha: Exponent for parameters.
        beta: Exponent for data.

    Returns:
        Nats a token, on the data of the fit.

    Example:
        >>> round(chinchilla_loss(175e9, 300e9), 3)
        2.002

    Reference:
        Hoffmann et al. (2022), arXiv:2203.15556, Eq. (10), third approach.
    """
    return E + A / n_parameters**alpha + B / n_tokens**beta  # (eq:llama-law)


def chinchilla_optimum(
    flops: float,
    *,
    A: float = 406.4,
    B: float = 410.7,
    alpha: float = 0.34,
    beta: float = 0.28,
) -> tuple[float, float]:
    r"""Return the model and the data of lowest expected loss for a budget of 6 P n operations.

    $$
    P^\star = K \Big(\frac{C}{6}\Big)^{\frac{\beta}{\alpha+\beta}}, \qquad
    n^\star = \frac{1}{K} \Big(\frac{C}{6}\Big)^{\frac{\alpha}{\alpha+\beta}}, \qquad
    K = \Big(\frac{\alpha A}{\beta B}\Big)^{\frac{1}{\alpha+\beta}}
    $$

    Args:
        flops: C.
        A: As in `chinchilla_loss`.
        B: As in `chinchilla_loss`.
        alpha: As in `chinchilla_loss`.
        beta: As in `chinchilla_loss`.

    Returns:
        Parameters and tokens.

    Example:
        >>> P, n = chinchilla_optimum(6e21)
        >>> round(P * n / 1e21, 6)
        1.0

    Reference:
        Hoffmann et al. (2022), arXiv:2203.15556, Eq. (4).
    """
    K = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    P = K * (flops / 6) ** (beta / (alpha + beta))  # (eq:llama-optimum)
    return P, flops / 6 / P
