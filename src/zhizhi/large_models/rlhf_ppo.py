"""RLHF: a reward learnt from comparisons, and what it takes to maximise it token by token."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranking_loss(rewards: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    r"""Charge the rewards of K ranked answers for all their comparisons at once.

    $$
    -\frac{1}{B \binom K2} \sum_b \sum_{i < j} \log \sigma(r_{b,i} - r_{b,j})
    $$

    Each answer is read once and takes part in K - 1 comparisons. Split into single pairs and
    shuffled, the same answer would be learnt K - 1 times an epoch.

    Args:
        rewards: Of the answers to one question in the order of the person who ranked them, best
            first; at least two.

    Returns:
        Mean over questions of the mean over pairs; log 2 while the rewards know nothing.

    Raises:
        ValueError: If there are fewer than two answers.

    Example:
        >>> ranking_loss(torch.tensor([[2.0, 1.0, 0.0]]))
        tensor(0.2512)

    Reference:
        Ouyang et al. (2022), arXiv:2203.02155, Eq. (1).
    """
    K = rewards.shape[-1]
    if K < 2:
        raise ValueError(f"K is {K}: at least 2 answers, or there is nothing to compare.")
    better, worse = torch.triu_indices(K, K, offset=1, device=rewards.device)
    margin = rewards[:, better] - rewards[:, worse]
    return -torch.nn.functional.logsigmoid(margin).mean()  # (eq:rlhf-ranking)


def last_token(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
    """Read the value at the last token of each answer: where a reward model gives its score.

    Args:
        values: One number for each position.
        mask: True on the tokens that count; the last of them in each row is taken.

    Returns:
        The numbers, and their positions.

    Raises:
        ValueError: If a row has no token.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> last_token(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), mask)
        (tensor([2., 6.]), tensor([1, 2]))
    """
    if not mask.any(dim=-1).all():
        raise ValueError("a row has no token that counts: at least 1.")
    place = mask.shape[-1] - 1 - mask.flip(-1).int().argmax(dim=-1)
    return values.gather(-1, place[:, None])[:, 0], place


def kl_shaped_rewards(
    score: Float[Tensor, " B"],
    logp: Float[Tensor, "B T"],
    logp_ref: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float,
) -> Float[Tensor, "B T"]:
    r"""Pay for the distance from the reference at every token, and the score at the last.

    $$
    r_t = -\beta \log \frac{\pi(y_t \mid x, y_{<t})}{\pi_{\text{ref}}(y_t \mid x, y_{<t})}
        + \mathbb 1[t = T]\; r(x, y)
    $$

    Args:
        score: The reward model's number for the whole answer.
        logp: Log probabilities of the tokens under the policy that wrote them, without gradient.
        logp_ref: The same under the reference.
        mask: True on the tokens of the answer, the token that ends it included.
        beta: Price of one nat.

    Returns:
        A reward for each token, 0 outside of the mask; a row adds up to the regularised reward.

    Raises:
        ValueError: If `logp` asks for a gradient: rewards are numbers, not paths for gradients.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> logp, ref = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-2.0, -1.0, -9.0]])
        >>> kl_shaped_rewards(torch.tensor([5.0]), logp, ref, mask, beta=0.5)
        tensor([[-0.5000,  5.0000,  0.0000]])

    Reference:
        Ziegler et al. (2019), arXiv:1909.08593, Eq. (2); Ouyang et al. (2022), arXiv:2203.02155,
        Eq. (2).
    """
    if logp.requires_grad:
        raise ValueError("logp asks for a gradient: detach it, a reward has none.")
    _, place = last_token(logp, mask)
    rewards = (-beta * (logp - logp_ref)).masked_fill(~mask, 0.0)
    return rewards.scatter_add(-1, place[:, None], score[:, None])  # (eq:rlhf-shaped)


def whiten(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, shift_mean: bool = True
) -> Float[Tensor, "B T"]:
    """Give the numbers under a mask variance 1, and mean 0 unless the mean is to stay.

    Args:
        x: Advantages or rewards.
        mask: Which count; the others become 0.
        shift_mean: Off for rewards, whose sign means something.

    Returns:
        The numbers, rescaled by the standard deviation (of a population, plus 1e-8).

    Raises:
        ValueError: If fewer than two numbers count.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor([[-1.,  1.,  0.]])

    Reference:
        Huang et al. (2024), arXiv:2403.17031, on the code of Ziegler et al. (2019).
    """
    n = int(mask.sum())
    if n < 2:
        raise ValueError(f"{n} numbers count: at least 2, or there is no variance.")
    mean = x[mask].mean()
    white = (x - mean) / (x[mask].var(unbiased=False) + 1e-8).sqrt()
    if not shift_mean:
        white = white + mean
    return white.masked_fill(~mask, 0.0)


def clipped_value_loss(
    values: Float[Tensor, "*batch"],
    old_values: Float[Tensor, "*batch"],
    returns: Float[Tensor, "*batch"],
    *,
    clip: float,
) -> Float[Tensor, "*batch"]:
    r"""Take the worse of the critic's error and the error after a step of limited size.

    $$
    \tfrac12 \max\big((V - \hat G)^2,\
    (\operatorname{clip}(V, V_{\text{old}} \pm c) - \hat G)^2\big)
    $$

    Args:
        values: V, which is trained.
        old_values: V when the answers were written.
        returns: The targets.
        clip: c, in units of the reward; it depends on their scale.

    Returns:
        One loss each, never below the unclipped one.

    Raises:
        ValueError: If `clip` is not positive.

    Example:
        >>> clipped_value_loss(torch.tensor([0.9]), torch.zeros(1), torch.ones(1), clip=0.2)
        tensor([0.3200])

    Reference:
        Huang et al. (2024), arXiv:2403.17031; Ouyang et al. (2022) use c = 0.2.
    """
    if clip <= 0:
        raise ValueError(f"clip is {clip}: clip > 0.")
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2  # (eq:rlhf-value)


def adaptive_kl_coefficient(
    beta: float, kl: float, *, target: float, gain: float = 0.1, limit: float = 0.2
) -> float:
    r"""Raise the price of a nat while the policy is too far away, lower it while it is near.

    $$
    \beta \leftarrow \beta\,\Big(1 + K \operatorname{clip}\Big(\frac{\text{KL}}{\text{target}} - 1,
        -e, e\Big)\Big)
    $$

    Args:
        beta: The price in this step.
        kl: Measured KL of whole answers, in nats.
        target: The distance that is wanted, in nats.
        gain: K.
        limit: e; a single bad batch moves the price no further than by K e.

    Returns:
        The price in the next step.

    Raises:
        ValueError: If the target is not positive.

    Example:
        >>> round(adaptive_kl_coefficient(0.1, 12.0, target=6.0), 4)  # twice too far
        0.102

    Reference:
        Ziegler et al. (2019), arXiv:1909.08593, Sec. 2.2.
    """
    if target <= 0:
        raise ValueError(f"target is {target}: a KL divergence to hold must be positive.")
    error = min(max(kl / target - 1, -limit), limit)
    return beta * (1 + gain * error)  # (eq:rlhf-beta)


def best_of_n_policy(
    probs: Float[Tensor, " N"], proxy: Float[Tensor, " N"], *, n: int
) -> Float[Tensor, " N"]:
    r"""Return the exact distribution of the best of n answers, by a proxy, over N listed answers.

    $$
    \pi_n(y) = F(y)^n - F(y^-)^n, \qquad F(y) = \sum_{r(y') \le r(y)} \pi(y')
    $$

    Args:
        probs: Probabilities of the answers.
        proxy: Their rewards, all different.
        n: Draws.

    Returns:
        Probabilities of the one that is kept.

    Raises:
        ValueError: If n < 1 or two answers have the same reward.

    Example:
        >>> best_of_n_policy(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), n=2)
        tensor([0.2500, 0.7500])

    Reference:
        Nakano et al. (2021), arXiv:2112.09332, for the method; the formula is that of a maximum.
    """
    if n < 1:
        raise ValueError(f"n is {n}: n >= 1.")
    order = proxy.argsort()
    if (proxy[order].diff() <= 0).any():
        raise ValueError("two answers have the same reward: the best must be one.")
    cdf = probs[order].cumsum(0)
    below = torch.cat([cdf.new_zeros(1), cdf[:-1]])
    return torch.empty_like(probs).scatter(0, order, cdf**n - below**n)  # (eq:rlhf-bon)


def best_of_n_kl(n: int) -> float:
    r"""Return how far the best of n is from the policy that is drawn from, in nats.

    $$
    \log n - \frac{n - 1}{n}
    $$

    Exact if each single answer is improbable; an upper bound otherwise.

    Args:
        n: Draws.

    Returns:
        The KL divergence.

    Raises:
        ValueError: If n < 1.

    Example:
        >>> round(best_of_n_kl(4), 4)
        0.6363

    Reference:
        Stiennon et al. (2020), arXiv:2009.01325, App. G.3; Beirami et al. (2024),
        arXiv:2401.01879, for the bound.
    """
    if n < 1:
        raise ValueError(f"n is {n}: n >= 1.")
    return math.log(n) - (n - 1) / n  # (eq:rlhf-bon-kl)
