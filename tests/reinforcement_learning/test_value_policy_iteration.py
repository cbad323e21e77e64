"""Optimal values by many routes, the bounds that stop them, and the traps around them."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tests.closeness import assert_exact
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import (
    ARROWS,
    TabularMDP,
    absorbing,
    book_grid_world,
    grid_world,
    policy_from_arrows,
)
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    iterative_policy_evaluation,
    markov_reward_process,
    policy_evaluation,
)
from zhizhi.reinforcement_learning.value_policy_iteration import (
    gauss_seidel_sweep,
    greedy_actions,
    greedy_policy,
    optimal_value_bounds,
    optimality_update,
    policy_iteration,
    shaped,
    truncated_policy_iteration,
    value_iteration,
)

STAY = policy_from_arrows(["○○○○○"] * 5)
ZERO = torch.zeros(25, dtype=torch.float64)

FIGURE_3_4 = {  # (r_forbidden, discount): the table that the book prints
    (-1.0, 0.9): "5.8 5.6 6.2 6.5 5.8 6.5 7.2 8.0 7.2 6.5 7.2 8.0 10.0 8.0 7.2 "
    "8.0 10.0 10.0 10.0 8.0 7.2 9.0 10.0 9.0 8.1",
    (-1.0, 0.5): "0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.1 0.0 0.0 2.0 0.1 0.1 "
    "0.0 2.0 2.0 2.0 0.2 0.0 1.0 2.0 1.0 0.5",
    (-1.0, 0.0): "0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 0.0 0.0 "
    "0.0 1.0 1.0 1.0 0.0 0.0 0.0 1.0 0.0 0.0",
    (-10.0, 0.9): "3.5 3.9 4.3 4.8 5.3 3.1 3.5 4.8 5.3 5.9 2.8 2.5 10.0 5.9 6.6 "
    "2.5 10.0 10.0 10.0 7.3 2.3 9.0 10.0 9.0 8.1",
}


def random_mdp(seed: int, *, S: int = 6, A: int = 3, discount: float = 0.9) -> TabularMDP:
    """Draw a stochastic model."""
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(S, A, S, dtype=torch.float64, generator=generator) ** 4
    reward = torch.randn(S, A, dtype=torch.float64, generator=generator)
    return TabularMDP(transition / transition.sum(dim=-1, keepdim=True), reward, discount)


def optimum(mdp: TabularMDP) -> Tensor:
    """Solve by policy iteration from the uniform policy."""
    S, A = mdp.reward.shape
    return policy_iteration(mdp, torch.full((S, A), 1 / A, dtype=torch.float64)).values[-1]


def linear_program(mdp: TabularMDP) -> Tensor:
    """Minimise the sum of v subject to v >= r + gamma P v: no iteration of ours is involved."""
    S, A = mdp.reward.shape
    rows = mdp.discount * mdp.transition - torch.eye(S, dtype=torch.float64)[:, None]
    solved = linprog(
        torch.ones(S).numpy(),
        A_ub=rows.reshape(S * A, S).numpy(),
        b_ub=-mdp.reward.reshape(S * A).numpy(),
        bounds=(None, None),
    )
    return torch.from_numpy(solved.x)


def deterministic_policies(S: int, A: int) -> list[Tensor]:
    eye = torch.eye(A, dtype=torch.float64)
    return [eye[list(actions)] for actions in product(range(A), repeat=S)]


def twins(seed: int) -> TabularMDP:
    """Build a model in which states 0 and 1 are copies, and going to either is equally good."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.rand(6, 1, 6, dtype=torch.float64, generator=generator)
    reward = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    row = row / row.sum(dim=-1, keepdim=True)
    transition = torch.cat([row, row[:, :, [1, 0, 2, 3, 4, 5]]], dim=1)
    transition[1], reward[1] = transition[0], reward[0]
    return TabularMDP(transition, reward.repeat(1, 2), 0.9)


def test_the_update_is_the_maximum_written_with_loops():
    mdp = random_mdp(0)
    v = torch.linspace(-3, 4, 6, dtype=torch.float64)
    for s in range(6):
        slow = max(
            mdp.reward[s, a] + 0.9 * sum(mdp.transition[s, a, t] * v[t] for t in range(6))
            for a in range(3)
        )
        assert_exact(optimality_update(mdp, v)[s], slow)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), c=st.floats(-5, 5))
def test_the_update_is_monotone_shifts_by_gamma_and_contracts_by_gamma(seed, c):
    mdp = random_mdp(seed)
    generator = torch.Generator().manual_seed(seed)
    v, w = 5 * torch.randn(2, 6, dtype=torch.float64, generator=generator)
    f_v, f_w = optimality_update(mdp, v), optimality_update(mdp, w)
    assert (f_v - f_w).abs().max() <= 0.9 * (v - w).abs().max() + 1e-12
    assert (optimality_update(mdp, torch.maximum(v, w)) >= torch.maximum(f_v, f_w) - 1e-12).all()
    assert_exact(optimality_update(mdp, v + c), f_v + 0.9 * c)


def test_values_and_policies_of_the_two_by_two_example_are_tables_4_2_and_4_3():
    mdp = grid_world(shape=(2, 2), forbidden={(0, 1)}, target=(1, 1))
    v_0 = torch.zeros(4, dtype=torch.float64)
    q_0 = [[-1, -1, 0, -1, 0], [-1, -1, 1, 0, -1], [0, 1, -1, -1, 0], [-1, -1, -1, 0, 1]]
    assert_exact(action_values(mdp, v_0), q_0)
    v = value_iteration(mdp, v_0, tolerance=1e-6)
    assert_exact(v[1], [0, 1, 1, 1])
    g = 0.9
    q_1 = [
        [-1, -1 + g, g, -1, 0],
        [-1 + g, -1 + g, 1 + g, 0, -1 + g],
        [0, 1 + g, -1 + g, -1 + g, g],
        [-1 + g, -1 + g, -1 + g, g, 1 + g],
    ]
    assert_exact(action_values(mdp, v[1]), q_1)
    assert greedy_policy(action_values(mdp, v[1])).argmax(dim=1).tolist() == [2, 2, 1, 4]
    assert_exact(v[2], [g, 1 + g, 1 + g, 1 + g])


@pytest.mark.parametrize(("setting", "printed"), FIGURE_3_4.items(), ids=str)
def test_optimal_values_are_those_of_figure_3_4(setting, printed):
    r_forbidden, discount = setting
    v = optimum(book_grid_world(r_forbidden=r_forbidden, discount=discount))
    table = torch.tensor([float(x) for x in printed.split()], dtype=torch.float64)
    assert (v - table).abs().max() <= 0.0501


@pytest.mark.parametrize("seed", range(4))
def test_value_iteration_policy_iteration_and_a_linear_program_agree(seed):
    mdp = random_mdp(seed, discount=0.8)
    by_values = value_iteration(mdp, torch.zeros(6, dtype=torch.float64), tolerance=1e-12)[-1]
    assert_exact(by_values, optimum(mdp))
    assert (by_values - linear_program(mdp)).abs().max() < 1e-7  # the solver's own tolerance


def test_the_fixed_point_dominates_every_policy_and_its_greedy_policy_attains_it():
    mdp = random_mdp(5, S=4, A=3)
    v_star = optimum(mdp)
    values = torch.stack([policy_evaluation(mdp, pi) for pi in deterministic_policies(4, 3)])
    assert_exact(values.amax(dim=0), v_star)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        policy = torch.rand(4, 3, dtype=torch.float64, generator=generator).softmax(dim=1)
        assert (policy_evaluation(mdp, policy) <= v_star + 1e-12).all()
    greedy = greedy_policy(action_values(mdp, v_star))
    assert_exact(policy_evaluation(mdp, greedy), v_star)
    assert greedy.sum(dim=1).tolist() == [1.0] * 4


def test_a_policy_is_optimal_exactly_when_it_takes_only_greedy_actions():
    mdp = book_grid_world(r_forbidden=-10.0)
    v_star = optimum(mdp)
    choices = greedy_actions(action_values(mdp, v_star))
    assert int((choices.sum(dim=1) > 1).sum()) == 2, "two cells of the book's grid have ties"
    mixed = choices.double() / choices.sum(dim=1, keepdim=True)
    assert_exact(policy_evaluation(mdp, mixed), v_star)
    for s in (0, 15):
        spoilt = mixed.clone()
        spoilt[s] = 0.99 * mixed[s] + 0.01 * (~choices[s]).double() / (~choices[s]).sum()
        assert policy_evaluation(mdp, spoilt)[s] < v_star[s] - 1e-4


def test_greedy_actions_count_ties_up_to_the_tolerance_and_greedy_policy_takes_the_first():
    q = torch.tensor([[1.0, 1.0 + 1e-12, 0.5]], dtype=torch.float64)
    assert greedy_actions(q).tolist() == [[True, True, False]]
    assert greedy_actions(q, tolerance=0.0).tolist() == [[False, True, False]]
    assert greedy_policy(q).tolist() == [[1.0, 0.0, 0.0]]
    assert greedy_policy(q, tolerance=0.0).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("seed", range(5))
def test_the_error_stays_within_the_bound_and_the_greedy_loss_within_its_own(seed):
    mdp = random_mdp(seed)
    v_star = optimum(mdp)
    v = value_iteration(mdp, 10 * torch.ones(6, dtype=torch.float64), tolerance=1e-8)
    error = (v - v_star).abs().amax(dim=1)
    assert (error[1:] <= 9 * v.diff(dim=0).abs().amax(dim=1) + 1e-12).all()
    assert (error[1:] <= 0.9 * error[:-1] + 1e-12).all()
    assert error[-1] <= 1e-8
    for v_k, e in zip(v[:20], error[:20], strict=True):
        loss = v_star - policy_evaluation(mdp, greedy_policy(action_values(mdp, v_k)))
        assert loss.max() <= 18 * e + 1e-12
        residual = (optimality_update(mdp, v_k) - v_k).abs().max()
        assert e <= 10 * residual + 1e-12


def test_a_small_change_is_not_a_small_error():
    mdp = book_grid_world(r_forbidden=-10.0)
    v_star = optimum(mdp)
    v = value_iteration(mdp, ZERO, tolerance=1e-10)
    change = v.diff(dim=0).abs().amax(dim=1)
    error = (v - v_star).abs().amax(dim=1)
    first = int((change >= 1e-10).sum()) + 1
    assert first == 220
    assert error[first] > 8.5e-10
    assert int((error >= 1e-10).sum()) == len(v) - 1 == 241


def test_value_iteration_knows_when_nothing_is_left_to_do():
    mdp = random_mdp(6)
    v_star = optimum(mdp)
    assert len(value_iteration(mdp, v_star, tolerance=1e-9)) == 2
    blind = replace(mdp, discount=0.0)
    v = value_iteration(blind, v_star, tolerance=1e-12)
    assert len(v) == 2
    assert_exact(v[-1], mdp.reward.amax(dim=1))


def test_value_iteration_ends_though_the_tolerance_is_below_the_rounding():
    mdp = random_mdp(7)
    single = TabularMDP(mdp.transition.float(), mdp.reward.float(), 0.9)
    v = value_iteration(single, torch.zeros(6), tolerance=1e-30)
    assert v.dtype == torch.float32
    assert len(v) < 800
    assert (v[-1] - optimum(mdp)).abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_the_bounds_enclose_the_optimum_and_the_greedy_policy(seed):
    mdp = random_mdp(seed)
    v_star = optimum(mdp)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        v = 5 * torch.randn(6, dtype=torch.float64, generator=generator)
        lower, upper = optimal_value_bounds(mdp, v)
        v_pi = policy_evaluation(mdp, greedy_policy(action_values(mdp, v)))
        assert (lower <= v_pi + 1e-12).all()
        assert (v_star <= upper + 1e-12).all()
        change = optimality_update(mdp, v) - v
        assert_exact(upper - lower, (9 * (change.max() - change.min())).expand(6))
    assert_exact(torch.stack(optimal_value_bounds(mdp, v_star)), torch.stack([v_star, v_star]))


def test_on_the_grid_the_bounds_meet_after_as_many_sweeps_as_the_longest_way_is_long():
    mdp = book_grid_world(r_forbidden=-10.0)
    v = value_iteration(mdp, ZERO, tolerance=1e-6)
    assert len(v) - 1 == 153
    widths = [(upper - lower).max() for lower, upper in (optimal_value_bounds(mdp, x) for x in v)]
    assert int(torch.stack(widths).gt(2e-6).sum()) == 14
    assert_exact(optimal_value_bounds(mdp, v[14])[0], optimum(mdp))


def test_the_bounds_do_not_hold_for_the_change_of_an_in_place_sweep():
    mdp = book_grid_world(r_forbidden=-10.0)
    v_star = optimum(mdp)
    order = sorted(range(25), key=lambda s: (s != 17, -v_star[s].item()))
    before = v_star - 1.0
    for after, holds in (
        (optimality_update(mdp, before), True),
        (gauss_seidel_sweep(mdp, before, order=order), False),
    ):
        lower = after + 9 * (after - before).min()
        assert bool((lower <= v_star + 1e-9).all()) == holds


def test_policy_iteration_starts_as_in_table_4_5():
    mdp = grid_world(shape=(1, 2), forbidden=(), target=(0, 1))
    left = policy_from_arrows(["←←"])
    v = policy_evaluation(mdp, left)
    assert_exact(v, [-10, -9])
    left_stay_right = [ARROWS.index(a) for a in "←○→"]
    assert_exact(action_values(mdp, v)[:, left_stay_right], [[-10, -9, -7.1], [-9, -7.1, -9.1]])
    run = policy_iteration(mdp, left)
    assert len(run.policies) == 2
    assert run.policies[1].argmax(dim=1).tolist() == [ARROWS.index("→"), ARROWS.index("○")]


@pytest.mark.parametrize("seed", range(5))
def test_policy_iteration_improves_at_least_as_one_update_does_and_is_newtons_method(seed):
    mdp = random_mdp(seed, S=8, A=4)
    run = policy_iteration(mdp, torch.full((8, 4), 0.25, dtype=torch.float64))
    eye = torch.eye(8, dtype=torch.float64)
    for k in range(len(run.values) - 1):
        v, v_next = run.values[k], run.values[k + 1]
        assert (v_next >= optimality_update(mdp, v) - 1e-12).all()
        assert (optimality_update(mdp, v) >= v - 1e-12).all()
        P_next, r_next = markov_reward_process(mdp, run.policies[k + 1])
        gain = torch.linalg.solve(eye - 0.9 * P_next, r_next + 0.9 * P_next @ v - v)
        assert_exact(v + gain, v_next)
        left = (run.values[-1] - v_next).max()
        assert left <= 0.9 * (run.values[-1] - v).max() + 1e-12
    assert_exact(optimality_update(mdp, run.values[-1]), run.values[-1])


def test_from_standing_still_the_right_values_spread_cell_by_cell():
    run = policy_iteration(book_grid_world(r_forbidden=-10.0), STAY)
    right = [int(((run.values[-1] - v).abs() < 1e-9).sum()) for v in run.values]
    assert right == [1, 6, 7, 8, 9, 10, 12, 14, 16, 17, 19, 20, 21, 22, 24, 25]


def test_taking_the_maximum_afresh_can_go_on_for_ever_and_ours_stops():
    mdp = twins(0)
    seen = [torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(6, 1)]
    for _ in range(30):
        v = policy_evaluation(mdp, seen[-1])
        assert_exact(v, policy_evaluation(mdp, seen[0]))
        # What rounding may do: the twin that state 2 does not make for comes out a little higher.
        preferred = mdp.transition[2, seen[-1][2].argmax(), :2].argmax()
        v[1 - preferred] += 1e-11
        assert greedy_policy(action_values(mdp, v)).equal(seen[0]), "ours takes it for a tie"
        seen.append(torch.eye(2, dtype=torch.float64)[action_values(mdp, v).argmax(dim=1)])
    assert not any(a.equal(b) for a, b in pairwise(seen)), "the maximum never stays"
    assert len(policy_iteration(mdp, seen[-1]).policies) == 1, "the twins are equally good"


def test_truncation_to_one_sweep_is_value_iteration_and_to_many_policy_iteration():
    mdp = random_mdp(8)
    zero = torch.zeros(6, dtype=torch.float64)
    v = truncated_policy_iteration(mdp, zero, n_sweeps=1, n_iterations=10)
    assert_exact(v, value_iteration(mdp, zero, tolerance=1e-9)[:11])
    many = truncated_policy_iteration(mdp, zero, n_sweeps=400, n_iterations=4)
    run = policy_iteration(mdp, greedy_policy(action_values(mdp, zero)))
    last = len(run.values)
    assert_exact(many[1 : last + 1], run.values[:4])


def test_truncation_converges_from_anywhere_for_a_constant_only_shifts_it():
    mdp = random_mdp(15)
    v_0 = torch.tensor([9.0, -4.0, 0.0, 30.0, -8.0, 2.0], dtype=torch.float64)
    v = truncated_policy_iteration(mdp, v_0, n_sweeps=3, n_iterations=80)
    low = truncated_policy_iteration(mdp, v_0 - 400.0, n_sweeps=3, n_iterations=80)
    fading = 400.0 * 0.9 ** (3 * torch.arange(81, dtype=torch.float64))
    assert_exact(v - low, fading[:, None].expand(-1, 6))
    assert (optimality_update(mdp, low[0]) >= low[0]).all()
    assert (low.diff(dim=0) >= -1e-12).all(), "from far below the values only rise"
    assert (v[-1] - optimum(mdp)).abs().max() < 1e-8


def test_rounds_to_a_millionth_are_the_counts_of_the_page():
    mdp = book_grid_world(r_forbidden=-1.0)
    v_star = optimum(mdp)
    for m, rounds in ((1, 153), (3, 51), (5, 31), (10, 16), (20, 8), (100, 5)):
        v = truncated_policy_iteration(mdp, ZERO, n_sweeps=m, n_iterations=rounds)
        error = (v - v_star).abs().amax(dim=1)
        assert error[-1] <= 1e-6 < error[-2]


def test_from_below_no_truncation_beats_value_iteration_sweep_by_sweep():
    for seed in range(5):
        mdp = random_mdp(seed)
        v_star = optimum(mdp)
        below = v_star - torch.linspace(0.1, 9, 6, dtype=torch.float64)
        iterates = truncated_policy_iteration(mdp, below, n_sweeps=1, n_iterations=24)
        for m in (2, 3, 6):
            v = truncated_policy_iteration(mdp, below, n_sweeps=m, n_iterations=24 // m)
            assert (v <= iterates[::m] + 1e-12).all()
            assert (iterates <= v_star + 1e-12).all()


def test_from_above_a_truncation_can_win_in_sweeps():
    mdp = random_mdp(0)
    v_star = optimum(mdp)
    above = v_star + torch.linspace(0.1, 9, 6, dtype=torch.float64)
    one = truncated_policy_iteration(mdp, above, n_sweeps=1, n_iterations=6)[-1]
    two = truncated_policy_iteration(mdp, above, n_sweeps=2, n_iterations=3)[-1]
    assert (two - v_star).abs().max() < (one - v_star).abs().max() - 1e-3


def test_truncated_values_are_those_of_no_policy():
    mdp = random_mdp(9, S=4, A=2)
    v = truncated_policy_iteration(
        mdp, torch.zeros(4, dtype=torch.float64), n_sweeps=2, n_iterations=2
    )[-1]
    gaps = [(policy_evaluation(mdp, pi) - v).abs().max() for pi in deterministic_policies(4, 2)]
    assert min(gaps) > 0.1


def test_an_in_place_sweep_reads_what_it_has_just_written():
    mdp = random_mdp(10)
    v = torch.linspace(-2, 2, 6, dtype=torch.float64)
    order = [3, 1, 5, 0, 2, 4]
    newest = v.tolist()
    for s in order:
        newest[s] = max(
            mdp.reward[s, a].item()
            + 0.9 * sum(mdp.transition[s, a, t].item() * newest[t] for t in range(6))
            for a in range(3)
        )
    assert_exact(gauss_seidel_sweep(mdp, v, order=order), newest)
    assert_exact(v, torch.linspace(-2, 2, 6, dtype=torch.float64))


def test_in_place_sweeps_contract_and_keep_the_fixed_point():
    mdp = random_mdp(11)
    v_star = optimum(mdp)
    order = [5, 4, 3, 2, 1, 0]
    assert_exact(gauss_seidel_sweep(mdp, v_star, order=order), v_star)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        v, w = 5 * torch.randn(2, 6, dtype=torch.float64, generator=generator)
        gap = gauss_seidel_sweep(mdp, v, order=order) - gauss_seidel_sweep(mdp, w, order=order)
        assert gap.abs().max() <= 0.9 * (v - w).abs().max() + 1e-12


def test_in_place_is_no_faster_where_the_target_waits_for_itself():
    mdp = book_grid_world(r_forbidden=-1.0)
    at_once, row_by_row = ZERO, ZERO
    for n in range(1, 154):
        at_once = optimality_update(mdp, at_once)
        row_by_row = gauss_seidel_sweep(mdp, row_by_row, order=list(range(25)))
        assert_exact(at_once[17], 10 * (1 - 0.9**n))
        assert_exact(row_by_row[17], at_once[17])


@settings(deadline=None, max_examples=15)
@given(alpha=st.floats(0.1, 5.0), beta=st.floats(-3.0, 3.0))
def test_an_affine_reward_keeps_the_optimal_policies(alpha, beta):
    mdp = book_grid_world(r_forbidden=-10.0)
    changed = replace(mdp, reward=alpha * mdp.reward + beta)
    v, v_changed = optimum(mdp), optimum(changed)
    assert_exact(v_changed, alpha * v + beta / (1 - 0.9))
    choices = greedy_actions(action_values(changed, v_changed), tolerance=1e-8)
    assert choices.equal(greedy_actions(action_values(mdp, v)))


def test_shaping_subtracts_the_potential_from_every_policys_values():
    mdp = random_mdp(12)
    potential = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0, 1.0], dtype=torch.float64)
    changed = shaped(mdp, potential)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        policy = torch.rand(6, 3, dtype=torch.float64, generator=generator).softmax(dim=1)
        expected = policy_evaluation(mdp, policy) - potential
        assert_exact(policy_evaluation(changed, policy), expected)
    assert_exact(optimum(changed), optimum(mdp) - potential)
    for s, a in product(range(6), range(3)):
        climbed = 0.9 * sum(mdp.transition[s, a, t] * potential[t] for t in range(6))
        assert_exact(changed.reward[s, a], mdp.reward[s, a] + climbed - potential[s])


def test_a_constant_potential_adds_a_constant_to_every_reward():
    mdp = random_mdp(13)
    changed = shaped(mdp, torch.full((6,), -7.0 / (1 - 0.9), dtype=torch.float64))
    assert_exact(changed.reward, mdp.reward + 7.0)


def test_a_bonus_near_the_target_can_keep_the_robot_outside_and_a_potential_cannot():
    target, door = 17, 22
    mdp = absorbing(book_grid_world(r_forbidden=-10.0), states=[target])
    stay, up = ARROWS.index("○"), ARROWS.index("↑")
    for bonus, best in ((0.05, up), (0.2, stay)):  # 10 times the bonus against 1
        lured = replace(mdp, reward=mdp.reward + bonus * mdp.transition[:, :, door])
        assert action_values(lured, optimum(lured))[door].argmax() == best
    distance = torch.tensor([abs(s // 5 - 3) + abs(s % 5 - 2) for s in range(25)]).double()
    led = shaped(mdp, -0.2 * distance)
    expected = greedy_actions(action_values(mdp, optimum(mdp)))
    assert greedy_actions(action_values(led, optimum(led))).equal(expected)


@pytest.mark.parametrize(("penalty", "gamma"), [(1.0, 0.50006), (10.0, 0.97160)])
def test_the_robot_crosses_the_forbidden_cell_above_a_discount_that_is_a_root(penalty, gamma):
    def margin(g: float) -> float:
        return (1 + penalty) * g - penalty - g**13

    assert margin(gamma - 1e-4) < 0 < margin(gamma + 1e-4)
    for g, arrow in ((gamma - 1e-4, "↑"), (gamma + 1e-4, "→")):
        mdp = book_grid_world(r_forbidden=-penalty, discount=g)
        assert ARROWS[action_values(mdp, optimum(mdp))[15].argmax()] == arrow


def test_evaluating_the_greedy_policy_by_sweeps_is_what_truncation_does():
    mdp = random_mdp(14)
    v_0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
    policy = greedy_policy(action_values(mdp, v_0))
    expected = iterative_policy_evaluation(mdp, policy, v_0, n_sweeps=7)[-1]
    assert_exact(truncated_policy_iteration(mdp, v_0, n_sweeps=7, n_iterations=1)[1], expected)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3])
def test_a_tolerance_that_is_not_positive_is_refused(tolerance):
    message = f"tolerance is {tolerance}: it must be positive, or the sweeps may never end."
    with pytest.raises(ValueError, match=f"^{message}$"):
        value_iteration(random_mdp(0), torch.zeros(6, dtype=torch.float64), tolerance=tolerance)


def test_an_order_that_misses_a_state_is_refused():
    message = "order names 5 different states in 6 places: it must name each of the 6 states once."
    with pytest.raises(ValueError, match=f"^{message}$"):
        gauss_seidel_sweep(
            random_mdp(0), torch.zeros(6, dtype=torch.float64), order=[0, 1, 2, 3, 4, 4]
        )


def test_a_policy_without_sweeps_is_refused():
    with pytest.raises(ValueError, match=r"^n_sweeps is 0: each policy needs at least 1 sweep.$"):
        truncated_policy_iteration(
            random_mdp(0), torch.zeros(6, dtype=torch.float64), n_sweeps=0, n_iterations=1
        )
