"""PPO: generalised advantages, the clipped surrogate, and the group that stands in for a critic."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gae(
    rewards: Float[Tensor, "*batch T"],
    values: Float[Tensor, "*batch T"],
    next_values: Float[Tensor, "*batch T"],
    terminated: Bool[Tensor, "*batch T"],
    truncated: Bool[Tensor, "*batch T"],
    *,
    discount: float,
    lam: float,
) -> Float[Tensor, "*batch T"]:
    r"""Estimate advantages by a sum of TD errors whose weights decay.

    $$
    \hat A_t = \delta_t + \gamma\lambda\,(1 - \text{ended}_t)\,\hat A_{t+1}, \qquad
    \delta_t = R_{t+1} + \gamma\,(1 - \text{terminated}_t)\,V(S'_{t+1}) - V(S_t)
    $$

    Args:
        rewards: Column t holds R_{t+1}, the reward that A_t brings.
        values: V(S_t).
        next_values: The value of the state in which step t really arrived; where an episode ends,
            that is its last state and not the first of the next episode.
        terminated: The episode is over and nothing can follow: no bootstrap.
        truncated: The episode is only cut off, by a time limit: bootstrap, but do not look across.
        discount: The discount rate.
        lam: 0 keeps one TD error, 1 the whole return.

    Returns:
        The advantages; added to `values` they are the targets of the critic. After the last column
        nothing is known and V stands in, as after a truncation.

    Raises:
        ValueError: If `discount` or `lam` is outside [0, 1].

    Example:
        >>> r, no = torch.ones(2), torch.zeros(2, dtype=torch.bool)
        >>> gae(r, torch.zeros(2), torch.zeros(2), no, no, discount=1.0, lam=0.5)
        tensor([1.5000, 1.0000])

    Reference:
        Schulman et al. (2016), arXiv:1506.02438, Eq. (16).
    """
    if not (0 <= discount <= 1 and 0 <= lam <= 1):
        raise ValueError(f"discount is {discount} and lam is {lam}: both must lie in [0, 1].")
    delta = rewards + discount * next_values * ~terminated - values  # (eq:ppo-delta)
    carry = discount * lam * (~(terminated | truncated)).to(delta.dtype)
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[..., 0])
    for t in reversed(range(delta.shape[-1])):
        following = delta[..., t] + carry[..., t] * following  # (eq:ppo-gae-recursion)
        advantages[..., t] = following
    return advantages


def clipped_surrogate(
    logp: Float[Tensor, "*batch"],
    logp_old: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    epsilon: float,
) -> Float[Tensor, "*batch"]:
    r"""Weigh each advantage by the ratio of the policies, and stop paying once it has gone too far.

    $$
    L = \min\big(\rho\hat A,\ \operatorname{clip}(\rho, 1-\epsilon, 1+\epsilon)\,\hat A\big),
    \qquad \rho = \frac{\pi_\theta(a \mid s)}{\pi_{\text{old}}(a \mid s)}
    $$

    Args:
        logp: Log probabilities of the actions taken, under the policy that is trained.
        logp_old: The same under the policy that took them, without gradient.
        advantages: Their advantages.
        epsilon: How far the ratio may go from 1 with profit.

    Returns:
        The objective of each sample, to be maximised; it never exceeds the unclipped one.

    Raises:
        ValueError: If `epsilon` is not in (0, 1).

    Example:
        >>> ratio = torch.tensor([0.5, 1.5])
        >>> clipped_surrogate(ratio.log(), torch.zeros(2), torch.ones(2), epsilon=0.2)
        tensor([0.5000, 1.2000])

    Reference:
        Schulman et al. (2017), arXiv:1707.06347, Eq. (7).
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}: 0 < epsilon < 1.")
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.minimum(ratio * advantages, clipped * advantages)  # (eq:ppo-clip)


def ppo_loss(
    logits: Float[Tensor, "B A"],
    values: Float[Tensor, " B"],
    actions: Int[Tensor, " B"],
    logp_old: Float[Tensor, " B"],
    advantages: Float[Tensor, " B"],
    returns: Float[Tensor, " B"],
    *,
    epsilon: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Add up the three terms of PPO: surrogate, critic, entropy.

    $$
    \mathcal L = -\overline{L^{\text{clip}}} + c_v\,\overline{(V - \hat G)^2} - c_e\,\overline{H}
    $$

    Args:
        logits: Scores of all actions.
        values: The critic's values.
        actions: The actions taken.
        logp_old: Their log probabilities when they were taken.
        advantages: Their advantages, normalised or not.
        returns: Targets of the critic.
        epsilon: Half-width of the clip.
        value_weight: c_v.
        entropy_weight: c_e.

    Returns:
        The loss, to be minimised.

    Example:
        >>> zero = torch.zeros(2)
        >>> ppo_loss(torch.zeros(2, 2), zero, torch.tensor([0, 1]), zero - 0.6931, zero, zero + 2)
        tensor(2.)

    Reference:
        Schulman et al. (2017), arXiv:1707.06347, Eq. (9).
    """
    all_logp = logits.log_softmax(dim=-1)
    logp = all_logp.gather(-1, actions[:, None])[:, 0]
    surrogate = clipped_surrogate(logp, logp_old, advantages, epsilon=epsilon).mean()
    entropy = -(all_logp.exp() * all_logp).sum(dim=-1).mean()
    value_loss = (values - returns).square().mean()
    return -surrogate + value_weight * value_loss - entropy_weight * entropy  # (eq:ppo-loss)


class KLEstimates(NamedTuple):
    r"""Three estimates of a KL divergence, one number for each sample; r = p(x)/q(x).

    Attributes:
        k1: $-\log r$: unbiased, of either sign.
        k2: $\frac12(\log r)^2$: biased, never negative.
        k3: $r - 1 - \log r$: unbiased and never negative.
    """

    k1: Float[Tensor, "*batch"]
    k2: Float[Tensor, "*batch"]
    k3: Float[Tensor, "*batch"]


def kl_estimates(
    logp_sampled: Float[Tensor, "*batch"], logp_other: Float[Tensor, "*batch"]
) -> KLEstimates:
    r"""Estimate KL(q || p) from samples of q.

    Args:
        logp_sampled: Log probabilities of the samples under q, which drew them.
        logp_other: Their log probabilities under p.

    Returns:
        The three estimates, not averaged.

    Example:
        >>> kl_estimates(torch.zeros(1), torch.full((1,), 0.5).log()).k3
        tensor([0.1931])

    Reference:
        Schulman (2020), Approximating KL divergence (blog).
    """
    log_r = logp_other - logp_sampled
    return KLEstimates(-log_r, 0.5 * log_r.square(), log_r.expm1() - log_r)  # (eq:ppo-k)


def group_advantages(
    rewards: Float[Tensor, "*batch G"], *, eps: float = 1e-4
) -> Float[Tensor, "*batch G"]:
    r"""Compare each answer with the others to the same question.

    $$
    \hat A_i = \frac{R_i - \operatorname{mean}(R)}{\operatorname{std}(R) + \epsilon}
    $$

    Args:
        rewards: One reward for each of the G answers, at least two.
        eps: Added to the standard deviation (of a sample, with G - 1).

    Returns:
        The advantage that all tokens of an answer share; 0 where all answers are equally good.

    Raises:
        ValueError: If a group has fewer than two answers.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), eps=0.0)
        tensor([ 0.8660, -0.8660, -0.8660,  0.8660])

    Reference:
        Shao et al. (2024), arXiv:2402.03300, Section 4.1.2, outcome supervision.
    """
    G = rewards.shape[-1]
    if G < 2:
        raise ValueError(f"a group has {G} answers: at least 2, or there is nothing to compare.")
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (rewards.std(dim=-1, keepdim=True) + eps)  # (eq:ppo-group)


def grpo_loss(
    logp: Float[Tensor, "N T"],
    logp_old: Float[Tensor, "N T"],
    logp_ref: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    *,
    epsilon: float = 0.2,
    beta: float = 0.04,
) -> Float[Tensor, ""]:
    r"""Average clipped surrogate and KL penalty over the tokens of an answer, then over answers.

    Args:
        logp: Log probabilities of the tokens under the policy that is trained.
        logp_old: The same under the policy that wrote them.
        logp_ref: The same under the reference.
        advantages: One for each answer.
        mask: True on the tokens of the answer, at least one in each row.
        epsilon: Half-width of the clip.
        beta: Weight of the estimate k3 of KL(policy || reference).

    Returns:
        The loss, to be minimised.

    Raises:
        ValueError: If an answer has no token.

    Example:
        >>> zero = torch.zeros(2, 3)
        >>> every = torch.ones(2, 3, dtype=torch.bool)
        >>> grpo_loss(zero, zero, zero, torch.tensor([1.0, 0.5]), every)
        tensor(-0.7500)

    Reference:
        Shao et al. (2024), arXiv:2402.03300, Eqs. (3) and (4).
    """
    length = mask.sum(dim=-1)
    if length.min() < 1:
        raise ValueError(f"the shortest answer has {length.min().item()} tokens: at least 1.")
    surrogate = clipped_surrogate(
        logp, logp_old, advantages[:, None].expand_as(logp), epsilon=epsilon
    )
    penalised = surrogate - beta * kl_estimates(logp, logp_ref).k3  # (eq:ppo-grpo)
    return -(penalised.masked_fill(~mask, 0.0).sum(dim=-1) / length).mean()
