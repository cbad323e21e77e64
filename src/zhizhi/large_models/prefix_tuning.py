"""Prefixes: trained keys and values before the text, or trained embeddings in its place."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from zhizhi.large_models.transformer_decoder import KVCache


class PrefixCache(KVCache):
    r"""A cache whose first positions were not read but trained; it can be differentiated through.

    Args:
        keys_values: Of each layer and head; the same for all rows.
        batch: Rows.

    Attributes:
        length: Positions so far, the prefix included.

    Example:
        >>> cache = PrefixCache(torch.zeros(1, 2, 5, 2, 3), batch=4)
        >>> k = torch.ones(4, 1, 2, 3)
        >>> keys, values = cache.append(0, k, k)
        >>> cache.length, keys.shape
        (6, torch.Size([4, 6, 2, 3]))
    """

    def __init__(self, keys_values: Float[Tensor, "L 2 P G Dh"], *, batch: int) -> None:
        self._layers = [
            [x.expand(batch, *x.shape) for x in layer] for layer in keys_values.unbind()
        ]
        self._pending = 0
        self.length = keys_values.shape[2]

    @property
    def nbytes(self) -> int:
        """Size of what is kept, in bytes."""
        return sum(x.numel() * x.element_size() for layer in self._layers for x in layer)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and the values of each layer."""
        return [(k, v) for k, v in self._layers]

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Let row b go on from what row rows[b] has read.

        Args:
            rows: Old row of each new one.
        """
        self._layers = [[x[rows] for x in layer] for layer in self._layers]

    def append(
        self, layer: int, k: Float[Tensor, "B N G Dh"], v: Float[Tensor, "B N G Dh"]
    ) -> tuple[Float[Tensor, "B S G Dh"], Float[Tensor, "B S G Dh"]]:
        """Put new positions behind what a layer has and return all of them.

        Args:
            layer: Index of the layer; layers append in order.
            k: New keys.
            v: New values.

        Raises:
            ValueError: If a layer is out of turn.
        """
        if layer != self._pending:
            raise ValueError(f"Layer {layer} appends: it is the turn of layer {self._pending}.")
        kept = [
            torch.cat([old, new], dim=1)
            for old, new in zip(self._layers[layer], (k, v), strict=True)
        ]
        self._layers[layer] = kept
        self._pending = (layer + 1) % len(self._layers)
        if self._pending == 0:
            self.length += k.shape[1]
        return kept[0], kept[1]


class Prefix(nn.Module):
    r"""Trained keys and values for every layer, made directly or by a network that is thrown away.

    $$
    P_\theta[i] = \operatorname{MLP}_\theta(P'_\theta[i]) \in \mathbb R^{2 L G d_h}
    $$

    Args:
        length: l_p, positions of the prefix.
        n_layers: L.
        n_kv_heads: G.
        head_width: d_h.
        hidden: Width of the network and of P'; None trains P itself.
        generator: Draws the weights.

    Raises:
        ValueError: If the length is below 1.

    Example:
        >>> prefix = Prefix(length=5, n_layers=2, n_kv_heads=4, head_width=8)
        >>> sum(p.numel() for p in prefix.parameters())  # 2 L l_p G d_h
        640
        >>> prefix.cache(batch=3).length
        5

    Reference:
        Li & Liang (2021), arXiv:2101.00190, Sec. 4.2-4.3, Eq. (3).
    """

    def __init__(
        self,
        *,
        length: int,
        n_layers: int,
        n_kv_heads: int,
        head_width: int,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length is {length}: a prefix has at least one position.")
        self._axes = {"L": n_layers, "two": 2, "G": n_kv_heads}
        size = n_layers * 2 * n_kv_heads * head_width
        self.table = nn.Parameter(torch.empty(length, hidden or size))
        nn.init.normal_(self.table, std=0.02 if hidden is None else 1.0, generator=generator)
        self.network = None
        if hidden is not None:
            self.network = nn.Sequential(
                nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, size)
            )
            for layer in (self.network[0], self.network[2]):
                assert isinstance(layer, nn.Linear)
                nn.init.normal_(layer.weight, std=hidden**-0.5 / 10, generator=generator)
                nn.init.zeros_(layer.bias)

    def keys_values(self) -> Float[Tensor, "L 2 P G Dh"]:
        """Return the prefix itself: all that must be kept after training."""
        flat = self.table if self.network is None else self.network(self.table)
        return rearrange(flat, "P (L two G Dh) -> L two P G Dh", **self._axes)

    def cache(self, *, batch: int) -> PrefixCache:
        """Return a cache that begins with the prefix, for a model to go on from.

        Args:
            batch: Rows.
        """
        return PrefixCache(self.keys_values(), batch=batch)  # (eq:prefix-cache)


class SoftPrompt(nn.Module):
    r"""Trained vectors that stand before the embeddings of the text, at the input alone.

    Args:
        length: l_p.
        width: D.
        like: Embeddings whose rows, drawn at random, are the initial values; None draws small
            numbers.
        generator: Draws.

    Raises:
        ValueError: If the length is below 1.

    Example:
        >>> SoftPrompt(length=3, width=4)(torch.zeros(2, 5, 4)).shape
        torch.Size([2, 8, 4])

    Reference:
        Lester et al. (2021), arXiv:2104.08691, Sec. 2; values from the vocabulary, Sec. 3.2.
    """

    def __init__(
        self,
        *,
        length: int,
        width: int,
        like: Float[Tensor, "V D"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length is {length}: a prompt has at least one position.")
        if like is None:
            start = torch.randn(length, width, generator=generator) * 0.02
        else:
            start = like[torch.randint(len(like), (length,), generator=generator)].detach().clone()
        self.prompt = nn.Parameter(start)

    def forward(self, embeddings: Float[Tensor, "B T D"]) -> Float[Tensor, "B S D"]:
        """Return prompt and embeddings, one after the other."""
        return torch.cat([self.prompt.expand(len(embeddings), -1, -1), embeddings], dim=1)


def prefix_weight(
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    prefix_k: Float[Tensor, "P Dh"],
) -> Float[Tensor, "*batch T"]:
    r"""Return the share of the attention that goes to the prefix, without a mask.

    $$
    \lambda(q) = \frac{\sum_j e^{q^\top p_j / \sqrt{d_h}}}
                      {\sum_j e^{q^\top p_j / \sqrt{d_h}} + \sum_s e^{q^\top k_s / \sqrt{d_h}}}
    $$

    Args:
        q: Queries.
        k: Keys of the text.
        prefix_k: Keys of the prefix.

    Returns:
        From 0 to 1: attention with a prefix is (1 - lambda) times attention without it plus lambda
        times attention to it alone.

    Example:
        >>> prefix_weight(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, 4))
        tensor([0.2500])

    Reference:
        He et al. (2021), arXiv:2110.04366, Eq. (7).
    """
    scale = q.shape[-1] ** -0.5
    prefix = (q @ prefix_k.T * scale).logsumexp(dim=-1)
    text = (q @ k.mT * scale).logsumexp(dim=-1)
    return (prefix - text).sigmoid()  # (eq:prefix-gate)
