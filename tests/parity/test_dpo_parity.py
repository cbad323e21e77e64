"""DPO against Liger's fused loss and against TRL's trainer, both offline on random weights."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.closeness import assert_float32

from zhizhi.large_models.dpo import dpo_loss, hinge_loss, implicit_reward, sequence_log_probs

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("loss_type", "ours"), [("sigmoid", dpo_loss), ("hinge", hinge_loss)])
def test_loss_and_gradient_equal_liger_fused_linear_dpo(loss_type, ours):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    generator = torch.Generator().manual_seed(0)
    hidden, hidden_ref = torch.randn(2, 6, 7, 16, generator=generator)  # 3 chosen, 3 rejected
    weight, weight_ref = torch.randn(2, 11, 16, generator=generator)
    labels = torch.randint(0, 11, (6, 7), generator=generator)
    labels[0, :3] = labels[3, :3] = labels[4, 5:] = -100

    theirs = chunked_loss.LigerFusedLinearDPOLoss(
        ignore_index=-100,
        beta=0.1,
        compiled=False,
        use_ref_model=True,
        average_log_prob=False,
        loss_type=loss_type,
    )
    their_weight = weight.clone().requires_grad_()
    # Liger does not shift: it takes the hidden states and the labels that they predict.
    shifted = hidden[:, :-1].contiguous(), labels[:, 1:].contiguous()
    expected, _ = theirs(
        their_weight,
        *shifted,
        ref_input=hidden_ref[:, :-1].contiguous(),
        ref_weight=weight_ref,
    )
    expected.backward()

    our_weight = weight.clone().requires_grad_()
    w, l = sequence_log_probs(hidden @ our_weight.T, labels).chunk(2)
    ref_w, ref_l = sequence_log_probs(hidden_ref @ weight_ref.T, labels).chunk(2)
    actual = ours(w, l, ref_w, ref_l, beta=0.1).mean()
    actual.backward()

    assert_float32(actual, expected)
    assert our_weight.grad is not None
    assert their_weight.grad is not None
    assert_float32(our_weight.grad, their_weight.grad)


# The peers warn about themselves when they are imported and when a trainer starts.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.slow
def test_loss_and_rewards_equal_trl_dpo_trainer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        transformers = pytest.importorskip("transformers")
        datasets = pytest.importorskip("datasets")
        tokenizers = pytest.importorskip("tokenizers")

    words = ["<pad>", "<eos>", "<unk>", "sort", "three", "one", "two", "four", "down", "up"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = transformers.LlamaForCausalLM(config)
        reference = transformers.LlamaForCausalLM(config)
    pairs = datasets.Dataset.from_list(
        [
            {"prompt": "sort up", "chosen": " one two three", "rejected": " three one"},
            {"prompt": "sort down four", "chosen": " four two", "rejected": " one two four four"},
        ]
    )
    settings = trl.DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        beta=0.1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(trainer.model, dict(batch)).detach()

    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        logps = sequence_log_probs(policy(ids, attention_mask=mask).logits, labels)
        logps_ref = sequence_log_probs(reference(ids, attention_mask=mask).logits, labels)
    (w, l), (ref_w, ref_l) = logps.chunk(2), logps_ref.chunk(2)

    assert_float32(dpo_loss(w, l, ref_w, ref_l, beta=0.1).mean(), expected)
    margin = implicit_reward(w, ref_w, beta=0.1) - implicit_reward(l, ref_l, beta=0.1)
    assert_float32(F.softplus(-margin).mean(), expected)
    assert abs(expected.item() - 0.6931) > 1e-3  # the two models differ, so the check is not empty
