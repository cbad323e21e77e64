"""The decoder-only transformer of GPT-2, and the cache that lets it go on from where it stands."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.lr_schedule import cosine_with_warmup


class KVCache:
    r"""Keys and values of every position that a model has read, in buffers of fixed size.

    Each layer appends the new positions of one call and gets all of them back; when every layer
    has appended, the positions count as read.

    Args:
        n_layers: Layers of the model.
        batch: Rows.
        max_length: Positions there is room for.
        n_kv_heads: Heads of keys and values, G.
        head_width: Width of a head.
        dtype: Dtype of the buffers.
        device: Where they are.

    Attributes:
        length: Positions read so far.

    Example:
        >>> cache = KVCache(n_layers=1, batch=1, max_length=4, n_kv_heads=2, head_width=3)
        >>> k = torch.ones(1, 2, 2, 3)
        >>> keys, values = cache.append(0, k, k)
        >>> cache.length, keys.shape, cache.nbytes
        (2, torch.Size([1, 2, 2, 3]), 192)
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch: int,
        max_length: int,
        n_kv_heads: int,
        head_width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = n_layers, 2, batch, max_length, n_kv_heads, head_width
        self._kv = torch.zeros(shape, dtype=dtype, device=device)
        self._pending = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes: 2 L B T G Dh numbers."""
        return self._kv.nbytes

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and the values of each layer, of the positions read so far."""
        return [(k[:, : self.length], v[:, : self.length]) for k, v in self._kv]

    def append(
        self, layer: int, k: Float[Tensor, "B N G Dh"], v: Float[Tensor, "B N G Dh"]
    ) -> tuple[Float[Tensor, "B S G Dh"], Float[Tensor, "B S G Dh"]]:
        """Store the N new positions of a layer and return all S of them.

        Args:
            layer: Index of the layer; layers append in order.
            k: New keys.
            v: New values.

        Returns:
            Keys and values of all positions, views of the buffers.

        Raises:
            ValueError: If a layer is out of turn or there is no room.
        """
        n_layers, _, _, max_length, _, _ = self._kv.shape
        if layer != self._pending:
            raise ValueError(f"Layer {layer} appends: it is the turn of layer {self._pending}.")
        end = self.length + k.shape[1]
        if end > max_length:
            raise ValueError(f"{end} positions: the cache has room for {max_length}.")
        self._kv[layer, 0, :, self.length : end] = k
        self._kv[layer, 1, :, self.length : end] = v
        self._pending = (layer + 1) % n_layers
        if self._pending == 0:
            self.length = end
        return self._kv[layer, 0, :, :end], self._kv[layer, 1, :, :end]

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Let row b go on from what row rows[b] has read, as beams do.

        Args:
            rows: Old row of each new one; as many as before.

        Raises:
            ValueError: If the number of rows changes.
        """
        if len(rows) != self._kv.shape[2]:
            raise ValueError(f"{len(rows)} rows for {self._kv.shape[2]}: the number stays.")
        self._kv[:, :, :, : self.length] = self._kv[:, :, rows, : self.length]


class Block(nn.Module):
    r"""Read from the other positions, then think about each alone; both write to the stream.

    $$
    h = x + \operatorname{Attn}(\operatorname{LN}_1(x)), \qquad
    y = h + \operatorname{MLP}(\operatorname{LN}_2(h))
    $$

    With `pre_norm` off it is the block of 2017, y = LN(h + MLP(h)), h = LN(x + Attn(x)).

    Args:
        width: D.
        n_heads: H; divides D.
        pre_norm: Whether the norms stand on the branches and not on the stream.

    Raises:
        ValueError: If H does not divide D.

    Example:
        >>> Block(width=8, n_heads=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference:
        Radford et al. (2019), Sec. 2.3; Xiong et al. (2020), arXiv:2002.04745, for both places.
    """

    def __init__(self, *, width: int, n_heads: int, pre_norm: bool = True) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"width is {width} and n_heads {n_heads}: n_heads must divide width.")
        self.n_heads, self.pre_norm = n_heads, pre_norm
        self.attn_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(
        self, x: Float[Tensor, "B N D"], *, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "B N D"]:
        """Return what each position reads from those up to itself, cached ones included."""
        q, k, v = rearrange(self.qkv(x), "B N (c H Dh) -> c B N H Dh", c=3, H=self.n_heads)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = grouped_query_attention(q, k, v, causal=True)
        return self.attn_out(rearrange(mixed, "B N H Dh -> B N (H Dh)"))

    def think(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return the output of the two-layer network, position by position."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def forward(
        self, x: Float[Tensor, "B N D"], *, cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "B N D"]:
        """Return the stream after this block."""
        if self.pre_norm:
            x = x + self.attend(self.attn_norm(x), cache=cache, layer=layer)  # (eq:decoder-attn)
            return x + self.think(self.mlp_norm(x))  # (eq:decoder-mlp)
        x = self.attn_norm(x + self.attend(x, cache=cache, layer=layer))
        return self.mlp_norm(x + self.think(x))


class Decoder(nn.Module):
    r"""Score the next token at every position, reading only the tokens up to it.

    $$
    \ell_t = E \operatorname{LN}\big(B_L \circ \dots \circ B_1 (E_{x_t} + P_t)\big)
    $$

    The embedding E also reads out. Weights begin as in GPT-2: N(0, 0.02), those that write to the
    stream divided by sqrt(2 L).

    Args:
        vocab_size: V.
        width: D.
        n_layers: L.
        n_heads: H.
        max_length: Positions that have an embedding.
        pre_norm: As in `Block`.
        generator: Draws the weights.

    Example:
        >>> model = Decoder(vocab_size=10, width=8, n_layers=2, n_heads=2, max_length=16)
        >>> model(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 10])

    Reference:
        Radford et al. (2019), Language Models are Unsupervised Multitask Learners, Sec. 2.3.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        n_layers: int,
        n_heads: int,
        max_length: int,
        pre_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.max_length, self.n_heads = max_length, n_heads
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(max_length, width)
        blocks = [Block(width=width, n_heads=n_heads, pre_norm=pre_norm) for _ in range(n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("attn_out.weight", "down.weight"))
                std = 0.02 / (2 * n_layers) ** 0.5 if writes else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def new_cache(self, *, batch: int, max_length: int | None = None) -> KVCache:
        """Return an empty cache that fits this model.

        Args:
            batch: Rows.
            max_length: Positions; None means all that have an embedding.
        """
        weight = self.token.weight
        return KVCache(
            n_layers=len(self.blocks),
            batch=batch,
            max_length=max_length or self.max_length,
            n_kv_heads=self.n_heads,
            head_width=weight.shape[1] // self.n_heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(
        self, ids: Int[Tensor, "B N"], *, cache: KVCache | None = None
    ) -> Float[Tensor, "B N V"]:
        """Return unnormalised log-probabilities of the token after each position.

        Args:
            ids: New tokens; with a cache they follow the ones it has read.
            cache: Is filled. Without it the tokens are read from the beginning.

        Raises:
            ValueError: If a position has no embedding.
        """
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.max_length:
            raise ValueError(f"{end} positions: {self.max_length} have an embedding.")
        x = self.token(ids) + self.position.weight[start:end]
        for layer, block in enumerate(self.blocks):
            x = block(x, cache=cache, layer=layer)
        return self.norm(x) @ self.token.weight.T  # (eq:decoder-logits)


def next_token_loss(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    r"""Return the mean of -log p over all tokens that have one before them, in nats.

    $$
    -\frac{1}{B(T-1)} \sum_b \sum_{t=1}^{T-1} \log p(x_{b,t} \mid x_{b,<t})
    $$

    The shift is made here: position t-1 is asked for token t.

    Args:
        logits: Scores at every position of `ids`.
        ids: Tokens.

    Returns:
        A scalar; divided by ln 2 it is bits a token.

    Raises:
        ValueError: If there is one token or none.

    Example:
        >>> next_token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))  # ln 8
        tensor(2.0794)
    """
    if ids.shape[1] < 2:
        raise ValueError(f"T is {ids.shape[1]}: the first token has nothing before it, T >= 2.")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def decoder_parameters(*, vocab_size: int, width: int, n_layers: int, max_length: int) -> int:
    r"""Count the parameters of a `Decoder` without building it.

    $$
    (V + T) D + L (12 D^2 + 13 D) + 2 D
    $$

    Args:
        vocab_size: V.
        width: D.
        n_layers: L.
        max_length: T.

    Returns:
        The count; the embedding that also reads out is counted once.

    Example:
        >>> decoder_parameters(vocab_size=50257, width=768, n_layers=12, max_length=1024)
        124439808

    Reference:
        Radford et al. (2019), Table 2, names the four sizes (and miscounts the smallest).
    """
    D = width
    return (vocab_size + max_length) * D + n_layers * (12 * D * D + 13 * D) + 2 * D


def train_steps(
    model: nn.Module,
    batches: Sequence[Int[Tensor, "B T"]],
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> list[float]:
    r"""Take one AdamW step a batch on `next_token_loss`, with gradients clipped to norm 1.

    Args:
        model: Takes ids and returns logits.
        batches: Tokens of each step.
        lr: Peak of a rate that rises over the first twentieth and falls along a cosine to lr/10.
        weight_decay: Of matrices; vectors are left alone.

    Returns:
        The loss before each step, in nats a token.

    Example:
        >>> model = Decoder(vocab_size=4, width=8, n_layers=1, n_heads=1, max_length=8)
        >>> losses = train_steps(model, [torch.tensor([[0, 1, 2, 3]])] * 40, lr=1e-2)
        >>> losses[-1] < losses[0]
        True
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    n, warmup = len(batches), max(1, len(batches) // 20)

    def factor(step: int) -> float:
        return cosine_with_warmup(step, n_steps=n, n_warmup=warmup, floor=0.1)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for ids in batches:
        loss = next_token_loss(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
