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
