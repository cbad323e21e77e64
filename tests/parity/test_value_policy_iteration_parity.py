"""Optimal values of gymnasium's tables, solved by a linear program straight from its lists."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP
from zhizhi.reinforcement_learning.rl_basics import action_values
from zhizhi.reinforcement_learning.value_policy_iteration import (
    gauss_seidel_sweep,
    greedy_policy,
    optimal_value_bounds,
    policy_iteration,
    truncated_policy_iteration,
    value_iteration,
)

pytestmark = pytest.mark.parity

GAMMA = 0.95
PROBLEMS = {
    "FrozenLake-v1": {"is_slippery": True},
    "FrozenLake8x8-v1": {"is_slippery": True},
    "CliffWalking-v1": {},
}


def environment(name: str) -> Any:
    gymnasium = pytest.importorskip("gymnasium")
    # Unwrapped: the registered environment may stop after some steps, the table does not.
    return gymnasium.make(name, **PROBLEMS[name]).unwrapped


def as_mdp(P: dict, *, discount: float) -> TabularMDP:
    """Turn (probability, next state, reward, terminated) into tensors with one state more.

    CliffWalking leaves its goal again: only the flag says that the episode is over there. So every
    terminated outcome leads to an extra state that keeps the agent and pays nothing.
    """
    S, A = len(P), len(P[0])
    transition = torch.zeros(S + 1, A, S + 1, dtype=torch.float64)
    reward = torch.zeros(S + 1, A, dtype=torch.float64)
    transition[S, :, S] = 1.0
    for s, actions in P.items():
        for a, outcomes in actions.items():
            for probability, s_next, r, terminated in outcomes:
                transition[s, a, S if terminated else s_next] += probability
                reward[s, a] += probability * float(r)
    return TabularMDP(transition, reward, discount)


def linear_program(P: dict, *, discount: float) -> np.ndarray:
    """Minimise the sum of v subject to v >= r + gamma P v, one row for each state and action."""
    S = len(P)
    rows, right = [], []
    for s, actions in P.items():
        for outcomes in actions.values():
            row, expected = np.zeros(S), 0.0
            row[s] -= 1.0
            for probability, s_next, r, terminated in outcomes:
                expected += probability * float(r)
                if not terminated:
                    row[s_next] += discount * probability
            rows.append(row)
            right.append(-expected)
    solved = linprog(np.ones(S), A_ub=np.array(rows), b_ub=right, bounds=(None, None))
    assert solved.status == 0
    return solved.x


def assert_solves(v: Tensor, P: dict) -> None:
    """Raise unless the values agree with the linear program to the tolerance of its solver."""
    gap = np.abs(v[:-1].numpy() - linear_program(P, discount=GAMMA))
    assert gap.max() < 1e-6, gap.max()
    assert v[-1] == 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_algorithm_agrees_with_the_linear_program(name):
    P = environment(name).P
    mdp = as_mdp(P, discount=GAMMA)
    S, A = mdp.reward.shape
    zero = torch.zeros(S, dtype=torch.float64)
    assert_solves(value_iteration(mdp, zero, tolerance=1e-9)[-1], P)
    uniform = torch.full((S, A), 1 / A, dtype=torch.float64)
    v_star = policy_iteration(mdp, uniform).values[-1]
    assert_solves(v_star, P)
    assert_solves(truncated_policy_iteration(mdp, zero, n_sweeps=5, n_iterations=100)[-1], P)
    v = zero
    for _ in range(450):
        v = gauss_seidel_sweep(mdp, v, order=list(range(S)))
    assert_solves(v, P)
    lower, upper = optimal_value_bounds(mdp, zero)
    assert (lower <= v_star).all()
    assert (v_star <= upper).all()


def test_the_greedy_policy_walks_the_cliff_in_the_shortest_way():
    walk = environment("CliffWalking-v1")
    mdp = as_mdp(walk.P, discount=GAMMA)
    zero = torch.zeros(len(mdp.reward), dtype=torch.float64)
    v = value_iteration(mdp, zero, tolerance=1e-9)[-1]
    actions = greedy_policy(action_values(mdp, v)).argmax(dim=1).tolist()
    state, _ = walk.reset(seed=0)
    start, total, n_steps, terminated = int(state), 0.0, 0, False
    while not terminated and n_steps < 50:
        state, reward, terminated, _, _ = walk.step(actions[int(state)])
        total, n_steps = total + GAMMA**n_steps * float(reward), n_steps + 1
    assert n_steps == 13
    assert abs(total - v[start].item()) < 1e-9
