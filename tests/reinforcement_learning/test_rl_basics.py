"""Values of a fixed policy: three routes to the same number, and the limits it must keep."""

from dataclasses import replace
from math import log

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_exact, assert_float32
from torch import Tensor

from zhizhi.reinforcement_learning.grid_world import (
    TabularMDP,
    absorbing,
    book_grid_world,
    grid_world,
    policy_from_arrows,
    rollout,
)
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    discounted_returns,
    iterative_policy_evaluation,
    markov_reward_process,
    policy_evaluation,
)


def random_mdp(seed: int, *, S: int = 6, A: int = 3, discount: float = 0.9):
    """Draw a stochastic model and a stochastic policy."""
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(S, A, S, dtype=torch.float64, generator=generator)
    transition = transition / transition.sum(dim=-1, keepdim=True)
    reward = torch.randn(S, A, dtype=torch.float64, generator=generator)
    policy = torch.rand(S, A, dtype=torch.float64, generator=generator)
    return TabularMDP(transition, reward, discount), policy / policy.sum(dim=1, keepdim=True)


def two_by_two(*, discount: float = 0.9) -> TabularMDP:
    """Build the 2x2 example of Sections 2.4 to 2.8: s_2 is forbidden, s_4 the target."""
    return grid_world(shape=(2, 2), forbidden={(0, 1)}, target=(1, 1), discount=discount)


def half_right_half_down() -> Tensor:
    return 0.5 * policy_from_arrows(["→↓", "→○"]) + 0.5 * policy_from_arrows(["↓↓", "→○"])


def test_returns_equal_the_sum_of_the_definition():
    rewards = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G = discounted_returns(rewards, discount=0.8)
    for n in range(3):
        for t in range(7):
            slow = sum(0.8 ** (k - t) * rewards[n, k].item() for k in range(t, 7))
            assert_exact(G[n, t], slow)


def test_without_discount_only_the_next_reward_counts_and_with_none_all_do():
    rewards = torch.tensor([2.0, -1.0, 4.0])
    assert discounted_returns(rewards, discount=0.0).tolist() == [2.0, -1.0, 4.0]
    assert discounted_returns(rewards, discount=1.0).tolist() == [5.0, 3.0, 4.0]


def test_the_trajectory_of_the_slides_returns_gamma_cubed_over_one_minus_gamma():
    mdp = grid_world(shape=(3, 3), forbidden={(1, 2), (2, 0)}, target=(2, 2))
    policy = policy_from_arrows(["→↓←", "→↓↓", "→→○"])
    _, _, rewards = rollout(mdp, policy, torch.tensor([0]), n_steps=300)
    G = discounted_returns(rewards, discount=0.9)
    assert_exact(G[0, 0], 0.9**3 / (1 - 0.9))


def test_the_chain_of_a_policy_is_the_table_summed_by_hand():
    mdp, policy = random_mdp(1)
    P_pi, r_pi = markov_reward_process(mdp, policy)
    for s in range(6):
        assert_exact(r_pi[s], sum(policy[s, a] * mdp.reward[s, a] for a in range(3)))
        for t in range(6):
            slow = sum(policy[s, a] * mdp.transition[s, a, t] for a in range(3))
            assert_exact(P_pi[s, t], slow)
    assert_exact(P_pi.sum(dim=1), torch.ones(6))


def test_two_by_two_values_are_those_of_the_book():
    mdp = two_by_two()
    assert_exact(policy_evaluation(mdp, policy_from_arrows(["↓↓", "→○"])), [9, 10, 10, 10])
    assert_exact(policy_evaluation(mdp, half_right_half_down()), [8.5, 10, 10, 10])
    P_pi, r_pi = markov_reward_process(mdp, half_right_half_down())
    assert P_pi.tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert r_pi.tolist() == [-0.5, 1, 1, 1]


@settings(deadline=None, max_examples=20)
@given(discount=st.floats(0.0, 0.99))
def test_the_order_of_the_three_policies_holds_for_every_discount(discount):
    mdp = two_by_two(discount=discount)
    down = policy_evaluation(mdp, policy_from_arrows(["↓↓", "→○"]))[0]
    right = policy_evaluation(mdp, policy_from_arrows(["→↓", "→○"]))[0]
    both = policy_evaluation(mdp, half_right_half_down())[0]
    later = discount / (1 - discount)
    assert_exact(torch.stack([down, both, right]), [later, later - 0.5, later - 1])


def test_a_solved_value_satisfies_the_bellman_equation_written_with_loops():
    mdp, policy = random_mdp(2)
    v = policy_evaluation(mdp, policy)
    for s in range(6):
        right_hand_side = sum(
            policy[s, a]
            * (
                mdp.reward[s, a]
                + mdp.discount * sum(mdp.transition[s, a, t] * v[t] for t in range(6))
            )
            for a in range(3)
        )
        assert_exact(v[s], right_hand_side)


def test_a_solved_value_is_the_mean_of_sampled_returns():
    mdp, policy = random_mdp(3, discount=0.7)
    N, T = 4000, 40
    start = torch.zeros(N, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    _, _, rewards = rollout(mdp, policy, start, n_steps=T, generator=generator)
    G = discounted_returns(rewards, discount=0.7)[:, 0]
    cut = 0.7**T / 0.3 * mdp.reward.abs().max()
    gap = (G.mean() - policy_evaluation(mdp, policy)[0]).abs()
    assert gap <= 4 * G.std() / N**0.5 + cut


def test_values_grow_with_rewards_and_are_at_least_the_first_reward():
    mdp, policy = random_mdp(4)
    mdp = replace(mdp, reward=mdp.reward.abs())
    P_pi, r_pi = markov_reward_process(mdp, policy)
    v = policy_evaluation(mdp, policy)
    assert (v >= r_pi).all()
    inverse = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - 0.9 * P_pi)
    assert (inverse >= torch.eye(6) - 1e-12).all()
    series = sum(0.9**k * torch.linalg.matrix_power(P_pi, k) for k in range(400))
    assert_exact(inverse, series)


def test_without_discount_the_value_is_the_first_reward():
    mdp, policy = random_mdp(5, discount=0.0)
    assert_exact(policy_evaluation(mdp, policy), markov_reward_process(mdp, policy)[1])


def test_iteration_converges_to_the_solution_at_the_promised_rate():
    mdp = book_grid_world(r_forbidden=-10.0)
    policy = torch.full((25, 5), 0.2, dtype=torch.float64)
    v = iterative_policy_evaluation(mdp, policy, torch.zeros(25, dtype=torch.float64), n_sweeps=300)
    error = (v - policy_evaluation(mdp, policy)).abs().amax(dim=1)
    assert error[-1] < 1e-10
    assert (error[1:150] <= 0.9 * error[:149] * (1 + 1e-9)).all()
    slope = (error[140].log() - error[40].log()) / 100
    assert abs(slope.item() - log(0.9)) < 1e-3


def test_iteration_errs_by_the_power_of_the_chain_on_the_first_error():
    mdp, policy = random_mdp(6)
    P_pi, _ = markov_reward_process(mdp, policy)
    v_0 = torch.linspace(-3, 3, 6, dtype=torch.float64)
    v = iterative_policy_evaluation(mdp, policy, v_0, n_sweeps=5)
    v_pi = policy_evaluation(mdp, policy)
    assert torch.equal(v[0], v_0)
    power = torch.linalg.matrix_power(P_pi, 5)
    assert_exact(v[5] - v_pi, 0.9**5 * power @ (v_0 - v_pi))


def test_iteration_from_the_solution_stays_and_without_sweeps_returns_the_guess():
    mdp, policy = random_mdp(7)
    v_pi = policy_evaluation(mdp, policy)
    v = iterative_policy_evaluation(mdp, policy, v_pi, n_sweeps=3)
    assert_exact(v[3], v_pi)
    assert iterative_policy_evaluation(mdp, policy, v_pi, n_sweeps=0).shape == (1, 6)


def test_action_values_of_the_book_include_actions_never_taken():
    mdp, policy = two_by_two(), half_right_half_down()
    q = action_values(mdp, policy_evaluation(mdp, policy))
    assert_exact(q[0], [6.65, 8, 9, 6.65, 7.65])


def test_state_values_are_the_policys_mean_of_action_values():
    mdp, policy = random_mdp(8)
    v = policy_evaluation(mdp, policy)
    assert_exact((policy * action_values(mdp, v)).sum(dim=1), v)


def test_action_values_solve_their_own_bellman_equation():
    mdp, policy = random_mdp(9)
    P = rearrange(mdp.transition, "S A S_next -> (S A) S_next")
    Pi = torch.block_diag(*policy)
    r = rearrange(mdp.reward, "S A -> (S A)")
    q = torch.linalg.solve(torch.eye(18, dtype=torch.float64) - 0.9 * P @ Pi, r)
    assert_exact(q.view(6, 3), action_values(mdp, policy_evaluation(mdp, policy)))


@settings(deadline=None, max_examples=20)
@given(alpha=st.floats(0.1, 5.0), beta=st.floats(-3.0, 3.0))
def test_an_affine_reward_shifts_every_value_alike(alpha, beta):
    mdp, policy = random_mdp(10)
    changed = replace(mdp, reward=alpha * mdp.reward + beta)
    expected = alpha * policy_evaluation(mdp, policy) + beta / (1 - 0.9)
    assert_exact(policy_evaluation(changed, policy), expected)


def test_a_target_that_ends_the_episode_is_worth_zero_and_one_that_does_not_ten():
    mdp, policy = two_by_two(), policy_from_arrows(["↓↓", "→○"])
    assert_exact(policy_evaluation(absorbing(mdp, states=[3]), policy), [0.9, 1, 1, 0])
    assert_exact(policy_evaluation(mdp, policy)[3], 10.0)


def test_single_precision_in_single_precision_out():
    mdp, policy = random_mdp(11)
    single = TabularMDP(mdp.transition.float(), mdp.reward.float(), mdp.discount)
    v = policy_evaluation(single, policy.float())
    assert v.dtype == torch.float32
    assert_float32(v, policy_evaluation(mdp, policy))
    assert_float32(action_values(single, v), action_values(mdp, v.double()))


def test_a_policy_that_is_no_distribution_is_refused():
    mdp, policy = random_mdp(12)
    message = (
        r"the smallest pi\(a\|s\) is .* and a row sums to 2: "
        "every row must be non-negative and sum to 1."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        policy_evaluation(mdp, 2 * policy)
    negative = torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.float64).repeat(6, 1)
    with pytest.raises(ValueError, match=r"^the smallest pi\(a\|s\) is -1 and a row sums to 1: "):
        markov_reward_process(mdp, negative)
