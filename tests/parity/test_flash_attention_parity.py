"""Against torch: its CPU flash kernel with log-sum-exp, its backward, SDPA and flex attention."""

import pytest
import torch
from tests.closeness import assert_float32, relative_error
from torch.nn import functional as F

from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.flash_attention import flash_attention, flash_attention_backward

pytestmark = pytest.mark.parity


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_output_and_log_sum_exp_equal_those_of_the_flash_kernel_of_torch(causal):
    q, k, v = draw(*[(2, 3, 150, 32)] * 3)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    ours, our_lse = flash_attention(q, k, v, causal=causal)
    assert_float32(ours, out)
    assert_float32(our_lse, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_those_of_the_flash_kernel_of_torch(causal):
    q, k, v, do = draw(*[(2, 3, 150, 32)] * 4)
    aten = torch.ops.aten
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    expected = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, out, lse, 0.0, causal
    )
    ours = flash_attention_backward(
        do, q, k, v, *flash_attention(q, k, v, causal=causal), causal=causal
    )
    for actual, wanted in zip(ours, expected, strict=True):
        assert relative_error(actual, wanted) < 2e-6


def test_torch_flash_backend_agrees_with_grouped_heads():
    q, k, v = draw((2, 100, 6, 32), (2, 100, 2, 32), (2, 100, 2, 32))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))),
            is_causal=True,
        )
    assert_float32(grouped_query_attention(q, k, v, causal=True), out.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
def test_flex_attention_agrees_and_gives_the_same_log_sum_exp():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = draw(*[(2, 3, 150, 32)] * 3)
    out, lse = flex_attention(q, k, v, return_lse=True)
    ours, our_lse = flash_attention(q, k, v)
    assert_float32(ours, out)
    assert_float32(our_lse, lse)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_a_sliding_window_agrees():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = draw(*[(2, 3, 150, 32)] * 3)
    mask = create_block_mask(
        lambda b, h, t, s: (s <= t) & (s > t - 40), None, None, 150, 150, device="cpu"
    )
    ours, _ = flash_attention(q, k, v, causal=True, window=40)
    assert_float32(ours, flex_attention(q, k, v, block_mask=mask))
