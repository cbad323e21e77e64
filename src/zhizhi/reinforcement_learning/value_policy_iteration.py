"""Value iteration, policy iteration and what lies between: optimal policies of a known model."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, log
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    iterative_policy_evaluation,
    policy_evaluation,
)


class PolicyIteration(NamedTuple):
    """Every policy that was tried, each with its values; the last one is optimal."""

    policies: Float[Tensor, "K S A"]
    values: Float[Tensor, "K S"]


def optimality_update(mdp: TabularMDP, v: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    r"""Apply the right-hand side of the Bellman optimality equation once.

    $$
    f(v)(s) = \max_a \Big[ r(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, v(s') \Big]
    $$

    Args:
        mdp: The model.
        v: Any values; all of them are read before the first new one is written.

    Returns:
        f(v), which is `v` itself if and only if `v` is optimal.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> optimality_update(mdp, torch.tensor([2.0]))
        tensor([2.])

    Reference:
        Zhao (2025), Mathematical Foundations of Reinforcement Learning, Eqs. (3.1) to (3.3).
    """
    return action_values(mdp, v).amax(dim=1)  # (eq:vpi-optimality)


def greedy_actions(q: Float[Tensor, "S A"], *, tolerance: float = 1e-9) -> Bool[Tensor, "S A"]:
    r"""Mark all actions whose value is the greatest, up to rounding.

    Args:
        q: Action values.
        tolerance: How far below the greatest a value may lie and still count as equal.

    Returns:
        True where the action is greedy; a policy is greedy if it takes only such actions.

    Example:
        >>> greedy_actions(torch.tensor([[0.0, 2.0, 2.0]]))
        tensor([[False,  True,  True]])
    """
    return q >= q.amax(dim=1, keepdim=True) - tolerance


def greedy_policy(q: Float[Tensor, "S A"], *, tolerance: float = 1e-9) -> Float[Tensor, "S A"]:
    r"""Take the first of the greedy actions in every state: one 1 in each row of pi(a|s).

    Args:
        q: Action values.
        tolerance: As in `greedy_actions`, so that rounding does not decide between equal actions.

    Example:
        >>> greedy_policy(torch.tensor([[0.0, 2.0, 2.0]]))
        tensor([[0., 1., 0.]])

    Reference:
        Zhao (2025), Theorem 3.5.
    """
    first = greedy_actions(q, tolerance=tolerance).int().argmax(dim=1)
    return torch.nn.functional.one_hot(first, q.shape[1]).to(q.dtype)


def value_iteration(
    mdp: TabularMDP, v_0: Float[Tensor, " S"], *, tolerance: float
) -> Float[Tensor, "K S"]:
    r"""Apply f until the values are known to be within a tolerance of the optimal ones.

    $$
    v_{k+1} = f(v_k), \qquad
    \|v_k - v^*\|_\infty \le \frac{\gamma}{1-\gamma}\, \|v_k - v_{k-1}\|_\infty
    $$

    Args:
        mdp: The model.
        v_0: The first guess; any will do.
        tolerance: Upper bound on the error of the last row, in exact arithmetic.

    Returns:
        v_0, v_1, ... up to the first row whose bound is small enough.

    Raises:
        ValueError: If `tolerance` is not positive.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> value_iteration(mdp, torch.zeros(1), tolerance=0.25).T
        tensor([[0.0000, 1.0000, 1.5000, 1.7500]])

    Reference:
        Zhao (2025), Algorithm 4.1; Puterman (1994), Markov Decision Processes, Section 6.3.
    """
    if tolerance <= 0:
        raise ValueError(
            f"tolerance is {tolerance}: it must be positive, or the sweeps may never end."
        )
    gamma = mdp.discount
    v = [v_0, optimality_update(mdp, v_0)]
    change = (v[1] - v[0]).abs().max().item()
    n_sweeps = 1
    if gamma * change > tolerance * (1 - gamma):
        # So many suffice whatever the model; the bound on the last change may end it sooner.
        n_sweeps = ceil(log(tolerance * (1 - gamma) / change) / log(gamma))
    while len(v) <= n_sweeps and gamma * change > tolerance * (1 - gamma):  # (eq:vpi-stop)
        v.append(optimality_update(mdp, v[-1]))
        change = (v[-1] - v[-2]).abs().max().item()
    return torch.stack(v)


def optimal_value_bounds(
    mdp: TabularMDP, v: Float[Tensor, " S"]
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    r"""Enclose the optimal values by the smallest and the greatest change of one sweep.

    $$
    f(v) + \frac{\gamma}{1-\gamma} \min_s \Delta(s) \;\le\; v_\pi \;\le\; v^* \;\le\;
    f(v) + \frac{\gamma}{1-\gamma} \max_s \Delta(s), \qquad \Delta = f(v) - v
    $$

    Args:
        mdp: The model.
        v: Any values.

    Returns:
        The two ends. Between them also lie the values of any policy pi that is greedy for `v`.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> optimal_value_bounds(mdp, torch.zeros(1))
        (tensor([2.]), tensor([2.]))

    Reference:
        MacQueen (1966); Puterman (1994), Section 6.6.
    """
    f_v = optimality_update(mdp, v)
    change, factor = f_v - v, mdp.discount / (1 - mdp.discount)
    return f_v + factor * change.min(), f_v + factor * change.max()  # (eq:vpi-bounds)


def gauss_seidel_sweep(
    mdp: TabularMDP, v: Float[Tensor, " S"], *, order: Sequence[int]
) -> Float[Tensor, " S"]:
    r"""Update the states one after another, each from the newest values.

    Args:
        mdp: The model.
        v: The values before the sweep; they are not changed.
        order: The states in the order in which they are updated.

    Returns:
        The values after the sweep.

    Raises:
        ValueError: If `order` does not name every state once.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> gauss_seidel_sweep(mdp, torch.zeros(1), order=[0])
        tensor([1.])

    Reference:
        Puterman (1994), Section 6.3.3.
    """
    if sorted(order) != list(range(len(v))):
        raise ValueError(
            f"order names {len(set(order))} different states in {len(order)} places: "
            f"it must name each of the {len(v)} states once."
        )
    newest = v.clone()
    for s in order:
        expected = mdp.transition[s] @ newest
        newest[s] = (mdp.reward[s] + mdp.discount * expected).max()
    return newest


def policy_iteration(
    mdp: TabularMDP, policy: Float[Tensor, "S A"], *, tolerance: float = 1e-9
) -> PolicyIteration:
    r"""Evaluate the policy, make it greedy for its own values, and repeat until nothing is better.

    $$
    v_{\pi_k} = r_{\pi_k} + \gamma P_{\pi_k} v_{\pi_k}, \qquad
    \pi_{k+1} = \arg\max_\pi \big( r_\pi + \gamma P_\pi v_{\pi_k} \big)
    $$

    Args:
        mdp: The model.
        policy: The policy to start from; it may be stochastic.
        tolerance: A state keeps its actions unless another one is better by more than this, so
            that rounding cannot make two equal policies take turns for ever. For float64.

    Returns:
        The policies pi_0, pi_1, ... and their values.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> policy_iteration(mdp, torch.tensor([[1.0, 0.0]])).values.T
        tensor([[0., 2.]])

    Reference:
        Zhao (2025), Algorithm 4.2; named policy iteration by Howard (1960), from memory.
    """
    policies, values = [policy], [policy_evaluation(mdp, policy)]
    while True:
        q = action_values(mdp, values[-1])
        better = q.amax(dim=1) > values[-1] + tolerance
        if not better.any():
            return PolicyIteration(torch.stack(policies), torch.stack(values))
        greedy = greedy_policy(q, tolerance=tolerance)
        policies.append(torch.where(better[:, None], greedy, policies[-1]))
        values.append(policy_evaluation(mdp, policies[-1]))


def truncated_policy_iteration(
    mdp: TabularMDP, v_0: Float[Tensor, " S"], *, n_sweeps: int, n_iterations: int
) -> Float[Tensor, "{n_iterations+1} S"]:
    r"""Evaluate each greedy policy by a few sweeps only.

    $$
    v_{k+1} = T_{\pi}^{m} v_k, \qquad T_\pi v = r_\pi + \gamma P_\pi v, \qquad
    \pi \text{ greedy for } v_k
    $$

    One sweep (m = 1) is value iteration; ever more of them approach policy iteration.

    Args:
        mdp: The model.
        v_0: The first guess.
        n_sweeps: How many sweeps m evaluate each policy.
        n_iterations: How many policies are evaluated.

    Returns:
        v_0, v_1, ... after each policy.

    Raises:
        ValueError: If `n_sweeps` is less than 1.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> truncated_policy_iteration(mdp, torch.zeros(1), n_sweeps=2, n_iterations=1).T
        tensor([[0.0000, 1.5000]])

    Reference:
        Zhao (2025), Algorithm 4.3; Puterman and Shin (1978), who call it modified.
    """
    if n_sweeps < 1:
        raise ValueError(f"n_sweeps is {n_sweeps}: each policy needs at least 1 sweep.")
    v = [v_0]
    for _ in range(n_iterations):
        policy = greedy_policy(action_values(mdp, v[-1]))
        v.append(iterative_policy_evaluation(mdp, policy, v[-1], n_sweeps=n_sweeps)[-1])
    return torch.stack(v)


def shaped(mdp: TabularMDP, potential: Float[Tensor, " S"]) -> TabularMDP:
    r"""Pay for climbing a potential and charge for descending it.

    $$
    r'(s,a) = r(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, \Phi(s') - \Phi(s)
    $$

    Args:
        mdp: The model.
        potential: The potential $\Phi$.

    Returns:
        A model in which every policy's values are those of `mdp` minus the potential, so that
        the same policies are optimal.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> shaped(mdp, torch.tensor([-2.0])).reward
        tensor([[1., 2.]])

    Reference:
        Ng, Harada and Russell (1999), Theorem 1.
    """
    climbed = mdp.discount * einsum(mdp.transition, potential, "S A S_next, S_next -> S A")
    return replace(mdp, reward=mdp.reward + climbed - potential[:, None])  # (eq:vpi-shaping)
