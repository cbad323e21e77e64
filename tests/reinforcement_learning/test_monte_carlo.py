"""Sampled values against exact ones: what a mean of returns is, and where it is biased."""

from itertools import product
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_exact
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import (
    ARROWS,
    TabularMDP,
    book_grid_world,
    grid_world,
    policy_from_arrows,
    rollout,
)
from zhizhi.reinforcement_learning.monte_carlo import (
    Trajectory,
    epsilon_greedy,
    epsilon_soft,
    every_visit,
    first_visit,
    mc_basic,
    mc_epsilon_greedy,
    mc_exploring_starts,
    walk,
)
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    discounted_returns,
    iterative_policy_evaluation,
    policy_evaluation,
)
from zhizhi.reinforcement_learning.value_policy_iteration import (
    greedy_actions,
    greedy_policy,
    policy_iteration,
    truncated_policy_iteration,
)

STAY = policy_from_arrows(["○○○○○"] * 5)
UNIFORM = torch.full((25, 5), 0.2, dtype=torch.float64)

FIGURE_5_4 = {  # episode length: the values that the book prints, row by row
    1: "0 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 1 1 1 0 0 0 1 0 0",
    2: "0 0 0 0 0 0 0 0 0 0 0 0 1.9 0 0 0 1.9 1.9 1.9 0 0 0.9 1.9 0.9 0",
    3: "0 0 0 0 0 0 0 0 0 0 0 0 2.7 0 0 0 2.7 2.7 2.7 0 0 1.7 2.7 1.7 0.8",
    4: "0 0 0 0 0 0 0 0 0 0 0 0 3.4 0 0 0 3.4 3.4 3.4 0.7 0 2.4 3.4 2.4 1.5",
    14: "1.2 1.6 2.0 2.5 3.0 0.9 1.2 2.5 3.0 3.6 0.5 0.3 7.7 3.6 4.3 "
    "0.3 7.7 7.7 7.7 5.0 0.0 6.7 7.7 6.7 5.8",
    15: "1.4 1.8 2.2 2.7 3.3 1.1 1.4 2.7 3.3 3.8 0.8 0.5 7.9 3.8 4.5 "
    "0.5 7.9 7.9 7.9 5.2 0.2 6.9 7.9 6.9 6.0",
    30: "3.1 3.5 3.9 4.4 4.9 2.7 3.1 4.4 4.9 5.5 2.4 2.1 9.6 5.5 6.1 "
    "2.1 9.6 9.6 9.6 6.9 1.9 8.6 9.6 8.6 7.7",
    100: "3.5 3.9 4.3 4.8 5.3 3.1 3.5 4.8 5.3 5.9 2.8 2.5 10.0 5.9 6.6 "
    "2.5 10.0 10.0 10.0 7.3 2.3 9.0 10.0 9.0 8.1",
}


def random_mdp(seed: int, *, S: int = 4, A: int = 3, discount: float = 0.8):
    """Draw a stochastic model and a stochastic policy."""
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(S, A, S, dtype=torch.float64, generator=generator)
    reward = torch.randn(S, A, dtype=torch.float64, generator=generator)
    policy = torch.rand(S, A, dtype=torch.float64, generator=generator)
    mdp = TabularMDP(transition / transition.sum(dim=-1, keepdim=True), reward, discount)
    return mdp, policy / policy.sum(dim=1, keepdim=True)


def optimum(mdp: TabularMDP) -> Tensor:
    S, A = mdp.reward.shape
    return policy_iteration(mdp, torch.full((S, A), 1 / A, dtype=torch.float64)).values[-1]


def n_wrong(policy: Tensor, moves: Tensor) -> int:
    """Count the states in which some most probable action is not among the given moves."""
    return int((greedy_actions(policy) & ~moves).any(dim=1).sum())


def ones(T: int) -> Trajectory:
    """Stay T steps in a single state, each of which pays 1."""
    return Trajectory([0] * T, [0] * T, [1.0] * T)


@settings(deadline=None, max_examples=5)
@given(n=st.integers(2, 60))
def test_a_mean_is_unbiased_and_its_variance_falls_as_one_over_n(n):
    generator = torch.Generator().manual_seed(n)
    coins = 2.0 * torch.randint(0, 2, (20_000, n), generator=generator) - 1
    means = coins.mean(dim=1)
    assert abs(means.mean().item()) < 4 / sqrt(20_000 * n)
    assert abs(means.var().item() * n - 1) < 5 * sqrt(2 / 20_000)
    copied = coins[:, :1].expand(-1, n).mean(dim=1)
    assert abs(copied.var().item() - 1) < 0.01, "copies of one sample stay as uncertain as it is"


def test_a_walk_begins_with_the_pair_and_goes_on_by_the_policy_as_rollout_does():
    mdp = book_grid_world(r_forbidden=-10.0)
    policy = policy_from_arrows(["→→→→↓", "↑↑→→↓", "↑←↓→↓", "↑→○←↓", "↑→↑←←"])
    down = ARROWS.index("↓")
    walked = walk(mdp, policy, start=(0, down), n_steps=20)
    assert (walked.states[0], walked.actions[0]) == (0, down)
    states, actions, rewards = rollout(mdp, policy, torch.tensor([5]), n_steps=19)
    assert walked.states[1:] == states[0, :-1].tolist()
    assert walked.actions[1:] == actions[0].tolist()
    assert walked.rewards[1:] == rewards[0].tolist()


def test_a_walk_draws_states_and_actions_with_their_chances():
    mdp, policy = random_mdp(0)
    N = 100_000
    walked = walk(mdp, policy, start=(1, 2), n_steps=N, generator=torch.Generator().manual_seed(0))
    s, a = torch.tensor(walked.states), torch.tensor(walked.actions)
    assert torch.equal(mdp.reward[s, a], torch.tensor(walked.rewards, dtype=torch.float64))
    for state, action in product(range(4), range(3)):
        here = s == state
        share = (a[here][1:] == action).double().mean()
        p = policy[state, action]
        assert (share - p).abs() <= 5 * (p * (1 - p) / here.sum()).sqrt()
        left = (here & (a == action))[:-1].nonzero().flatten()
        for arrival in range(4):
            share = (s[left + 1] == arrival).double().mean()
            p = mdp.transition[state, action, arrival]
            assert (share - p).abs() <= 5 * (p * (1 - p) / len(left)).sqrt()


def test_a_walk_never_takes_what_has_no_chance_and_repeats_with_its_generator():
    mdp, _ = random_mdp(1)
    transition = mdp.transition.clone()
    transition[:, :, 3] = 0.0
    transition[:, :, 0] = 0.0
    transition = transition / transition.sum(dim=-1, keepdim=True)
    closed = TabularMDP(transition, mdp.reward, 0.8)
    policy = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    runs = [
        walk(closed, policy, start=(0, 0), n_steps=5000, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert set(runs[0].states[1:]) == {1, 2}
    assert set(runs[0].actions[1:]) == {1}


@pytest.mark.parametrize("n_tail", [0, 7])
def test_visits_are_counted_and_their_returns_added_as_the_definition_says(n_tail):
    mdp, policy = random_mdp(2)
    walked = walk(mdp, policy, start=(0, 0), n_steps=40, generator=torch.Generator().manual_seed(2))
    G = discounted_returns(torch.tensor(walked.rewards, dtype=torch.float64), discount=0.8)
    total, count = torch.zeros(2, 4, 3, dtype=torch.float64)
    once, seen = torch.zeros(2, 4, 3, dtype=torch.float64)
    for t, (s, a) in enumerate(zip(walked.states, walked.actions, strict=True)):
        if t < 40 - n_tail:
            total[s, a] += G[t]
            count[s, a] += 1
        if not seen[s, a]:
            once[s, a], seen[s, a] = G[t], 1
    every = every_visit(walked, shape=(4, 3), discount=0.8, n_tail=n_tail)
    assert_exact(torch.stack(every), torch.stack([total, count]))
    if n_tail == 0:
        first = first_visit(walked, shape=(4, 3), discount=0.8)
        assert_exact(torch.stack(first), torch.stack([once, seen]))


def test_every_visit_is_biased_by_half_in_one_episode_and_consistent_in_many():
    for T in (1, 4, 9):
        total, count = every_visit(ones(T), shape=(1, 1), discount=1.0)
        assert_exact(total / count, [[(T + 1) / 2]])
        assert_exact(first_visit(ones(T), shape=(1, 1), discount=1.0)[0], [[float(T)]])
    p, N = 0.1, 100_000
    generator = torch.Generator().manual_seed(0)
    squares = {}
    for n in (1, 5):
        T = torch.empty(N, n, dtype=torch.float64).geometric_(p, generator=generator)
        once, every = T.mean(dim=1), (T * (T + 1) / 2).sum(dim=1) / T.sum(dim=1)
        assert (once.mean() - 1 / p).abs() < 4 * once.std() / sqrt(N), "first visits are unbiased"
        squares[n] = [(x - 1 / p).square().mean().item() for x in (once, every)]
        if n == 1:
            assert (every.mean() - (1 / p + 1) / 2).abs() < 4 * every.std() / sqrt(N)
    assert squares[1][1] < 0.6 * squares[1][0], "biased, and yet the smaller error"
    assert squares[5][1] > squares[5][0]
    T = torch.empty(2_000_000, dtype=torch.float64).geometric_(p, generator=generator)
    assert abs((T * (T + 1) / 2).sum() / T.sum() - 1 / p) < 0.05


def test_visits_near_the_end_of_an_episode_drag_the_mean_down():
    mdp = book_grid_world(r_forbidden=-10.0)
    parked = walk(mdp, STAY, start=(17, ARROWS.index("○")), n_steps=50)
    total, count = every_visit(parked, shape=(25, 5), discount=0.9)
    assert_exact(total[17, 4] / count[17, 4], 10 * (1 - 9 * (1 - 0.9**50) / 50))
    total, count = every_visit(parked, shape=(25, 5), discount=0.9, n_tail=30)
    assert count[17, 4] == 20
    assert total[17, 4] / count[17, 4] > 10 * (1 - 0.9**31)


def test_state_values_alone_do_not_tell_the_better_action():
    mdp, _ = random_mdp(3, A=2)
    swapped = TabularMDP(mdp.transition.flip(1), mdp.reward.flip(1), mdp.discount)
    half = torch.full((4, 2), 0.5, dtype=torch.float64)
    v, v_swapped = policy_evaluation(mdp, half), policy_evaluation(swapped, half)
    assert_exact(v, v_swapped)
    better = greedy_policy(action_values(mdp, v))
    assert_exact(greedy_policy(action_values(swapped, v)), 1 - better)


def test_action_values_of_figure_5_3_come_from_one_episode_each():
    mdp = grid_world(shape=(3, 3), forbidden={(1, 2), (2, 0)}, target=(2, 2))
    run = mc_basic(
        mdp,
        policy_from_arrows(["↑↓←", "→↓↓", "→→○"]),
        n_steps=300,
        n_episodes=1,
        n_iterations=1,
    )
    assert_exact(run.q[0, 0], [-10, 7.29, 7.29, -10, -9])
    assert run.policies[1][0].argmax() in (1, 2)


@pytest.mark.parametrize(("T", "printed"), FIGURE_5_4.items())
def test_values_for_each_episode_length_are_those_of_figure_5_4(T, printed):
    mdp = book_grid_world(r_forbidden=-10.0)
    run = mc_basic(mdp, STAY, n_steps=T, n_episodes=1, n_iterations=10)
    assert run.q[8].equal(run.q[9]), "settled after eight improvements"
    table = torch.tensor([float(x) for x in printed.split()], dtype=torch.float64)
    assert (run.q[-1].amax(dim=1) - table).abs().max() <= 0.0501
    assert (optimum(mdp) - run.q[-1].amax(dim=1)).max() <= 10 * 0.9**T + 1e-9


def test_an_estimate_is_the_truncated_value_and_not_the_whole():
    mdp, policy = random_mdp(4)
    T, n = 5, 1000
    run = mc_basic(
        mdp,
        policy,
        n_steps=T,
        n_episodes=n,
        n_iterations=1,
        generator=torch.Generator().manual_seed(0),
    )
    zero = torch.zeros(4, dtype=torch.float64)
    short = iterative_policy_evaluation(mdp, policy, zero, n_sweeps=T - 1)[-1]
    bound = mdp.reward.abs().max() * (1 - 0.8**T) / (1 - 0.8)
    gap = (run.q[0] - action_values(mdp, short)).abs().max()
    assert gap <= 4 * bound / sqrt(n)
    whole = action_values(mdp, policy_evaluation(mdp, policy))
    assert (run.q[0] - whole).abs().max() > 2 * gap
    assert (run.q[0] - whole).abs().max() <= 0.8**T / 0.2 * mdp.reward.abs().max() + gap


def test_truncated_policy_iteration_forgets_its_bias_and_mc_basic_does_not():
    mdp = book_grid_world(r_forbidden=-10.0)
    v_star = optimum(mdp)
    zero = torch.zeros(25, dtype=torch.float64)
    warm = truncated_policy_iteration(mdp, zero, n_sweeps=15, n_iterations=8)[-1]
    cold = mc_basic(mdp, STAY, n_steps=15, n_episodes=1, n_iterations=12).q[-1].amax(dim=1)
    assert (v_star - warm).abs().max() < 1e-4
    assert_exact((v_star - cold).max(), 10 * 0.9**15)


def test_exploring_starts_are_the_algorithm_of_the_book_written_with_a_dictionary():
    mdp, policy = random_mdp(5)
    run = mc_exploring_starts(
        mdp, policy, n_steps=12, n_sweeps=3, n_tail=2, generator=torch.Generator().manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    returns: dict[tuple[int, int], list[float]] = {}
    for k in range(3):
        for pair in torch.randperm(12, generator=generator).tolist():
            start = (pair // 3, pair % 3)
            walked = walk(mdp, policy, start=start, n_steps=12, generator=generator)
            g = 0.0
            for t in reversed(range(12)):
                g = 0.8 * g + walked.rewards[t]
                if t < 10:
                    returns.setdefault((walked.states[t], walked.actions[t]), []).append(g)
            policy = policy.clone()
            for s in set(walked.states[:10]):
                means = [
                    sum(returns[s, a]) / len(returns[s, a]) if (s, a) in returns else 0.0
                    for a in range(3)
                ]
                policy[s] = torch.eye(3, dtype=torch.float64)[means.index(max(means))]
        for (s, a), g_list in returns.items():
            assert_exact(run.q[k, s, a], sum(g_list) / len(g_list))
            assert run.visits[k, s, a] == len(g_list)
        assert torch.equal(run.policies[k + 1], policy)
    assert run.visits[-1].min() >= 3, "each pair starts one episode in each sweep"


def test_means_over_past_policies_lag_behind_the_policy():
    mdp = book_grid_world(r_forbidden=-10.0)
    run = mc_exploring_starts(
        mdp, STAY, n_steps=50, n_sweeps=20, generator=torch.Generator().manual_seed(2)
    )
    now = action_values(mdp, policy_evaluation(mdp, run.policies[-1]))
    pair = 12, ARROWS.index("↓")
    assert_exact(now[pair], 10.0)
    assert run.q[-1][pair] < -10
    moves = greedy_actions(action_values(mdp, optimum(mdp)))
    assert 20 <= 25 - n_wrong(run.policies[-1], moves) < 25
    fresh = mc_basic(mdp, STAY, n_steps=30, n_episodes=1, n_iterations=8)
    assert n_wrong(fresh.policies[-1], moves) == 0, "a thousand episodes of one policy at a time"


def test_epsilon_greedy_is_what_choosing_uniformly_with_chance_epsilon_gives():
    q = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]], dtype=torch.float64)
    assert_exact(epsilon_greedy(q, epsilon=0.0), [[0, 1, 0, 0, 0]])
    assert_exact(epsilon_greedy(q, epsilon=1.0), [[0.2] * 5])
    assert_exact(epsilon_greedy(q, epsilon=0.3), [[0.06, 1 - 4 / 5 * 0.3, 0.06, 0.06, 0.06]])
    N = 100_000
    generator = torch.Generator().manual_seed(0)
    explore = torch.rand(N, generator=generator) < 0.3
    action = torch.where(explore, torch.randint(0, 5, (N,), generator=generator), 1)
    share = torch.bincount(action, minlength=5) / N
    assert (share - epsilon_greedy(q, epsilon=0.3)[0]).abs().max() < 4 * sqrt(0.25 / N)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), epsilon=st.floats(0.0, 1.0))
def test_no_policy_that_explores_as_much_has_a_greater_mean_of_q(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    rho = torch.rand(6, 4, dtype=torch.float64, generator=generator).softmax(dim=1)
    soft = epsilon / 4 + (1 - epsilon) * rho
    best = epsilon_greedy(q, epsilon=epsilon)
    assert ((best * q).sum(dim=1) >= (soft * q).sum(dim=1) - 1e-12).all()


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_exploring_is_a_wind_in_the_environment(epsilon):
    mdp, rho = random_mdp(6)
    soft = epsilon_soft(mdp, epsilon=epsilon)
    mixed = epsilon / 3 + (1 - epsilon) * rho
    assert_exact(policy_evaluation(soft, rho), policy_evaluation(mdp, mixed))
    s, a = 2, 1
    slow = (1 - epsilon) * mdp.transition[s, a] + epsilon / 3 * sum(mdp.transition[s])
    assert_exact(soft.transition[s, a], slow)
    best = optimum(soft)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(4, 3, dtype=torch.float64, generator=generator).softmax(dim=1)
        v = policy_evaluation(mdp, epsilon / 3 + (1 - epsilon) * other)
        assert (v <= best + 1e-12).all()


def test_the_target_is_left_when_exploring_there_is_too_dear():
    mdp = book_grid_world(r_forbidden=-10.0, bounce_reward="sum")
    sure = optimum(mdp)
    q_sure = action_values(mdp, sure)
    for epsilon, kept, best in ((0.0, 10.0, 10.0), (0.1, 3.3, 3.3), (0.2, -2.8, -2.6)):
        v = policy_evaluation(mdp, epsilon_greedy(q_sure, epsilon=epsilon))
        assert abs(v[17] - kept) < 0.05
        assert abs(optimum(epsilon_soft(mdp, epsilon=epsilon))[17] - best) < 0.05
    v = policy_evaluation(mdp, epsilon_greedy(q_sure, epsilon=0.5))
    assert v.argmin() == 17, "the target has become the worst of all cells"
    assert abs(v[17] + 17.0) < 0.05
    for epsilon, stays, agrees in (
        (0.1191, True, True),
        (0.1201, True, False),
        (0.2129, True, False),
        (0.2139, False, False),
        (0.5, False, False),
    ):
        soft = epsilon_soft(mdp, epsilon=epsilon)
        moves = greedy_actions(action_values(soft, optimum(soft)))
        assert bool(moves[17, ARROWS.index("○")]) == stays
        assert (not (moves & ~greedy_actions(q_sure)).any()) == agrees


def test_one_long_walk_evaluates_a_policy_that_tries_everything():
    mdp, policy = random_mdp(7)
    run = mc_epsilon_greedy(
        mdp,
        policy,
        epsilon=0.2,
        n_steps=200_000,
        n_iterations=1,
        generator=torch.Generator().manual_seed(0),
    )
    exact = action_values(mdp, policy_evaluation(mdp, policy))
    assert (run.q[0] - exact).abs().max() < 0.1
    assert run.visits[0].sum() == 200_000
    assert_exact(run.policies[1], epsilon_greedy(run.q[0], epsilon=0.2))


def test_two_iterations_come_near_the_best_epsilon_greedy_policy_but_need_not_reach_it():
    mdp = book_grid_world(r_forbidden=-1.0, bounce_reward="sum")
    soft = epsilon_soft(mdp, epsilon=0.5)
    best = optimum(soft)
    run = mc_epsilon_greedy(
        mdp,
        UNIFORM,
        epsilon=0.5,
        n_steps=1_000_000,
        n_iterations=2,
        generator=torch.Generator().manual_seed(0),
    )
    gaps = [(best - policy_evaluation(mdp, pi)).max().item() for pi in run.policies[1:]]
    assert gaps[0] > 1 > 0.5 > gaps[1] > 0
    assert n_wrong(run.policies[2], greedy_actions(action_values(soft, best))) > 0
    even = (run.visits[0] / 8000 - 1).abs()
    assert even.max() < 0.05, "the uniform walk visits all pairs equally"
    assert run.visits[1].max() > 500 * run.visits[1].min(), "the better policy does not"


def test_a_policy_without_exploration_learns_nothing_of_the_other_actions():
    mdp, _ = random_mdp(8)
    policy = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    run = mc_epsilon_greedy(mdp, policy, epsilon=0.0, n_steps=5000, n_iterations=1)
    assert (run.visits[0, 1:, [0, 2]] == 0).all()
    assert (run.q[0, 1:, [0, 2]] == 0).all()


@pytest.mark.parametrize("function", [epsilon_greedy, epsilon_soft])
@pytest.mark.parametrize("epsilon", [-0.1, 1.5])
def test_an_epsilon_that_is_no_chance_is_refused(function, epsilon):
    mdp, policy = random_mdp(9)
    argument = policy if function is epsilon_greedy else mdp
    with pytest.raises(ValueError, match=rf"^epsilon is {epsilon}: it must lie in \[0, 1\].$"):
        function(argument, epsilon=epsilon)
