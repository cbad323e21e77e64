"""RL basics: returns, state values and action values of a fixed policy."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP


def discounted_returns(
    rewards: Float[Tensor, "*batch T"], *, discount: float
) -> Float[Tensor, "*batch T"]:
    r"""Sum the rewards that follow each step of a trajectory, discounted.

    $$
    G_t = R_{t+1} + \gamma\, G_{t+1}, \qquad G_T = 0
    $$

    Args:
        rewards: R_1 ... R_T: column t holds R_{t+1}, the reward that A_t brings.
        discount: The discount rate.

    Returns:
        G_0 ... G_{T-1}. What a longer trajectory would have added to G_0 is cut off.

    Example:
        >>> discounted_returns(torch.tensor([0.0, 0.0, 1.0]), discount=0.5)
        tensor([0.2500, 0.5000, 1.0000])

    Reference:
        Zhao (2025), Mathematical Foundations of Reinforcement Learning, Section 2.4.
    """
    G = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        following = rewards[..., t] + discount * following  # (eq:rl-return)
        G[..., t] = following
    return G


def markov_reward_process(
    mdp: TabularMDP, policy: Float[Tensor, "S A"]
) -> tuple[Float[Tensor, "S S"], Float[Tensor, " S"]]:
    r"""Average the actions out of a decision process by following one policy.

    $$
    [P_\pi]_{s,s'} = \sum_a \pi(a \mid s)\, p(s' \mid s,a), \qquad
    r_\pi(s) = \sum_a \pi(a \mid s)\, r(s,a)
    $$

    Args:
        mdp: The model.
        policy: The table pi(a|s).

    Returns:
        The transition matrix of the Markov chain that is left, and its expected rewards.

    Raises:
        ValueError: If a row of `policy` is no distribution.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.9)
        >>> markov_reward_process(mdp, torch.tensor([[0.5, 0.5]]))
        (tensor([[1.]]), tensor([0.5000]))

    Reference:
        Zhao (2025), Eqs. (2.8) to (2.10).
    """
    total = policy.sum(dim=1)
    worst = total[(total - 1).abs().argmax()].item()
    if policy.min() < 0 or abs(worst - 1) > 1e-5:
        raise ValueError(
            f"the smallest pi(a|s) is {policy.min().item():.6g} and a row sums to {worst:.6g}: "
            "every row must be non-negative and sum to 1."
        )
    P_pi = einsum(policy, mdp.transition, "S A, S A S_next -> S S_next")
    r_pi = einsum(policy, mdp.reward, "S A, S A -> S")
    return P_pi, r_pi


def policy_evaluation(mdp: TabularMDP, policy: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    r"""Solve the Bellman equation of a policy as the linear system that it is.

    $$
    v_\pi = (I - \gamma P_\pi)^{-1} r_\pi
    $$

    Args:
        mdp: The model.
        policy: The table pi(a|s).

    Returns:
        The state values.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> policy_evaluation(mdp, torch.tensor([[0.0, 1.0]]))  # 1 / (1 - 0.5)
        tensor([2.])

    Reference:
        Zhao (2025), Section 2.7.1.
    """
    P_pi, r_pi = markov_reward_process(mdp, policy)
    identity = torch.eye(len(r_pi), dtype=r_pi.dtype)
    return torch.linalg.solve(identity - mdp.discount * P_pi, r_pi)  # (eq:rl-closed-form)


def iterative_policy_evaluation(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    v_0: Float[Tensor, " S"],
    *,
    n_sweeps: int,
) -> Float[Tensor, "{n_sweeps+1} S"]:
    r"""Apply the right-hand side of the Bellman equation again and again.

    $$
    v_{k+1} = r_\pi + \gamma P_\pi v_k
    $$

    Args:
        mdp: The model.
        policy: The table pi(a|s).
        v_0: The first guess; any will do.
        n_sweeps: How often the right-hand side is applied.

    Returns:
        v_0, v_1, ... The last row errs at most `discount ** n_sweeps` times as much as the first.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> iterative_policy_evaluation(
        ...     mdp, torch.tensor([[0.0, 1.0]]), torch.zeros(1), n_sweeps=3
        ... ).T
        tensor([[0.0000, 1.0000, 1.5000, 1.7500]])

    Reference:
        Zhao (2025), Eq. (2.11).
    """
    P_pi, r_pi = markov_reward_process(mdp, policy)
    v = [v_0]
    for _ in range(n_sweeps):
        v.append(r_pi + mdp.discount * P_pi @ v[-1])  # (eq:rl-iteration)
    return torch.stack(v)


def action_values(mdp: TabularMDP, v: Float[Tensor, " S"]) -> Float[Tensor, "S A"]:
    r"""Look one step ahead: take any action once, then collect v.

    $$
    q(s,a) = r(s,a) + \gamma \sum_{s'} p(s' \mid s,a)\, v(s')
    $$

    Args:
        mdp: The model.
        v: State values; with those of a policy the result is that policy's action values.

    Returns:
        A value for every action, also for those that the policy never takes.

    Example:
        >>> mdp = TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.5)
        >>> action_values(mdp, torch.tensor([2.0]))
        tensor([[1., 2.]])

    Reference:
        Zhao (2025), Eq. (2.14).
    """
    expected = einsum(mdp.transition, v, "S A S_next, S_next -> S A")
    return mdp.reward + mdp.discount * expected  # (eq:rl-q-from-v)
