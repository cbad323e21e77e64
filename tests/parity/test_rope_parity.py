import pytest
import torch
import transformers
from tests.closeness import assert_float32
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from zhizhi.large_models.rope import (
    by_parts_frequencies,
    interpolated_frequencies,
    ntk_frequencies,
    rope_frequencies,
    rotate,
    yarn_frequencies,
    yarn_temperature,
)

pytestmark = pytest.mark.parity


def config(**rope):
    return transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=rope.pop("max_position_embeddings", 2048),
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"} | rope,
    )


def test_the_rotation_is_that_of_llama():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 9, 3, 128, generator=g) for _ in range(2))
    positions = torch.arange(100, 109)
    rotary = LlamaRotaryEmbedding(config())
    cos, sin = rotary(q, positions[None])
    wanted = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, theirs in zip((q, k), wanted, strict=True):
        ours = rotate(x, positions, rope_frequencies(128)).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # angles in float32 there


def test_interpolation_is_linear_scaling():
    theirs, factor = ROPE_INIT_FUNCTIONS["linear"](config(rope_type="linear", factor=4.0), "cpu")
    assert factor == 1.0
    assert_float32(interpolated_frequencies(rope_frequencies(128), scale=4.0), theirs)


def test_ntk_is_the_dynamic_rule_at_a_given_length():
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        config(rope_type="dynamic", factor=1.0), "cpu", seq_len=8192
    )
    assert_float32(ntk_frequencies(128, scale=4.0), theirs)


@pytest.mark.parametrize(("scale", "base"), [(4.0, 10_000.0), (16.0, 500_000.0), (40.0, 10_000.0)])
def test_yarn_frequencies_and_temperature_are_theirs(scale, base):
    setting = config(
        rope_type="yarn",
        factor=scale,
        rope_theta=base,
        original_max_position_embeddings=4096,
        max_position_embeddings=int(4096 * scale),
    )
    theirs, temperature = ROPE_INIT_FUNCTIONS["yarn"](setting, "cpu")
    ours = yarn_frequencies(128, scale=scale, trained_length=4096, base=base)
    assert_float32(ours, theirs)
    assert abs(temperature - yarn_temperature(scale)) < 1e-12


def test_by_parts_with_four_turns_is_llama3():
    setting = config(
        rope_type="llama3",
        factor=8.0,
        rope_theta=500_000.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        max_position_embeddings=131_072,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](setting, "cpu")
    ours = by_parts_frequencies(128, scale=8.0, trained_length=8192, base=500_000.0, fast=4.0)
    assert_float32(ours, theirs)
