import pytest
import torch
import transformers
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from zhizhi.large_models.alpaca import IGNORE, encode_example, pad_examples, sft_loss
from zhizhi.large_models.llama import Llama, LlamaConfig, load_hf_weights

pytestmark = pytest.mark.parity


def batch():
    texts = (("abc", "de"), ("a", "bcdef"), ("ab", "c"))
    return [
        encode_example(p, a, encode=lambda text: [ord(x) - 96 for x in text], eos=9)
        for p, a in texts
    ]


def test_a_batch_is_that_of_trl():
    examples = batch()
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    theirs = collator(
        [{"input_ids": e.ids.tolist(), "labels": e.labels.tolist()} for e in examples]
    )
    ours = pad_examples(examples, pad=0)
    assert torch.equal(ours.ids, theirs["input_ids"])
    assert torch.equal(ours.labels, theirs["labels"])
    assert IGNORE == -100


def test_the_loss_is_that_of_transformers():
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
    ids, labels, mask = pad_examples(batch(), pad=0)
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask.long(), labels=labels).loss
        torch.testing.assert_close(sft_loss(ours(ids), labels), wanted, rtol=1e-5, atol=1e-5)
