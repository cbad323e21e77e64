import pytest
import torch
import transformers
from tests.closeness import assert_float32

from zhizhi.large_models.generation import beam_search, generate, next_token_distribution
from zhizhi.large_models.lr_schedule import cosine_with_warmup
from zhizhi.large_models.transformer_decoder import Decoder, decoder_parameters

pytestmark = pytest.mark.parity


def pair():
    """Return our decoder and GPT-2 of transformers with the same random weights."""
    g = torch.Generator().manual_seed(0)
    ours = Decoder(vocab_size=31, width=24, n_layers=3, n_heads=4, max_length=40, generator=g)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=g)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=40, n_embd=24, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=30, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    names = {
        "ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_attn": "qkv", "attn.c_proj": "attn_out",
        "mlp.c_fc": "up", "mlp.c_proj": "down",
    }  # fmt: skip
    state = {
        "transformer.wte.weight": ours.token.weight,
        "transformer.wpe.weight": ours.position.weight,
        "transformer.ln_f.weight": ours.norm.weight,
        "transformer.ln_f.bias": ours.norm.bias,
        "lm_head.weight": ours.token.weight,
    }
    for i, block in enumerate(ours.blocks):
        for theirs_name, ours_name in names.items():
            layer = getattr(block, ours_name)
            weight = layer.weight.T if "c_" in theirs_name else layer.weight  # Conv1D is [in, out]
            state[f"transformer.h.{i}.{theirs_name}.weight"] = weight
            state[f"transformer.h.{i}.{theirs_name}.bias"] = layer.bias
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("attn.bias") for name in missing)
    return ours, theirs


PROMPT = torch.tensor([[3, 14, 15, 9], [2, 6, 5, 7]])


def test_the_scores_are_those_of_gpt2():
    ours, theirs = pair()
    with torch.no_grad():
        torch.testing.assert_close(ours(PROMPT), theirs(PROMPT).logits, rtol=1e-5, atol=1e-4)


def test_the_counts_are_those_of_gpt2_and_its_big_sisters():
    for width, n_layers, heads in ((768, 12, 12), (1600, 48, 25)):
        with torch.device("meta"):
            config = transformers.GPT2Config(n_embd=width, n_layer=n_layers, n_head=heads)
            theirs = transformers.GPT2LMHeadModel(config)
        assert theirs.num_parameters() == decoder_parameters(
            vocab_size=50257, width=width, n_layers=n_layers, max_length=1024
        )


def test_greedy_tokens_are_the_same():
    ours, theirs = pair()
    wanted = theirs.generate(PROMPT, max_new_tokens=30, do_sample=False, eos_token_id=None,
                             pad_token_id=0)  # fmt: skip
    assert torch.equal(generate(ours, PROMPT, max_new_tokens=30), wanted)


@pytest.mark.parametrize(
    "how",
    [{"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}],
)
def test_drawn_tokens_are_the_same(how):
    ours, theirs = pair()
    torch.manual_seed(5)
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | how
    wanted = theirs.generate(PROMPT, max_new_tokens=25, do_sample=True, eos_token_id=None,
                             pad_token_id=0, **settings)  # fmt: skip
    torch.manual_seed(5)
    got = generate(ours, PROMPT, max_new_tokens=25, **({"temperature": 1.0} | how))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("eos", [None, 30])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_are_the_same(eos, penalty):
    ours, theirs = pair()
    for prompt in PROMPT:
        wanted = theirs.generate(
            prompt[None], num_beams=4, max_new_tokens=12, do_sample=False, eos_token_id=eos,
            pad_token_id=0, length_penalty=penalty, early_stopping="never", num_return_sequences=4,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        found = beam_search(
            ours, prompt, n_beams=4, max_new_tokens=12, eos=eos, length_penalty=penalty
        )
        for hypothesis, ids, score in zip(
            found, wanted.sequences, wanted.sequences_scores, strict=True
        ):
            padded = hypothesis.ids + [0] * (ids.shape[0] - 4 - len(hypothesis.ids))
            assert padded == ids[4:].tolist()
            assert abs(hypothesis.score - score.item()) < 1e-4


def test_the_cut_of_top_p_is_that_of_the_warper():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * 3
    warper = transformers.TopPLogitsWarper(top_p=0.75)
    wanted = warper(None, logits).softmax(-1)
    assert_float32(next_token_distribution(logits, top_p=0.75), wanted)


def test_the_schedule_is_the_cosine_of_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=7, num_training_steps=50, min_lr_rate=0.1
    )
    for step in range(50):
        ours = cosine_with_warmup(step, n_steps=50, n_warmup=7, floor=0.1)
        assert abs(schedule.get_last_lr()[0] - ours) < 1e-12
        optimizer.step()
        schedule.step()
