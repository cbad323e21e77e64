"""CliffWalking of gymnasium: the cliff of the article is its cliff, and both algorithms walk it."""

import pytest
import torch
from tests.parity.test_rl_basics_parity import as_mdp

from zhizhi.reinforcement_learning.temporal_difference import (
    cliff_walking,
    q_learning_target,
    sarsa_target,
    td_control,
)

pytestmark = pytest.mark.parity


def test_the_cliff_is_that_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    P = gymnasium.make("CliffWalking-v1").unwrapped.P
    theirs, ours = as_mdp(P, discount=0.99), cliff_walking()
    inside = [s for s in range(48) if not 37 <= s <= 47]  # nobody stands on the cliff or the goal
    assert torch.equal(ours.transition[inside], theirs.transition[inside])
    assert torch.equal(ours.reward[inside], theirs.reward[inside])


def test_sarsa_takes_the_safe_way_and_q_learning_the_edge():
    greedy_returns = {}
    for target in (sarsa_target, q_learning_target):
        run = td_control(
            cliff_walking(), target, start=36, ends=[47], n_episodes=500, alpha=0.5, epsilon=0.1,
            discount=1.0, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        gymnasium = pytest.importorskip("gymnasium")
        environment = gymnasium.make("CliffWalking-v1")
        s, _ = environment.reset()
        total, over = 0.0, False
        for _ in range(100):
            s, reward, over, _, _ = environment.step(int(run.q[s].argmax()))
            total += float(reward)
            if over:
                break
        assert over
        greedy_returns[target.__name__] = total
    assert greedy_returns["q_learning_target"] == -13
    assert greedy_returns["sarsa_target"] in (-15, -17)
