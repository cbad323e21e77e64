"""Attention agrees with loops, with torch, and with its limits."""

import math

import pytest
import torch
from tests.closeness import assert_exact, relative_error
from torch.nn import functional as F

from zhizhi.large_models.attention import (
    causal_mask,
    grouped_query_attention,
    scaled_dot_product_attention,
)


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attention_by_loops(q, k, v, *, causal):
    out = torch.zeros(q.shape[0], v.shape[1], dtype=q.dtype)
    for t in range(q.shape[0]):
        last = t + k.shape[0] - q.shape[0] if causal else k.shape[0] - 1
        weights = [math.exp(float(q[t] @ k[s]) / math.sqrt(q.shape[1])) for s in range(last + 1)]
        for s, weight in enumerate(weights):
            out[t] += weight / sum(weights) * v[s]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 7), (7, 3), (1, 4)])
def test_one_head_equals_three_loops(T, S, causal):
    q, k, v = draw((T, 4), (S, 4), (S, 6))
    out = scaled_dot_product_attention(q, k, v, causal=causal)
    assert_exact(out, attention_by_loops(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_equals_torch_attention_with_keys_repeated_per_head(causal):
    q, k, v = draw((2, 9, 6, 8), (2, 9, 3, 8), (2, 9, 3, 5))
    repeated = [x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, is_causal=causal)
    assert_exact(grouped_query_attention(q, k, v, causal=causal), expected.transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_each_query_head_reads_the_key_head_of_its_group(G, causal):
    q, k, v = draw((1, 5, 4, 8), (1, 7, G, 8), (1, 7, G, 8))
    out = grouped_query_attention(q, k, v, causal=causal)
    for h in range(4):
        g = h * G // 4
        expected = scaled_dot_product_attention(q[0, :, h], k[0, :, g], v[0, :, g], causal=causal)
        assert_exact(out[0, :, h], expected)


def test_equal_scores_average_the_values():
    q, k, v = draw((3, 4), (5, 4), (5, 2))
    out = scaled_dot_product_attention(torch.zeros_like(q), k, v)
    assert_exact(out, v.mean(dim=0).expand(3, 2))


def test_one_score_far_above_the_others_selects_its_value():
    q, k, v = draw((1, 4), (5, 4), (5, 2))
    k[3] = q[0] * 1e4
    assert_exact(scaled_dot_product_attention(q, k, v)[0], v[3])


def test_order_of_the_keys_does_not_matter_without_a_mask():
    q, k, v = draw((3, 4), (5, 4), (5, 2))
    permutation = torch.tensor([3, 0, 4, 1, 2])
    permuted = scaled_dot_product_attention(q, k[permutation], v[permutation])
    assert_exact(permuted, scaled_dot_product_attention(q, k, v))


def test_causal_output_does_not_depend_on_later_keys():
    q, k, v = draw((1, 6, 2, 4), (1, 6, 1, 4), (1, 6, 1, 4))
    before = grouped_query_attention(q, k, v, causal=True)[:, :4]
    k[:, 4:], v[:, 4:] = 7.0, -7.0
    assert_exact(grouped_query_attention(q, k, v, causal=True)[:, :4], before)


def test_causal_mask_aligns_the_last_query_with_the_last_key():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(3, 2).int().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert causal_mask(1, 5).all()


def test_decoding_one_query_at_a_time_equals_all_at_once():
    q, k, v = draw((1, 6, 4, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    steps = [
        grouped_query_attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], causal=True)
        for t in range(6)
    ]
    assert_exact(torch.cat(steps, dim=1), grouped_query_attention(q, k, v, causal=True))


@pytest.mark.parametrize("function", [scaled_dot_product_attention, grouped_query_attention])
def test_a_query_without_keys_gets_zero_and_zero_gradient(function):
    q, k, v = (x.requires_grad_() for x in draw((1, 4, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)))
    heads_first = function is scaled_dot_product_attention
    out = function(*((x.transpose(1, 2) if heads_first else x) for x in (q, k, v)), causal=True)
    out = out.transpose(1, 2) if heads_first else out
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    out.sum().backward()
    assert torch.equal(q.grad[:, :2], torch.zeros_like(q.grad[:, :2]))
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_no_keys_at_all_give_zero():
    q, k, v = draw((1, 3, 2, 4), (1, 0, 1, 4), (1, 0, 1, 4))
    assert torch.equal(grouped_query_attention(q, k, v), torch.zeros_like(q))


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_equals_finite_differences(causal):
    q, k, v = (x.requires_grad_() for x in draw((1, 3, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2)))
    assert torch.autograd.gradcheck(
        lambda *x: grouped_query_attention(*x, causal=causal), (q, k, v)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_the_input(dtype):
    q, k, v = draw((1, 5, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8))
    out = grouped_query_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
    assert out.dtype == dtype
    truth = grouped_query_attention(q, k, v, causal=True)
    assert relative_error(out, truth) < 4 * torch.finfo(dtype).eps  # a few roundings in a row


def test_heads_that_do_not_divide_are_refused():
    q, k, v = draw((1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"^q has 4 heads and k has 3: 3 must divide 4\.$"):
        grouped_query_attention(q, k, v)
