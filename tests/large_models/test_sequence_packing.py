import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.large_models import llama as llama_module
from zhizhi.large_models.llama import Llama, LlamaConfig
from zhizhi.large_models.sequence_packing import (
    best_fit_decreasing,
    document_mask,
    first_fit_decreasing,
    next_fit,
    pack,
    packing_efficiency,
    pad,
    patched,
    unpad,
    varlen_attention,
)
from zhizhi.large_models.transformer_decoder import Decoder

WAYS = [next_fit, first_fit_decreasing, best_fit_decreasing]
TEXTS = [torch.tensor([1, 5, 2, 9]), torch.tensor([7, 3]), torch.tensor([4, 4, 8, 0, 6])]


def model():
    g = torch.Generator().manual_seed(0)
    m = Llama(LlamaConfig(11, 16, 24, 2, 4, 2, base=100.0), generator=g).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=g)
    return m


def best_of_all(lengths, capacity):
    """Return the fewest rows, by trying every place for every text."""

    def rows(left, room):
        if not left:
            return len(room)
        best = rows(left[1:], [*room, capacity - left[0]])
        for r in {*room}:
            if r >= left[0]:
                rest = list(room)
                rest[rest.index(r)] -= left[0]
                best = min(best, rows(left[1:], rest))
        return best

    return rows(sorted(lengths, reverse=True), [])


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_every_text_is_in_one_row_and_no_row_overflows(lengths):
    for way in WAYS:
        rows = way(lengths, capacity=20)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)


@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=7))
def test_rows_are_at_most_what_the_theorems_allow(lengths):
    best = best_of_all(lengths, 10)
    assert best >= math.ceil(sum(lengths) / 10)
    assert len(next_fit(lengths, capacity=10)) <= 2 * best
    for way in WAYS[1:]:
        assert len(way(lengths, capacity=10)) <= 11 / 9 * best + 6 / 9


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_takes_the_fullest_row_that_has_room(lengths):
    room, slow = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [(left, r) for r, left in enumerate(room) if left >= lengths[i]]
        if not fits:
            room.append(20 - lengths[i])
            slow.append([i])
        else:
            _, r = min(fits)
            room[r] -= lengths[i]
            slow[r].append(i)
    assert best_fit_decreasing(lengths, capacity=20) == slow


def test_next_fit_keeps_the_order():
    assert next_fit([5, 5, 1, 9, 1], capacity=10) == [[0, 1], [2, 3], [4]]
    assert next_fit([], capacity=3) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [0, 11])
def test_a_text_that_is_empty_or_too_long_is_refused(way, bad):
    with pytest.raises(ValueError, match=f"Text 1 has length {bad}: 1 <= length <= 10"):
        way([3, bad], capacity=10)


def test_efficiency_counts_positions():
    assert packing_efficiency([3, 4], [[0], [1]], capacity=7) == 0.5


def test_no_label_crosses_from_one_text_to_the_next():
    row = pack(TEXTS)
    assert row.ids.tolist() == [1, 5, 2, 9, 7, 3, 4, 4, 8, 0, 6]
    assert row.labels.tolist() == [-100, 5, 2, 9, -100, 3, -100, 4, 8, 0, 6]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]
    assert row.documents.tolist() == [0] * 4 + [1] * 2 + [2] * 5
    assert row.cu_seqlens.tolist() == [0, 4, 6, 11]
    masked = pack(TEXTS[:2], labels=[torch.tensor([-100, -100, 2, 9]), torch.tensor([7, 3])])
    assert masked.labels.tolist() == [-100, -100, 2, 9, -100, 3]


def test_texts_that_are_empty_or_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"lengths \[\]"):
        pack([])
    with pytest.raises(ValueError, match=r"lengths \[4, 0\]"):
        pack([TEXTS[0], torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match=r"Labels of \[2\] for texts of \[4\]"):
        pack(TEXTS[:1], labels=[torch.tensor([1, 2])])


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
def test_what_is_unpadded_comes_back(rest):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, *rest, generator=g)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    kept = unpad(x, mask)
    slow = [x[b, t] for b in range(3) for t in range(5) if mask[b, t]]
    assert torch.equal(kept.x, torch.stack(slow))
    assert kept.cu_seqlens.tolist() == [0, 2, 7, 9]
    assert kept.max_length == 5
    back = pad(kept.x, kept.indices, batch=3, length=5)
    wanted = torch.where(mask.reshape(3, 5, *[1] * len(rest)), x, torch.zeros(()))
    assert torch.equal(back, wanted)


def test_a_pad_that_is_also_eos_takes_the_real_one_away():
    eos = 9
    rows = torch.tensor([[5, 2, eos, eos], [1, 5, 2, eos]])
    lost = unpad(rows, rows != eos)
    assert lost.x.tolist() == [5, 2, 1, 5, 2]  # no text ends any more


def test_the_mask_is_a_block_for_each_text():
    documents = pack(TEXTS).documents
    mask = document_mask(documents)
    for i in range(11):
        for j in range(11):
            assert mask[i, j] == (documents[i] == documents[j] and j <= i)


def separate():
    return torch.cat([model()(text[None])[0] for text in TEXTS])


def test_packed_texts_score_as_they_do_alone():
    row, m = pack(TEXTS), model()
    with patched(llama_module, "grouped_query_attention", varlen_attention(row.cu_seqlens)):
        got = m(row.ids[None], positions=row.positions)[0]
    assert_exact(got, separate())


def test_without_boundaries_the_texts_leak():
    row, m = pack(TEXTS), model()
    leaked = m(row.ids[None], positions=row.positions)[0]
    assert_exact(leaked[:4], separate()[:4])  # the first text has nothing before it
    assert (leaked[4:] - separate()[4:]).abs().max() > 0.1


def test_rotations_need_no_reset_and_learned_positions_do():
    row, m = pack(TEXTS), model()
    with patched(llama_module, "grouped_query_attention", varlen_attention(row.cu_seqlens)):
        running = m(row.ids[None], positions=torch.arange(11))[0]
    torch.testing.assert_close(running, separate(), rtol=1e-9, atol=1e-9)

    from zhizhi.large_models import transformer_decoder

    g = torch.Generator().manual_seed(0)
    learned = Decoder(
        vocab_size=11, width=16, n_layers=1, n_heads=2, max_length=11, generator=g
    ).double()
    with patched(transformer_decoder, "grouped_query_attention", varlen_attention(row.cu_seqlens)):
        running = learned(row.ids[None])[0]
    alone = torch.cat([learned(text[None])[0] for text in TEXTS])
    assert (running - alone).abs().max() > 1e-3


def test_gradients_of_a_packed_row_are_the_sum_of_those_of_its_texts():
    row, a, b = pack(TEXTS), model(), model()
    with patched(llama_module, "grouped_query_attention", varlen_attention(row.cu_seqlens)):
        a(row.ids[None], positions=row.positions).square().sum().backward()
    for text in TEXTS:
        b(text[None]).square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)


def test_unpadded_rows_score_as_padded_ones():
    m = model()
    ids = torch.tensor([[1, 5, 2, 9, 0], [7, 3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    kept = unpad(ids, mask)
    positions = torch.cat([torch.arange(4), torch.arange(2)])
    with patched(llama_module, "grouped_query_attention", varlen_attention(kept.cu_seqlens)):
        flat = m(kept.x[None], positions=positions)[0]
    back = pad(flat, kept.indices, batch=2, length=5)
    assert_exact(back[mask], m(ids)[mask])  # padding on the right is never read by a causal model


def test_a_patch_ends_with_its_block_even_when_that_fails():
    before = llama_module.grouped_query_attention
    with (
        pytest.raises(TypeError, match="NoneType"),
        patched(llama_module, "grouped_query_attention", None),
    ):
        model()(TEXTS[0][None])
    assert llama_module.grouped_query_attention is before
    with pytest.raises(AttributeError), patched(llama_module, "no_such_name", None):
        pass
    assert not hasattr(llama_module, "no_such_name")
