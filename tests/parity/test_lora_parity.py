import peft
import pytest
import torch
import transformers
from bitsandbytes import functional as bnb

from zhizhi.large_models.llama import Llama, LlamaConfig, load_hf_weights
from zhizhi.large_models.lora import inject_lora, lora_state, merge_lora
from zhizhi.large_models.nf4 import dequantize_nf4, nf4_levels, quantize_nf4

pytestmark = pytest.mark.parity
IDS = torch.tensor([[3, 14, 15, 9, 2]])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("stabilised", [False, True])
def test_forward_and_merge_are_those_of_peft(stabilised):
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
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], use_rslora=stabilised
        ),
    ).eval()
    inject_lora(ours, r"\.(q|v)$", rank=3, alpha=7.0, stabilised=stabilised)
    with torch.no_grad():
        for name, w in lora_state(ours).items():
            w.normal_(std=0.2)
            _, i, letter, part = name.split(".")
            layer = theirs.base_model.model.model.layers[int(i)].self_attn
            module = getattr(layer, f"{letter}_proj")
            getattr(module, f"lora_{part}")["default"].weight.copy_(w)
        wanted = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS), wanted, rtol=1e-4, atol=1e-5)
        merged = theirs.merge_and_unload()
        merge_lora(ours)
        torch.testing.assert_close(ours(IDS), merged(IDS).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.blocks[1].q.weight,
            merged.model.layers[1].self_attn.q_proj.weight,
            rtol=1e-6,
            atol=1e-7,
        )


def test_levels_are_those_of_bitsandbytes():
    wanted = bnb.create_normal_map(offset=0.9677083)
    wanted = wanted[wanted.nonzero().flatten()].sort().values
    ours = nf4_levels()
    torch.testing.assert_close(ours[ours != 0], wanted.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (7, 192)])
def test_codes_scales_and_values_are_those_of_bitsandbytes(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = quantize_nf4(w)
    pairs = packed.flatten()
    theirs = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()
    assert torch.equal(ours.codes, theirs)
    assert torch.equal(ours.absmax, state.absmax)
    torch.testing.assert_close(
        dequantize_nf4(ours), bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7
    )
