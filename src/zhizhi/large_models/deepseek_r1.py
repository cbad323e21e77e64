"""DeepSeek-R1: rewards that are rules, answers that vote, and how much a token weighs."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

THOUGHT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)


def format_reward(text: str) -> float:
    r"""Return 1 if a text is a thought and then an answer, each in its tags, and nothing else.

    Args:
        text: What the model wrote.

    Returns:
        1 or 0.

    Example:
        >>> format_reward("<think>3 and 4</think> <answer>7</answer>"), format_reward("7")
        (1.0, 0.0)

    Reference:
        DeepSeek-AI (2025), arXiv:2501.12948, Sec. 2.2.2 and Table 1.
    """
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    once = all(text.count(tag) == 1 for tag in tags)
    return float(once and THOUGHT.fullmatch(text.strip()) is not None)


def accuracy_reward(text: str, solution: str) -> float:
    r"""Return 1 if the answer in the tags is the solution: the same text or the same number.

    Args:
        text: What the model wrote.
        solution: What is right.

    Returns:
        1 or 0; 0 if there is not exactly one answer.

    Example:
        >>> accuracy_reward("<think>.</think><answer> 7.0 </answer>", "7")
        1.0
        >>> accuracy_reward("<answer>6</answer><answer>7</answer>", "7")
        0.0

    Reference:
        DeepSeek-AI (2025), arXiv:2501.12948, Sec. 2.2.2: rules, not a reward model.
    """
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if len(answers) != 1:
        return 0.0
    given, wanted = answers[0].strip(), solution.strip()
    try:
        return float(math.isclose(float(given), float(wanted), rel_tol=1e-9))
    except ValueError:
        return float(given == wanted)


def chinese_share(text: str) -> float:
    r"""Return the part of the words that are Chinese: the reward for not mixing languages.

    Args:
        text: A thought. Each Chinese character and each run of Latin letters is one word.

    Returns:
        From 0 to 1; 1 minus it is the share of English. 0 if there is no word.

    Example:
        >>> chinese_share("先 compute 三"), chinese_share("12 + 3")
        (0.6666666666666666, 0.0)

    Reference:
        DeepSeek-AI (2025), arXiv:2501.12948, Sec. 2.3.2: the proportion of target-language words.
    """
    chinese = re.findall(r"[\u4e00-\u9fff]", text)
    latin = re.findall(r"[A-Za-z]+", text)
    return len(chinese) / (len(chinese) + len(latin)) if chinese else 0.0


def pass_at_k(n: int, c: int, *, k: int) -> float:
    r"""Estimate without bias how often at least one of k answers is right, from n of which c are.

    $$
    1 - \binom{n - c}{k} \Big/ \binom{n}{k}
    $$

    Args:
        n: Answers that were drawn.
        c: Right ones.
        k: Answers that count, at most n.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: If not 0 <= c <= n or not 1 <= k <= n.

    Example:
        >>> pass_at_k(4, 1, k=2)
        0.5

    Reference:
        Chen et al. (2021), arXiv:2107.03374, Eq. (1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n is {n}, c {c} and k {k}: 0 <= c <= n and 1 <= k <= n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # (eq:r1-pass)


def majority_vote(answers: Sequence[Hashable]) -> Hashable:
    r"""Return the commonest answer, the first of equals: cons@n.

    Args:
        answers: Of one question, at least one.

    Returns:
        An answer.

    Raises:
        ValueError: If there is none.

    Example:
        >>> majority_vote([3, 7, 7, 3, 9])
        3

    Reference:
        Wang et al. (2022), arXiv:2203.11171: self-consistency.
    """
    if not answers:
        raise ValueError("There is no answer to vote for.")
    counts = Counter(answers)
    return max(counts, key=lambda answer: counts[answer])  # insertion order breaks ties


def token_weights(
    mask: Bool[Tensor, "N T"], *, aggregation: str, max_length: int | None = None
) -> Float[Tensor, "N T"]:
    r"""Return the weight of each token's term in the loss.

    $$
    \frac{1}{N |o_i|} \quad\text{grpo}, \qquad \frac{1}{\sum_j |o_j|} \quad\text{dapo}, \qquad
    \frac{1}{N\, T_{\max}} \quad\text{dr\_grpo}
    $$

    Args:
        mask: True on the tokens of each answer, at least one a row.
        aggregation: "grpo": mean over the tokens of an answer, then over answers; "dapo": over all
            tokens; "dr_grpo": sums over a constant.
        max_length: T_max; the width of the mask if None.

    Returns:
        Weights, 0 outside of the mask.

    Raises:
        ValueError: If an answer has no token or the aggregation has another name.

    Example:
        >>> token_weights(torch.tensor([[True, False], [True, True]]), aggregation="grpo")
        tensor([[0.5000, 0.0000],
                [0.2500, 0.2500]])

    Reference:
        Shao et al. (2024), arXiv:2402.03300, Eq. (3); Yu et al. (2025), arXiv:2503.14476, Eq. (8);
        Liu et al. (2025), arXiv:2503.20783, for the constant.
    """
    lengths = mask.sum(dim=-1)
    if lengths.min() < 1:
        raise ValueError(f"the shortest answer has {lengths.min().item()} tokens: at least 1.")
    N, T = mask.shape
    if aggregation == "grpo":
        weights = 1 / (N * lengths)[:, None].expand(N, T)
    elif aggregation == "dapo":
        weights = torch.full((N, T), 1 / lengths.sum().item())
    elif aggregation == "dr_grpo":
        weights = torch.full((N, T), 1 / (N * (max_length or T)))
    else:
        raise ValueError(f"aggregation is {aggregation!r}: 'grpo', 'dapo' or 'dr_grpo'.")
    return weights.masked_fill(~mask, 0.0)  # (eq:r1-weights)
