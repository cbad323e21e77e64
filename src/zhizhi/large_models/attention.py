"""Attention: one softmax over keys, and the ways of sharing keys between heads."""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def causal_mask(T: int, S: int, *, device: torch.device | None = None) -> Bool[Tensor, "T S"]:
    r"""Say which of S keys each of T queries may read, the last query aligned with the last key.

    $$
    m_{t,s} = [\, s \le t + S - T \,]
    $$

    Args:
        T: Number of queries.
        S: Number of keys. With T < S the queries are the last T of S positions, as in decoding with
            a cache; with T > S the first T - S queries may read nothing.
        device: Where the mask is made.

    Returns:
        True where a query may read a key.

    Example:
        >>> causal_mask(2, 3).int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def scaled_dot_product_attention(
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    v: Float[Tensor, "*batch S Dv"],
    *,
    causal: bool = False,
) -> Float[Tensor, "*batch T Dv"]:
    r"""Average the values, weighted by how well their keys match each query.

    $$
    o_t = \sum_{s} p_{t,s}\, v_s, \qquad
    p_{t,s} = \frac{m_{t,s}\, e^{q_t^{\top} k_s / \sqrt{d_h}}}
                   {\sum_{s'} m_{t,s'}\, e^{q_t^{\top} k_{s'} / \sqrt{d_h}}}
    $$

    The mask m is 1 everywhere, or that of `causal_mask`. A query that may read no key gets o = 0.

    Args:
        q: Queries of one head.
        k: Keys.
        v: Values.
        causal: Whether a query reads only keys that are not after it.

    Returns:
        One output vector for each query.

    Example:
        >>> q, k = torch.zeros(2, 4), torch.zeros(2, 4)
        >>> scaled_dot_product_attention(q, k, torch.tensor([[1.0], [3.0]]), causal=True)
        tensor([[1.],
                [2.]])

    Reference:
        Vaswani et al. (2017), arXiv:1706.03762, Eq. (1).
    """
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (eq:attention-scores)
    if causal:
        scores = scores.masked_fill(~causal_mask(T, S, device=q.device), -torch.inf)
    weights = scores.softmax(dim=-1)  # (eq:attention-softmax)
    if causal and T > S:  # the softmax of a row of -inf is NaN; the empty sum is 0
        weights = weights.masked_fill(~causal_mask(T, S, device=q.device), 0.0)
    return weights @ v  # (eq:attention-output)


def grouped_query_attention(
    q: Float[Tensor, "B T H Dh"],
    k: Float[Tensor, "B S G Dh"],
    v: Float[Tensor, "B S G Dv"],
    *,
    causal: bool = False,
) -> Float[Tensor, "B T H Dv"]:
    r"""Let H query heads read from G shared key/value heads.

    $$
    o_{t,h} = \sum_{s} \operatorname{softmax}_s\!\Big(
        \tfrac{1}{\sqrt{d_h}}\, q_{t,h}^{\top} k_{s,g(h)} \Big)\, v_{s,g(h)},
    \qquad g(h) = \lfloor h\,G / H \rfloor
    $$

    G = H is multi-head attention; G = 1 is multi-query attention.

    Args:
        q: Queries.
        k: Keys. Head g serves the H/G neighbouring query heads with g(h) = g.
        v: Values, grouped like the keys.
        causal: Whether a query reads only keys that are not after it, the last query aligned with
            the last key. A query that may read no key gets 0.

    Returns:
        One output vector for each query position and query head.

    Raises:
        ValueError: If G does not divide H.

    Example:
        >>> import torch
        >>> q, kv = torch.zeros(1, 2, 4, 8), torch.ones(1, 3, 2, 8)
        >>> grouped_query_attention(q, kv, kv)[0, 0, 0, :3]
        tensor([1., 1., 1.])

    Reference:
        Vaswani et al. (2017), arXiv:1706.03762, Eq. (1): the softmax over keys.
        Ainslie et al. (2023), arXiv:2305.13245: the grouping of heads.
    """
    T, H, S, G = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"q has {H} heads and k has {G}: {G} must divide {H}.")
    grouped = rearrange(q, "B T (G P) Dh -> B T G P Dh", G=G)  # (eq:attention-group)
    scores = einsum(grouped, k, "B T G P Dh, B S G Dh -> B G P T S") * q.shape[-1] ** -0.5
    hidden = ~causal_mask(T, S, device=q.device) if causal else None
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(dim=-1)
    if hidden is not None and T > S:  # the softmax of a row of -inf is NaN; the empty sum is 0
        weights = weights.masked_fill(hidden, 0.0)
    out = einsum(weights, v, "B G P T S, B S G Dv -> B T G P Dv")
    return rearrange(out, "B T G P Dv -> B T (G P) Dv")
