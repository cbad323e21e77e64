"""Seed-Thinking-v1.5: answers that can be checked, and the repairs that keep PPO stable on them."""

import ast
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def verify_24(expression: str, numbers: Sequence[int], *, target: int = 24) -> bool:
    r"""Return whether an expression makes the target from exactly these numbers.

    It is parsed, never executed: whole numbers, + - * / and brackets, nothing else. Fractions are
    exact, so 8 / (3 - 8/3) counts.

    Args:
        expression: What the model answered.
        numbers: Those of the puzzle; each must be used once.
        target: The value.

    Returns:
        True or False; everything that is no such expression is False.

    Example:
        >>> verify_24("8 / (3 - 8 / 3)", [3, 3, 8, 8]), verify_24("24", [3, 3, 8, 8])
        (True, False)

    Reference:
        ByteDance Seed (2025), arXiv:2504.13914, Sec. 2: logic puzzles with verifiers.
    """
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(ast.dump(node))

    try:
        made = value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return made == target and Counter(used) == Counter(numbers)


def solve_24(numbers: Sequence[int], *, target: int = 24) -> str | None:
    """Return one expression that makes the target, or None if there is none.

    Args:
        numbers: Of a puzzle.
        target: The value.

    Returns:
        An expression with all brackets.

    Example:
        >>> solve_24([1, 1, 1, 1]) is None, verify_24(str(solve_24([4, 7, 8, 8])), [4, 7, 8, 8])
        (True, True)
    """
    signs = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

    def search(terms: list[tuple[Fraction, str]]) -> str | None:
        if len(terms) == 1:
            return terms[0][1] if terms[0][0] == target else None
        for i, (a, left) in enumerate(terms):
            for j, (b, right) in enumerate(terms):
                if i == j:
                    continue
                rest = [term for k, term in enumerate(terms) if k not in (i, j)]
                for sign, apply in signs.items():
                    if sign == "/" and b == 0:
                        continue
                    found = search([*rest, (apply(a, b), f"({left} {sign} {right})")])
                    if found is not None:
                        return found
        return None

    return search([(Fraction(n), str(n)) for n in numbers])


def make_sudoku(
    *, n_blank: int, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "4 4"], Int[Tensor, "4 4"]]:
    r"""Draw a 4 x 4 sudoku with some cells left blank: the more, the harder.

    Args:
        n_blank: Blank cells, 0 to 16. With many of them there is more than one solution.
        generator: Shuffles digits, rows and columns of one filled grid, and chooses the blanks.

    Returns:
        The puzzle, 0 where it is blank, and one solution.

    Raises:
        ValueError: If n_blank is out of range.

    Example:
        >>> puzzle, solution = make_sudoku(n_blank=6)
        >>> int((puzzle == 0).sum()), verify_sudoku(solution, puzzle)
        (6, True)
    """
    if not 0 <= n_blank <= 16:
        raise ValueError(f"n_blank is {n_blank}: 0 to 16 cells can be blank.")

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    def lines() -> Tensor:  # bands change places, and so do the lines of a band
        return torch.cat([2 * band + shuffled(2) for band in shuffled(2)])

    filled = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [3, 2, 1, 0]])
    solution = shuffled(4)[filled][lines()][:, lines()] + 1
    puzzle = solution.clone()
    puzzle.view(-1)[shuffled(16)[:n_blank]] = 0
    return puzzle, solution


def verify_sudoku(answer: Int[Tensor, "4 4"], puzzle: Int[Tensor, "4 4"]) -> bool:
    r"""Return whether an answer keeps the clues and has 1 to 4 in each row, column and box.

    Args:
        answer: A filled grid.
        puzzle: The clues, 0 where there is none.

    Returns:
        True or False; another solution than the one that was drawn is right, too.

    Example:
        >>> puzzle, solution = make_sudoku(n_blank=3)
        >>> verify_sudoku(solution.T.clone(), puzzle * 0), verify_sudoku(puzzle, puzzle)
        (True, False)
    """
    boxes = rearrange(answer, "(Y y) (X x) -> (Y X) (y x)", y=2, x=2)
    lines = torch.cat([answer, answer.T, boxes])
    full = torch.arange(1, 5, device=answer.device)
    kept = (answer == puzzle) | (puzzle == 0)
    return bool((lines.sort(dim=1).values == full).all() and kept.all())


def pairwise_preference(
    margin_ab: Float[Tensor, "*batch"], margin_ba: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Read a preference off a language model that was asked twice, in both orders.

    $$
    P(A \succ B) = \sigma\Big(\frac{m_{AB} - m_{BA}}{2}\Big), \qquad
    m = \ell_{\text{YES}} - \ell_{\text{NO}}
    $$

    A liking for the place, the same number added to both margins, drops out.

    Args:
        margin_ab: Logit of YES less that of NO to "is A better than B?".
        margin_ba: The same with A and B exchanged.

    Returns:
        From 0 to 1; that of the exchanged pair is 1 minus it.

    Example:
        >>> pairwise_preference(torch.tensor([3.0]), torch.tensor([1.0]))  # likes what comes first
        tensor([0.7311])

    Reference:
        ByteDance Seed (2025), arXiv:2504.13914, Sec. 3: a pairwise generative reward model that
        answers YES or NO; asking in both orders is not in the report.
    """
    return torch.sigmoid((margin_ab - margin_ba) / 2)  # (eq:seed-pairwise)


def length_adaptive_lambda(
    length: Int[Tensor, "*batch"], *, alpha: float = 0.05
) -> Float[Tensor, "*batch"]:
    r"""Return the lambda of GAE that weighs an answer in proportion to its length.

    $$
    \lambda = \max\Big(0,\ 1 - \frac{1}{\alpha\, l}\Big)
    $$

    Without the maximum it is negative for answers shorter than 1/alpha.

    Args:
        length: l, in tokens.
        alpha: The share of the tokens that the weights add up to.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: If alpha is not positive or a length is below 1.

    Example:
        >>> length_adaptive_lambda(torch.tensor([10, 100, 10_000]))
        tensor([0.0000, 0.8000, 0.9980])

    Reference:
        Yue et al. (2025), arXiv:2504.05118 (VAPO), length-adaptive GAE, alpha = 0.05.
    """
    if alpha <= 0 or (length.numel() and length.min() < 1):
        raise ValueError(f"alpha is {alpha} and length {length.tolist()}: alpha > 0, length >= 1.")
    return (1 - 1 / (alpha * length.float())).clamp_min(0.0)  # (eq:seed-lambda)


def clip_higher_surrogate(
    logp: Float[Tensor, "*batch"],
    logp_old: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
) -> Float[Tensor, "*batch"]:
    r"""Let rare tokens grow further than common ones may fall: clip-higher.

    $$
    \min\big(\rho \hat A,\ \operatorname{clip}(\rho, 1 - \epsilon_{\text{low}},
        1 + \epsilon_{\text{high}})\, \hat A\big)
    $$

    Args:
        logp: Log probabilities under the policy that is trained.
        logp_old: The same under the one that wrote the tokens, without gradient.
        advantages: Their advantages.
        epsilon_low: How far the ratio may fall below 1 with profit.
        epsilon_high: How far it may rise.

    Returns:
        The objective of each token, to be maximised.

    Raises:
        ValueError: If not 0 < epsilon_low < 1, or epsilon_high is not positive.

    Example:
        >>> clip_higher_surrogate(torch.tensor([2.0]).log(), torch.zeros(1), torch.ones(1))
        tensor([1.2800])

    Reference:
        ByteDance Seed (2025), arXiv:2504.13914, Eq. (1); Yu et al. (2025), arXiv:2503.14476
        (DAPO), Eq. (10): 0.2 and 0.28.
    """
    if not 0 < epsilon_low < 1 or epsilon_high <= 0:
        raise ValueError(
            f"epsilon_low is {epsilon_low} and epsilon_high {epsilon_high}: "
            "0 < epsilon_low < 1 and epsilon_high > 0."
        )
    ratio = torch.exp(logp - logp_old)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.minimum(ratio * advantages, clipped * advantages)  # (eq:seed-clip)


def informative_groups(right: Bool[Tensor, "Q G"]) -> Bool[Tensor, " Q"]:
    r"""Return which questions were neither always nor never answered rightly.

    $$
    0 < |\{i : o_i \text{ is right}\}| < G
    $$

    Args:
        right: Whether each of the G answers to each question is right.

    Returns:
        True where the group has a gradient; dynamic sampling asks on until a batch is full of them.

    Example:
        >>> informative_groups(torch.tensor([[True, True], [True, False]]))
        tensor([False,  True])

    Reference:
        Yu et al. (2025), arXiv:2503.14476, Eq. (11).
    """
    return right.any(dim=-1) & ~right.all(dim=-1)  # (eq:seed-dynamic)


def soft_overlong_penalty(
    length: Int[Tensor, "*batch"], *, max_length: int, cache: int
) -> Float[Tensor, "*batch"]:
    r"""Warn an answer before it is cut off.

    $$
    0 \ \text{up to } L - c, \qquad \frac{(L - c) - l}{c} \ \text{up to } L, \qquad
    -1 \ \text{beyond}
    $$

    Args:
        length: l, in tokens.
        max_length: L.
        cache: c, the width of the ramp.

    Returns:
        Added to the reward of the answer; from -1 to 0.

    Raises:
        ValueError: If not 0 < cache <= max_length.

    Example:
        >>> soft_overlong_penalty(torch.tensor([10, 16, 17, 18, 20, 21]), max_length=20, cache=4)
        tensor([ 0.0000,  0.0000, -0.2500, -0.5000, -1.0000, -1.0000])

    Reference:
        Yu et al. (2025), arXiv:2503.14476, Eq. (13).
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache is {cache} of {max_length}: 0 < cache <= max_length.")
    return ((max_length - cache - length.float()) / cache).clamp(-1.0, 0.0)  # (eq:seed-overlong)


def batch_makespan(lengths: Sequence[float], *, workers: int, stream: bool) -> float:
    r"""Return how long workers take to write answers: in locked steps, or each when it is free.

    Args:
        lengths: Time of each answer, in the order in which they are asked for.
        workers: Answers that are written at one time.
        stream: Off: a batch of `workers` starts when the one before it has ended; on: a worker
            begins the next answer at once.

    Returns:
        Time until the last answer is there.

    Raises:
        ValueError: If there is no worker.

    Example:
        >>> times = [1.0, 9.0, 1.0, 9.0]
        >>> [batch_makespan(times, workers=2, stream=stream) for stream in (False, True)]
        [18.0, 11.0]

    Reference:
        ByteDance Seed (2025), arXiv:2504.13914, Sec. 4: the streaming rollout system.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: at least 1.")
    if not stream:
        return sum(max(lengths[i : i + workers]) for i in range(0, len(lengths), workers))
    free = [0.0] * workers
    for length in lengths:
        first = min(range(workers), key=free.__getitem__)
        free[first] += length
    return max(free)
