"""Learning rates over a run of training, as factors of the peak."""

import math


def cosine_with_warmup(step: int, *, n_steps: int, n_warmup: int, floor: float = 0.1) -> float:
    r"""Rise in a straight line, then fall along half a cosine to a floor.

    $$
    \eta_s / \eta_{\max} = \begin{cases}
        s / n_w & s < n_w \\
        f + \tfrac{1 - f}{2} \Big(1 + \cos \pi \tfrac{s - n_w}{n - n_w}\Big) & s \ge n_w
    \end{cases}
    $$

    The first step of a warm-up has rate 0.

    Args:
        step: Steps already taken, s.
        n_steps: Steps of the whole run, n; the floor is kept after them.
        n_warmup: Steps of the rise, n_w; 0 begins at the peak.
        floor: Part of the peak that is left at the end, f.

    Returns:
        A factor from 0 to 1.

    Raises:
        ValueError: If the rise is longer than the run, or step or floor is out of range.

    Example:
        >>> [round(cosine_with_warmup(s, n_steps=10, n_warmup=2), 4) for s in (0, 1, 2, 6, 10, 99)]
        [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]

    Reference:
        Touvron et al. (2023), arXiv:2302.13971, Sec. 2.3: 2,000 steps of warm-up, floor 10 %.
    """
    if not 0 <= n_warmup < n_steps:
        raise ValueError(f"n_warmup is {n_warmup} of {n_steps} steps: 0 <= n_warmup < n_steps.")
    if step < 0 or not 0 <= floor <= 1:
        raise ValueError(f"step is {step} and floor {floor}: step >= 0, 0 <= floor <= 1.")
    if step < n_warmup:
        return step / n_warmup
    done = min(1.0, (step - n_warmup) / (n_steps - n_warmup))
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done))  # (eq:llama-schedule)


def multi_step(
    step: int,
    *,
    n_steps: int,
    n_warmup: int,
    milestones: tuple[float, ...] = (0.8, 0.9),
    factors: tuple[float, ...] = (0.316, 0.1),
) -> float:
    r"""Rise in a straight line, then stay, and fall in steps near the end.

    $$
    \eta_s / \eta_{\max} = s / n_w, \quad 1, \quad f_1 \text{ from } m_1 n, \quad
    f_2 \text{ from } m_2 n
    $$

    A longer run can begin from the first stage of a shorter one.

    Args:
        step: Steps already taken, s.
        n_steps: Steps of the whole run, n.
        n_warmup: Steps of the rise, n_w.
        milestones: Parts of the run after which the rate falls, ascending.
        factors: Part of the peak after each milestone.

    Returns:
        A factor from 0 to 1.

    Raises:
        ValueError: If milestones and factors do not go together, or the rise is too long.

    Example:
        >>> [multi_step(s, n_steps=100, n_warmup=10) for s in (0, 5, 10, 79, 80, 90)]
        [0.0, 0.5, 1.0, 1.0, 0.316, 0.1]

    Reference:
        DeepSeek-AI (2024), arXiv:2401.02954, Sec. 2.3; 31.6 % is one over the root of ten.
    """
    if len(milestones) != len(factors) or list(milestones) != sorted(milestones):
        raise ValueError(f"milestones {milestones} and factors {factors}: one each, ascending.")
    if step < 0 or not 0 <= n_warmup < n_steps * min(milestones, default=1.0):
        raise ValueError(f"step is {step} and n_warmup {n_warmup}: the rise ends before the falls.")
    if step < n_warmup:
        return step / n_warmup
    passed = sum(step >= m * n_steps for m in milestones)
    return 1.0 if passed == 0 else factors[passed - 1]  # (eq:deepseek-llm-schedule)
