import peft
import pytest
import torch
import transformers

from zhizhi.large_models.adapter_tuning import ScaledLinear
from zhizhi.large_models.llama import Llama, LlamaConfig, load_hf_weights
from zhizhi.large_models.prefix_tuning import Prefix

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
IDS = torch.tensor([[3, 14, 15, 9, 2]])


def pair():
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Llama(LlamaConfig(31, 32, 48, 2, 4, 2))
    load_hf_weights(ours, theirs.state_dict())
    return ours, theirs


def test_rescaling_is_ia3_of_peft():
    ours, theirs = pair()
    theirs = peft.get_peft_model(
        theirs,
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.base_model.model.model.layers, strict=True):
            for owner, name, module, on in (
                (block, "k", layer.self_attn.k_proj, "output"),
                (block, "v", layer.self_attn.v_proj, "output"),
                (block.mlp, "down", layer.mlp.down_proj, "input"),
            ):
                scaled = ScaledLinear(getattr(owner, name), on=on)
                scaled.scale.copy_(torch.rand(len(scaled.scale), generator=g) + 0.5)
                module.ia3_l["default"].copy_(scaled.scale.reshape(module.ia3_l["default"].shape))
                setattr(owner, name, scaled)
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_prefix_is_that_of_peft():
    ours, theirs = pair()
    theirs = peft.get_peft_model(
        theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    table = theirs.prompt_encoder["default"].embedding.weight  # [P, L two G Dh]
    prefix = Prefix(length=5, n_layers=2, n_kv_heads=2, head_width=8)
    with torch.no_grad():
        prefix.table.copy_(table)
        wanted = theirs(IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(
            ours(IDS, cache=prefix.cache(batch=1)), wanted, rtol=1e-4, atol=1e-5
        )
