import datasets
import pytest
import torch
import transformers
import trl
from transformers.modeling_flash_attention_utils import _unpad_input

from zhizhi.large_models import llama as llama_module
from zhizhi.large_models.llama import Llama, LlamaConfig, load_hf_weights
from zhizhi.large_models.sequence_packing import (
    best_fit_decreasing,
    pack,
    patched,
    unpad,
    varlen_attention,
)

pytestmark = pytest.mark.parity
TEXTS = [torch.tensor([1, 5, 2, 9]), torch.tensor([7, 3]), torch.tensor([4, 4, 8, 0, 6])]


def test_unpadding_is_that_of_transformers():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    x = torch.arange(16).reshape(2, 4, 2)
    kept, indices, cu, longest, _ = _unpad_input(x, mask)
    ours = unpad(x, mask.bool())
    assert torch.equal(ours.x, kept)
    assert torch.equal(ours.indices, indices)
    assert torch.equal(ours.cu_seqlens, cu.long())
    assert ours.max_length == longest


def test_a_packed_row_is_that_of_the_flattening_collator():
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )
    theirs = collator([{"input_ids": text.tolist()} for text in TEXTS])
    ours = pack(TEXTS)
    assert torch.equal(ours.ids[None], theirs["input_ids"])
    assert torch.equal(ours.labels[None], theirs["labels"])
    assert torch.equal(ours.positions[None], theirs["position_ids"])
    assert torch.equal(ours.documents[None], theirs["seq_idx"].long())
    assert torch.equal(ours.cu_seqlens, theirs["cu_seq_lens_q"].long())


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_decreasing_needs_as_many_rows_as_that_of_trl(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (60,), generator=g).tolist()
    data = datasets.Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})
    theirs = trl.pack_dataset(data, seq_length=64, strategy="bfd")
    ours = best_fit_decreasing(lengths, capacity=64)
    assert len(theirs) == len(ours)


def test_positions_isolate_in_transformers_only_without_a_cache():
    """The silent leak: the same call with the default cache mixes the texts."""
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    ours = Llama(LlamaConfig(11, 16, 24, 2, 4, 2))
    load_hf_weights(ours, theirs.state_dict())
    row = pack(TEXTS)
    with torch.no_grad():
        with patched(llama_module, "grouped_query_attention", varlen_attention(row.cu_seqlens)):
            wanted = ours(row.ids[None], positions=row.positions)
        inputs = {"input_ids": row.ids[None], "position_ids": row.positions[None]}
        alone = theirs(**inputs, use_cache=False).logits
        leaked = theirs(**inputs).logits
    torch.testing.assert_close(alone, wanted, rtol=1e-4, atol=1e-4)
    assert (leaked - wanted).abs().max() > 0.05
