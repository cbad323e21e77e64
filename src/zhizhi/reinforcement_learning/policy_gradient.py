"""Policy gradients: exactly from the model, from samples, and with a critic."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import TabularMDP, step
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    discounted_returns,
    markov_reward_process,
    policy_evaluation,
)


def discounted_visits(
    mdp: TabularMDP, policy: Float[Tensor, "S A"], start: Float[Tensor, " S"]
) -> Float[Tensor, " S"]:
    r"""Count how often each state is visited, each visit discounted by its time.

    $$
    \rho_\pi(s) = \sum_{t \ge 0} \gamma^t \Pr(S_t = s), \qquad
        \rho_\pi^\top = d_0^\top (I - \gamma P_\pi)^{-1}
    $$

    Args:
        mdp: The model.
        policy: Probabilities of the actions in each state.
        start: The distribution d_0 of the first state.

    Returns:
        Numbers that sum to 1 / (1 - discount).

    Raises:
        ValueError: If `start` does not sum to one.

    Reference:
        Sutton et al. (1999), Policy Gradient Methods, section 1, the start-state formulation.
    """
    if abs(start.sum().item() - 1) > 1e-6:
        raise ValueError(f"start sums to {start.sum().item()}: probabilities sum to 1.")
    P_pi, _ = markov_reward_process(mdp, policy)
    eye = torch.eye(len(P_pi), dtype=P_pi.dtype)
    return torch.linalg.solve((eye - mdp.discount * P_pi).T, start.to(P_pi.dtype))


def policy_gradient(
    mdp: TabularMDP, theta: Float[Tensor, "S A"], start: Float[Tensor, " S"]
) -> Float[Tensor, "S A"]:
    r"""Return the gradient of the expected return of a softmax policy, exactly.

    $$
    \frac{\partial J}{\partial \theta_{s,a}} = \rho_\pi(s)\, \pi(a \mid s)\, A_\pi(s, a)
    $$

    Args:
        mdp: The model.
        theta: Preferences; the policy is their softmax in each state.
        start: The distribution of the first state.

    Returns:
        The gradient with respect to theta.

    Reference:
        Sutton et al. (1999), Theorem 1; Zhao (2025), Theorem 9.2.
    """
    policy = theta.softmax(dim=1)
    v = policy_evaluation(mdp, policy)
    advantage = action_values(mdp, v) - v[:, None]
    visits = discounted_visits(mdp, policy, start)
    return visits[:, None] * policy * advantage  # (eq:pg-softmax)


def score(
    theta: Float[Tensor, "S A"], states: Int[Tensor, "*batch"], actions: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch A"]:
    r"""Return $\nabla \log \pi(a \mid s)$ in the preferences of the state s.

    $$
    \frac{\partial \log \pi(a \mid s)}{\partial \theta_{s,b}} = [a = b] - \pi(b \mid s)
    $$

    Args:
        theta: Preferences.
        states: States.
        actions: Actions taken there.

    Returns:
        One row for each pair; in the preferences of other states the gradient is 0.
    """
    chosen = torch.nn.functional.one_hot(actions, theta.shape[1])
    return chosen.to(theta.dtype) - theta.softmax(dim=1)[states]  # (eq:pg-score)


def reinforce_gradient(
    theta: Float[Tensor, "S A"],
    states: Int[Tensor, "N T"],
    actions: Int[Tensor, "N T"],
    rewards: Float[Tensor, "N T"],
    *,
    discount: float,
    baseline: Float[Tensor, " S"] | None = None,
) -> Float[Tensor, "S A"]:
    r"""Estimate the policy gradient from trajectories of the policy itself.

    $$
    \hat g = \frac1N \sum_{n,t} \gamma^t\, (G_t - b(S_t))\, \nabla \log \pi(A_t \mid S_t)
    $$

    Args:
        theta: Preferences of the policy that was followed.
        states: S_t for t = 0, 1, ...
        actions: A_t.
        rewards: R_{t+1}.
        discount: The discount rate; it weighs the rewards, and the times.
        baseline: b(s), a number for each state; None for 0.

    Returns:
        An estimate without bias but for the reward that would come after the last step.

    Reference:
        Williams (1992), REINFORCE.
    """
    G = discounted_returns(rewards, discount=discount)
    gain = G if baseline is None else G - baseline[states]
    weight = discount ** torch.arange(states.shape[1], dtype=theta.dtype) * gain
    pieces = weight[..., None] * score(theta, states, actions)  # (eq:pg-reinforce)
    total = torch.zeros_like(theta).index_add(0, states.flatten(), pieces.flatten(0, 1))
    return total / len(states)


def least_variance_baseline(
    policy: Float[Tensor, "S A"], q: Float[Tensor, "S A"]
) -> Float[Tensor, " S"]:
    r"""Return the baseline that makes a single sample's gradient vary least, state by state.

    $$
    b^*(s) = \frac{\mathbb E[\lVert \nabla \log \pi \rVert^2\, q]}
        {\mathbb E[\lVert \nabla \log \pi \rVert^2]}
    $$

    Args:
        policy: A softmax policy.
        q: Action values.

    Reference:
        Greensmith, Bartlett & Baxter (2004); Zhao (2025), Box 10.1.
    """
    S, A = policy.shape
    s, a = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(S), torch.arange(A), indexing="ij")
    )
    squared = score(policy.log(), s, a).square().sum(dim=1).view(S, A)
    weight = policy * squared
    return (weight * q).sum(dim=1) / weight.sum(dim=1)  # (eq:pg-baseline)


class ActorCritic(NamedTuple):
    """Preferences of the actor, and the critic's value of each state."""

    theta: Float[Tensor, "S A"]
    values: Float[Tensor, " S"]


def actor_critic(
    mdp: TabularMDP,
    begin: ActorCritic,
    states: Int[Tensor, " N"],
    *,
    n_steps: int,
    actor_rate: float,
    critic_rate: float,
    start: Float[Tensor, " S"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[ActorCritic, Int[Tensor, " N"]]:
    r"""Let several copies of the agent walk on, and learn from every single step.

    $$
    \delta_t = R_{t+1} + \gamma V(S_{t+1}) - V(S_t), \qquad
        \theta \mathrel{+}= \alpha\, \delta_t \nabla \log \pi(A_t \mid S_t), \qquad
        V(S_t) \mathrel{+}= \beta\, \delta_t
    $$

    Args:
        mdp: The environment; only its answers are used.
        begin: Actor and critic at the start.
        states: Where the copies stand.
        n_steps: Steps of each copy.
        actor_rate: The rate alpha, for the mean over the copies.
        critic_rate: The rate beta, for the mean over the copies that stand in a state.
        start: Distribution of the first state. If given, a copy goes back there after a step with
            probability 1 - discount, so that states are met as often as discounted visits count
            them. If None, the copies walk on for ever, and states are met as often as they are
            visited in the long run.
        generator: Source of actions and transitions.

    Returns:
        Actor and critic after the walk, and where the copies stand then.

    Raises:
        ValueError: If there is no copy.

    Reference:
        Zhao (2025), Algorithm 10.2 (A2C).
    """
    if len(states) == 0:
        raise ValueError("there are 0 copies: at least one walks.")
    theta, values = begin.theta.clone(), begin.values.clone()
    for _ in range(n_steps):
        policy = theta.softmax(dim=1)
        actions = torch.multinomial(policy[states], 1, generator=generator)[:, 0]
        following, rewards = step(mdp, states, actions, generator=generator)
        delta = rewards + mdp.discount * values[following] - values[states]  # (eq:pg-delta)
        pieces = delta[:, None] * score(theta, states, actions) / len(states)
        theta = theta.index_add(0, states, actor_rate * pieces)  # (eq:pg-actor)
        count = torch.bincount(states, minlength=len(values)).clamp(min=1)
        values = values.index_add(0, states, critic_rate * delta / count[states])
        states = following
        if start is not None:
            back = torch.rand(len(states), generator=generator) > mdp.discount
            again = torch.multinomial(start, len(states), replacement=True, generator=generator)
            states = torch.where(back, again, states)
    return ActorCritic(theta, values), states
