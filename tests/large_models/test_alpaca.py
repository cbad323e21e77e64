import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_float32

from zhizhi.large_models.alpaca import (
    IGNORE,
    encode_example,
    keep_new,
    longest_common_subsequence,
    pad_examples,
    prompt_of,
    refusal,
    rouge_l,
    sft_loss,
)
from zhizhi.large_models.tokenizer_bpe import BPETokenizer, train_bpe


def letters(text):
    return [ord(x) - 96 for x in text]


def test_the_template_has_an_input_only_if_there_is_one():
    both, one = prompt_of("Add.", context="1 2"), prompt_of("Add.")
    assert both.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert one.endswith("the request.\n\n### Instruction:\nAdd.\n\n### Response:")
    assert "Input" not in one
    assert "paired with an input" in both


def test_a_template_keeps_braces_of_what_is_put_in():
    assert "{x}" in prompt_of("Print {x}.", context="{y}")


def test_only_the_answer_and_its_end_are_asked_for():
    example = encode_example("abc", "de", encode=letters, eos=0)
    assert example.ids.tolist() == [1, 2, 3, 4, 5, 0]
    assert example.labels.tolist() == [IGNORE] * 3 + [4, 5, 0]
    with pytest.raises(ValueError, match="The prompt has no token"):
        encode_example("", "de", encode=letters, eos=0)


def test_encoding_both_at_once_may_swallow_the_boundary():
    pattern = r"\S+|\s+"
    merges = train_bpe(["x:b y:b z:b"], vocab_size=257, pattern=pattern)
    tokenizer = BPETokenizer(merges, pattern=pattern)
    prompt, answer = "a:", "b"
    joined = tokenizer.encode(prompt + answer)
    assert joined[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)
    apart = encode_example(prompt, answer, encode=tokenizer.encode, eos=999)
    n = len(tokenizer.encode(prompt))
    assert apart.ids[:n].tolist() == tokenizer.encode(prompt)
    assert apart.labels[n:].tolist() == [*tokenizer.encode(answer), 999]


def test_filling_is_masked_by_place_and_a_real_end_stays():
    eos = 0
    examples = [
        encode_example(p, a, encode=letters, eos=eos) for p, a in (("a", "b"), ("ab", "cd"))
    ]
    batch = pad_examples(examples, pad=eos)
    assert batch.ids.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]]
    assert batch.labels.tolist() == [
        [IGNORE, 2, 0, IGNORE, IGNORE],
        [IGNORE, IGNORE, 3, 4, 0],
    ]
    assert batch.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    with pytest.raises(ValueError, match="no example"):
        pad_examples([], pad=0)


def test_the_loss_is_the_mean_over_what_counts():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=g)
    labels = torch.tensor([[IGNORE, 2, 0, IGNORE, IGNORE], [5, IGNORE, 3, 4, 0]])
    terms = [
        -logits[b, t - 1].log_softmax(-1)[labels[b, t]]
        for b in range(2)
        for t in range(1, 5)
        if labels[b, t] != IGNORE
    ]
    assert len(terms) == 5  # the first label has nothing before it
    assert_float32(sft_loss(logits, labels), torch.stack(terms).mean())


def test_masked_places_get_no_gradient_and_a_loss_of_nothing_is_refused():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    sft_loss(logits, torch.tensor([[IGNORE, IGNORE, 3, IGNORE]])).backward()
    assert logits.grad[0, 1].any()
    assert not logits.grad[0, [0, 2, 3]].any()
    with pytest.raises(ValueError, match="No label counts"):
        sft_loss(logits, torch.tensor([[5, IGNORE, IGNORE, IGNORE]]))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_the_longest_common_subsequence_is_that_of_all(a, b):
    def subsequences(x):
        return {c for n in range(len(x) + 1) for c in itertools.combinations(x, n)}

    assert longest_common_subsequence(a, b) == max(map(len, subsequences(a) & subsequences(b)))


@given(st.text(alphabet="ab c.D", max_size=20), st.text(alphabet="ab c.D", max_size=20))
def test_rouge_is_symmetric_and_one_only_for_the_same_words(a, b):
    assert rouge_l(a, b) == rouge_l(b, a)
    assert 0 <= rouge_l(a, b) <= 1
    words = [x.replace(".", " ").lower().split() for x in (a, b)]
    assert (rouge_l(a, b) == 1) == (words[0] == words[1] != [])


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Name three rivers", "3 words"),
        (" ".join(["word"] * 151), "151 words"),
        ("Describe the attached image in detail", "image"),
        ("Write a program that sorts a list", "a program"),
        ("(Optional) name three rivers of Asia", "begins with '('"),
        ("你好 name three rivers of Asia", "begins with '你'"),
    ],
)
def test_what_is_unfit_is_thrown_away_for_a_reason(instruction, reason):
    assert reason in refusal(instruction)


def test_a_fit_instruction_stays():
    assert refusal("Name three rivers of Asia.") is None
    assert refusal("Explain imagery in a poem by Heine.") is None  # a word, not a part of one


def test_the_pool_stays_diverse():
    candidates = [
        f"{verb} three {thing} of {place} please."
        for verb in ("Name", "Describe", "Compare")
        for thing in ("rivers", "cities")
        for place in ("Asia", "Africa")
    ]
    kept = keep_new(candidates, ["Name three rivers of Europe please."])
    for a, b in itertools.combinations(kept, 2):
        assert rouge_l(a, b) <= 0.7
    dropped = [c for c in candidates if c not in kept]
    for c in dropped:
        assert (
            max(rouge_l(c, other) for other in [*kept, "Name three rivers of Europe please."]) > 0.7
        )
    assert keep_new(candidates, [], threshold=1.0) == candidates
