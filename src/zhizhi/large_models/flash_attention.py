"""FlashAttention in plain PyTorch: exact attention in tiles, a softmax that can be interrupted.

`flash_attention_triton` does the same on a GPU; here every step is a line that can be read.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zhizhi.deep_learning.softmax_cross_entropy import rebase


class SoftmaxState(NamedTuple):
    r"""What has to be remembered of the keys seen so far, one entry for each query.

    Attributes:
        m: The largest score, $-\infty$ before the first key.
        d: The denominator relative to it, $\sum_s e^{x_s - m}$.
        o: The numerator relative to it, $\sum_s e^{x_s - m} v_s$.
    """

    m: Float[Tensor, "*batch T"]
    d: Float[Tensor, "*batch T"]
    o: Float[Tensor, "*batch T Dv"]


def attend_tile(
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    v: Float[Tensor, "*batch S Dv"],
    visible: Bool[Tensor, "T S"] | None = None,
) -> SoftmaxState:
    r"""Attend to one tile of keys and return the state of its softmax.

    $$
    m_t = \max_s x_{t,s}, \quad d_t = \sum_s e^{x_{t,s} - m_t}, \quad
    o_t = \sum_s e^{x_{t,s} - m_t} v_s, \qquad x_{t,s} = q_t^{\top} k_s / \sqrt{d_h}
    $$

    Args:
        q: A tile of queries.
        k: A tile of keys, at least one.
        v: Their values.
        visible: Which query may read which key; all of them when None.

    Returns:
        The state; (-inf, 0, 0) for a query that may read no key of this tile.

    Example:
        >>> q, k, v = torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([[1.0], [3.0]])
        >>> attend_tile(q, k, v)
        SoftmaxState(m=tensor([0.]), d=tensor([2.]), o=tensor([[4.]]))

    Reference:
        Dao (2023), arXiv:2307.08691, Section 3.1.1: numerators that are divided once, at the end.
    """
    x = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        x = x.masked_fill(~visible, -torch.inf)
    m = x.amax(dim=-1)
    # A row of -inf has no largest score: any finite base gives e^{-inf} = 0, m itself gives NaN.
    p = torch.exp(x - m.masked_fill(m == -torch.inf, 0.0)[..., None])
    return SoftmaxState(m, p.sum(dim=-1), p @ v)


def merge_states(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    r"""Combine what was learnt from two disjoint sets of keys.

    $$
    m = \max(m_a, m_b), \quad
    d = d_a e^{m_a - m} + d_b e^{m_b - m}, \quad
    o = o_a e^{m_a - m} + o_b e^{m_b - m}
    $$

    The operation is associative and commutative, and (-inf, 0, 0) is its identity.

    Args:
        a: The state of one set of keys.
        b: The state of another.

    Returns:
        The state of their union.

    Example:
        >>> one = SoftmaxState(torch.zeros(1), torch.ones(1), torch.full((1, 1), 5.0))
        >>> merge_states(one, one)
        SoftmaxState(m=tensor([0.]), d=tensor([2.]), o=tensor([[10.]]))

    Reference:
        Milakov & Gimelshein (2018), arXiv:1805.02867, Eq. (4).
    """
    m, scale_a, scale_b = rebase(a.m, b.m)
    d = a.d * scale_a + b.d * scale_b  # (eq:flash-merge)
    o = a.o * scale_a[..., None] + b.o * scale_b[..., None]
    return SoftmaxState(m, d, o)


def finish_state(
    state: SoftmaxState,
) -> tuple[Float[Tensor, "*batch T Dv"], Float[Tensor, "*batch T"]]:
    r"""Divide once, and keep one number for the backward pass.

    $$
    \frac{o_t}{d_t}, \qquad L_t = m_t + \log d_t = \log \sum_s e^{x_{t,s}}
    $$

    Args:
        state: The state after all keys.

    Returns:
        Outputs and log-sum-exp; (0, -inf) for a query that could read no key.

    Example:
        >>> state = SoftmaxState(torch.zeros(1), torch.tensor([2.0]), torch.tensor([[4.0]]))
        >>> finish_state(state)
        (tensor([[2.]]), tensor([0.6931]))

    Reference:
        Dao (2023), arXiv:2307.08691, Section 3.1.1: the log-sum-exp is all that is stored.
    """
    empty = state.d == 0
    out = state.o / state.d.masked_fill(empty, 1.0)[..., None]
    return out, state.m + state.d.log()


def online_softmax(x: Float[Tensor, "*batch S"], *, block: int = 1) -> Float[Tensor, "*batch S"]:
    r"""Softmax whose maximum and denominator come from a single pass.

    $$
    m_i = \max(m_{i-1}, x_i), \qquad d_i = d_{i-1} e^{m_{i-1} - m_i} + e^{x_i - m_i}
    $$

    Args:
        x: Scores, at least one of each row finite.
        block: How many scores are taken at a time.

    Returns:
        The probabilities.

    Raises:
        ValueError: If the block is not positive.

    Example:
        >>> online_softmax(torch.tensor([0.0, 1e4, 1e4]))
        tensor([0.0000, 0.5000, 0.5000])

    Reference:
        Milakov & Gimelshein (2018), arXiv:1805.02867, Algorithm 3.
    """
    _check_positive(block=block)
    m = torch.full_like(x[..., 0], -torch.inf)
    d = torch.zeros_like(m)
    for x_block in x.split(block, dim=-1):
        m_new = torch.maximum(m, x_block.amax(dim=-1))
        base = m_new.masked_fill(m_new == -torch.inf, 0.0)
        d = d * torch.exp(m - base) + torch.exp(x_block - base[..., None]).sum(dim=-1)
        m = m_new  # (eq:flash-online)
    return torch.exp(x - m[..., None]) / d[..., None]


def flash_attention(
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    v: Float[Tensor, "*batch S Dv"],
    *,
    causal: bool = False,
    window: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Float[Tensor, "*batch T Dv"], Float[Tensor, "*batch T"]]:
    r"""Compute attention tile by tile; no tensor of size T x S exists at any time.

    $$
    o_t = \frac{\sum_s e^{x_{t,s} - m_t} v_s}{\sum_s e^{x_{t,s} - m_t}}, \qquad
    L_t = \log \sum_s e^{x_{t,s}}
    $$

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        causal: Whether a query reads only keys that are not after it, the last query aligned with
            the last key.
        window: Keys that a causal query reads at most, its own among them; None for all.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        Outputs and the log-sum-exp of each query's scores; (0, -inf) where there is no key to read.

    Raises:
        ValueError: If a block or the window is not positive, or a window is not causal.

    Example:
        >>> q, k, v = torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([[1.0], [3.0]])
        >>> flash_attention(q, k, v, block_k=1)
        (tensor([[2.]]), tensor([0.6931]))

    Reference:
        Dao (2023), arXiv:2307.08691, Algorithm 1.
    """
    _check_tiles(block_q, block_k, causal=causal, window=window)
    T, S = q.shape[-2], k.shape[-2]
    out, lse = v.new_empty(*q.shape[:-1], v.shape[-1]), torch.empty_like(q[..., 0])
    for i in range(0, T, block_q):
        rows = slice(i, min(i + block_q, T))
        q_i = q[..., rows, :]
        state = _empty_state(q_i, v)
        for j in _key_tiles(rows, T, S, causal=causal, window=window, block=block_k):
            cols = slice(j, min(j + block_k, S))
            visible = _visible(rows, cols, S - T, window, q) if causal else None
            tile = attend_tile(q_i, k[..., cols, :], v[..., cols, :], visible)
            state = merge_states(state, tile)
        out[..., rows, :], lse[..., rows] = finish_state(state)
    return out, lse


def flash_attention_backward(
    grad_out: Float[Tensor, "*batch T Dv"],
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    v: Float[Tensor, "*batch S Dv"],
    out: Float[Tensor, "*batch T Dv"],
    lse: Float[Tensor, "*batch T"],
    *,
    causal: bool = False,
    window: int | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[
    Float[Tensor, "*batch T Dh"], Float[Tensor, "*batch S Dh"], Float[Tensor, "*batch S Dv"]
]:
    r"""Compute the gradients tile by tile; the probabilities are recomputed, not remembered.

    $$
    P = e^{X - L}, \quad dV = P^{\top} dO, \quad dP = dO\, V^{\top}, \quad
    dX = P \odot (dP - D), \quad D_t = dO_t \cdot O_t
    $$

    Args:
        grad_out: Gradient of the loss with respect to `out`.
        q: Queries.
        k: Keys.
        v: Values.
        out: Outputs of `flash_attention`.
        lse: Log-sum-exp of `flash_attention`.
        causal: As in the forward pass.
        window: As in the forward pass.
        block_q: Queries in a tile.
        block_k: Keys in a tile.

    Returns:
        Gradients with respect to q, k and v.

    Raises:
        ValueError: If a block or the window is not positive, or a window is not causal.

    Example:
        >>> q, k, v = torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([[1.0], [3.0]])
        >>> out, lse = flash_attention(q, k, v)
        >>> flash_attention_backward(torch.ones(1, 1), q, k, v, out, lse)[2]
        tensor([[0.5000],
                [0.5000]])

    Reference:
        Dao (2023), arXiv:2307.08691, Algorithm 2.
    """
    _check_tiles(block_q, block_k, causal=causal, window=window)
    T, S, scale = q.shape[-2], k.shape[-2], q.shape[-1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_out * out).sum(dim=-1)  # (eq:flash-delta)
    for i in range(0, T, block_q):
        rows = slice(i, min(i + block_q, T))
        q_i, do_i = q[..., rows, :], grad_out[..., rows, :]
        for j in _key_tiles(rows, T, S, causal=causal, window=window, block=block_k):
            cols = slice(j, min(j + block_k, S))
            k_j, v_j = k[..., cols, :], v[..., cols, :]
            x = q_i @ k_j.mT * scale
            if causal:
                x = x.masked_fill(~_visible(rows, cols, S - T, window, q), -torch.inf)
            lse_i = lse[..., rows, None]
            p = torch.exp(x - lse_i.masked_fill(lse_i == -torch.inf, 0.0))  # (eq:flash-recompute)
            dp = do_i @ v_j.mT
            dx = p * (dp - delta[..., rows, None]) * scale  # (eq:flash-dscore)
            dv[..., cols, :] += p.mT @ do_i
            dk[..., cols, :] += dx.mT @ q_i
            dq[..., rows, :] += dx @ k_j
    return dq, dk, dv


def flash_attention_varlen(
    q: Float[Tensor, "N H Dh"],
    k: Float[Tensor, "N G Dh"],
    v: Float[Tensor, "N G Dv"],
    cu_seqlens: Int[Tensor, " J"],
    *,
    causal: bool = True,
) -> Float[Tensor, "N H Dv"]:
    r"""Attend inside each of J - 1 sequences that lie end to end in one row.

    Sequence j owns the positions $c_j \le n < c_{j+1}$ and sees no other; nothing is padded.

    Args:
        q: Queries of all sequences.
        k: Keys; head g serves the H/G neighbouring query heads.
        v: Values.
        cu_seqlens: The boundaries $c_0 = 0 \le c_1 \le \dots \le c_{J-1} = N$.
        causal: Whether a query reads only keys that are not after it.

    Returns:
        Outputs, packed like the queries.

    Raises:
        ValueError: If the boundaries do not ascend from 0 to N, or G does not divide H.

    Example:
        >>> q = torch.zeros(3, 1, 4)
        >>> v = torch.tensor([1.0, 3.0, 7.0]).reshape(3, 1, 1)
        >>> flash_attention_varlen(q, q, v, torch.tensor([0, 2, 3])).flatten()
        tensor([1., 2., 7.])

    Reference:
        Dao-AILab/flash-attention, `flash_attn_varlen_func`: the boundaries and their name.
    """
    N, H, G = q.shape[0], q.shape[1], k.shape[1]
    if G == 0 or H % G:
        raise ValueError(f"q has {H} heads and k has {G}: {G} must divide {H}.")
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != N or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seqlens is {bounds}; it must ascend from 0 to {N}, the number of rows."
        )
    q_h = rearrange(q, "N H Dh -> H N Dh")
    k_h = repeat(k, "N G Dh -> (G P) N Dh", P=H // G)
    v_h = repeat(v, "N G Dv -> (G P) N Dv", P=H // G)
    pieces = [
        flash_attention(q_h[:, a:b], k_h[:, a:b], v_h[:, a:b], causal=causal)[0]
        for a, b in pairwise(bounds)
    ]
    return rearrange(torch.cat([v_h[:, :0], *pieces], dim=1), "H N Dv -> N H Dv")


def split_kv_attention(
    q: Float[Tensor, "*batch T Dh"],
    k: Float[Tensor, "*batch S Dh"],
    v: Float[Tensor, "*batch S Dv"],
    *,
    n_splits: int,
) -> tuple[Float[Tensor, "*batch T Dv"], Float[Tensor, "*batch T"]]:
    r"""Let several workers read one long cache, and combine their finished outputs.

    $$
    L_t = \log \sum_i e^{L_{i,t}}, \qquad o_t = \sum_i e^{L_{i,t} - L_t}\, o_{i,t}
    $$

    Args:
        q: The last T positions: one in decoding, some when drafts are verified.
        k: Keys of the whole cache, those of the T positions included.
        v: Values.
        n_splits: Parts of the cache; may exceed S.

    Returns:
        Outputs and log-sum-exp of causal attention, the last query aligned with the last key.

    Raises:
        ValueError: If there is no part.

    Example:
        >>> q, k, v = torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([[1.0], [3.0]])
        >>> split_kv_attention(q, k, v, n_splits=2)
        (tensor([[2.]]), tensor([0.6931]))

    Reference:
        Dao et al. (2023), Flash-Decoding for long-context inference (blog of PyTorch).
    """
    _check_positive(n_splits=n_splits)
    T, S = q.shape[-2], k.shape[-2]
    out, lse = [], []
    for i in range(n_splits):
        cols = slice(i * S // n_splits, (i + 1) * S // n_splits)
        if cols.start < cols.stop:
            visible = _visible(slice(0, T), cols, S - T, None, q)
            part = finish_state(attend_tile(q, k[..., cols, :], v[..., cols, :], visible))
            out.append(part[0])
            lse.append(part[1])
    if not out:
        return finish_state(_empty_state(q, v))
    parts = torch.stack(lse)
    total = parts.logsumexp(dim=0)
    weight = torch.exp(parts - total.masked_fill(total == -torch.inf, 0.0))  # (eq:flash-split)
    return (weight[..., None] * torch.stack(out)).sum(dim=0), total


def standard_hbm_accesses(T: int, Dh: int) -> int:
    r"""Count the numbers that attention moves when every step goes through global memory.

    Three kernels: $X = QK^\top$ reads 2TD and writes T²; the softmax reads and writes T²; $PV$
    reads T² + TD and writes TD.

    Args:
        T: Queries, and keys.
        Dh: Head width.

    Returns:
        Elements read plus elements written, 4TD + 4T².

    Example:
        >>> standard_hbm_accesses(1024, 64)
        4456448

    Reference:
        Dao et al. (2022), arXiv:2205.14135, Algorithm 0.
    """
    return (2 * T * Dh + T * T) + 2 * T * T + (T * T + 2 * T * Dh)


def flash_hbm_accesses(T: int, Dh: int, *, M: int) -> int:
    r"""Count the numbers that the first FlashAttention moves, walking its two loops.

    Args:
        T: Queries, and keys.
        Dh: Head width.
        M: On-chip memory in elements; $B_c = \lceil M / 4D \rceil$, $B_r = \min(B_c, D)$.

    Returns:
        Elements read plus elements written.

    Example:
        >>> flash_hbm_accesses(1024, 64, M=49_152)
        1335296

    Reference:
        Dao et al. (2022), arXiv:2205.14135, Algorithm 1 and Theorem 2.
    """
    block_k = -(-M // (4 * Dh))
    block_q = min(block_k, Dh)
    count = 0
    for j in range(0, T, block_k):
        count += 2 * Dh * min(block_k, T - j)  # K_j and V_j, once
        for i in range(0, T, block_q):
            rows = min(block_q, T - i)
            count += rows * (2 * Dh + 2)  # Q_i, O_i, and its m and d, read
            count += rows * (Dh + 2)  # O_i, m and d, written
    return count


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1.")


def _empty_state(q: Tensor, v: Tensor) -> SoftmaxState:
    m = torch.full_like(q[..., 0], -torch.inf)
    return SoftmaxState(m, torch.zeros_like(m), m.new_zeros(*m.shape, v.shape[-1]))


def _check_tiles(block_q: int, block_k: int, *, causal: bool, window: int | None) -> None:
    _check_positive(block_q=block_q, block_k=block_k)
    if window is not None:
        _check_positive(window=window)
        if not causal:
            raise ValueError(f"window is {window} without causal: a window ends at its query.")


def _key_tiles(
    rows: slice, T: int, S: int, *, causal: bool, window: int | None, block: int
) -> range:
    """Return where the key tiles start that some query of these rows can reach."""
    if not causal:
        return range(0, S, block)
    oldest = 0 if window is None else max(0, rows.start + S - T - window + 1)
    return range(oldest // block * block, min(S, rows.stop + S - T), block)


def _visible(
    rows: slice, cols: slice, offset: int, window: int | None, like: Tensor
) -> Bool[Tensor, "T S"]:
    t = torch.arange(rows.start, rows.stop, device=like.device)[:, None] + offset
    s = torch.arange(cols.start, cols.stop, device=like.device)[None, :]
    seen = s <= t
    return seen if window is None else seen & (s > t - window)
