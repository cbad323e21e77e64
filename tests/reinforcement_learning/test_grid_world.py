"""The grid world is the one of the book: its tables, its figures and its two ambiguities."""

import pytest
import torch
from jaxtyping import Float
from tests.closeness import assert_exact
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import (
    ARROWS,
    BOOK_FORBIDDEN,
    BOOK_TARGET,
    TabularMDP,
    absorbing,
    book_grid_world,
    grid_world,
    policy_from_arrows,
    rollout,
    step,
)
from zhizhi.reinforcement_learning.rl_basics import action_values, policy_evaluation

# Lecture slides L1, pp. 8 and 16: rows s_1 ... s_9, columns up, right, down, left, stay.
SLIDE_NEXT = [
    [1, 2, 4, 1, 1],
    [2, 3, 5, 1, 2],
    [3, 3, 6, 2, 3],
    [1, 5, 7, 4, 4],
    [2, 6, 8, 4, 5],
    [3, 6, 9, 5, 6],
    [4, 8, 7, 7, 7],
    [5, 9, 8, 7, 8],
    [6, 9, 9, 8, 9],
]
SLIDE_REWARD = ["b00b0", "b0000", "bbf00", "00fb0", "0f000", "0bt0f", "00bbf", "0tbf0", "fbb0t"]

GOOD = ("→→→→↓", "↑↑→→↓", "↑←↓→↓", "↑→○←↓", "↑→↑←←")  # Fig. 2.7(a), below; Fig. 5.6(a)
GOOD_TOO = ("→→→↓↓", "↑↑→↓↓", "↑←↓→↓", "↑→○←↓", "↑→↑←←")  # Fig. 2.7(a), above
RIGHT = ("→→→→→",) * 5  # Fig. 2.7(b), above
RANDOM = ("→←←↑↑", "↓○→↓→", "←→↓←○", "○↓↑↑→", "○→○→○")  # Fig. 2.7(b), below

V_GOOD = [
    [3.5, 3.9, 4.3, 4.8, 5.3],
    [3.1, 3.5, 4.8, 5.3, 5.9],
    [2.8, 2.5, 10.0, 5.9, 6.6],
    [2.5, 10.0, 10.0, 10.0, 7.3],
    [2.3, 9.0, 10.0, 9.0, 8.1],
]
V_RIGHT = [
    [-6.6, -7.3, -8.1, -9.0, -10.0],
    [-8.5, -8.3, -8.1, -9.0, -10.0],
    [-7.5, -8.3, -8.1, -9.0, -10.0],
    [-7.5, -7.2, -9.1, -9.0, -10.0],
    [-7.6, -7.3, -8.1, -9.0, -10.0],
]
V_RANDOM = [
    [0.0, 0.0, 0.0, -10.0, -10.0],
    [-9.0, -10.0, -0.4, -0.5, -10.0],
    [-10.0, -0.5, 0.5, -0.5, 0.0],
    [0.0, -1.0, -0.5, -0.5, -10.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
]
V_STAR_MILD = [  # Fig. 3.4(a): r_forbidden = -1
    [5.8, 5.6, 6.2, 6.5, 5.8],
    [6.5, 7.2, 8.0, 7.2, 6.5],
    [7.2, 8.0, 10.0, 8.0, 7.2],
    [8.0, 10.0, 10.0, 10.0, 8.0],
    [7.2, 9.0, 10.0, 9.0, 8.1],
]
V_GREEDY_10 = [  # Fig. 5.6(b), and 5.7(b): the good policy made 0.1-greedy is the best of its kind
    [0.4, 0.5, 0.9, 1.3, 1.4],
    [0.1, 0.0, 0.5, 1.3, 1.7],
    [0.1, -0.4, 3.4, 1.4, 1.9],
    [-0.1, 3.4, 3.3, 3.7, 2.2],
    [-0.3, 2.6, 3.7, 3.1, 2.7],
]
V_GREEDY_20 = [  # Fig. 5.6(c)
    [-2.2, -2.4, -2.1, -1.7, -1.8],
    [-2.5, -3.0, -3.3, -2.3, -2.0],
    [-2.3, -3.3, -2.5, -2.8, -2.2],
    [-2.5, -2.5, -2.8, -2.0, -2.4],
    [-2.8, -3.2, -2.1, -2.3, -2.2],
]
V_STAR_20 = [  # Fig. 5.7(c)
    [-1.1, -1.5, -1.1, -0.6, -0.6],
    [-1.5, -2.2, -2.3, -1.0, -0.6],
    [-1.2, -2.4, -2.2, -1.5, -0.6],
    [-1.6, -2.3, -2.6, -1.4, -1.1],
    [-2.0, -3.0, -1.8, -1.4, -1.0],
]
V_GREEDY_50 = [  # Fig. 5.6(d): the good policy made 0.5-greedy
    [-8.0, -9.0, -8.4, -7.2, -7.8],
    [-8.7, -10.8, -12.4, -9.6, -8.9],
    [-8.3, -12.3, -15.3, -12.3, -10.5],
    [-9.7, -15.5, -17.0, -14.4, -12.2],
    [-10.9, -16.7, -15.2, -14.3, -12.4],
]
V_STAR_50 = [  # Fig. 5.7(d): the best 0.5-greedy policy
    [-4.3, -5.5, -4.5, -2.6, -2.3],
    [-5.6, -7.7, -7.7, -4.1, -2.4],
    [-5.5, -9.0, -8.0, -5.6, -2.8],
    [-6.8, -8.9, -9.4, -5.5, -4.2],
    [-7.9, -10.1, -6.7, -5.1, -3.7],
]

# Half a unit of the printed digit, and a little: some of the book's numbers come from iterations.
PRINTED = 0.0501


def assert_printed(v: Float[Tensor, " S"], table: list[list[float]]) -> None:
    """Raise unless the values round to the printed table."""
    gap = (v.view(5, 5) - torch.tensor(table, dtype=torch.float64)).abs()
    assert gap.max() <= PRINTED, gap


def best_values(mdp: TabularMDP, *, epsilon: float = 0.0) -> Float[Tensor, " S"]:
    """Iterate the optimality equation among policies that explore with chance epsilon."""
    v = torch.zeros(len(mdp.reward), dtype=torch.float64)
    for _ in range(300):
        q = mdp.reward + mdp.discount * mdp.transition @ v
        v = (1 - epsilon) * q.amax(dim=1) + epsilon * q.mean(dim=1)
    return v


def slide_grid() -> TabularMDP:
    return grid_world(
        shape=(3, 3),
        forbidden={(1, 2), (2, 0)},
        target=(2, 2),
        r_boundary=-1.0,
        r_forbidden=-3.0,
        r_target=5.0,
    )


def test_transitions_are_the_table_of_the_slides():
    mdp = slide_grid()
    assert (mdp.transition.argmax(dim=-1) + 1).tolist() == SLIDE_NEXT
    assert_exact(mdp.transition.sum(dim=-1), torch.ones(9, 5))
    assert mdp.transition.max() == 1


def test_rewards_are_the_table_of_the_slides():
    price = {"b": -1.0, "f": -3.0, "t": 5.0, "0": 0.0}
    assert slide_grid().reward.tolist() == [[price[c] for c in row] for row in SLIDE_REWARD]


@pytest.mark.parametrize(
    ("arrows", "table"),
    [(GOOD, V_GOOD), (GOOD_TOO, V_GOOD), (RIGHT, V_RIGHT), (RANDOM, V_RANDOM)],
    ids=["good", "good too", "right", "random"],
)
def test_values_of_four_policies_are_those_of_figure_2_7(arrows, table):
    mdp = book_grid_world(r_forbidden=-1.0)
    assert_printed(policy_evaluation(mdp, policy_from_arrows(arrows)), table)


def test_optimal_values_are_those_of_figure_3_4():
    assert_printed(best_values(book_grid_world(r_forbidden=-1.0)), V_STAR_MILD)
    assert_printed(best_values(book_grid_world(r_forbidden=-10.0)), V_GOOD)


def test_only_the_sum_reproduces_the_epsilon_greedy_figures():
    good = policy_from_arrows(GOOD)
    misses = {}
    for rule in ("boundary", "cell", "sum"):
        mdp = book_grid_world(r_forbidden=-10.0, bounce_reward=rule)
        pairs = [
            (policy_evaluation(mdp, (1 - epsilon) * good + epsilon / 5), table)
            for epsilon, table in ((0.1, V_GREEDY_10), (0.2, V_GREEDY_20), (0.5, V_GREEDY_50))
        ] + [
            (best_values(mdp, epsilon=epsilon), table)
            for epsilon, table in ((0.1, V_GREEDY_10), (0.2, V_STAR_20), (0.5, V_STAR_50))
        ]
        gaps = [(v.view(5, 5) - torch.tensor(table)).abs() for v, table in pairs]
        misses[rule] = [int((gap > PRINTED).sum()) for gap in gaps]
    # Of 150 numbers one stays: cell (3, 1) of Fig. 5.7(c) prints -1.2 where the sum gives -1.134.
    assert misses["sum"] == [0, 0, 0, 0, 1, 0]
    assert abs(gaps[4][2, 0].item() - 0.066) < 1e-3
    assert misses["cell"] == [0, 0, 5, 0, 2, 2]
    assert misses["boundary"] == [1, 1, 23, 1, 3, 9]


def test_the_bounce_rules_differ_in_one_number_and_not_without_exploration():
    models = {
        rule: book_grid_world(r_forbidden=-10.0, bounce_reward=rule)
        for rule in ("boundary", "cell", "sum")
    }
    cell = 4 * 5 + 1  # the only forbidden cell at the edge of the book's grid
    down = ARROWS.index("↓")
    prices = [models[rule].reward[cell, down].item() for rule in models]
    assert prices == [-1.0, -10.0, -11.0]
    for rule in ("cell", "sum"):
        differs = models[rule].reward != models["boundary"].reward
        assert differs.nonzero().tolist() == [[cell, down]]
        assert_exact(best_values(models[rule]), best_values(models["boundary"]))


def test_reward_depends_on_the_action_and_not_only_on_the_next_state():
    mdp = book_grid_world(r_forbidden=-1.0)
    up, stay = ARROWS.index("↑"), ARROWS.index("○")
    assert torch.equal(mdp.transition[0, up], mdp.transition[0, stay])
    assert (mdp.reward[0, up], mdp.reward[0, stay]) == (-1.0, 0.0)


def test_other_steps_pay_r_other():
    mdp = grid_world(shape=(1, 3), forbidden=(), target=(0, 2), r_other=-0.25)
    assert mdp.reward[0].tolist() == [-1.0, -0.25, -1.0, -1.0, -0.25]


def test_an_absorbing_state_is_worth_nothing_and_is_still_paid_for_on_arrival():
    mdp = book_grid_world(r_forbidden=-10.0)
    target = BOOK_TARGET[0] * 5 + BOOK_TARGET[1]
    v = best_values(absorbing(mdp, states=[target])).view(5, 5)
    assert v[BOOK_TARGET] == 0
    assert v[4, 2] == 1
    assert_exact(v[4, 4], 0.9**2)
    assert mdp.reward[target].abs().sum() > 0, "the original is left alone"


def test_step_draws_next_states_with_their_probabilities():
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    transition = torch.eye(3, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    transition[0, 1] = p
    mdp = TabularMDP(transition, torch.arange(6.0, dtype=torch.float64).view(3, 2), 0.9)
    N = 40_000
    state, action = torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    next_state, reward = step(mdp, state, action, generator=generator)
    share = torch.bincount(next_state, minlength=3) / N
    assert ((share - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all()
    assert (reward == 1.0).all()


def test_rollout_follows_the_arrows_to_the_target():
    mdp = book_grid_world(r_forbidden=-10.0)
    start = torch.tensor([4 * 5, 3 * 5 + 4])
    states, actions, rewards = rollout(mdp, policy_from_arrows(GOOD), start, n_steps=16)
    target = BOOK_TARGET[0] * 5 + BOOK_TARGET[1]
    assert (states[0] == target).nonzero()[0].item() == 15, "15 moves from the lower left"
    assert (states[1] == target).nonzero()[0].item() == 4
    assert rewards[0].tolist() == [0.0] * 14 + [1.0, 1.0]
    assert actions[1, :4].tolist() == [ARROWS.index(a) for a in "↓←←↑"]
    forbidden = {row * 5 + column for row, column in BOOK_FORBIDDEN}
    assert not forbidden & set(states.flatten().tolist())


def test_rollout_repeats_with_its_generator_and_draws_actions_from_the_policy():
    mdp = book_grid_world(r_forbidden=-1.0)
    policy = torch.full((25, 5), 0.2, dtype=torch.float64)
    start = torch.full((2000,), 12)
    runs = [
        rollout(mdp, policy, start, n_steps=5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    states, actions, rewards = runs[0]
    share = torch.bincount(actions.flatten(), minlength=5) / actions.numel()
    assert ((share - 0.2).abs() <= 4 * (0.2 * 0.8 / actions.numel()) ** 0.5).all()
    assert torch.equal(rewards, mdp.reward[states[:, :-1], actions])
    assert (mdp.transition[states[:, :-1], actions, states[:, 1:]] == 1).all()


def test_arrows_become_one_hot_rows_in_reading_order():
    assert policy_from_arrows(["↑→", "↓←", "○○"]).argmax(dim=1).tolist() == [0, 1, 2, 3, 4, 4]
    assert_exact(policy_from_arrows(GOOD).sum(dim=1), torch.ones(25))


def test_a_row_that_is_no_distribution_is_refused():
    message = (
        "the smallest p\\(s'\\|s,a\\) is 0.5 and a row sums to 0.5: "
        "every row must be non-negative and sum to 1."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        TabularMDP(torch.full((1, 1, 1), 0.5), torch.zeros(1, 1), 0.9)
    transition = torch.tensor([[[-1.0, 2.0]], [[0.0, 1.0]]])
    with pytest.raises(ValueError, match=r"^the smallest p.* is -1 and a row sums to 1: every row"):
        TabularMDP(transition, torch.zeros(2, 1), 0.9)


@pytest.mark.parametrize("discount", [1.0, -0.1])
def test_a_discount_outside_the_half_open_interval_is_refused(discount):
    message = f"discount is {discount}: it must lie in \\[0, 1\\), or returns may diverge."
    with pytest.raises(ValueError, match=f"^{message}$"):
        TabularMDP(torch.ones(1, 1, 1), torch.zeros(1, 1), discount)


def test_an_unknown_bounce_rule_is_refused():
    message = "bounce_reward is 'wall': it must be one of boundary, cell, sum."
    with pytest.raises(ValueError, match=f"^{message}$"):
        book_grid_world(r_forbidden=-1.0, bounce_reward="wall")


def test_cells_off_the_grid_and_a_forbidden_target_are_refused():
    with pytest.raises(ValueError, match=r"^cell \(2, 0\) lies outside the 2x3 grid.$"):
        grid_world(shape=(2, 3), forbidden={(2, 0)}, target=(0, 0))
    message = r"^cell \(0, 0\) is both target and forbidden: it must be one of them.$"
    with pytest.raises(ValueError, match=message):
        grid_world(shape=(2, 3), forbidden={(0, 0)}, target=(0, 0))


def test_an_unknown_arrow_is_refused():
    message = "'x' is no action: every character must be one of ↑→↓←○."
    with pytest.raises(ValueError, match=f"^{message}$"):
        policy_from_arrows(["→x"])


def test_one_step_ahead_of_the_optimal_values_no_action_is_better():
    mdp = book_grid_world(r_forbidden=-10.0)
    v = best_values(mdp)
    assert_exact(action_values(mdp, v).amax(dim=1), v)
