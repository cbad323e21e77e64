import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.large_models.attention import scaled_dot_product_attention
from zhizhi.large_models.prefix_tuning import Prefix, PrefixCache, SoftPrompt, prefix_weight
from zhizhi.large_models.transformer_decoder import Decoder, next_token_loss


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model():
    g = torch.Generator().manual_seed(0)
    return Decoder(
        vocab_size=11, width=16, n_layers=3, n_heads=2, max_length=30, generator=g
    ).double()


def prefix(hidden=None, length=4):
    g = torch.Generator().manual_seed(1)
    return Prefix(
        length=length, n_layers=3, n_kv_heads=2, head_width=8, hidden=hidden, generator=g
    ).double()


IDS = torch.tensor([[1, 5, 9, 10, 3], [2, 2, 0, 7, 8]])


def test_attention_with_a_prefix_is_a_mixture_of_two():
    q, k, v = some(6, 8), some(9, 8, seed=1), some(9, 5, seed=2)
    p_k, p_v = some(3, 8, seed=3), some(3, 5, seed=4)
    whole = scaled_dot_product_attention(q, torch.cat([p_k, k]), torch.cat([p_v, v]))
    share = prefix_weight(q, k, p_k)[:, None]
    text = scaled_dot_product_attention(q, k, v)
    alone = scaled_dot_product_attention(q, p_k, p_v)
    assert_exact(whole, (1 - share) * text + share * alone)
    weights = (q @ torch.cat([p_k, k]).T / 8**0.5).softmax(dim=-1)
    assert_exact(share[:, 0], weights[:, :3].sum(dim=-1))


def test_what_is_trained_is_what_a_text_would_have_left_in_the_cache():
    lm = model()
    with torch.no_grad():
        read = lm.new_cache(batch=1)
        lm(torch.tensor([[4, 6, 1, 3]]), cache=read)
        kept = torch.stack([torch.stack([kv[0] for kv in layer]) for layer in read.layers()])
        wanted = lm(torch.tensor([[4, 6, 1, 3, *IDS[0]]]))[:, 4:]
        got = lm(IDS[:1], cache=PrefixCache(kept, batch=1))
    assert_exact(got, wanted)


def test_a_prefix_reads_in_parts_as_at_once():
    lm, p = model(), prefix()
    at_once = lm(IDS, cache=p.cache(batch=2))
    cache = p.cache(batch=2)
    parts = [lm(part, cache=cache) for part in IDS.split([2, 1, 2], dim=1)]
    assert_exact(torch.cat(parts, dim=1), at_once)
    assert cache.length == 4 + 5
    assert cache.nbytes == 3 * 2 * 2 * 9 * 16 * 8


@pytest.mark.parametrize("hidden", [None, 6])
def test_every_layer_gets_a_gradient_and_the_model_none(hidden):
    lm, p = model().requires_grad_(False), prefix(hidden)
    kv = p.keys_values()
    kv.retain_grad()
    next_token_loss(lm(IDS, cache=PrefixCache(kv, batch=2)), IDS).backward()
    assert kv.shape == (3, 2, 4, 2, 8)
    assert (kv.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(q.grad is None for q in lm.parameters())
    assert all(q.grad is not None for q in p.parameters())


def test_the_gradient_is_that_of_finite_differences():
    lm, p = model(), prefix()
    kv = (p.keys_values().detach() * 10).requires_grad_()
    next_token_loss(lm(IDS, cache=PrefixCache(kv, batch=2)), IDS).backward()
    for index in ((0, 0, 1, 0, 3), (2, 1, 3, 1, 7)):
        values = []
        for step in (1e-5, -1e-5):
            moved = kv.detach().clone()
            moved[index] += step
            logits = lm(IDS, cache=PrefixCache(moved, batch=2))
            values.append(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
                )
            )
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(slope.detach(), kv.grad[index], rtol=1e-3, atol=1e-7)


def test_the_counts():
    assert sum(q.numel() for q in prefix().parameters()) == 2 * 3 * 4 * 2 * 8
    with_network = sum(q.numel() for q in prefix(hidden=6).parameters())
    assert with_network == 4 * 6 + (6 * 6 + 6) + (6 * 96 + 96)
    assert prefix(hidden=6).keys_values().shape == prefix().keys_values().shape


def test_a_soft_prompt_is_read_like_embeddings():
    lm = model()
    words = torch.tensor([7, 7, 2])
    prompt = SoftPrompt(length=3, width=16).double()
    with torch.no_grad():
        prompt.prompt.copy_(lm.token.weight[words])
    joined = prompt(lm.token(IDS))
    assert_exact(joined, lm.token(torch.cat([words.expand(2, 3), IDS], dim=1)))
    assert joined.shape == (2, 8, 16)


def test_a_soft_prompt_may_begin_as_words_and_is_a_copy():
    lm = model()
    prompt = SoftPrompt(
        length=5, width=16, like=lm.token.weight, generator=torch.Generator().manual_seed(0)
    )
    for row in prompt.prompt:
        assert (row == lm.token.weight).all(dim=1).any()
    with torch.no_grad():
        prompt.prompt.zero_()
    assert lm.token.weight.abs().min(dim=1).values.max() > 0


def test_a_layer_out_of_turn_and_a_prefix_of_nothing_are_refused():
    cache = prefix().cache(batch=2)
    k = some(2, 1, 2, 8)
    with pytest.raises(ValueError, match="Layer 1 appends: it is the turn of layer 0"):
        cache.append(1, k, k)
    with pytest.raises(ValueError, match="length is 0"):
        prefix(length=0)
    with pytest.raises(ValueError, match="length is 0"):
        SoftPrompt(length=0, width=4)


def test_rows_of_a_prefix_follow_the_beams():
    lm, p = model(), prefix()
    cache = p.cache(batch=2)
    lm(IDS[:, :3], cache=cache)
    cache.select(torch.tensor([1, 1]))
    moved = torch.cat([IDS[[1, 1], :3], IDS[:, 3:]], dim=1)
    assert_exact(lm(IDS[:, 3:], cache=cache), lm(moved, cache=p.cache(batch=2))[:, 3:])
    assert cache.layers()[2][1].shape == (2, 9, 2, 8)
