"""DeepSeek-V3: latent attention, fine-grained experts, modules that guess further ahead."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zhizhi.large_models.attention_variants import (
    LatentCache,
    LatentConfig,
    MultiHeadLatentAttention,
)
from zhizhi.large_models.llama import RMSNorm, SwiGLU
from zhizhi.large_models.moe import DeepSeekMoE, moe_parameters
from zhizhi.large_models.transformer_decoder import next_token_loss


class V3Config(NamedTuple):
    """Sizes of a DeepSeek-V3.

    Attributes:
        vocab_size: V.
        n_layers: L.
        n_dense: Layers at the start that have one feed-forward network in place of experts.
        dense_hidden: Its hidden width.
        expert_hidden: Hidden width of an expert.
        n_experts: Routed experts.
        k: Routed experts of each token.
        attention: Sizes of the attention, D among them.
        n_shared: Shared experts.
        scale: Factor on the gates.
        n_groups: Groups of routed experts.
        k_groups: Groups that one token may use.
    """

    vocab_size: int
    n_layers: int
    n_dense: int
    dense_hidden: int
    expert_hidden: int
    n_experts: int
    k: int
    attention: LatentConfig
    n_shared: int = 1
    scale: float = 1.0
    n_groups: int = 1
    k_groups: int = 1


V3 = V3Config(
    vocab_size=129_280,
    n_layers=61,
    n_dense=3,
    dense_hidden=18_432,
    expert_hidden=2048,
    n_experts=256,
    k=8,
    attention=LatentConfig(7168, 128, 512, 1536, 128, 64, 128),
    scale=2.5,
    n_groups=8,
    k_groups=4,
)


class V3Counts(NamedTuple):
    """Weights: all, those one token meets, and those of one embedding table."""

    total: int
    active: int
    table: int


def v3_parameters(config: V3Config) -> V3Counts:
    r"""Count the parameters without building the model; the routers' biases are no parameters.

    Args:
        config: Sizes.

    Returns:
        The counts; both embedding tables are in total and active.

    Example:
        >>> v3_parameters(V3).total
        671026404352

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 4.2: 671B, 37B active.
    """
    D, H, d_c, d_q, d_h, d_R, d_v = config.attention[:7]
    query = D * H * (d_h + d_R) if d_q is None else D * d_q + d_q + d_q * H * (d_h + d_R)
    attention = query + D * (d_c + d_R) + d_c + d_c * H * (d_h + d_v) + H * d_v * D
    moe, met = moe_parameters(
        d_model=D,
        d_hidden=config.expert_hidden,
        n_experts=config.n_experts,
        n_shared=config.n_shared,
        k=config.k,
    )
    sparse = config.n_layers - config.n_dense
    table = config.vocab_size * D
    rest = 2 * table + D + config.n_layers * (attention + 2 * D)
    rest += config.n_dense * 3 * D * config.dense_hidden
    return V3Counts(rest + sparse * moe, rest + sparse * met, table)


class V3Block(nn.Module):
    r"""Latent attention, then one network or many experts, both behind an RMSNorm.

    Args:
        config: Sizes.
        dense: Whether there is one network.
        generator: Draws the weights.

    Example:
        >>> config = V3Config(9, 2, 1, 16, 4, 4, 2, LatentConfig(8, 2, 6, None, 4, 2, 4))
        >>> V3Block(config, dense=False)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 2.1 and Fig. 2.
    """

    def __init__(
        self, config: V3Config, *, dense: bool, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        D, eps = config.attention.width, config.attention.eps
        self.attn_norm, self.mlp_norm = RMSNorm(D, eps=eps), RMSNorm(D, eps=eps)
        self.attention = MultiHeadLatentAttention(config.attention, generator=generator)
        self.mlp: SwiGLU | DeepSeekMoE
        if dense:
            self.mlp = SwiGLU(width=D, hidden=config.dense_hidden)
            for p in self.mlp.parameters():
                nn.init.normal_(p, std=0.02, generator=generator)
        else:
            self.mlp = DeepSeekMoE(
                D,
                config.expert_hidden,
                n_experts=config.n_experts,
                k=config.k,
                n_shared=config.n_shared,
                scale=config.scale,
                n_groups=config.n_groups,
                k_groups=config.k_groups,
                generator=generator,
            )

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        *,
        cache: LatentCache | None = None,
        layer: int = 0,
        absorb: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """Return the stream after the block."""
        read = self.attention(self.attn_norm(x), cache=cache, layer=layer, absorb=absorb)
        x = x + read
        h = self.mlp_norm(x)
        if isinstance(self.mlp, SwiGLU):
            return x + self.mlp(h)
        return x + self.mlp(h.flatten(0, 1))[0].reshape(h.shape)


class DeepSeekV3(nn.Module):
    r"""Score the next token at every position.

    Args:
        config: Sizes.
        generator: Draws the weights.

    Example:
        >>> config = V3Config(9, 2, 1, 16, 4, 4, 2, LatentConfig(8, 2, 6, None, 4, 2, 4))
        >>> DeepSeekV3(config)(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 9])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 2.1.
    """

    def __init__(self, config: V3Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        D = config.attention.width
        self.config = config
        self.token = nn.Embedding(config.vocab_size, D)
        self.blocks = nn.ModuleList(
            [
                V3Block(config, dense=i < config.n_dense, generator=generator)
                for i in range(config.n_layers)
            ]
        )
        self.norm = RMSNorm(D, eps=config.attention.eps)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        for p in (self.token.weight, self.head.weight):
            nn.init.normal_(p, std=0.02, generator=generator)

    def stream(
        self, ids: Int[Tensor, "B N"], *, cache: LatentCache | None = None, absorb: bool = False
    ) -> Float[Tensor, "B N D"]:
        """Return the stream after the last block, before the norm.

        Args:
            ids: New tokens.
            cache: Is filled.
            absorb: As in `MultiHeadLatentAttention`.
        """
        x = self.token(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache=cache, layer=layer, absorb=absorb)
        return x

    def forward(
        self, ids: Int[Tensor, "B N"], *, cache: LatentCache | None = None, absorb: bool = False
    ) -> Float[Tensor, "B N V"]:
        """Return unnormalised log-probabilities of the token after each position."""
        return self.head(self.norm(self.stream(ids, cache=cache, absorb=absorb)))


class MTPModule(nn.Module):
    r"""Guess one token further ahead, from the stream and the token that comes next.

    $$
    h'^{\,k}_i = M_k \big[ \operatorname{RMSNorm}(h^{k-1}_i) ;\,
        \operatorname{RMSNorm}(\operatorname{Emb}(t_{i+k})) \big]
    $$

    A block of its own follows; embedding and head are those of the main model.

    Args:
        config: Sizes of its block, which has experts.
        generator: Draws the weights.

    Example:
        >>> config = V3Config(9, 2, 1, 16, 4, 4, 2, LatentConfig(8, 2, 6, None, 4, 2, 4))
        >>> MTPModule(config)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Eqs. (21)-(23). The released weights concatenate the
        other way round.
    """

    def __init__(self, config: V3Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        D, eps = config.attention.width, config.attention.eps
        self.stream_norm, self.token_norm = RMSNorm(D, eps=eps), RMSNorm(D, eps=eps)
        self.project = nn.Linear(2 * D, D, bias=False)
        nn.init.normal_(self.project.weight, std=0.02, generator=generator)
        self.block = V3Block(config, dense=False, generator=generator)
        self.norm = RMSNorm(D, eps=eps)

    def forward(
        self, stream: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T D"]:
        """Return the stream of this depth.

        Args:
            stream: Of the depth before.
            embedded: The token that depth k may know at each position, k places ahead.
        """
        joined = torch.cat([self.stream_norm(stream), self.token_norm(embedded)], dim=-1)
        return self.block(self.project(joined))  # (eq:deepseek-v3-mtp)


def mtp_loss(
    model: DeepSeekV3,
    modules: list[MTPModule],
    ids: Int[Tensor, "B T"],
    *,
    weight: float,
) -> Float[Tensor, ""]:
    r"""Add to the loss of the next token the mean loss of those further ahead.

    $$
    \mathcal L = \mathcal L_0 + \frac{\lambda}{K} \sum_{k=1}^{K} \mathcal L_k, \qquad
    \mathcal L_k = -\frac1{T-k-1} \sum_i \log p_k(t_{i+k+1} \mid t_{\le i + k})
    $$

    Args:
        model: The main model.
        modules: One for each depth; depth k guesses the token k + 1 places ahead.
        ids: Tokens, more than the depths and one.
        weight: Lambda.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: If there are too few tokens.

    Example:
        >>> config = V3Config(9, 1, 1, 16, 4, 4, 2, LatentConfig(8, 2, 6, None, 4, 2, 4))
        >>> model, ids = DeepSeekV3(config), torch.tensor([[1, 2, 3, 4]])
        >>> mtp_loss(model, [MTPModule(config)], ids, weight=0.3).shape
        torch.Size([])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Eqs. (24)-(25).
    """
    if ids.shape[1] < len(modules) + 2:
        raise ValueError(f"{ids.shape[1]} tokens for {len(modules)} depths: two more are needed.")
    stream = model.stream(ids)
    loss = next_token_loss(model.head(model.norm(stream)), ids)
    for k, module in enumerate(modules, start=1):
        stream = module(stream[:, :-1], model.token(ids[:, k:]))
        logits = model.head(module.norm(stream))  # position i guesses token i + k + 1
        further = next_token_loss(logits, ids[:, k:])
        loss = loss + weight / len(modules) * further  # (eq:deepseek-v3-mtp-loss)
    return loss


class Speculated(NamedTuple):
    """Generated ids, how often the main model was run, and how many guesses it accepted."""

    ids: list[int]
    passes: int
    accepted: int


@torch.no_grad()
def speculate(
    model: DeepSeekV3, module: MTPModule, prompt: Int[Tensor, " T"], *, max_new_tokens: int
) -> Speculated:
    r"""Generate greedily, two tokens a pass where the guess of the module was right.

    The module guesses the token after next; the main model checks the guess while it reads it. What
    comes out is what greedy decoding gives, whatever the guesses.

    Args:
        model: The main model.
        module: Of depth 1.
        prompt: Tokens to go on from.
        max_new_tokens: How many.

    Returns:
        The tokens and the counts. No cache is kept, for clarity.

    Example:
        >>> config = V3Config(9, 1, 1, 16, 4, 4, 2, LatentConfig(8, 2, 6, None, 4, 2, 4))
        >>> found = speculate(
        ...     DeepSeekV3(config), MTPModule(config), torch.tensor([1, 2]), max_new_tokens=4
        ... )
        >>> len(found.ids), found.passes + found.accepted >= 4
        (4, True)

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Sec. 5.4.3.
    """
    ids, guess, new = prompt.tolist(), None, 0
    passes = accepted = 0
    while new < max_new_tokens:
        tried = ids + ([guess] if guess is not None else [])
        stream = model.stream(torch.tensor([tried]))
        passes += 1
        said = model.head(model.norm(stream))[0].argmax(dim=-1).tolist()
        following = said[len(ids) - 1]
        ids.append(following)
        new += 1
        if guess == following and new < max_new_tokens:  # the guess was read: one more for free
            accepted += 1
            ids.append(said[len(ids) - 1])
            new += 1
        known = stream[:, : len(ids) - 1]
        ahead = module(known, model.token(torch.tensor([ids[1:]])))
        guess = int(model.head(module.norm(ahead))[0, -1].argmax())
    return Speculated(ids[len(prompt) :], passes, accepted)
