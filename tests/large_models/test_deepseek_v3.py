import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn
from torch.nn import functional as F

from zhizhi.large_models.attention_variants import LatentCache, LatentConfig
from zhizhi.large_models.deepseek_v3 import (
    V3,
    DeepSeekV3,
    MTPModule,
    V3Config,
    mtp_loss,
    speculate,
    v3_parameters,
)

SMALL = V3Config(
    vocab_size=13,
    n_layers=3,
    n_dense=1,
    dense_hidden=20,
    expert_hidden=6,
    n_experts=8,
    k=2,
    attention=LatentConfig(16, 2, 6, 10, 4, 2, 4, base=100.0),
    scale=1.5,
    n_groups=4,
    k_groups=2,
)


def small(std=0.4):
    g = torch.Generator().manual_seed(0)
    model, module = DeepSeekV3(SMALL, generator=g).double(), MTPModule(SMALL, generator=g).double()
    for p in (*model.parameters(), *module.parameters()):
        nn.init.normal_(p, std=std, generator=g)
    return model, module


def some_ids(batch=2, length=9):
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_published_model_has_671_billion_parameters():
    counts = v3_parameters(V3)
    assert counts.total == 671_026_404_352
    assert counts.active / 1e9 == pytest.approx(37.55, abs=0.005)
    assert (counts.active - counts.table) / 1e9 == pytest.approx(36.6, abs=0.05)
    with torch.device("meta"):
        model = DeepSeekV3(V3)
    assert sum(p.numel() for p in model.parameters()) == counts.total


@pytest.mark.parametrize("changes", [{}, {"n_dense": 0}, {"n_shared": 2}, {"k": 4}])
def test_the_count_is_that_of_the_model(changes):
    config = SMALL._replace(**changes)
    counted = sum(p.numel() for p in DeepSeekV3(config).parameters())
    assert counted == v3_parameters(config).total


def test_a_token_meets_all_weights_but_those_of_the_experts_left_out():
    counts = v3_parameters(SMALL)
    assert counts.total - counts.active == 2 * (8 - 2) * 3 * 16 * 6


def test_the_model_is_its_blocks_one_after_the_other():
    model, _ = small()
    ids = some_ids()
    x = model.token(ids)
    for i, block in enumerate(model.blocks):
        x = x + block.attention(block.attn_norm(x))
        h = block.mlp_norm(x)
        if i == 0:
            out = block.mlp.down(F.silu(block.mlp.gate(h)) * block.mlp.up(h))
        else:
            out = torch.stack([block.mlp(row)[0] for row in h])
        x = x + out
    assert_exact(model(ids), model.norm(x) @ model.head.weight.T)
    assert_exact(model.stream(ids), x)


@pytest.mark.parametrize("absorb", [False, True])
def test_reading_in_parts_is_reading_at_once(absorb):
    model, _ = small()
    ids = some_ids()
    cache = LatentCache(
        n_layers=3, batch=2, max_length=9, kv_latent=6, rope_width=2, dtype=torch.float64
    )
    parts = [model(p, cache=cache, absorb=absorb) for p in ids.split([4, 1, 1, 3], dim=1)]
    assert_exact(torch.cat(parts, dim=1), model(ids))


def test_no_position_sees_what_comes_after_it():
    model, _ = small()
    ids = some_ids()
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 13
    assert_exact(model(ids)[:, :5], model(changed)[:, :5])


def test_the_module_joins_both_norms_and_has_a_block():
    model, module = small()
    h, e = model.stream(some_ids())[:, :-1], model.token(some_ids()[:, 1:])
    joined = torch.cat([module.stream_norm(h), module.token_norm(e)], dim=-1)
    assert_exact(module(h, e), module.block(joined @ module.project.weight.T))


def test_the_loss_asks_each_depth_for_a_token_further_ahead():
    model, module = small()
    other = MTPModule(SMALL).double()
    ids = some_ids()

    def nll(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    stream = model.stream(ids)
    main = nll(model.head(model.norm(stream))[:, :-1], ids[:, 1:])
    first = module(stream[:, :8], model.token(ids[:, 1:9]))
    second = other(first[:, :7], model.token(ids[:, 2:9]))
    one = nll(model.head(module.norm(first))[:, :-1], ids[:, 2:])
    two = nll(model.head(other.norm(second))[:, :-1], ids[:, 3:])
    got = mtp_loss(model, [module, other], ids, weight=0.3)
    assert_float32(got, main + 0.3 / 2 * (one + two))
    with pytest.raises(ValueError, match="3 tokens for 2 depths"):
        mtp_loss(model, [module, other], ids[:, :3], weight=0.3)


def test_a_guess_knows_the_next_token_and_nothing_beyond():
    model, module = small()
    ids = some_ids()

    def guesses(ids):
        return module(model.stream(ids)[:, :-1], model.token(ids[:, 1:]))

    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 13
    a, b = guesses(ids), guesses(changed)
    assert_exact(a[:, :5], b[:, :5])  # position 4 knows tokens 0 to 5
    assert not torch.allclose(a[:, 5], b[:, 5])


@torch.no_grad()
def greedy(model, prompt, n):
    ids = prompt.tolist()
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_speculation_changes_no_token(n):
    model, module = small()
    for start in range(4):
        prompt = torch.tensor([start, 5, 2])
        found = speculate(model, module, prompt, max_new_tokens=n)
        assert found.ids == greedy(model, prompt, n)
        assert found.passes + found.accepted == n


def test_right_guesses_halve_the_passes():
    """A model that counts: the module learns it, and nearly every guess is taken."""
    torch.manual_seed(0)
    model, module = DeepSeekV3(SMALL._replace(n_layers=1)), MTPModule(SMALL)
    optimizer = torch.optim.Adam([*model.parameters(), *module.parameters()], lr=1e-2)
    for _ in range(120):
        start = torch.randint(13, (16, 1))
        ids = (start + torch.arange(8)) % 13
        loss = mtp_loss(model, [module], ids, weight=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = speculate(model, module, torch.tensor([1, 2, 3]), max_new_tokens=12)
    assert found.ids == [(4 + i) % 13 for i in range(12)]
    assert found.passes <= 7
