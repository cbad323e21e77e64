"""Monte Carlo methods: action values, and from them better policies, out of sampled returns."""

from bisect import bisect_right
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP
from zhizhi.reinforcement_learning.value_policy_iteration import greedy_policy


class Trajectory(NamedTuple):
    """One walk: S_0, A_0, R_1, S_1, A_1, R_2, ... as plain lists, which Python reads fastest."""

    states: list[int]
    actions: list[int]
    rewards: list[float]


class MonteCarloRun(NamedTuple):
    """Estimates q_k of the policy pi_k, the visits they rest on, and the policies."""

    q: Float[Tensor, "K S A"]
    visits: Float[Tensor, "K S A"]
    policies: Float[Tensor, "K+1 S A"]


def walk(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    *,
    start: tuple[int, int],
    n_steps: int,
    generator: torch.Generator | None = None,
) -> Trajectory:
    r"""Take one action in one state, then follow a policy.

    The law is that of `grid_world.rollout`; a single long walk has nothing to vectorise.

    Args:
        mdp: The environment. Only answers to actions are used: which state, which reward.
        policy: The table pi(a|s).
        start: S_0 and A_0, whether or not the policy would take it.
        n_steps: How many rewards are collected.
        generator: Source of randomness.

    Returns:
        `n_steps` states, actions and rewards; entry t of the rewards is R_{t+1}.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> walk(mdp, torch.tensor([[1.0, 0.0]]), start=(0, 1), n_steps=3).rewards
        [1.0, 0.0, 0.0]
    """
    arrivals = mdp.transition.double().cumsum(dim=-1).tolist()
    choices = policy.double().cumsum(dim=-1).tolist()
    prices = mdp.reward.tolist()
    luck = torch.rand(2, n_steps, dtype=torch.float64, generator=generator).tolist()
    walked = Trajectory([], [], [])
    state, action = start
    for u, w in zip(*luck, strict=True):
        walked.states.append(state)
        walked.actions.append(action)
        walked.rewards.append(prices[state][action])
        steps = arrivals[state][action]
        state = bisect_right(steps, u * steps[-1])
        action = bisect_right(choices[state], w * choices[state][-1])
    return walked


def every_visit(
    trajectory: Trajectory, *, shape: tuple[int, int], discount: float, n_tail: int = 0
) -> tuple[Float[Tensor, "S A"], Float[Tensor, "S A"]]:
    r"""Add up the returns that follow every visit of each state-action pair.

    Args:
        trajectory: One walk.
        shape: How many states and how many actions there are.
        discount: The discount rate.
        n_tail: Visits in the last `n_tail` steps do not count: their returns are cut off too soon.

    Returns:
        The sums of returns and the numbers of visits.

    Example:
        >>> walked = Trajectory([0, 0], [0, 0], [1.0, 1.0])
        >>> every_visit(walked, shape=(1, 1), discount=0.5)  # 1 + 0.5, and 1
        (tensor([[2.5000]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))

    Reference:
        Zhao (2025), Mathematical Foundations of Reinforcement Learning, Section 5.3.1.
    """
    S, A = shape
    total, count = [[0.0] * A for _ in range(S)], [[0.0] * A for _ in range(S)]
    G = 0.0
    t = len(trajectory.states)
    for s, a, r in zip(*(reversed(column) for column in trajectory), strict=True):
        t -= 1
        G = r + discount * G  # (eq:rl-return)
        if t < len(trajectory.states) - n_tail:
            total[s][a] += G
            count[s][a] += 1
    return torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64)


def first_visit(
    trajectory: Trajectory, *, shape: tuple[int, int], discount: float
) -> tuple[Float[Tensor, "S A"], Float[Tensor, "S A"]]:
    r"""Take the return that follows the first visit of each state-action pair.

    Args:
        trajectory: One walk.
        shape: How many states and how many actions there are.
        discount: The discount rate.

    Returns:
        The return of each pair that was visited, and 1 where it was visited.

    Example:
        >>> walked = Trajectory([0, 0], [0, 0], [1.0, 1.0])
        >>> first_visit(walked, shape=(1, 1), discount=0.5)
        (tensor([[1.5000]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))

    Reference:
        Zhao (2025), Section 5.3.1.
    """
    total, count = torch.zeros(2, *shape, dtype=torch.float64)
    G = 0.0
    for s, a, r in zip(*(reversed(column) for column in trajectory), strict=True):
        G = r + discount * G
        total[s, a], count[s, a] = G, 1.0  # walking back, the first visit is written last
    return total, count


def epsilon_greedy(q: Float[Tensor, "S A"], *, epsilon: float) -> Float[Tensor, "S A"]:
    r"""Choose uniformly with chance epsilon, greedily otherwise.

    $$
    \pi(a \mid s) = \begin{cases} 1 - \epsilon + \epsilon/|\mathcal A| & a = a^*(s) \\
        \epsilon/|\mathcal A| & \text{otherwise} \end{cases}
    $$

    Args:
        q: Action values.
        epsilon: The chance.

    Returns:
        The table pi(a|s).

    Raises:
        ValueError: If `epsilon` is outside [0, 1].

    Example:
        >>> epsilon_greedy(torch.tensor([[1.0, 2.0]]), epsilon=0.5)
        tensor([[0.2500, 0.7500]])

    Reference:
        Zhao (2025), Section 5.4.1.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}: it must lie in [0, 1].")
    return (1 - epsilon) * greedy_policy(q) + epsilon / q.shape[1]  # (eq:mc-epsilon-greedy)


def epsilon_soft(mdp: TabularMDP, *, epsilon: float) -> TabularMDP:
    r"""Move the random actions of an epsilon-greedy policy into the environment.

    $$
    \tilde p(s' \mid s,a) = (1-\epsilon)\, p(s' \mid s,a)
        + \frac{\epsilon}{|\mathcal A|} \sum_b p(s' \mid s,b)
    $$

    and the same for the reward.

    Args:
        mdp: The model.
        epsilon: The chance that the action is replaced by a random one.

    Returns:
        A model in which a deterministic policy has the values that its epsilon-greedy version has
        in `mdp`. So its optimal values are the best that such policies can reach.

    Raises:
        ValueError: If `epsilon` is outside [0, 1].

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> epsilon_soft(mdp, epsilon=0.5).reward
        tensor([[0.2500, 0.7500]])
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}: it must lie in [0, 1].")
    p, r = mdp.transition, mdp.reward
    transition = (1 - epsilon) * p + epsilon * p.mean(dim=1, keepdim=True)
    reward = (1 - epsilon) * r + epsilon * r.mean(dim=1, keepdim=True)
    return replace(mdp, transition=transition, reward=reward)  # (eq:mc-soft)


def mc_basic(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    *,
    n_steps: int,
    n_episodes: int,
    n_iterations: int,
    generator: torch.Generator | None = None,
) -> MonteCarloRun:
    r"""Run policy iteration with every action value replaced by a mean of returns.

    Args:
        mdp: The environment.
        policy: The policy to start from.
        n_steps: Length of every episode.
        n_episodes: Episodes from each state-action pair, in each iteration.
        n_iterations: How many policies are evaluated.
        generator: Source of randomness.

    Returns:
        The estimates and the policies.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> mc_basic(
        ...     mdp, torch.tensor([[1.0, 0.0]]), n_steps=3, n_episodes=1, n_iterations=2
        ... ).q[1]
        tensor([[0.7500, 1.7500]], dtype=torch.float64)

    Reference:
        Zhao (2025), Algorithm 5.1.
    """
    S, A = mdp.reward.shape
    policies, estimates = [policy.double()], []
    for _ in range(n_iterations):
        q = torch.zeros(S, A, dtype=torch.float64)
        for s, a in list(product(range(S), range(A))) * n_episodes:
            episode = walk(mdp, policies[-1], start=(s, a), n_steps=n_steps, generator=generator)
            G = sum(mdp.discount**t * r for t, r in enumerate(episode.rewards))
            q[s, a] += G / n_episodes  # (eq:mc-estimate)
        estimates.append(q)
        policies.append(greedy_policy(q))
    visits = torch.full((n_iterations, S, A), float(n_episodes), dtype=torch.float64)
    return MonteCarloRun(torch.stack(estimates), visits, torch.stack(policies))


def mc_exploring_starts(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    *,
    n_steps: int,
    n_sweeps: int,
    n_tail: int = 0,
    generator: torch.Generator | None = None,
) -> MonteCarloRun:
    r"""Improve the policy after each episode; every pair takes its turn as the start of one.

    The means run over all episodes so far, whichever policy they followed.

    Args:
        mdp: The environment.
        policy: The policy to start from.
        n_steps: Length of every episode.
        n_sweeps: How many episodes start from each pair; their order is drawn in each sweep.
        n_tail: As in `every_visit`.
        generator: Source of randomness.

    Returns:
        Estimates, visits and policies after each sweep.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> mc_exploring_starts(mdp, torch.tensor([[1.0, 0.0]]), n_steps=3, n_sweeps=1).policies[1]
        tensor([[0., 1.]], dtype=torch.float64)

    Reference:
        Zhao (2025), Algorithm 5.2.
    """
    S, A = mdp.reward.shape
    total, count = torch.zeros(2, S, A, dtype=torch.float64)
    policies, estimates, visits = [policy.double()], [], []
    for _ in range(n_sweeps):
        policy = policies[-1]
        for pair in torch.randperm(S * A, generator=generator).tolist():
            start = divmod(pair, A)
            episode = walk(mdp, policy, start=start, n_steps=n_steps, generator=generator)
            more = every_visit(episode, shape=(S, A), discount=mdp.discount, n_tail=n_tail)
            total, count = total + more[0], count + more[1]
            seen = more[1].sum(dim=1, keepdim=True) > 0
            policy = torch.where(seen, greedy_policy(total / count.clamp_min(1)), policy)
        estimates.append(total / count)
        visits.append(count)
        policies.append(policy)
    return MonteCarloRun(torch.stack(estimates), torch.stack(visits), torch.stack(policies))


def mc_epsilon_greedy(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    *,
    epsilon: float,
    n_steps: int,
    n_iterations: int,
    generator: torch.Generator | None = None,
) -> MonteCarloRun:
    r"""Evaluate each policy on one long walk, and make it epsilon-greedy.

    The walk starts in state 0 with action 0; exploring is left to the policy. Each policy is judged
    by its own walk alone.

    Args:
        mdp: The environment.
        policy: The policy to start from; it has to take every action now and then.
        epsilon: Chance of a random action in all later policies.
        n_steps: Length of the walk.
        n_iterations: How many policies are evaluated.
        generator: Source of randomness.

    Returns:
        The estimates, the visits they rest on, and the policies. A pair that a walk never visits
        is estimated as 0.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> mc_epsilon_greedy(
        ...     mdp, torch.tensor([[0.5, 0.5]]), epsilon=0.2, n_steps=50, n_iterations=1
        ... ).policies[1]
        tensor([[0.1000, 0.9000]], dtype=torch.float64)

    Reference:
        Zhao (2025), Algorithm 5.3 and Section 5.4.3.
    """
    S, A = mdp.reward.shape
    policies, estimates, visits = [policy.double()], [], []
    for _ in range(n_iterations):
        episode = walk(mdp, policies[-1], start=(0, 0), n_steps=n_steps, generator=generator)
        total, count = every_visit(episode, shape=(S, A), discount=mdp.discount)
        estimates.append(total / count.clamp_min(1))
        visits.append(count)
        policies.append(epsilon_greedy(estimates[-1], epsilon=epsilon))
    return MonteCarloRun(torch.stack(estimates), torch.stack(visits), torch.stack(policies))
