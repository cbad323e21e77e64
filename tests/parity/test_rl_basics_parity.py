"""FrozenLake of gymnasium: a model and a simulator that share no code with ours."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.closeness import assert_exact
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    iterative_policy_evaluation,
    policy_evaluation,
)

pytestmark = pytest.mark.parity


def frozen_lake(*, is_slippery: bool) -> Any:
    gymnasium = pytest.importorskip("gymnasium")
    # Unwrapped: the registered environment stops after 100 steps, the model does not.
    return gymnasium.make("FrozenLake-v1", is_slippery=is_slippery).unwrapped


def as_mdp(P: dict, *, discount: float) -> TabularMDP:
    """Turn gymnasium's lists of (probability, next state, reward, terminated) into two tensors."""
    S, A = len(P), len(P[0])
    transition = torch.zeros(S, A, S, dtype=torch.float64)
    reward = torch.zeros(S, A, dtype=torch.float64)
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for probability, s_next, r, _ in outcomes:
                transition[s, a, s_next] += probability
                reward[s, a] += probability * r
    return TabularMDP(transition, reward, discount)


def numpy_values(P: dict, policy: np.ndarray, *, discount: float) -> np.ndarray:
    """Solve the Bellman equation with numpy, straight from gymnasium's lists.

    Past the end of an episode nothing follows, so the discount applies only while it lasts.
    """
    S = len(P)
    matrix, right = np.eye(S), np.zeros(S)
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for probability, s_next, r, terminated in outcomes:
                right[s] += policy[s, a] * probability * r
                if not terminated:
                    matrix[s, s_next] -= discount * policy[s, a] * probability
    return np.linalg.solve(matrix, right)


def optimal_action_values(mdp: TabularMDP) -> Tensor:
    v = torch.zeros(len(mdp.reward), dtype=torch.float64)
    for _ in range(3000):
        v = action_values(mdp, v).amax(dim=1)
    return action_values(mdp, v)


def greedy(q: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(q.argmax(dim=1), q.shape[1]).double()


@pytest.mark.parametrize("is_slippery", [False, True])
def test_values_on_frozen_lake_equal_numpy_on_gymnasiums_own_lists(is_slippery):
    P = frozen_lake(is_slippery=is_slippery).P
    mdp = as_mdp(P, discount=0.99)
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(16, 4, dtype=torch.float64, generator=generator)
    for policy in (random / random.sum(dim=1, keepdim=True), greedy(optimal_action_values(mdp))):
        expected = numpy_values(P, policy.numpy(), discount=0.99)
        assert_exact(policy_evaluation(mdp, policy), expected)
        v_0 = torch.zeros(16, dtype=torch.float64)
        iterated = iterative_policy_evaluation(mdp, policy, v_0, n_sweeps=3000)[-1]
        assert_exact(iterated, expected)


def test_terminal_states_of_frozen_lake_are_worth_zero():
    lake = frozen_lake(is_slippery=True)
    v = policy_evaluation(as_mdp(lake.P, discount=0.99), torch.full((16, 4), 0.25).double())
    ends = [s for s, letter in enumerate(lake.desc.flatten()) if letter in (b"H", b"G")]
    assert ends == [5, 7, 11, 12, 15]
    assert_exact(v[ends], torch.zeros(5))
    assert v[14] > 0


def test_values_on_frozen_lake_equal_the_mean_return_of_gymnasiums_simulator():
    lake = frozen_lake(is_slippery=True)
    mdp = as_mdp(lake.P, discount=0.99)
    policy = greedy(optimal_action_values(mdp))
    actions = policy.argmax(dim=1).tolist()
    returns, n_steps = [], 0
    state, _ = lake.reset(seed=0)
    G, weight = 0.0, 1.0
    while n_steps < 100_000:
        state, reward, terminated, _, _ = lake.step(actions[state])
        G, weight, n_steps = G + weight * float(reward), weight * 0.99, n_steps + 1
        if terminated:
            returns.append(G)
            state, _ = lake.reset()
            G, weight = 0.0, 1.0
    standard_error = np.std(returns, ddof=1) / len(returns) ** 0.5
    assert abs(np.mean(returns) - policy_evaluation(mdp, policy)[0].item()) < 4 * standard_error
    assert standard_error < 0.01


def test_optimal_values_on_frozen_lake_are_the_known_ones():
    for is_slippery, s, expected in ((False, 0, 0.99**5), (True, 0, 0.5420), (True, 14, 0.8628)):
        lake = frozen_lake(is_slippery=is_slippery)
        q = optimal_action_values(as_mdp(lake.P, discount=0.99))
        assert abs(q[s].max().item() - expected) < 5e-5
