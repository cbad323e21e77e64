"""Grid world: a finite Markov decision process written as two tensors, and Zhao's 5x5 grid."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cell = tuple[int, int]

ARROWS = "↑→↓←○"  # the five actions a_1 ... a_5; the circle stays
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))

BOOK_SHAPE = (5, 5)
BOOK_FORBIDDEN = frozenset({(1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (4, 1)})
BOOK_TARGET = (3, 2)


@dataclass(frozen=True, eq=False)
class TabularMDP:
    r"""Hold the model of a finite Markov decision process.

    Only the mean of the reward is kept, since nothing else enters an expected return:

    $$
    r(s,a) = \sum_r p(r \mid s,a)\, r
    $$

    Args:
        transition: The probability p(s' | s, a), indexed [s, a, s'].
        reward: The expected reward r(s, a).
        discount: The discount rate, in [0, 1).

    Raises:
        ValueError: If a row of `transition` is no distribution, or `discount` is outside [0, 1).

    Example:
        >>> TabularMDP(torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]]), 0.9).reward
        tensor([[0., 1.]])

    Reference:
        Zhao (2025), Mathematical Foundations of Reinforcement Learning, Section 1.7.
    """

    transition: Float[Tensor, "S A S"]
    reward: Float[Tensor, "S A"]
    discount: float

    def __post_init__(self) -> None:
        total = self.transition.sum(dim=-1)
        worst = total.flatten()[(total - 1).abs().argmax()].item()
        if self.transition.min() < 0 or abs(worst - 1) > 1e-5:
            raise ValueError(
                f"the smallest p(s'|s,a) is {self.transition.min().item():.6g} and a row sums to "
                f"{worst:.6g}: every row must be non-negative and sum to 1."
            )
        if not 0 <= self.discount < 1:
            raise ValueError(
                f"discount is {self.discount}: it must lie in [0, 1), or returns may diverge."
            )


def grid_world(
    *,
    shape: Cell,
    forbidden: Collection[Cell],
    target: Cell,
    r_boundary: float = -1.0,
    r_forbidden: float = -1.0,
    r_target: float = 1.0,
    r_other: float = 0.0,
    discount: float = 0.9,
    bounce_reward: str = "boundary",
) -> TabularMDP:
    r"""Build the grid world of Zhao's book as a deterministic MDP.

    States are cells, row by row; actions are up, right, down, left, stay. A step over the edge
    bounces back. Forbidden cells can be entered, at a price; the target is an ordinary cell, and
    the walk goes on after it.

    Args:
        shape: Rows and columns.
        forbidden: Cells (row, column), counted from 0, that cost `r_forbidden` to enter or stay in.
        target: The cell that pays `r_target` to enter or stay in.
        r_boundary: Reward of a step over the edge.
        r_forbidden: Reward of arriving in a forbidden cell.
        r_target: Reward of arriving in the target.
        r_other: Reward of every other step.
        discount: The discount rate.
        bounce_reward: What a step over the edge pays from inside a forbidden cell: "boundary" is
            `r_boundary`, "cell" is `r_forbidden`, "sum" is both added.

    Returns:
        The model in float64.

    Raises:
        ValueError: If `bounce_reward` is none of the names, a cell is off the grid, or the target
            is forbidden.

    Example:
        >>> grid = grid_world(shape=(1, 2), forbidden=(), target=(0, 1))
        >>> grid.reward[0]  # bounce, enter the target, bounce, bounce, stay
        tensor([-1.,  1., -1., -1.,  0.], dtype=torch.float64)

    Reference:
        Zhao (2025), lecture slides L1, pp. 8 and 16: the two tables, which say "boundary".
        The numbers printed in Figs. 5.6 and 5.7 of the book agree with "sum".
    """
    n_rows, n_columns = shape
    r_bounce = {"boundary": r_boundary, "cell": r_forbidden, "sum": r_boundary + r_forbidden}
    if bounce_reward not in r_bounce:
        raise ValueError(
            f"bounce_reward is {bounce_reward!r}: it must be one of {', '.join(r_bounce)}."
        )
    for cell in (*forbidden, target):
        if not (0 <= cell[0] < n_rows and 0 <= cell[1] < n_columns):
            raise ValueError(f"cell {cell} lies outside the {n_rows}x{n_columns} grid.")
    if target in forbidden:
        raise ValueError(f"cell {target} is both target and forbidden: it must be one of them.")

    S = n_rows * n_columns
    transition = torch.zeros(S, len(MOVES), S, dtype=torch.float64)
    reward = torch.zeros(S, len(MOVES), dtype=torch.float64)
    for s in range(S):
        row, column = divmod(s, n_columns)
        for a, (down, right) in enumerate(MOVES):
            arrival = row + down, column + right
            bounced = not (0 <= arrival[0] < n_rows and 0 <= arrival[1] < n_columns)
            if bounced:
                arrival = row, column
                reward[s, a] = r_bounce[bounce_reward] if arrival in forbidden else r_boundary
            elif arrival in forbidden:
                reward[s, a] = r_forbidden
            elif arrival == target:
                reward[s, a] = r_target
            else:
                reward[s, a] = r_other
            transition[s, a, arrival[0] * n_columns + arrival[1]] = 1.0
    return TabularMDP(transition, reward, discount)


def book_grid_world(
    *, r_forbidden: float, discount: float = 0.9, bounce_reward: str = "boundary"
) -> TabularMDP:
    r"""Build the 5x5 grid on which the book runs its algorithms.

    Args:
        r_forbidden: Reward of arriving in a forbidden cell; the book uses -1 and -10.
        discount: The discount rate.
        bounce_reward: As in `grid_world`.

    Returns:
        The model with 25 states and 5 actions, in float64.

    Example:
        >>> book_grid_world(r_forbidden=-10.0).reward.min()
        tensor(-10., dtype=torch.float64)

    Reference:
        Zhao (2025), Figs. 2.7, 3.4, 5.4, 5.6 and 5.7.
    """
    return grid_world(
        shape=BOOK_SHAPE,
        forbidden=BOOK_FORBIDDEN,
        target=BOOK_TARGET,
        r_forbidden=r_forbidden,
        discount=discount,
        bounce_reward=bounce_reward,
    )


def absorbing(mdp: TabularMDP, *, states: Sequence[int]) -> TabularMDP:
    r"""End the episode in some states: each leads only to itself and pays nothing.

    Args:
        mdp: The model.
        states: The states that become terminal.

    Returns:
        A new model; rewards paid on arrival in a terminal state are kept.

    Example:
        >>> grid = grid_world(shape=(1, 2), forbidden=(), target=(0, 1))
        >>> absorbing(grid, states=[1]).reward[1]
        tensor([0., 0., 0., 0., 0.], dtype=torch.float64)

    Reference:
        Sutton and Barto (1998), Reinforcement Learning: An Introduction, Section 3.4.
    """
    transition, reward = mdp.transition.clone(), mdp.reward.clone()
    for s in states:
        transition[s], reward[s] = 0.0, 0.0
        transition[s, :, s] = 1.0
    return replace(mdp, transition=transition, reward=reward)


def policy_from_arrows(rows: Sequence[str]) -> Float[Tensor, "S A"]:
    r"""Read a deterministic policy from one string of arrows per row of the grid.

    Args:
        rows: Strings over the five characters of `ARROWS`.

    Returns:
        The table pi(a|s) in float64: one 1 in each row.

    Raises:
        ValueError: If a character is no action.

    Example:
        >>> policy_from_arrows(["→○"])
        tensor([[0., 1., 0., 0., 0.],
                [0., 0., 0., 0., 1.]], dtype=torch.float64)
    """
    arrows = "".join(rows)
    for arrow in arrows:
        if arrow not in ARROWS:
            raise ValueError(f"{arrow!r} is no action: every character must be one of {ARROWS}.")
    actions = torch.tensor([ARROWS.index(arrow) for arrow in arrows])
    return torch.nn.functional.one_hot(actions, len(ARROWS)).double()


def step(
    mdp: TabularMDP,
    state: Int[Tensor, " N"],
    action: Int[Tensor, " N"],
    *,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    r"""Let N independent environments answer one action each.

    $$
    S_{t+1} \sim p(\cdot \mid S_t, A_t), \qquad R_{t+1} = r(S_t, A_t)
    $$

    Args:
        mdp: The model.
        state: The states S_t.
        action: The actions A_t.
        generator: Source of randomness.

    Returns:
        The states S_{t+1} and the rewards R_{t+1}.

    Example:
        >>> grid = grid_world(shape=(1, 2), forbidden=(), target=(0, 1))
        >>> step(grid, torch.tensor([0]), torch.tensor([1]))
        (tensor([1]), tensor([1.], dtype=torch.float64))
    """
    drawn = torch.multinomial(mdp.transition[state, action], 1, generator=generator)
    return drawn[:, 0], mdp.reward[state, action]


def rollout(
    mdp: TabularMDP,
    policy: Float[Tensor, "S A"],
    start: Int[Tensor, " N"],
    *,
    n_steps: int,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "N {n_steps+1}"], Int[Tensor, "N {n_steps}"], Float[Tensor, "N {n_steps}"]]:
    r"""Follow a policy for some steps in N independent environments.

    Args:
        mdp: The model.
        policy: The table pi(a|s).
        start: The states S_0.
        n_steps: Length T of every trajectory.
        generator: Source of randomness.

    Returns:
        The states S_0 ... S_T, the actions A_0 ... A_{T-1}, and the rewards R_1 ... R_T, so that
        column t of the rewards holds R_{t+1}.

    Example:
        >>> grid = grid_world(shape=(1, 3), forbidden=(), target=(0, 2))
        >>> states, _, rewards = rollout(
        ...     grid, policy_from_arrows(["→→○"]), torch.tensor([0]), n_steps=3
        ... )
        >>> states.tolist(), rewards.tolist()
        ([[0, 1, 2, 2]], [[0.0, 1.0, 1.0]])
    """
    N = len(start)
    states = start.new_empty(N, n_steps + 1)
    actions = start.new_empty(N, n_steps)
    rewards = mdp.reward.new_empty(N, n_steps)
    states[:, 0] = start
    for t in range(n_steps):
        chances = policy[states[:, t]]
        actions[:, t] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        answer = step(mdp, states[:, t], actions[:, t], generator=generator)
        states[:, t + 1], rewards[:, t] = answer
    return states, actions, rewards
