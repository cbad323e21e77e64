import pytest
import torch
from tests.closeness import assert_float32
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.attention_variants import LatentConfig, MultiHeadLatentAttention

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("q_latent", [24, None])
@pytest.mark.parametrize("absorb", [False, True])
def test_latent_attention_is_that_of_deepseek_v3(q_latent, absorb):
    config = LatentConfig(32, 4, 12, q_latent, 16, 8, 10)
    theirs_config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=q_latent,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=10,
        num_hidden_layers=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = DeepseekV3Attention(theirs_config, layer_idx=0).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    ours = MultiHeadLatentAttention(config)
    names = {
        "q_proj": "q_up", "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up",
        "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up",
        "o_proj": "out",
    }  # fmt: skip
    ours.load_state_dict(
        {f"{names[n.split('.')[0]]}.weight": w for n, w in theirs.state_dict().items()}
    )
    x = torch.randn(2, 9, 32)
    positions = torch.arange(9)[None]
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        embedding = DeepseekV3RotaryEmbedding(theirs_config)(x, positions)
        wanted = theirs(x, embedding, mask)[0]
        torch.testing.assert_close(ours(x, absorb=absorb), wanted, rtol=1e-4, atol=1e-5)


def test_shared_heads_are_those_of_torch():
    q, k, v = (torch.randn(2, 7, h, 8) for h in (6, 2, 2))
    wanted = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert_float32(grouped_query_attention(q, k, v, causal=True), wanted.transpose(1, 2))
