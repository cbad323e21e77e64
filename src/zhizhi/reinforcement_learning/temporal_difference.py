"""Temporal-difference learning: values that are corrected after every step, by other values."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP
from zhizhi.reinforcement_learning.monte_carlo import Trajectory

StepSize = Callable[[int], float]
"""Returns the step size of the n-th visit, n from 1."""

Target = Callable[[Sequence[float], int, float], float]
"""Returns the value of what comes next, from its action values, the next action and epsilon."""


class ControlRun(NamedTuple):
    """The action values at the end, and the rewards that each episode collected on the way."""

    q: Float[Tensor, "S A"]
    returns: Float[Tensor, " E"]


def td0(
    trajectory: Trajectory, v: Float[Tensor, " S"], *, discount: float, step: StepSize
) -> Float[Tensor, " S"]:
    r"""Evaluate a policy along one walk, one step at a time.

    $$
    v(s_t) \leftarrow v(s_t) - \alpha\,\big[v(s_t) - (r_{t+1} + \gamma\,v(s_{t+1}))\big]
    $$

    Args:
        trajectory: A walk under the policy; its last step has no next state and is not used.
        v: The first guess.
        discount: The discount rate.
        step: The step size, by the number of the state's visits.

    Returns:
        The values after the walk.

    Example:
        >>> walked = Trajectory([0, 0, 0], [0, 0, 0], [1.0, 1.0, 1.0])
        >>> td0(walked, torch.zeros(1), discount=0.5, step=lambda n: 0.5)
        tensor([0.8750])

    Reference:
        Sutton (1988); Zhao (2025), Eq. (7.1).
    """
    return n_step_td(trajectory, v, n=1, discount=discount, step=step)


def n_step_td(
    trajectory: Trajectory, v: Float[Tensor, " S"], *, n: int, discount: float, step: StepSize
) -> Float[Tensor, " S"]:
    r"""Evaluate a policy along one walk, each state corrected n steps later.

    $$
    G_{t:t+n} = \sum_{i=0}^{n-1} \gamma^i r_{t+1+i} + \gamma^n\,v(s_{t+n})
    $$

    Args:
        trajectory: A walk under the policy; its last n steps only serve the ones before.
        v: The first guess.
        n: Rewards that are seen before a value stands in for the rest.
        discount: The discount rate.
        step: The step size, by the number of the state's visits.

    Returns:
        The values after the walk.

    Raises:
        ValueError: If n is not positive.

    Example:
        >>> walked = Trajectory([0, 0, 0], [0, 0, 0], [1.0, 1.0, 1.0])
        >>> n_step_td(walked, torch.zeros(1), n=2, discount=0.5, step=lambda n: 1.0)
        tensor([1.5000])

    Reference:
        Zhao (2025), Section 7.4; Sutton & Barto (2018), Eq. (7.1).
    """
    if n < 1:
        raise ValueError(f"n is {n}: n >= 1.")
    states, _, rewards = trajectory
    values, visits = v.tolist(), [0] * len(v)
    weights = [discount**i for i in range(n)]
    for t in range(len(states) - n):
        s = states[t]
        visits[s] += 1
        seen = sum(w * r for w, r in zip(weights, rewards[t : t + n], strict=True))
        target = seen + discount**n * values[states[t + n]]
        values[s] -= step(visits[s]) * (values[s] - target)  # (eq:td-n-step)
    return torch.tensor(values, dtype=v.dtype)


def batch_td(
    trajectories: Sequence[Trajectory], *, n_states: int, discount: float
) -> Float[Tensor, " S"]:
    r"""Return where TD(0) settles if it reads the same walks again and again.

    It is the value of the process that the walks make most likely: each state's observed mean
    reward, and its observed frequencies of what comes next.

    $$
    v = (I - \gamma \hat P)^{-1} \hat r
    $$

    Args:
        trajectories: Walks; the last entry of `states` may stand for the end of an episode.
        n_states: How many states there are; one that was never left has the value 0.
        discount: The discount rate.

    Returns:
        The values.

    Example:
        >>> walks = [Trajectory([0, 1], [0, 0], [0.0, 0.0]), Trajectory([1, 1], [0, 0], [1.0, 0.0])]
        >>> batch_td(walks, n_states=2, discount=0.5)
        tensor([1., 2.], dtype=torch.float64)

    Reference:
        Sutton & Barto (2018), Section 6.3.
    """
    counts = torch.zeros(n_states, n_states, dtype=torch.float64)
    reward = torch.zeros(n_states, dtype=torch.float64)
    for states, _, rewards in trajectories:
        for s, s_next, r in zip(states[:-1], states[1:], rewards, strict=False):
            counts[s, s_next] += 1
            reward[s] += r
    visits = counts.sum(dim=1).clamp_min(1)
    identity = torch.eye(n_states, dtype=torch.float64)
    model = identity - discount * counts / visits[:, None]
    return torch.linalg.solve(model, reward / visits)  # (eq:td-batch)


def sarsa_target(q_next: Sequence[float], a_next: int, epsilon: float) -> float:
    """Return the value of the action that will be taken: Sarsa."""
    return q_next[a_next]


def expected_sarsa_target(q_next: Sequence[float], a_next: int, epsilon: float) -> float:
    """Return the mean over the actions that may be taken: expected Sarsa."""
    return (1 - epsilon) * max(q_next) + epsilon * sum(q_next) / len(q_next)


def q_learning_target(q_next: Sequence[float], a_next: int, epsilon: float) -> float:
    """Return the value of the best action, whichever will be taken: Q-learning."""
    return max(q_next)


def q_learning(
    trajectory: Trajectory, q: Float[Tensor, "S A"], *, discount: float, step: StepSize
) -> Float[Tensor, "S A"]:
    r"""Learn the best action values from a walk of whatever policy.

    $$
    q(s,a) \leftarrow q(s,a) - \alpha\,\big[q(s,a) - (r + \gamma \max_{a'} q(s',a'))\big]
    $$

    Args:
        trajectory: A walk; its last step has no next state and is not used.
        q: The first guess.
        discount: The discount rate.
        step: The step size, by the number of the pair's visits.

    Returns:
        The action values after the walk.

    Example:
        >>> walked = Trajectory([0, 0], [1, 0], [1.0, 0.0])
        >>> q_learning(walked, torch.zeros(1, 2), discount=0.5, step=lambda n: 0.5)
        tensor([[0.0000, 0.5000]])

    Reference:
        Watkins & Dayan (1992); Zhao (2025), Eq. (7.18), Algorithm 7.3.
    """
    table = q.tolist()
    visits = [[0] * q.shape[1] for _ in range(q.shape[0])]
    states, actions, rewards = trajectory
    for s, a, r, s_next in zip(states[:-1], actions[:-1], rewards[:-1], states[1:], strict=True):
        visits[s][a] += 1
        target = r + discount * max(table[s_next])
        table[s][a] -= step(visits[s][a]) * (table[s][a] - target)  # (eq:td-q-learning)
    return torch.tensor(table, dtype=q.dtype)


def cliff_walking(*, discount: float = 0.99) -> TabularMDP:
    r"""Return the 4 x 12 grid whose lower edge is a cliff.

    The walk begins in the lower left corner, 36, and ends in the lower right one, 47. Every step
    costs 1; the fields between them cost 100 and lead back to the start. The actions are up, right,
    down, left.

    Args:
        discount: The discount rate.

    Returns:
        The model.

    Example:
        >>> mdp = cliff_walking()
        >>> mdp.reward[36, 1].item(), mdp.transition[36, 1].argmax().item()
        (-100.0, 36)

    Reference:
        Sutton & Barto (2018), Example 6.6.
    """
    transition = torch.zeros(48, 4, 48, dtype=torch.float64)
    reward = torch.full((48, 4), -1.0, dtype=torch.float64)
    for s in range(48):
        for a, (dy, dx) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            y, x = min(max(s // 12 + dy, 0), 3), min(max(s % 12 + dx, 0), 11)
            falls = y == 3 and 0 < x < 11
            reward[s, a] = -100.0 if falls else -1.0
            transition[s, a, 36 if falls else 12 * y + x] = 1
    return TabularMDP(transition, reward, discount)


def td_control(
    mdp: TabularMDP,
    target: Target,
    *,
    start: int,
    ends: Sequence[int],
    n_episodes: int,
    alpha: float,
    epsilon: float,
    discount: float | None = None,
    generator: torch.Generator | None = None,
) -> ControlRun:
    r"""Learn while acting epsilon-greedily, episode after episode.

    $$
    q(s,a) \leftarrow q(s,a) - \alpha\,\big[q(s,a) - (r + \gamma\,\text{target})\big]
    $$

    Args:
        mdp: The environment; only its answers to actions are used.
        target: `sarsa_target`, `expected_sarsa_target` or `q_learning_target`.
        start: The state in which every episode begins.
        ends: States in which an episode is over; what follows them is worth 0.
        n_episodes: How many episodes.
        alpha: The step size.
        epsilon: The chance of a random action.
        discount: Another discount rate than the model's; 1 is allowed, since episodes end.
        generator: Source of randomness.

    Returns:
        The action values, and each episode's sum of rewards.

    Raises:
        ValueError: If the start is an end.

    Example:
        >>> mdp = TabularMDP(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), torch.ones(2, 1), 0.9)
        >>> td_control(mdp, sarsa_target, start=0, ends=[1], n_episodes=1, alpha=1.0, epsilon=0.0).q
        tensor([[1.],
                [0.]], dtype=torch.float64)

    Reference:
        Zhao (2025), Algorithms 7.1 and 7.2, Table 7.2; Sutton & Barto (2018), Section 6.4.
    """
    if start in ends:
        raise ValueError(f"start is {start}, which is one of the ends {list(ends)}.")
    gamma, over = mdp.discount if discount is None else discount, frozenset(ends)
    arrivals, prices = mdp.transition.double().cumsum(dim=-1).tolist(), mdp.reward.tolist()
    S, A = mdp.reward.shape
    q, sums = [[0.0] * A for _ in range(S)], []
    luck: list[float] = []

    def draw() -> float:
        if not luck:
            luck.extend(torch.rand(4096, dtype=torch.float64, generator=generator).tolist())
        return luck.pop()

    def choose(s: int) -> int:
        if draw() < epsilon:
            return int(draw() * A)
        row = q[s]
        best = max(row)
        ties = [a for a in range(A) if row[a] == best]
        return ties[int(draw() * len(ties))]

    for _ in range(n_episodes):
        s, total = start, 0.0
        a = choose(s)
        while s not in over:
            r = prices[s][a]
            s_next = bisect_right(arrivals[s][a], draw() * arrivals[s][a][-1])
            a_next = choose(s_next)
            ahead = 0.0 if s_next in over else target(q[s_next], a_next, epsilon)
            q[s][a] -= alpha * (q[s][a] - (r + gamma * ahead))  # (eq:td-control)
            s, a, total = s_next, a_next, total + r
        sums.append(total)
    return ControlRun(torch.tensor(q, dtype=torch.float64), torch.tensor(sums))
