import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn
from torch.nn import functional as F

from zhizhi.large_models.transformer_decoder import (
    Block,
    Decoder,
    KVCache,
    decoder_parameters,
    next_token_loss,
    train_steps,
)


def small(**changes):
    sizes = {"vocab_size": 13, "width": 16, "n_layers": 3, "n_heads": 4, "max_length": 24}
    g = torch.Generator().manual_seed(0)
    return Decoder(**(sizes | changes), generator=g).double()


def some_ids(batch=2, length=24, seed=1):
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_loops(model, ids):
    """Score the last position, one position and one head at a time."""
    width = model.token.weight.shape[1]
    Dh = width // model.n_heads
    stream = [model.token.weight[i] + model.position.weight[t] for t, i in enumerate(ids.tolist())]
    for block in model.blocks:
        q, k, v = zip(*(block.qkv(block.attn_norm(x)).split(width) for x in stream), strict=True)
        after = []
        for t, x in enumerate(stream):
            heads = []
            for h in range(model.n_heads):
                part = slice(h * Dh, (h + 1) * Dh)
                scores = [math.exp(q[t][part] @ k[s][part] / math.sqrt(Dh)) for s in range(t + 1)]
                mixed = sum(w * v[s][part] for s, w in enumerate(scores)) / sum(scores)
                heads.append(mixed)
            after.append(x + block.attn_out(torch.cat(heads)))
        stream = [x + block.think(block.mlp_norm(x)[None, None])[0, 0] for x in after]
    return model.norm(stream[-1]) @ model.token.weight.T


def test_the_model_is_its_definition_position_by_position():
    model, ids = small(), some_ids(batch=1, length=7)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    assert_exact(model(ids)[0, -1], by_loops(model, ids[0]))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_no_position_sees_what_comes_after_it(pre_norm):
    model, ids = small(pre_norm=pre_norm), some_ids()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 13
    assert torch.equal(model(ids)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(ids)[:, 10], model(changed)[:, 10])


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("cuts", [[24], [1] * 24, [5, 1, 10, 8]])
def test_reading_in_parts_is_reading_at_once(pre_norm, cuts):
    model, ids = small(pre_norm=pre_norm), some_ids()
    cache = model.new_cache(batch=2)
    parts = [model(part, cache=cache) for part in ids.split(cuts, dim=1)]
    assert cache.length == 24
    assert_exact(torch.cat(parts, dim=1), model(ids))


def test_the_rows_of_a_cache_follow_the_beams():
    model, ids = small(), some_ids(batch=3, length=9)
    cache = model.new_cache(batch=3)
    model(ids[:, :6], cache=cache)
    rows = torch.tensor([2, 2, 0])
    cache.select(rows)
    moved = torch.cat([ids[rows, :6], ids[:, 6:]], dim=1)
    assert_exact(model(ids[:, 6:], cache=cache), model(moved)[:, 6:])


def test_a_cache_keeps_two_numbers_a_layer_position_head_and_width():
    cache = small().new_cache(batch=5, max_length=7)
    assert cache.nbytes == 2 * 3 * 5 * 7 * 16 * 8


def test_a_cache_refuses_a_layer_out_of_turn_too_many_positions_and_other_rows():
    cache = KVCache(n_layers=2, batch=1, max_length=2, n_kv_heads=1, head_width=1)
    k = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="Layer 1 appends: it is the turn of layer 0"):
        cache.append(1, k, k)
    cache.append(0, k, k)
    assert cache.length == 0  # the second layer has not read it yet
    cache.append(1, k, k)
    assert cache.length == 1
    with pytest.raises(ValueError, match="3 positions: the cache has room for 2"):
        cache.append(0, k.expand(1, 2, 1, 1), k.expand(1, 2, 1, 1))
    with pytest.raises(ValueError, match="2 rows for 1"):
        cache.select(torch.tensor([0, 0]))


def test_a_position_without_an_embedding_is_refused():
    model = small()
    cache = model.new_cache(batch=1, max_length=30)
    model(some_ids(batch=1), cache=cache)
    with pytest.raises(ValueError, match="25 positions: 24 have an embedding"):
        model(torch.tensor([[1]]), cache=cache)
    with pytest.raises(ValueError, match="25 positions"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width is 8 and n_heads 3"):
        Block(width=8, n_heads=3)


@pytest.mark.parametrize(("width", "n_layers"), [(16, 3), (32, 1)])
def test_the_count_is_that_of_the_model(width, n_layers):
    model = small(width=width, n_layers=n_layers)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == decoder_parameters(
        vocab_size=13, width=width, n_layers=n_layers, max_length=24
    )


def test_weights_that_write_to_the_stream_begin_smaller():
    model = Decoder(vocab_size=500, width=128, n_layers=8, n_heads=4, max_length=300)
    for block in model.blocks:
        assert abs(block.up.weight.std() / 0.02 - 1) < 0.05
        assert abs(block.down.weight.std() / 0.02 * 4 - 1) < 0.05
        assert abs(block.attn_out.weight.std() / 0.02 * 4 - 1) < 0.05
        assert not block.up.bias.any()
    assert abs(model.token.weight.std() / 0.02 - 1) < 0.05


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.randn(7)
    assert torch.equal(small().blocks[1].up.weight, small().blocks[1].up.weight)


def test_the_loss_asks_each_position_for_the_next_token():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 5, 13, generator=g)
    ids = some_ids(length=5)
    slow = [-logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(1, 5)]
    assert_float32(next_token_loss(logits, ids), torch.stack(slow).mean())


def test_the_loss_of_uniform_scores_is_log_v_and_one_token_has_none():
    assert_float32(next_token_loss(torch.zeros(1, 4, 13), some_ids(1, 4)), torch.tensor(13.0).log())
    with pytest.raises(ValueError, match="T is 1"):
        next_token_loss(torch.zeros(1, 1, 13), some_ids(1, 1))


def test_training_takes_adamw_steps_with_the_schedule_and_clipped_gradients():
    batches = [some_ids(4, 12, seed) for seed in range(6)]
    model, twin = small().float(), small().float()
    losses = train_steps(model, batches, lr=1e-2, weight_decay=0.1)
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim <= 1]
    slow = []
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for step, ids in enumerate(batches):
        factor = step if step < 1 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / 5))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        logits = twin(ids)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, 13), ids[:, 1:].reshape(-1))
        twin.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        for p in twin.parameters():
            p.grad *= min(1.0, 1.0 / (norm.item() + 1e-6))
        optimizer.step()
        slow.append(loss.item())
    assert_float32(torch.tensor(losses), torch.tensor(slow))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
