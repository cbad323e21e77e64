"""DPO: the reward model written as a ratio of two language models, and the losses built on it."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def kl_optimal_policy(
    reward: Float[Tensor, "*batch N"],
    logp_ref: Float[Tensor, "*batch N"],
    *,
    beta: float,
) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch"]]:
    r"""Solve KL-regularised reward maximisation exactly over N listed responses.

    $$
    \pi^*(y \mid x) = \frac{\pi_{\text{ref}}(y \mid x)\, e^{r(x, y)/\beta}}{Z(x)},
    \qquad
    Z(x) = \sum_{y} \pi_{\text{ref}}(y \mid x)\, e^{r(x, y)/\beta}
    $$

    The value of the objective at its maximum is $\beta \log Z(x)$.

    Args:
        reward: Reward of each response.
        logp_ref: Log-probability of each response under the reference; -inf is allowed.
        beta: Strength of the KL penalty.

    Returns:
        The log-probabilities of the optimal policy, and log Z.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> import torch
        >>> logp_ref = torch.tensor([0.5, 0.5]).log()
        >>> logp, log_z = kl_optimal_policy(torch.tensor([0.0, 3.0]).log(), logp_ref, beta=1.0)
        >>> logp.exp()
        tensor([0., 1.])

    Reference:
        Rafailov et al. (2023), arXiv:2305.18290, Eq. (4) and Appendix A.1.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be greater than 0.")
    # (eq:dpo-optimum)
    scores = logp_ref + reward / beta
    log_z = scores.logsumexp(dim=-1)
    return scores - rearrange(log_z, "... -> ... 1"), log_z


def bradley_terry_loss(
    reward_chosen: Float[Tensor, " B"],
    reward_rejected: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    r"""Charge a reward for each comparison it has to explain.

    $$
    \ell = -\log \sigma\big(r(x, y_w) - r(x, y_l)\big)
    $$

    Args:
        reward_chosen: Reward of the preferred response of each pair.
        reward_rejected: Reward of the other response.

    Returns:
        One loss a pair; log 2 where the two rewards are equal.

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]))
        tensor([0.6931, 0.0486])

    Reference:
        Rafailov et al. (2023), arXiv:2305.18290, Eq. (2).
        Ouyang et al. (2022), arXiv:2203.02155, Eq. (1): the same over all pairs of a ranking.
    """
    return -F.logsigmoid(reward_chosen - reward_rejected)  # (eq:dpo-rm-loss)


def implicit_reward(
    logp: Float[Tensor, "*batch"],
    logp_ref: Float[Tensor, "*batch"],
    *,
    beta: float,
) -> Float[Tensor, "*batch"]:
    r"""Read the reward that a policy implies, relative to its reference.

    $$
    \hat r_\theta(x, y) = \beta \log
        \frac{\pi_\theta(y \mid x)}{\pi_{\text{ref}}(y \mid x)}
    $$

    Only differences between responses to one prompt mean something: every other reward for which
    the policy is optimal differs from this one by a function of the prompt.

    Args:
        logp: Log-probability of each response under the policy.
        logp_ref: Log-probability of the same responses under the reference.
        beta: Strength of the KL penalty.

    Returns:
        One reward for each response.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> import torch
        >>> implicit_reward(torch.tensor([-3.0]), torch.tensor([-5.0]), beta=0.1)
        tensor([0.2000])

    Reference:
        Rafailov et al. (2023), arXiv:2305.18290, Eq. (5) and Theorem 1.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be greater than 0.")
    return beta * (logp - logp_ref)  # (eq:dpo-implicit-reward)


def dpo_loss(
    logp_chosen: Float[Tensor, " B"],
    logp_rejected: Float[Tensor, " B"],
    logp_ref_chosen: Float[Tensor, " B"],
    logp_ref_rejected: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""Train a language model on comparisons as if it were a reward model.

    $$
    \ell_{\text{DPO}} = -\log \sigma\Big(
        \beta \log \frac{\pi_\theta(y_w \mid x)}{\pi_{\text{ref}}(y_w \mid x)}
        - \beta \log \frac{\pi_\theta(y_l \mid x)}{\pi_{\text{ref}}(y_l \mid x)} \Big)
    $$

    Args:
        logp_chosen: Log-probability of each preferred response, summed over its tokens.
        logp_rejected: The same of the other response.
        logp_ref_chosen: Log-probability of the preferred response under the frozen reference.
        logp_ref_rejected: The same of the other response.
        beta: Strength of the KL penalty. Small values tie the policy less to the reference.

    Returns:
        One loss a pair; exactly log 2 while the policy equals the reference.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> import torch
        >>> logp = torch.tensor([-7.0]), torch.tensor([-4.0])
        >>> dpo_loss(*logp, *logp)
        tensor([0.6931])

    Reference:
        Rafailov et al. (2023), arXiv:2305.18290, Eq. (7).
    """
    # (eq:dpo-loss)
    return bradley_terry_loss(
        implicit_reward(logp_chosen, logp_ref_chosen, beta=beta),
        implicit_reward(logp_rejected, logp_ref_rejected, beta=beta),
    )


def cdpo_loss(
    logp_chosen: Float[Tensor, " B"],
    logp_rejected: Float[Tensor, " B"],
    logp_ref_chosen: Float[Tensor, " B"],
    logp_ref_rejected: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""Train as `dpo_loss` does, on labels that are wrong with a known probability.

    $$
    \ell_{\text{cDPO}} = -(1 - \varepsilon) \log \sigma(\hat r_w - \hat r_l)
        - \varepsilon \log \sigma(\hat r_l - \hat r_w)
    $$

    Args:
        logp_chosen: Log-probability of each preferred response, summed over its tokens.
        logp_rejected: The same of the other response.
        logp_ref_chosen: Log-probability of the preferred response under the frozen reference.
        logp_ref_rejected: The same of the other response.
        beta: Strength of the KL penalty.
        label_smoothing: Probability that a label is flipped.

    Returns:
        One loss a pair, least where the margin of rewards is log((1 - eps) / eps).

    Raises:
        ValueError: If label_smoothing is outside [0, 0.5), or beta is not positive.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> cdpo_loss(zero, zero, zero, zero)
        tensor([0.6931])

    Reference:
        Mitchell (2023), A note on DPO with noisy preferences & relationship to IPO, Eq. (3).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 0.5).")
    reward_chosen = implicit_reward(logp_chosen, logp_ref_chosen, beta=beta)
    reward_rejected = implicit_reward(logp_rejected, logp_ref_rejected, beta=beta)
    as_labelled = bradley_terry_loss(reward_chosen, reward_rejected)
    as_flipped = bradley_terry_loss(reward_rejected, reward_chosen)
    # (eq:dpo-cdpo)
    return (1 - label_smoothing) * as_labelled + label_smoothing * as_flipped


def ipo_loss(
    logp_chosen: Float[Tensor, " B"],
    logp_rejected: Float[Tensor, " B"],
    logp_ref_chosen: Float[Tensor, " B"],
    logp_ref_rejected: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""Pull the log-ratio margin of each pair to 1/(2 beta) and no further.

    $$
    \ell_{\text{IPO}} = \Big( \log \frac{\pi_\theta(y_w \mid x)}{\pi_{\text{ref}}(y_w \mid x)}
        - \log \frac{\pi_\theta(y_l \mid x)}{\pi_{\text{ref}}(y_l \mid x)}
        - \frac{1}{2 \beta} \Big)^2
    $$

    Args:
        logp_chosen: Log-probability of each preferred response, summed over its tokens.
        logp_rejected: The same of the other response.
        logp_ref_chosen: Log-probability of the preferred response under the frozen reference.
        logp_ref_rejected: The same of the other response.
        beta: Strength of the KL penalty; the paper writes tau.

    Returns:
        One loss a pair.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> ipo_loss(zero + 5.0, zero, zero, zero, beta=0.1)
        tensor([0.])

    Reference:
        Azar et al. (2023), arXiv:2310.12036, Eq. (17).
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}: it must be greater than 0.")
    margin = (logp_chosen - logp_ref_chosen) - (logp_rejected - logp_ref_rejected)
    return (margin - 1 / (2 * beta)) ** 2  # (eq:dpo-ipo)


def hinge_loss(
    logp_chosen: Float[Tensor, " B"],
    logp_rejected: Float[Tensor, " B"],
    logp_ref_chosen: Float[Tensor, " B"],
    logp_ref_rejected: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""Ask each pair for a margin of implicit rewards of one, and forget it once it has it.

    $$
    \ell_{\text{hinge}} = \max\big(0,\ 1 - (\hat r_w - \hat r_l)\big)
    $$

    Args:
        logp_chosen: Log-probability of each preferred response, summed over its tokens.
        logp_rejected: The same of the other response.
        logp_ref_chosen: Log-probability of the preferred response under the frozen reference.
        logp_ref_rejected: The same of the other response.
        beta: Strength of the KL penalty.

    Returns:
        One loss a pair.

    Raises:
        ValueError: If beta is not positive.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> hinge_loss(zero + 4.0, zero, zero, zero, beta=0.1)
        tensor([0.6000])

    Reference:
        Zhao et al. (2023), arXiv:2305.10425: the hinge on log-likelihoods, without a reference.
        Liu et al. (2023), arXiv:2309.06657: the same hinge on the ratio to the reference.
    """
    reward_chosen = implicit_reward(logp_chosen, logp_ref_chosen, beta=beta)
    reward_rejected = implicit_reward(logp_rejected, logp_ref_rejected, beta=beta)
    return F.relu(1 - (reward_chosen - reward_rejected))  # (eq:dpo-hinge)


def sequence_log_probs(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    ignore_index: int = -100,
) -> Float[Tensor, " B"]:
    r"""Sum the log-probabilities of the counted tokens of each sequence.

    $$
    \log \pi(y \mid x) = \sum_{t \ge 1,\ \text{label}_t \ne -100}
        \log \operatorname{softmax}(\text{logits}_{t-1})[\text{label}_t]
    $$

    The shift is made here: position t-1 predicts label t, and the first label is never counted.
    Pass float32 logits: near -300 neighbouring bfloat16 numbers are 2 apart.

    Args:
        logits: Scores of the model, unshifted.
        labels: Token ids, with `ignore_index` on the prompt and the padding.
        ignore_index: The label that is not counted.

    Returns:
        One log-probability a sequence: a sum, not a mean over tokens.

    Raises:
        ValueError: If a sequence has no counted token.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4, 10)
        >>> labels = torch.tensor([[-100, -100, 3, 7]])
        >>> sequence_log_probs(logits, labels)  # two tokens, each of probability 1/10
        tensor([-4.6052])

    Reference:
        eric-mitchell/direct-preference-optimization, `_get_batch_logps` in `trainers.py`.
    """
    targets = labels[:, 1:].long()
    n_counted = (targets != ignore_index).sum(dim=-1)
    if (n_counted == 0).any():
        row = int((n_counted == 0).int().argmax())
        raise ValueError(
            f"row {row} counts 0 of {targets.shape[1]} labels: a response needs at least 1 token."
        )
    # (eq:dpo-sequence); cross_entropy is 0 where the label is ignored
    scores = rearrange(logits[:, :-1], "B T V -> B V T")
    return -F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="none").sum(-1)
