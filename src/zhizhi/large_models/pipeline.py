"""Pipelines of stages: who waits for whom, and for how long."""

from typing import NamedTuple


class Work(NamedTuple):
    """A forward ("F") or backward ("B") of one micro-batch on one stage, with its times."""

    stage: int
    kind: str
    batch: int
    start: float
    end: float


def one_f_one_b(n_stages: int, n_batches: int, *, F: float = 1.0, B: float = 2.0) -> list[Work]:
    r"""Run the 1F1B schedule: fill, then one forward and one backward in turn, then drain.

    Stage s has at most P - s micro-batches under way, whose activations it keeps.

    Args:
        n_stages: P.
        n_batches: M, micro-batches; at least P.
        F: Time of a forward on a stage.
        B: Time of a backward.

    Returns:
        All work with its times.

    Raises:
        ValueError: If there are fewer micro-batches than stages.

    Example:
        >>> work = one_f_one_b(2, 2)
        >>> max(w.end for w in work)
        9.0

    Reference:
        Narayanan et al. (2019), PipeDream; Harlap et al. (2018), arXiv:1806.03377.
    """
    P, M = n_stages, n_batches
    if not 1 <= P <= M:
        raise ValueError(f"{M} micro-batches on {P} stages: at least as many as stages.")
    orders = []
    for s in range(P):
        ahead = P - s
        order = [("F", i) for i in range(ahead)]
        for i in range(M):
            order.append(("B", i))
            if i + ahead < M:
                order.append(("F", i + ahead))
        orders.append(order)
    done: dict[tuple[int, str, int], float] = {}
    free, position = [0.0] * P, [0] * P
    work: list[Work] = []
    while len(work) < 2 * P * M:
        for s in range(P):
            if position[s] == len(orders[s]):
                continue
            kind, i = orders[s][position[s]]
            if kind == "F":
                needs = [] if s == 0 else [(s - 1, "F", i)]
            else:
                needs = [(s, "F", i)] if s == P - 1 else [(s + 1, "B", i)]
            if not all(need in done for need in needs):
                continue
            start = max([free[s], *(done[need] for need in needs)])
            end = start + (F if kind == "F" else B)
            done[s, kind, i], free[s] = end, end
            position[s] += 1
            work.append(Work(s, kind, i, start, end))
    return work


def bubble(work: list[Work], *, stage: int = 0) -> float:
    r"""Return how long a stage is idle between the first and the last work of all.

    Args:
        work: Of a schedule.
        stage: Which.

    Returns:
        Time.

    Example:
        >>> bubble(one_f_one_b(8, 20))  # (P - 1)(F + B)
        21.0
    """
    busy = sum(w.end - w.start for w in work if w.stage == stage)
    return max(w.end for w in work) - min(w.start for w in work) - busy


def bubble_formulas(
    n_stages: int, *, F: float = 1.0, B: float = 2.0, W: float = 1.0, both: float | None = None
) -> dict[str, float]:
    r"""Return the idle time of a stage by the formulas of three schedules.

    $$
    (P - 1)(F + B), \qquad (P - 1)(F + B - 2W), \qquad \Big(\frac P2 - 1\Big)(F\&B + B - 3W)
    $$

    Args:
        n_stages: P; even for DualPipe.
        F: Time of a forward.
        B: Time of a whole backward.
        W: Of it, the part for weights.
        both: Time of a forward and a backward that overlap; None takes F + B.

    Returns:
        "1F1B", "ZB1P" and "DualPipe".

    Raises:
        ValueError: If P is odd.

    Example:
        >>> bubble_formulas(8)
        {'1F1B': 21.0, 'ZB1P': 7.0, 'DualPipe': 6.0}

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Table 2.
    """
    if n_stages % 2:
        raise ValueError(f"n_stages is {n_stages}: DualPipe sends from both ends, P is even.")
    P = n_stages
    overlapped = F + B if both is None else both
    return {
        "1F1B": (P - 1) * (F + B),
        "ZB1P": (P - 1) * (F + B - 2 * W),
        "DualPipe": (P / 2 - 1) * (overlapped + B - 3 * W),
    }
