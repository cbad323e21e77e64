import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from tests.closeness import assert_float32
from trl.rewards import think_format_reward

from zhizhi.large_models.deepseek_r1 import token_weights

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_weights_are_those_of_liger(aggregation):
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    hidden, head = torch.randn(3, 4, 8, generator=g), torch.randn(11, 8, generator=g)
    ids = torch.randint(11, (3, 4), generator=g)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        loss_type=aggregation,
        max_completion_length=4,
    )
    theirs = loss(hidden, head, ids, mask.long(), advantages, old_per_token_logps=logp - 0.05)[0]
    ratio = torch.full((3, 4), 0.05).exp()
    weights = token_weights(mask, aggregation=aggregation, max_length=4)
    assert_float32(-(weights * ratio * advantages[:, None]).sum(), theirs)


def test_the_format_of_trl_asks_for_the_thought_alone():
    texts = ["<think>a</think>\n7", "7"]
    got = think_format_reward([[{"content": text}] for text in texts])
    assert got == [1.0, 0.0]
