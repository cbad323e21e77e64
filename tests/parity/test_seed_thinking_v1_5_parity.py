import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from tests.closeness import assert_float32
from trl.rewards import get_soft_overlong_punishment

from zhizhi.large_models.deepseek_r1 import token_weights
from zhizhi.large_models.seed_thinking_v1_5 import clip_higher_surrogate, soft_overlong_penalty

pytestmark = pytest.mark.parity


def test_the_penalty_is_that_of_trl():
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=4)
    lengths = list(range(1, 30))
    ours = soft_overlong_penalty(torch.tensor(lengths), max_length=20, cache=4)
    assert ours.tolist() == theirs(completion_ids=[[0] * n for n in lengths])


def test_the_loss_of_dapo_is_that_of_liger():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    hidden, head = torch.randn(3, 4, 8, generator=g), torch.randn(11, 8, generator=g)
    ids = torch.randint(11, (3, 4), generator=g)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = logp + 0.5 * torch.randn(3, 4, generator=g)  # ratios on both sides of both limits
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo",
        epsilon_low=0.2, epsilon_high=0.28,
    )  # fmt: skip
    theirs = loss(hidden, head, ids, mask.long(), advantages, old_per_token_logps=old)[0]
    terms = clip_higher_surrogate(logp, old, advantages[:, None].expand_as(logp))
    assert_float32(-(token_weights(mask, aggregation="dapo") * terms).sum(), theirs)
