"""Our estimators on episodes that gymnasium's simulator walked, against numpy on its tables."""

from typing import Any

import numpy as np
import pytest
import torch

from zhizhi.reinforcement_learning.monte_carlo import Trajectory, every_visit, first_visit

pytestmark = pytest.mark.parity

GAMMA = 0.95
SHAPE = (16, 4)


def frozen_lake() -> Any:
    gymnasium = pytest.importorskip("gymnasium")
    # Unwrapped: the registered environment stops after 100 steps, the model does not.
    return gymnasium.make("FrozenLake-v1", is_slippery=True).unwrapped


def uniform_action_values(P: dict) -> np.ndarray:
    """Solve the Bellman equation of the uniform policy, straight from gymnasium's lists."""
    S, A = len(P), len(P[0])
    matrix, right = np.eye(S * A), np.zeros(S * A)
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for probability, s_next, r, terminated in outcomes:
                right[s * A + a] += probability * float(r)
                if not terminated:
                    matrix[s * A + a, s_next * A : s_next * A + A] -= GAMMA * probability / A
    return np.linalg.solve(matrix, right).reshape(S, A)


def walked_by_gymnasium(lake: Any, *, n_episodes: int) -> list[Trajectory]:
    chooser = np.random.default_rng(0)
    episodes = []
    state, _ = lake.reset(seed=0)
    for _ in range(n_episodes):
        episode, terminated = Trajectory([], [], []), False
        while not terminated:
            action = int(chooser.integers(4))
            episode.states.append(int(state))
            episode.actions.append(action)
            state, reward, terminated, _, _ = lake.step(action)
            episode.rewards.append(float(reward))
        episodes.append(episode)
        state, _ = lake.reset()
    return episodes


def test_means_of_returns_on_gymnasiums_episodes_approach_its_exact_action_values():
    lake = frozen_lake()
    exact = torch.from_numpy(uniform_action_values(lake.P))
    episodes = walked_by_gymnasium(lake, n_episodes=6000)
    for estimate in (every_visit, first_visit):
        total, count = torch.zeros(2, *SHAPE, dtype=torch.float64)
        for episode in episodes:
            more = estimate(episode, shape=SHAPE, discount=GAMMA)
            total, count = total + more[0], count + more[1]
        often = count > 200
        assert often.sum() > 30
        # Returns lie in [0, 1], so the variance of one is at most q (1 - q).
        q = exact[often]
        error = (total[often] / count[often] - q).abs()
        # Visits of one episode share its end: count them as if only every eighth were a new one.
        fresh = count[often] if estimate is first_visit else count[often] / 8
        assert (error <= 5 * (q * (1 - q) / fresh).sqrt() + 1e-12).all()
        assert exact.max() > 0.3


def test_the_two_ways_of_counting_differ_and_agree_on_episodes_without_returns_to_a_pair():
    episodes = walked_by_gymnasium(frozen_lake(), n_episodes=200)
    n_equal = 0
    for episode in episodes:
        every = every_visit(episode, shape=SHAPE, discount=GAMMA)
        first = first_visit(episode, shape=SHAPE, discount=GAMMA)
        pairs = set(zip(episode.states, episode.actions, strict=True))
        assert int(first[1].sum()) == len(pairs)
        assert int(every[1].sum()) == len(episode.states)
        if len(pairs) == len(episode.states):
            n_equal += 1
            assert torch.equal(torch.stack(every), torch.stack(first))
    assert 0 < n_equal < 200
