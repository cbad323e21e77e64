import pytest
import torch
import transformers

from zhizhi.large_models.generation import generate
from zhizhi.large_models.llama import LLAMA_1, Llama, LlamaConfig, llama_parameters, load_hf_weights

pytestmark = pytest.mark.parity


def theirs_of(config, **changes):
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.base},
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        **changes,
    )


def pair():
    """Return our model and theirs with the same random weights."""
    config = LlamaConfig(31, 32, 48, 3, 4, 2, base=500.0)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(theirs_of(config)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = Llama(config)
    load_hf_weights(ours, theirs.state_dict())
    return ours, theirs


PROMPT = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 7]])


def test_the_scores_and_the_loss_are_those_of_transformers():
    from zhizhi.large_models.transformer_decoder import next_token_loss

    ours, theirs = pair()
    with torch.no_grad():
        wanted = theirs(PROMPT, labels=PROMPT)
        got = ours(PROMPT)
    torch.testing.assert_close(got, wanted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_token_loss(got, PROMPT), wanted.loss, rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_where_theirs_rounds():
    ours, theirs = (model.bfloat16() for model in pair())
    with torch.no_grad():
        got, wanted = ours(PROMPT), theirs(PROMPT).logits
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() < 0.03 * scale  # attention is summed in another order


def test_gradients_are_those_of_transformers():
    ours, theirs = pair()
    for model in (ours, theirs):
        logits = model(PROMPT) if model is ours else model(PROMPT).logits
        logits.square().mean().backward()
    torch.testing.assert_close(
        ours.blocks[0].k.weight.grad,
        theirs.model.layers[0].self_attn.k_proj.weight.grad,
        rtol=1e-4,
        atol=1e-4,
    )


def test_greedy_and_drawn_tokens_are_the_same():
    ours, theirs = pair()
    how = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(PROMPT, do_sample=False, **how)
    assert torch.equal(generate(ours, PROMPT, max_new_tokens=30), wanted)
    torch.manual_seed(7)
    wanted = theirs.generate(PROMPT, do_sample=True, top_k=0, top_p=0.9, **how)
    torch.manual_seed(7)
    got = generate(ours, PROMPT, max_new_tokens=30, temperature=1.0, top_p=0.9)
    assert torch.equal(got, wanted)


def test_the_counts_are_theirs():
    for config in (LLAMA_1["7B"], LlamaConfig(128_256, 4096, 14_336, 32, 32, 8)):
        with torch.device("meta"):
            theirs = transformers.LlamaForCausalLM(theirs_of(config))
        assert theirs.num_parameters() == llama_parameters(config)
