"""Tiles change the order of a sum, not the sum: every function equals the plain definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.large_models.attention import causal_mask, grouped_query_attention
from zhizhi.large_models.attention import scaled_dot_product_attention as plain
from zhizhi.large_models.flash_attention import (
    SoftmaxState,
    attend_tile,
    finish_state,
    flash_attention,
    flash_attention_backward,
    flash_attention_varlen,
    flash_hbm_accesses,
    merge_states,
    online_softmax,
    split_kv_attention,
    standard_hbm_accesses,
)

SHAPES = [(37, 37), (20, 53), (53, 20), (1, 30), (16, 16), (5, 0)]


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def same_state(a: SoftmaxState, b: SoftmaxState) -> None:
    for x, y in zip(a, b, strict=True):
        assert_exact(x, y)


def states(n: int) -> list[SoftmaxState]:
    (q,) = draw((4, 8))
    keys = [x * 3 for x in draw(*[(5, 8)] * n)]
    return [attend_tile(q, k, k[:, :3]) for k in keys]


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40),
    st.integers(min_value=1, max_value=50),
)
def test_online_softmax_equals_softmax_for_every_block(scores, block):
    x = torch.tensor(scores, dtype=torch.float64)
    assert_exact(online_softmax(x, block=block), x.softmax(dim=-1))


def test_online_softmax_survives_scores_whose_exponential_overflows():
    x = torch.tensor([[1e4, 1e4 - 1.0, -1e4], [-torch.inf, 0.0, -torch.inf]], dtype=torch.float64)
    e = math.exp(-1.0)
    assert_exact(online_softmax(x), [[1 / (1 + e), e / (1 + e), 0.0], [0.0, 1.0, 0.0]])


def test_state_of_a_tile_is_maximum_denominator_and_numerator():
    q, k, v = draw((1, 2), (3, 2), (3, 2))
    x = [float(q[0] @ k[s]) / math.sqrt(2) for s in range(3)]
    state = attend_tile(q, k, v)
    assert_exact(state.m, [max(x)])
    assert_exact(state.d, [sum(math.exp(y - max(x)) for y in x)])
    assert_exact(state.o[0], sum(math.exp(y - max(x)) * v[s] for s, y in enumerate(x)))


def test_merging_two_tiles_gives_the_state_of_their_union():
    q, k, v = draw((4, 8), (10, 8), (10, 3))
    merged = merge_states(attend_tile(q, k[:3], v[:3]), attend_tile(q, k[3:], v[3:]))
    same_state(merged, attend_tile(q, k, v))


def test_merge_is_associative_and_commutative():
    a, b, c = states(3)
    same_state(merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c)))
    same_state(merge_states(a, b), merge_states(b, a))


def test_the_state_before_the_first_key_is_the_identity():
    (a,) = states(1)
    empty = SoftmaxState(
        torch.full_like(a.m, -torch.inf), torch.zeros_like(a.d), torch.zeros_like(a.o)
    )
    same_state(merge_states(a, empty), a)
    same_state(merge_states(empty, a), a)
    same_state(merge_states(empty, empty), empty)


def test_a_tile_that_a_query_may_not_read_is_the_identity_for_it():
    q, k = draw((2, 8), (3, 8))
    visible = torch.tensor([[False] * 3, [True] * 3])
    state = attend_tile(q, k, k, visible)
    assert (state.m[0], state.d[0]) == (-torch.inf, 0.0)
    assert torch.equal(state.o[0], torch.zeros(8, dtype=torch.float64))
    out, lse = finish_state(state)
    assert torch.equal(out[0], torch.zeros(8, dtype=torch.float64))
    assert lse[0] == -torch.inf


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (8, 32), (64, 64), (7, 5), (3, 1)])
def test_forward_equals_the_plain_definition(T, S, block_q, block_k, causal):
    q, k, v = draw((2, T, 8), (2, S, 8), (2, S, 6))
    out, lse = flash_attention(q, k, v, causal=causal, block_q=block_q, block_k=block_k)
    assert_exact(out, plain(q, k, v, causal=causal))
    x = q @ k.mT / math.sqrt(8)
    if causal:
        x = x.masked_fill(~causal_mask(T, S), -torch.inf)
    assert_exact(lse, x.logsumexp(dim=-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (7, 5)])
def test_backward_equals_autograd_of_the_plain_definition(T, S, block_q, block_k, causal):
    q, k, v, do = draw((2, T, 8), (2, S, 8), (2, S, 6), (2, T, 6))
    blocks = {"causal": causal, "block_q": block_q, "block_k": block_k}
    out, lse = flash_attention(q, k, v, **blocks)
    grads = flash_attention_backward(do, q, k, v, out, lse, **blocks)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(plain(*inputs, causal=causal), inputs, do)
    for actual, wanted in zip(grads, expected, strict=True):
        assert_exact(actual, wanted)


def windowed(q, k, v, window):
    T, S = q.shape[-2], k.shape[-2]
    t, s = torch.arange(T)[:, None] + S - T, torch.arange(S)[None, :]
    x = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((s > t) | (s <= t - window), -torch.inf)
    return torch.nan_to_num(x.softmax(dim=-1)) @ v


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("window", [1, 4, 16, 1000])
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (7, 5)])
def test_a_window_forward_and_backward(T, S, window, block_q, block_k):
    q, k, v, do = draw((2, T, 8), (2, S, 8), (2, S, 6), (2, T, 6))
    rules = {"causal": True, "window": window, "block_q": block_q, "block_k": block_k}
    out, lse = flash_attention(q, k, v, **rules)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = windowed(*inputs, window)
    assert_exact(out, wanted.detach())
    if S >= T:  # an empty row has no gradient, and autograd of the plain softmax gives NaN
        grads = flash_attention_backward(do, q, k, v, out, lse, **rules)
        for actual, expected in zip(grads, torch.autograd.grad(wanted, inputs, do), strict=True):
            assert_exact(actual, expected)


def test_a_window_visits_a_number_of_tiles_that_is_linear_in_the_length(monkeypatch):
    from zhizhi.large_models import flash_attention as module

    tiles = []
    original = module.attend_tile
    monkeypatch.setattr(module, "attend_tile", lambda *a: tiles.append(a) or original(*a))
    for T in (128, 256):
        q, k, v = draw((T, 8), (T, 8), (T, 8))
        tiles.clear()
        module.flash_attention(q, k, v, causal=True, window=32, block_q=16, block_k=16)
        assert len(tiles) == 3 * (T // 16) - 3  # 32/16 + 1 a row of tiles, fewer at the start


@pytest.mark.parametrize("n_splits", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("T", "S"), [(1, 30), (4, 53), (6, 3), (1, 1), (2, 0)])
def test_a_split_cache_gives_what_a_whole_one_does(T, S, n_splits):
    q, k, v = draw((2, T, 8), (2, S, 8), (2, S, 6))
    out, lse = split_kv_attention(q, k, v, n_splits=n_splits)
    whole, whole_lse = flash_attention(q, k, v, causal=True)
    assert_exact(out, whole)
    assert_exact(lse, whole_lse)


def test_causal_forward_does_not_touch_tiles_above_the_diagonal(monkeypatch):
    from zhizhi.large_models import flash_attention as module

    q, k, v = draw((64, 8), (64, 8), (64, 8))
    tiles = []
    original = module.attend_tile
    monkeypatch.setattr(module, "attend_tile", lambda *a: tiles.append(a) or original(*a))
    module.flash_attention(q, k, v, causal=True, block_q=16, block_k=16)
    assert len(tiles) == 4 * 5 // 2


def test_splitting_the_keys_and_merging_in_any_order_is_decoding():
    q, k, v = draw((1, 8), (64, 8), (64, 8))
    chunks = [attend_tile(q, k[i : i + 16], v[i : i + 16]) for i in range(0, 64, 16)]
    for a, b, c, d in itertools.permutations(chunks):
        tree = merge_states(merge_states(a, b), merge_states(c, d))
        assert_exact(finish_state(tree)[0], plain(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_each_sequence_alone(causal):
    lengths = [7, 0, 20, 1, 3]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k, v = draw((31, 4, 8), (31, 2, 8), (31, 2, 6))
    packed = flash_attention_varlen(q, k, v, bounds, causal=causal)
    for a, b in itertools.pairwise(bounds.tolist()):
        alone = grouped_query_attention(q[None, a:b], k[None, a:b], v[None, a:b], causal=causal)
        assert_exact(packed[a:b], alone[0])


def test_standard_accesses_are_those_of_three_kernels():
    T, Dh = 10, 4
    score, softmax, value = 2 * T * Dh + T * T, T * T + T * T, T * T + T * Dh + T * Dh
    assert standard_hbm_accesses(T, Dh) == score + softmax + value


def test_flash_accesses_have_the_closed_form_of_the_two_loops():
    for T, Dh, M in [(1024, 64, 25_600), (1024, 64, 49_152), (1024, 64, 98_304), (100, 16, 999)]:
        tiles = math.ceil(T / math.ceil(M / (4 * Dh)))
        assert flash_hbm_accesses(T, Dh, M=M) == 2 * T * Dh + tiles * (3 * T * Dh + 4 * T)


def test_flash_accesses_fall_as_one_over_memory():
    few, many = (flash_hbm_accesses(2**14, 64, M=M) for M in (2**18, 2**14))
    assert 14 < many / few < 16  # Theorem 2 says 16 as T grows; the first read of K and V stays


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: online_softmax(x[0], block=0), r"^block is 0; it must be at least 1\.$"),
        (lambda x: flash_attention(x, x, x, block_q=0), r"^block_q is 0; it must be at least 1\.$"),
        (
            lambda x: flash_attention(x, x, x, window=4),
            r"^window is 4 without causal: a window ends at its query\.$",
        ),
        (
            lambda x: flash_attention(x, x, x, causal=True, window=0),
            r"^window is 0; it must be at least 1\.$",
        ),
        (
            lambda x: split_kv_attention(x, x, x, n_splits=0),
            r"^n_splits is 0; it must be at least 1\.$",
        ),
        (
            lambda x: flash_attention_backward(x, x, x, x, x, x[:, 0], block_k=-1),
            r"^block_k is -1; it must be at least 1\.$",
        ),
        (
            lambda x: flash_attention_varlen(
                x[:, None], x[:, None], x[:, None], torch.tensor([0, 3])
            ),
            r"^cu_seqlens is \[0, 3\]; it must ascend from 0 to 4, the number of rows\.$",
        ),
        (
            lambda x: flash_attention_varlen(
                x[:, None], x[:, None], x[:, None], torch.tensor([0, 3, 2, 4])
            ),
            r"^cu_seqlens is \[0, 3, 2, 4\]; it must ascend from 0 to 4, the number of rows\.$",
        ),
        (
            lambda x: flash_attention_varlen(
                x[:, None].repeat(1, 3, 1), x[:, None].repeat(1, 2, 1), x[:, None].repeat(1, 2, 1),
                torch.tensor([0, 4]),
            ),
            r"^q has 3 heads and k has 2: 2 must divide 3\.$",
        ),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 8))
