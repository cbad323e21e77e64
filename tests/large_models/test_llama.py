import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn

from zhizhi.large_models.generation import generate
from zhizhi.large_models.llama import (
    LLAMA_1,
    Llama,
    LlamaConfig,
    chinchilla_loss,
    chinchilla_optimum,
    llama_parameters,
    load_hf_weights,
    swiglu_hidden,
    training_flops,
)

SMALL = LlamaConfig(13, 16, 24, 3, 4, 2, base=100.0)


def small(**changes):
    g = torch.Generator().manual_seed(0)
    model = Llama(SMALL._replace(**changes), generator=g).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=g)
    return model


def some_ids(batch=2, length=12):
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(1))


def norm(x, weight):
    return x / math.sqrt(x.square().mean() + 1e-6) * weight


@torch.no_grad()
def by_loops(model, ids):
    """Score the last position, with complex rotations and a loop over heads."""
    c = model.config
    Dh, share = c.width // c.n_heads, c.n_heads // c.n_kv_heads
    turn = [c.base ** (-2 * i / Dh) for i in range(Dh // 2)]

    def rotated(x, t):
        z = torch.complex(x[: Dh // 2], x[Dh // 2 :])
        z = z * torch.exp(1j * torch.tensor(turn, dtype=torch.float64) * t)
        return torch.cat([z.real, z.imag])

    stream = [model.token.weight[i] for i in ids.tolist()]
    for block in model.blocks:
        inputs = [norm(x, block.attn_norm.weight) for x in stream]
        after = []
        for t, x in enumerate(stream):
            heads = []
            for h in range(c.n_heads):
                g = h // share
                q = rotated((block.q.weight @ inputs[t])[h * Dh : (h + 1) * Dh], t)
                part = slice(g * Dh, (g + 1) * Dh)
                scores = [
                    math.exp(q @ rotated((block.k.weight @ y)[part], s) / math.sqrt(Dh))
                    for s, y in enumerate(inputs[: t + 1])
                ]
                values = [(block.v.weight @ y)[part] for y in inputs[: t + 1]]
                heads.append(sum(w * v for w, v in zip(scores, values, strict=True)) / sum(scores))
            x = x + block.o.weight @ torch.cat(heads)
            y = norm(x, block.mlp_norm.weight)
            gate = block.mlp.gate.weight @ y
            hidden = gate / (1 + torch.exp(-gate)) * (block.mlp.up.weight @ y)
            after.append(x + block.mlp.down.weight @ hidden)
        stream = after
    return model.head.weight @ norm(stream[-1], model.norm.weight)


def test_the_model_is_its_definition_position_by_position():
    model, ids = small(), some_ids(batch=1, length=7)
    assert_exact(model(ids)[0, -1], by_loops(model, ids[0]))


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [4, 1, 7]])
def test_reading_in_parts_is_reading_at_once(cuts):
    model, ids = small(), some_ids()
    cache = model.new_cache(batch=2, max_length=12)
    parts = [model(part, cache=cache) for part in ids.split(cuts, dim=1)]
    assert_exact(torch.cat(parts, dim=1), model(ids))
    assert cache.nbytes == 2 * 3 * 2 * 12 * 2 * 4 * 8  # two key heads, not four


def test_only_distances_count():
    model, ids = small(), some_ids()
    moved = model(ids, positions=torch.arange(1000, 1012))
    torch.testing.assert_close(moved, model(ids), rtol=1e-9, atol=1e-9)
    stretched = model(ids, positions=2 * torch.arange(12))
    assert not torch.allclose(stretched, model(ids))


def test_no_position_sees_what_comes_after_it():
    model, ids = small(), some_ids()
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 13
    assert torch.equal(model(ids)[:, :5], model(changed)[:, :5])


def test_it_can_be_generated_from_and_a_cache_changes_no_token():
    model = small()
    with_cache, without = (
        generate(model, some_ids(), max_new_tokens=9, use_cache=u) for u in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_other_frequencies_reach_every_layer():
    model, ids = small(), some_ids()
    before = model(ids)
    model.frequencies = model.frequencies / 4
    assert_exact(model(ids), model(ids))
    assert not torch.allclose(model(ids), before)
    model.frequencies = torch.zeros(2, dtype=torch.float64)  # no position at all
    assert_exact(model(ids), model(ids, positions=torch.zeros(12, dtype=torch.long)))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_that_of_the_model(n_kv_heads, tied):
    config = SMALL._replace(n_kv_heads=n_kv_heads, tied=tied)
    counted = sum(p.numel() for p in Llama(config).parameters())
    assert counted == llama_parameters(config)


def test_the_published_sizes_have_these_counts():
    counts = {"7B": 6738415616, "13B": 13015864320, "33B": 32528943616, "65B": 65285660672}
    for name, config in LLAMA_1.items():
        with torch.device("meta"):
            model = Llama(config)
        assert sum(p.numel() for p in model.parameters()) == counts[name]
        assert config.hidden == swiglu_hidden(config.width)
        assert llama_parameters(config) == counts[name]


def test_the_hidden_width_is_the_next_multiple():
    for width in (1, 48, 64, 4096, 5120):
        F = swiglu_hidden(width, multiple_of=8)
        assert F % 8 == 0
        assert 0 <= F - int(8 * width / 3) < 8
    with pytest.raises(ValueError, match="multiple_of 0"):
        swiglu_hidden(8, multiple_of=0)


def test_heads_must_divide():
    for changes in ({"n_heads": 3}, {"n_kv_heads": 3}):
        with pytest.raises(ValueError, match="each must divide the one before it"):
            Llama(SMALL._replace(**changes))


def test_a_cache_needs_a_length():
    with pytest.raises(ValueError, match="max_length is None"):
        small().new_cache(batch=1)


def test_weights_that_do_not_fit_are_refused_and_change_nothing():
    model, ids = small(), some_ids()
    before = model(ids)
    with pytest.raises(ValueError, match=r"missing 30: .*unknown 1: strange"):
        load_hf_weights(model, {"strange": torch.zeros(1)})
    assert torch.equal(model(ids), before)


def test_training_costs_six_operations_a_parameter_and_token():
    """Two forward and four backward: counted on one matrix (eq:llama-flops)."""
    from torch.utils.flop_counter import FlopCounterMode

    layers = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    x = torch.randn(10, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layers(x).sum().backward()
    assert counter.get_total_flops() == training_flops(2.0 * 32 * 32, 10.0)


def test_the_optimum_is_the_lowest_point_of_the_law_on_its_budget():
    """A search over sizes finds the same (eq:llama-optimum)."""
    for C in (1e20, 1e23):
        P, n = chinchilla_optimum(C)
        assert_float32(torch.tensor(training_flops(P, n)), torch.tensor(C))
        best = min(
            (math.exp(x / 1000) for x in range(15_000, 28_000)),
            key=lambda size: chinchilla_loss(size, C / 6 / size),
        )
        assert abs(best / P - 1) < 1e-3


def test_the_law_falls_to_the_loss_of_a_perfect_model():
    assert chinchilla_loss(1e90, 1e90) == pytest.approx(1.69)
    assert chinchilla_loss(1e9, 1e9) > chinchilla_loss(2e9, 1e9) > chinchilla_loss(2e9, 2e9)
