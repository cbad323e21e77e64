import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.reinforcement_learning.grid_world import TabularMDP, absorbing, book_grid_world
from zhizhi.reinforcement_learning.monte_carlo import Trajectory, every_visit, walk
from zhizhi.reinforcement_learning.rl_basics import action_values, policy_evaluation
from zhizhi.reinforcement_learning.temporal_difference import (
    batch_td,
    expected_sarsa_target,
    n_step_td,
    q_learning,
    q_learning_target,
    sarsa_target,
    td0,
    td_control,
)
from zhizhi.reinforcement_learning.value_policy_iteration import (
    greedy_actions,
    greedy_policy,
    policy_iteration,
)

UNIFORM = torch.full((25, 5), 0.2, dtype=torch.float64)


def long_walk(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return walk(
        book_grid_world(r_forbidden=-1.0), UNIFORM, start=(0, 0), n_steps=n, generator=generator
    )


def chain():
    """Two states that always move on, and an end."""
    transition = torch.zeros(3, 1, 3, dtype=torch.float64)
    transition[0, 0, 1] = transition[1, 0, 2] = transition[2, 0, 2] = 1
    return TabularMDP(transition, torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64), 0.5)


# Prediction


def test_td0_equals_the_loop_of_the_book():
    walked = long_walk(500)
    v, visits = [0.0] * 25, [0] * 25
    for t in range(499):
        s, s_next, r = walked.states[t], walked.states[t + 1], walked.rewards[t]
        visits[s] += 1
        v[s] = v[s] + 1 / visits[s] * (r + 0.9 * v[s_next] - v[s])
    ours = td0(walked, torch.zeros(25).double(), discount=0.9, step=lambda n: 1 / n)
    assert_exact(ours, v)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_true_values_are_the_fixed_point_of_the_mean_update(n):
    mdp = chain()
    v = policy_evaluation(mdp, torch.ones(3, 1).double())
    walked = walk(mdp, torch.ones(3, 1).double(), start=(0, 0), n_steps=12)
    assert_exact(n_step_td(walked, v, n=n, discount=0.5, step=lambda _: 0.7), v)


def test_td0_approaches_the_values_with_steps_that_suit_it_and_not_with_one_over_n():
    mdp, walked = book_grid_world(r_forbidden=-1.0), long_walk(60_000)
    v = policy_evaluation(mdp, UNIFORM)
    zero = torch.zeros(25).double()
    errors = [
        (td0(walked, zero, discount=0.9, step=step) - v).square().mean().sqrt().item()
        for step in (lambda n: 1 / n, lambda n: n**-0.7)
    ]
    assert errors[0] > 1
    assert errors[1] < 0.3


def test_with_n_as_long_as_the_walk_and_one_over_k_it_is_monte_carlo():
    mdp = absorbing(chain(), states=[2])
    walks = [walk(mdp, torch.ones(3, 1).double(), start=(0, 0), n_steps=30) for _ in range(3)]
    zero = torch.zeros(3).double()
    ours = n_step_td(walks[0], zero, n=25, discount=0.5, step=lambda k: 1 / k)
    total, count = every_visit(walks[0], shape=(3, 1), discount=0.5, n_tail=25)
    assert_exact(ours[:2], (total / count.clamp_min(1))[:2, 0])


def test_n_steps_shrink_the_error_of_the_guess_by_the_discount_to_the_n():
    mdp = book_grid_world(r_forbidden=-1.0)
    v, P = policy_evaluation(mdp, UNIFORM), (UNIFORM[:, :, None] * mdp.transition).sum(1)
    reward = (UNIFORM * mdp.reward).sum(1)
    guess = torch.randn(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = guess
    for n in range(1, 6):
        target = reward + 0.9 * P @ target  # the mean of the n-step return
        assert (target - v).abs().max() <= 0.9**n * (guess - v).abs().max() + 1e-12


def test_batch_td_is_where_repeated_td0_settles():
    walks = [long_walk(60, seed) for seed in range(4)]
    exact = batch_td(walks, n_states=25, discount=0.9)
    v = torch.zeros(25).double()
    settled = False
    for _ in range(4000):
        change = torch.zeros(25).double()
        for states, _, rewards in walks:
            for s, s_next, r in zip(states[:-1], states[1:], rewards, strict=False):
                change[s] += r + 0.9 * v[s_next] - v[s]
        v = v + 0.02 * change
        settled = bool(change.abs().max() < 1e-11)
        if settled:
            break
    assert settled
    assert_exact(v, exact)


def test_batch_td_and_the_mean_of_returns_differ_on_the_example_of_a_and_b():
    # Eight episodes: A, 0, B, 0 once; B, 1 six times; B, 0 once. State 2 is the end.
    walks = [Trajectory([0, 1, 2], [0] * 3, [0.0, 0.0, 0.0])]
    walks += [Trajectory([1, 2], [0] * 2, [r, 0.0]) for r in (1.0,) * 6 + (0.0,)]
    v = batch_td(walks, n_states=3, discount=1.0 - 1e-12)
    assert v[:2].tolist() == pytest.approx([0.75, 0.75])


# Control


def test_q_learning_finds_the_best_values_from_a_random_walk():
    mdp = book_grid_world(r_forbidden=-1.0)
    best = policy_iteration(mdp, UNIFORM).values[-1]
    q_star = action_values(mdp, best)
    for start, bound in ((0.0, 0.01), (10.0, 0.01), (100.0, 0.1)):
        first = torch.full((25, 5), start, dtype=torch.float64)
        q = q_learning(long_walk(100_000), first, discount=0.9, step=lambda n: 0.1)
        assert (q - q_star).square().mean().sqrt() < bound
        wrong = greedy_policy(q).bool() & ~greedy_actions(q_star, tolerance=0.05)
        assert not wrong.any()


def test_q_learning_equals_the_loop_of_the_book():
    walked = long_walk(400)
    q = torch.zeros(25, 5, dtype=torch.float64)
    for t in range(399):
        s, a = walked.states[t], walked.actions[t]
        q[s, a] += 0.1 * (walked.rewards[t] + 0.9 * q[walked.states[t + 1]].max() - q[s, a])
    zero = torch.zeros(25, 5, dtype=torch.float64)
    assert_exact(q_learning(walked, zero, discount=0.9, step=lambda n: 0.1), q)


def test_the_three_targets_by_hand():
    row = [1.0, 4.0, 2.0, 1.0]
    assert sarsa_target(row, 2, 0.1) == 2.0
    assert q_learning_target(row, 2, 0.1) == 4.0
    assert expected_sarsa_target(row, 2, 0.2) == pytest.approx(0.8 * 4 + 0.2 * 2)
    assert expected_sarsa_target(row, 2, 0.0) == q_learning_target(row, 2, 0.0)


@pytest.mark.parametrize("target", [sarsa_target, expected_sarsa_target, q_learning_target])
def test_without_exploration_all_three_learn_the_only_way(target):
    run = td_control(chain(), target, start=0, ends=[2], n_episodes=200, alpha=0.5, epsilon=0.0)
    assert_exact(run.q[:, 0], [1 + 0.5 * 2, 2, 0])
    assert run.returns.tolist() == [3.0] * 200


def test_what_follows_an_end_is_worth_nothing_even_without_discount():
    run = td_control(
        chain(), sarsa_target, start=0, ends=[2], n_episodes=300, alpha=0.5, epsilon=0.0,
        discount=1.0,
    )  # fmt: skip
    assert_exact(run.q[:, 0], [3, 2, 0])


# Refusals


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match=r"^n is 0: n >= 1\.$"):
        n_step_td(long_walk(3), torch.zeros(25), n=0, discount=0.9, step=lambda n: 1.0)


def test_a_start_at_the_end_is_refused():
    message = r"^start is 2, which is one of the ends \[2\]\.$"
    with pytest.raises(ValueError, match=message):
        td_control(chain(), sarsa_target, start=2, ends=[2], n_episodes=1, alpha=0.5, epsilon=0.0)
