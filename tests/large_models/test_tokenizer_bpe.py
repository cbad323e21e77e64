import itertools
import json
import math
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhizhi.large_models.tiny_text import tiny_text
from zhizhi.large_models.tokenizer_bpe import (
    BYTE_ID,
    BYTES,
    WORDS,
    WORDS_AND_DIGITS,
    BPETokenizer,
    bits_per_byte,
    merge_pair,
    train_bpe,
)

TEXT = "low low low lower lowest newer newer wider 你好 你好 你们, don't! 12345 12345"


def train_slowly(texts, n_merges, pattern=WORDS, min_count=2):
    """Count every pair of every word anew for each merge."""
    words = [[BYTE_ID[b] for b in w.encode()] for t in texts for w in re.findall(pattern, t)]
    merges = []
    for new in range(256, 256 + n_merges):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts or max(counts.values()) < min_count:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [merge_pair(word, best, new) for word in words]
    return merges


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet="ab c1'é你\n", max_size=40), max_size=4))
def test_counting_as_one_goes_learns_what_counting_anew_learns(texts):
    assert train_bpe(texts, vocab_size=256 + 30) == train_slowly(texts, 30)


def test_on_real_text_too():
    text = tiny_text()[:6000]
    assert train_bpe([text], vocab_size=256 + 150) == train_slowly([text], 150)


def test_fewer_merges_are_the_beginning_of_more():
    long = train_bpe([TEXT], vocab_size=290)
    assert train_bpe([TEXT], vocab_size=270) == long[:14]


def test_training_ends_when_no_pair_occurs_often_enough():
    merges = train_bpe(["abcd abcd xy"], vocab_size=1000, min_count=2)
    tokenizer = BPETokenizer(merges)
    made = {tokenizer.token_bytes(256 + i) for i in range(len(merges))}
    assert b" abcd" not in made  # once
    assert b"abcd" in made
    assert b"xy" not in made
    once = BPETokenizer(train_bpe(["abcd abcd xy"], vocab_size=1000, min_count=1))
    assert len(once.encode(" xy")) == 1


def test_no_merge_crosses_a_cut():
    tokenizer = BPETokenizer(train_bpe(["a b a b a b a b"] * 5, vocab_size=400))
    for i in range(256, tokenizer.vocab_size):
        assert tokenizer.token_bytes(i) in (b" a", b" b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I'll go", ["I", "'ll", " go"]),
        ("a  b", ["a", " ", " b"]),
        ("x\n\n y", ["x", "\n\n", " y"]),
        ("end  ", ["end", "  "]),
        ("你好，世界", ["你好", "，", "世界"]),
        ("in 2023_a", ["in", " 2023", "_", "a"]),
    ],
)
def test_words_are_cut_as_gpt2_cuts_them(text, words):
    assert re.findall(WORDS, text) == words


def test_digits_may_be_cut_one_by_one():
    assert re.findall(WORDS_AND_DIGITS, "in 2023") == ["in", " ", "2", "0", "2", "3"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    for pattern in (WORDS, WORDS_AND_DIGITS):
        assert "".join(re.findall(pattern, text)) == text
        tokenizer = BPETokenizer(
            train_bpe([TEXT], vocab_size=290, pattern=pattern), pattern=pattern
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream(ids)) == text
        assert len(ids) <= len(text.encode())


def test_encoding_applies_merges_in_the_order_they_were_learnt():
    tokenizer = BPETokenizer(train_bpe([TEXT], vocab_size=320))
    for word in re.findall(WORDS, TEXT):
        ids = [BYTE_ID[b] for b in word.encode()]
        for i, pair in enumerate(tokenizer.merges):
            ids = merge_pair(ids, pair, 256 + i)
        assert tokenizer.encode(word) == ids


def test_bytes_are_numbered_as_in_gpt2():
    assert sorted(BYTES) == list(range(256))
    assert BYTES[0] == ord("!")
    assert BYTES[220] == ord(" ")  # the id of a blank in GPT-2


def test_what_users_write_never_becomes_a_special_token():
    tokenizer = BPETokenizer(train_bpe([TEXT], vocab_size=300), special=["<end>", "<end>x"])
    plain = tokenizer.encode("a<end>")
    assert max(plain) < tokenizer.special["<end>"]
    assert tokenizer.decode(plain) == "a<end>"
    meant = tokenizer.encode("a<end>b<end>x", allow_special=True)
    assert meant == [
        *tokenizer.encode("a"),
        tokenizer.special["<end>"],
        *tokenizer.encode("b"),
        tokenizer.special["<end>x"],  # the longer name wins
    ]
    assert tokenizer.decode(meant) == "a<end>b<end>x"


def test_half_a_character_waits_for_the_other_half():
    tokenizer = BPETokenizer([])
    pieces = list(tokenizer.stream(tokenizer.encode("a你b")))
    assert pieces == ["a", "", "", "你", "b", ""]
    cut = tokenizer.encode("你")[:2]
    assert tokenizer.decode(cut) == "\ufffd"
    assert list(tokenizer.stream(cut)) == ["", "", "\ufffd"]


def test_a_file_gives_the_same_tokenizer_and_another_file_an_error(tmp_path):
    tokenizer = BPETokenizer(
        train_bpe([TEXT], vocab_size=300, pattern=WORDS_AND_DIGITS),
        pattern=WORDS_AND_DIGITS,
        special=["<end>"],
    )
    path = tmp_path / "bpe.json"
    tokenizer.save(path)
    again = BPETokenizer.load(path)
    assert again.encode(TEXT + "<end>", allow_special=True) == tokenizer.encode(
        TEXT + "<end>", allow_special=True
    )
    for bad in ("[]", "{}", "not json", json.dumps({"merges": [1], "pattern": "", "special": []})):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"bpe\.json is no tokenizer"):
            BPETokenizer.load(path)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 255"):
        train_bpe([TEXT], vocab_size=255)
    with pytest.raises(ValueError, match="Merge 0 joins 256 and 1: only ids below 256"):
        BPETokenizer([(256, 1)])
    with pytest.raises(ValueError, match="each needs a name of its own"):
        BPETokenizer([], special=["a", "a"])
    with pytest.raises(ValueError, match="each needs a name of its own"):
        BPETokenizer([], special=[""])
    with pytest.raises(ValueError, match="Token 256: ids go from 0 to 255"):
        BPETokenizer([]).decode([256])
    with pytest.raises(ValueError, match="n_tokens is 0"):
        bits_per_byte(1.0, n_tokens=0, n_bytes=3)


def test_bits_a_byte_do_not_depend_on_the_cut():
    """A model that spreads p evenly over a text is as good by the byte, however it is cut."""
    n_bytes, total_nats = 300, 200.0
    for n_tokens in (300, 100, 7):
        got = bits_per_byte(total_nats / n_tokens, n_tokens=n_tokens, n_bytes=n_bytes)
        assert got == pytest.approx(total_nats / math.log(2) / n_bytes)
