import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.large_models.rlhf_ppo import last_token, ranking_loss

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def trl_utils():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of experimental parts
        return pytest.importorskip("trl.experimental.utils")


def test_the_last_token_is_where_trl_reads_the_reward(trl_utils):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (32,), generator=g)
    answered = torch.arange(8) < lengths[:, None]
    theirs = trl_utils.first_true_indices(~answered) - 1  # its get_reward does the same
    values = torch.randn(32, 8, generator=g)
    score, place = last_token(values, answered)
    assert torch.equal(place, theirs)
    assert_float32(score, values[torch.arange(32), theirs])


def test_two_answers_are_a_logistic_regression_on_the_margin():
    rewards = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    peer = torch.nn.functional.binary_cross_entropy_with_logits(
        rewards[:, 0] - rewards[:, 1], torch.ones(16)
    )
    assert_float32(ranking_loss(rewards), peer)
