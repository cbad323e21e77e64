import math

import pytest
import torch
from tests.closeness import assert_exact
from torch import nn

from zhizhi.large_models.attention_variants import (
    DEEPSEEK_V3,
    LatentCache,
    LatentConfig,
    MultiHeadLatentAttention,
    cached_latent_numbers,
    cached_numbers,
    grouped_decode_cost,
    latent_decode_cost,
    pool_heads,
)
from zhizhi.large_models.llama import Llama, LlamaConfig

SMALL = LatentConfig(16, 4, 6, 10, 5, 4, 3, base=100.0)


def small(**changes):
    g = torch.Generator().manual_seed(0)
    layer = MultiHeadLatentAttention(SMALL._replace(**changes), generator=g).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5, generator=g)
    return layer


def some(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x, weight):
    return x / math.sqrt(x.square().mean() + 1e-6) * weight


@torch.no_grad()
def by_loops(layer, x):
    """Write out Eqs. (9)-(19) for the last position, head by head, with complex rotations."""
    _D, H, d_c, d_q, d_h, d_R, d_v, base, _ = layer.config
    turn = torch.tensor([base ** (-2 * i / d_R) for i in range(d_R // 2)], dtype=torch.float64)

    def rotated(z, t):
        pairs = torch.complex(z[0::2], z[1::2]) * torch.exp(1j * turn * t)
        return torch.view_as_real(pairs).flatten()

    compressed = [layer.kv_down.weight @ y for y in x]
    latent = [norm(z[:d_c], layer.kv_norm.weight) for z in compressed]
    shared = [rotated(z[d_c:], t) for t, z in enumerate(compressed)]
    t = len(x) - 1
    c_q = x[t] if d_q is None else norm(layer.q_down.weight @ x[t], layer.q_norm.weight)
    q = (layer.q_up.weight @ c_q).reshape(H, d_h + d_R)
    heads = []
    for h in range(H):
        kv = [(layer.kv_up.weight @ c).reshape(H, d_h + d_v)[h] for c in latent]
        scores = [
            (q[h, :d_h] @ kv[s][:d_h] + rotated(q[h, d_h:], t) @ shared[s]) / math.sqrt(d_h + d_R)
            for s in range(t + 1)
        ]
        weights = [math.exp(s) for s in scores]
        heads.append(sum(w * z[d_h:] for w, z in zip(weights, kv, strict=True)) / sum(weights))
    return layer.out.weight @ torch.cat(heads)


@pytest.mark.parametrize("q_latent", [10, None])
@pytest.mark.parametrize("absorb", [False, True])
def test_the_layer_is_its_equations_head_by_head(q_latent, absorb):
    layer, x = small(q_latent=q_latent), some(1, 6, 16)
    assert_exact(layer(x, absorb=absorb)[0, -1], by_loops(layer, x[0]))


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 4]])
def test_reading_in_parts_is_reading_at_once(cuts, absorb):
    layer, x = small(), some(2, 9, 16)
    cache = LatentCache(
        n_layers=1, batch=2, max_length=9, kv_latent=6, rope_width=4, dtype=torch.float64
    )
    parts = [layer(part, cache=cache, absorb=absorb) for part in x.split(cuts, dim=1)]
    assert_exact(torch.cat(parts, dim=1), layer(x))
    assert cache.nbytes == 2 * 9 * (6 + 4) * 8


def test_absorbed_gradients_are_the_same():
    layer, x = small(), some(2, 5, 16)
    grads = []
    for absorb in (False, True):
        layer.zero_grad()
        layer(x, absorb=absorb).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_order_of_the_past_counts_and_without_rotation_it_does_not():
    layer, x = small(), some(1, 6, 16)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(layer(x)[:, -1], layer(swapped)[:, -1])
    layer.frequencies = torch.zeros(2, dtype=torch.float64)
    assert_exact(layer(x)[:, -1], layer(swapped)[:, -1])


def test_a_cache_refuses_a_layer_out_of_turn_and_too_many_positions():
    cache = LatentCache(n_layers=2, batch=1, max_length=2, kv_latent=3, rope_width=2)
    c, k = torch.ones(1, 1, 3), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="Layer 1 appends: it is the turn of layer 0"):
        cache.append(1, c, k)
    cache.append(0, c, k)
    cache.append(1, 2 * c, 2 * k)
    assert cache.length == 1
    kept_c, kept_k = cache.append(0, 3 * c, 3 * k)
    assert kept_c[0, :, 0].tolist() == [1.0, 3.0]  # of this layer alone
    assert kept_k[0, :, 0].tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match="3 positions: the cache has room for 2"):
        cache.append(1, c.expand(1, 2, 3), k.expand(1, 2, 2))


# Heads that share


@pytest.mark.parametrize("G", [4, 2, 1])
def test_pooled_heads_are_the_means_of_their_groups(G):
    w = some(12, 5)
    pooled = pool_heads(w, n_heads=4, n_groups=G).reshape(G, 3, 5)
    heads = w.reshape(4, 3, 5)
    for g in range(G):
        members = [heads[h] for h in range(4) if h * G // 4 == g]
        assert_exact(pooled[g], sum(members) / len(members))


def test_heads_that_are_equal_lose_nothing_by_pooling():
    config = LlamaConfig(13, 16, 24, 2, 4, 4)
    full, shared = Llama(config).double(), Llama(config._replace(n_kv_heads=2)).double()
    state = full.state_dict()
    for name, _w in state.items():
        if name.endswith((".k.weight", ".v.weight")):
            heads = some(2, 4, 16, seed=len(name)) * 0.3
            state[name] = heads.repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(state)
    shared.load_state_dict(
        {
            name: pool_heads(w, n_heads=4, n_groups=2)
            if name.endswith((".k.weight", ".v.weight"))
            else w
            for name, w in state.items()
        }
    )
    ids = torch.arange(12).reshape(1, 12)
    assert_exact(shared(ids), full(ids))


def test_heads_that_do_not_divide_are_refused():
    for rows, H, G in ((12, 4, 3), (10, 4, 2)):
        with pytest.raises(ValueError, match="each must be a multiple of the next"):
            pool_heads(some(rows, 2), n_heads=H, n_groups=G)


# What is kept and what it costs


def test_the_published_caches():
    v2 = DEEPSEEK_V3._replace(width=5120)
    assert cached_latent_numbers(v2, n_layers=60) == 34_560
    assert cached_latent_numbers(DEEPSEEK_V3, n_layers=61) == 35_136
    assert cached_numbers(n_layers=95, n_kv_heads=8, head_width=128) == 194_560
    assert cached_numbers(n_layers=80, n_kv_heads=64, head_width=128) * 2 == 2_621_440
    # nine halves of d_h a layer: as many as 2.25 groups
    assert cached_latent_numbers(v2, n_layers=2) == cached_numbers(
        n_layers=1, n_kv_heads=1, head_width=128 * 9 // 2
    )


def test_the_reduction_of_93_percent_needs_six_bits():
    ours, theirs = 34_560, 194_560
    assert 1 - ours / theirs == pytest.approx(0.822, abs=5e-4)
    assert 1 - ours * 6 / (theirs * 16) == pytest.approx(0.9334, abs=5e-5)


def test_grouped_intensity_is_the_sharing():
    for G in (1, 4, 16):
        cost = grouped_decode_cost(77, n_heads=16, n_kv_heads=G, head_width=32)
        assert cost.intensity == 16 / G


@pytest.mark.parametrize("absorb", [False, True])
def test_the_operations_are_those_that_the_layer_does(absorb):
    from torch.utils.flop_counter import FlopCounterMode

    layer, T = small().float(), 50
    cache = LatentCache(n_layers=1, batch=1, max_length=T, kv_latent=6, rope_width=4)
    with torch.no_grad():
        layer(torch.randn(1, T - 1, 16), cache=cache)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 1, 16), cache=cache, absorb=absorb)
    projections = sum(
        2 * p.numel()
        for name, p in layer.named_parameters()
        if p.ndim == 2 and name != "kv_up.weight"
    )
    counted = counter.get_total_flops() - projections
    assert counted == latent_decode_cost(T, SMALL, absorb=absorb).flops


def test_absorbing_reads_little_and_computes_much():
    long = latent_decode_cost(100_000_000, DEEPSEEK_V3, absorb=True)
    assert long.intensity == pytest.approx(128 * (2 * 512 + 64) / (512 + 64), rel=0.01)
