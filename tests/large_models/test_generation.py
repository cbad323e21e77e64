import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.large_models.generation import beam_search, generate, next_token_distribution
from zhizhi.large_models.transformer_decoder import Decoder, KVCache


class Markov:
    """A model that looks at the last token only, from a table of probabilities."""

    def __init__(self, table):
        self.log_p = torch.tensor(table, dtype=torch.float64).log()

    def __call__(self, ids, *, cache=None):
        return self.log_p[ids]

    def new_cache(self, *, batch, max_length=None):
        return KVCache(n_layers=1, batch=batch, max_length=1, n_kv_heads=1, head_width=1)


TRAP = Markov([[0.0, 0.6, 0.4], [0.34, 0.33, 0.33], [0.02, 0.9, 0.08]])


def small(vocab_size=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"width": 16, "n_layers": 2, "n_heads": 2, "max_length": 32}
    model = Decoder(vocab_size=vocab_size, **sizes, generator=g).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=g)
    return model


def truncate_slowly(p, temperature, top_k, top_p):
    """Cut the tail with lists, one token after the other."""
    q = [x ** (1 / temperature) for x in p]
    q = [x / sum(q) for x in q]
    order = sorted(range(len(q)), key=lambda i: -q[i])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        whole, mass, kept = sum(q[i] for i in order), 0.0, []
        for i in order:
            if mass / whole >= top_p:
                break
            kept.append(i)
            mass += q[i]
        order = kept
    whole = sum(q[i] for i in order)
    return [q[i] / whole if i in order else 0.0 for i in range(len(q))]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9, unique=True),
    temperature=st.floats(0.3, 3.0),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.05, 0.999),
)
def test_the_tail_is_cut_as_the_slow_lists_cut_it(weights, temperature, top_k, top_p):
    p = [w / sum(weights) for w in weights]
    logits = torch.tensor(p, dtype=torch.float64).log() + 3.0  # a shift changes nothing
    got = next_token_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert_exact(got.sum(), 1.0)
    near = [
        truncate_slowly(p, temperature, top_k, top_p and top_p * (1 + e)) for e in (-1e-9, 0, 1e-9)
    ]
    assert any(torch.allclose(got, torch.tensor(q, dtype=torch.float64), rtol=1e-9) for q in near)


def test_rows_are_cut_each_by_itself():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 5.0]])
    both = next_token_distribution(logits, top_p=0.9)
    for row, alone in zip(both, logits, strict=True):
        assert torch.equal(row, next_token_distribution(alone, top_p=0.9))


def test_the_best_token_always_stays():
    p = next_token_distribution(torch.tensor([0.1, 0.9]).log(), top_p=1e-9)
    assert p.tolist() == [0.0, 1.0]
    assert next_token_distribution(torch.tensor([2.0, 2.0]), temperature=0.0).tolist() == [1.0, 0.0]


def test_everything_stays_at_one_and_at_a_k_beyond_the_vocabulary():
    logits = torch.tensor([0.3, -1.0, 2.0])
    for how in ({}, {"top_p": 1.0}, {"top_k": 3}, {"top_k": 99}):
        assert torch.equal(next_token_distribution(logits, **how), logits.softmax(-1))


def test_low_temperature_becomes_greedy_and_high_becomes_uniform():
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    greedy = next_token_distribution(logits, temperature=0.0)
    assert torch.allclose(next_token_distribution(logits, temperature=0.02), greedy, atol=1e-12)
    flat = next_token_distribution(logits, temperature=1e9)
    assert torch.allclose(flat, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-8)


def test_half_precision_scores_are_summed_in_float32():
    assert next_token_distribution(torch.zeros(3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_a_cut_that_leaves_nothing_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        next_token_distribution(torch.zeros(3), **how)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_cache_changes_no_token(how):
    model, prompt = small(), torch.tensor([[1, 2, 3], [4, 0, 1]])
    texts = [
        generate(
            model,
            prompt,
            max_new_tokens=20,
            use_cache=use_cache,
            generator=torch.Generator().manual_seed(3),
            **how,
        )
        for use_cache in (True, False)
    ]
    assert texts[0].shape == (2, 23)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0][:, :3], prompt)


def test_drawn_tokens_follow_the_chain_of_conditionals():
    g = torch.Generator().manual_seed(0)
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    drawn = generate(TRAP, prompt, max_new_tokens=2, temperature=1.0, use_cache=False, generator=g)
    counts = torch.zeros(3, 3).index_put_(
        (drawn[:, 1], drawn[:, 2]), torch.tensor(1.0), accumulate=True
    )
    p = TRAP.log_p.exp()
    assert (counts / 20_000 - p[0][:, None] * p).abs().max() < 0.012


def test_rows_that_ended_are_filled_up_and_the_rest_goes_on():
    chain = Markov([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]])  # 0 1 2 3 0 1 2 3 ...
    rows = generate(chain, torch.tensor([[0], [2]]), max_new_tokens=9, eos=3, use_cache=False)
    assert rows.tolist() == [[0, 1, 2, 3], [2, 3, 3, 3]]  # and it stops when both have ended


def test_nothing_to_go_on_from_or_to_is_refused():
    with pytest.raises(ValueError, match="T is 0"):
        generate(small(), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        generate(small(), torch.tensor([[1]]), max_new_tokens=0)


# Beam search


@torch.no_grad()
def exhaustive(model, prompt, steps, eos=None, penalty=0.0):
    """Score every continuation, each read from the beginning."""
    V = model(prompt[None])[0, -1].shape[0]
    found = {}
    for path in itertools.product(range(V), repeat=steps):
        end = path.index(eos) + 1 if eos in path else steps
        path = path[:end]
        ids = torch.cat([prompt, torch.tensor(path)])
        log_p = model(ids[None])[0].log_softmax(-1)
        start = len(prompt)
        total = sum(log_p[start - 1 + t, token].item() for t, token in enumerate(path))
        found[path] = total / len(path) ** penalty
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_enough_beams_find_the_best_of_all(penalty, eos, seed):
    model, prompt = small(vocab_size=3, seed=seed), torch.tensor([2, 0])
    found = beam_search(
        model, prompt, n_beams=81, max_new_tokens=4, eos=eos, length_penalty=penalty
    )
    wanted = exhaustive(model, prompt, 4, eos, penalty)
    for (ids, score), (path, total) in zip(found[:10], wanted[:10], strict=True):
        assert tuple(ids) == path
        assert_exact(score, total)


def test_one_beam_is_greedy():
    model, prompt = small(), torch.tensor([1, 2])
    greedy = generate(model, prompt[None], max_new_tokens=12)[0, 2:].tolist()
    assert beam_search(model, prompt, n_beams=1, max_new_tokens=12)[0].ids == greedy


def test_two_beams_leave_the_dead_end_that_greed_takes():
    one, two = (
        beam_search(TRAP, torch.tensor([0]), n_beams=n, max_new_tokens=2, length_penalty=0.0)[0]
        for n in (1, 2)
    )
    assert one.ids == [1, 0]
    assert two.ids == [2, 1]
    assert_exact(two.score, torch.tensor(0.4 * 0.9, dtype=torch.float64).log())


def test_scores_are_those_of_the_text_and_fall():
    model, prompt = small(), torch.tensor([3, 3, 1])
    found = beam_search(model, prompt, n_beams=4, max_new_tokens=6, length_penalty=1.0)
    scores = [h.score for h in found]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(h.ids) for h in found}) == 4
    for ids, score in found:
        log_p = model(torch.cat([prompt, torch.tensor(ids)])[None])[0].log_softmax(-1)
        total = sum(log_p[2 + t, token] for t, token in enumerate(ids))
        assert_exact(score, total / 6)


def test_length_penalty_decides_between_short_and_long():
    model = Markov([[0.0, 0.55, 0.45], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])  # 2 ends; 1 goes on
    long = beam_search(
        model, torch.tensor([0]), n_beams=2, max_new_tokens=5, eos=2, length_penalty=1.0
    )
    assert long[0].ids == [1, 1, 1, 1, 1]
    cheap = Markov([[0.0, 0.45, 0.55], [0.0, 0.9, 0.1], [0.0, 1.0, 0.0]])
    short = beam_search(
        cheap, torch.tensor([0]), n_beams=2, max_new_tokens=5, eos=2, length_penalty=0.0
    )
    assert short[0].ids == [2]


def test_when_every_beam_has_ended_only_the_ended_are_returned():
    model = Markov([[0.0, 1.0], [0.0, 1.0]])
    found = beam_search(model, torch.tensor([0]), n_beams=1, max_new_tokens=9, eos=1)
    assert [h.ids for h in found] == [[1]]


def test_a_search_without_beams_tokens_or_prompt_is_refused():
    for prompt, n_beams, n in (([], 1, 1), ([0], 0, 1), ([0], 1, 0)):
        with pytest.raises(ValueError, match="all must be at least 1"):
            beam_search(
                TRAP,
                torch.tensor(prompt, dtype=torch.long),
                n_beams=n_beams,
                max_new_tokens=n,
            )
