"""The gradient by autograd, by differences, by samples; baselines that change nothing but noise."""

import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.reinforcement_learning.grid_world import TabularMDP, book_grid_world, rollout
from zhizhi.reinforcement_learning.policy_gradient import (
    ActorCritic,
    actor_critic,
    discounted_visits,
    least_variance_baseline,
    policy_gradient,
    reinforce_gradient,
    score,
)
from zhizhi.reinforcement_learning.rl_basics import (
    action_values,
    markov_reward_process,
    policy_evaluation,
)


def world(seed: int = 0, *, S: int = 4, A: int = 3, discount: float = 0.8):
    """Return a random model, preferences and a distribution of the first state."""
    g = torch.Generator().manual_seed(seed)
    transition = torch.rand(S, A, S, generator=g, dtype=torch.float64)
    reward = torch.randn(S, A, generator=g, dtype=torch.float64)
    mdp = TabularMDP(transition / transition.sum(dim=2, keepdim=True), reward, discount)
    start = torch.rand(S, generator=g, dtype=torch.float64)
    theta = torch.randn(S, A, generator=g, dtype=torch.float64)
    return mdp, theta, start / start.sum()


def performance(mdp, theta, start):
    return start @ policy_evaluation(mdp, theta.softmax(dim=1))


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_autograd_through_the_inverse(seed: int) -> None:
    mdp, theta, start = world(seed)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(performance(mdp, leaf, start), leaf)
    assert_exact(policy_gradient(mdp, theta, start), expected)


def test_the_gradient_is_that_of_finite_differences() -> None:
    mdp, theta, start = world()
    h = 1e-6
    for s, a in ((0, 0), (2, 1), (3, 2)):
        bump = torch.zeros_like(theta)
        bump[s, a] = h
        up, down = (performance(mdp, theta + sign * bump, start) for sign in (1, -1))
        found = policy_gradient(mdp, theta, start)[s, a]
        assert found.item() == pytest.approx(((up - down) / (2 * h)).item(), abs=1e-7)


def test_visits_are_the_discounted_probabilities_of_being_there() -> None:
    mdp, theta, start = world()
    policy = theta.softmax(dim=1)
    P, _ = markov_reward_process(mdp, policy)
    now, total = start.clone(), torch.zeros_like(start)
    for t in range(300):
        total += mdp.discount**t * now
        now = now @ P
    assert_exact(discounted_visits(mdp, policy, start), total)
    assert total.sum().item() == pytest.approx(1 / (1 - mdp.discount))


def test_the_score_is_the_gradient_of_the_log_probability_and_zero_on_average() -> None:
    _, theta, _ = world()
    leaf = theta.clone().requires_grad_()
    for s in range(4):
        rows = score(theta, torch.full((3,), s), torch.arange(3))
        for a in range(3):
            (expected,) = torch.autograd.grad(leaf.log_softmax(dim=1)[s, a], leaf)
            assert_exact(rows[a], expected[s])
            assert (expected[torch.arange(4) != s] == 0).all()
        assert_exact(theta.softmax(dim=1)[s] @ rows, torch.zeros(3))


@pytest.mark.parametrize("with_baseline", [False, True])
def test_samples_give_the_gradient_on_average(with_baseline: bool) -> None:
    mdp, theta, start = world(discount=0.6)
    policy = theta.softmax(dim=1)
    baseline = policy_evaluation(mdp, policy) if with_baseline else None
    g = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(60):
        first = torch.multinomial(start, 100, replacement=True, generator=g)
        states, actions, rewards = rollout(mdp, policy, first, n_steps=40, generator=g)
        estimates.append(
            reinforce_gradient(
                theta, states[:, :-1], actions, rewards, discount=0.6, baseline=baseline
            )
        )
    found = torch.stack(estimates)
    error = found.std(dim=0) / math.sqrt(60)
    exact = policy_gradient(mdp, theta, start)
    assert ((found.mean(dim=0) - exact).abs() < 4.5 * error + 1e-6).all()


def test_reinforce_is_the_sum_over_times_that_it_says() -> None:
    mdp, theta, _ = world()
    g = torch.Generator().manual_seed(1)
    states, actions, rewards = rollout(
        mdp, theta.softmax(dim=1), torch.tensor([0, 2]), n_steps=5, generator=g
    )
    b = torch.randn(4, generator=g, dtype=torch.float64)
    total = torch.zeros_like(theta)
    for n in range(2):
        for t in range(5):
            G = sum(0.8 ** (k - t) * rewards[n, k] for k in range(t, 5))
            s, a = states[n, t], actions[n, t]
            direction = -theta.softmax(dim=1)[s]
            direction[a] += 1
            total[s] += 0.8**t * (G - b[s]) * direction / 2
    found = reinforce_gradient(theta, states[:, :-1], actions, rewards, discount=0.8, baseline=b)
    assert_exact(found, total)


def test_no_baseline_varies_less_than_the_best_one() -> None:
    mdp, theta, _ = world()
    policy = theta.softmax(dim=1)
    q = action_values(mdp, policy_evaluation(mdp, policy))
    best = least_variance_baseline(policy, q)

    def variance(b: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([
            score(theta, torch.full((3,), s), torch.arange(3)) * (q[s] - b[s])[:, None]
            for s in range(4)
        ])  # fmt: skip
        mean = torch.einsum("sa,sab->sb", policy, rows)
        return torch.einsum("sa,sab->s", policy, rows**2) - mean.square().sum(dim=1)

    for shift in (-1.0, -0.01, 0.01, 1.0):
        assert (variance(best + shift) > variance(best)).all()
    assert (variance(best) <= variance((policy * q).sum(dim=1)) + 1e-12).all()
    assert (variance(best) < variance(torch.zeros(4).double())).all()


def test_a_step_of_actor_and_critic_is_the_one_written_out() -> None:
    mdp, theta, _ = world()
    v = torch.randn(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    states = torch.tensor([1, 1, 3])
    found, where = actor_critic(
        mdp, ActorCritic(theta, v), states, n_steps=1, actor_rate=0.3, critic_rate=0.5,
        generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    g = torch.Generator().manual_seed(9)
    policy = theta.softmax(dim=1)
    actions = torch.multinomial(policy[states], 1, generator=g)[:, 0]
    following = torch.multinomial(mdp.transition[states, actions], 1, generator=g)[:, 0]
    assert where.tolist() == following.tolist()
    new_theta, new_v = theta.clone(), v.clone()
    for n in range(3):
        s, a = states[n], actions[n]
        delta = mdp.reward[s, a] + 0.8 * v[following[n]] - v[s]
        direction = -policy[s]
        direction[a] += 1
        new_theta[s] += 0.3 * delta * direction / 3
        new_v[s] += 0.5 * delta / (2 if s == 1 else 1)
    assert_exact(found.theta, new_theta)
    assert_exact(found.values, new_v)


@pytest.mark.slow
def test_actor_and_critic_climb_on_the_book_grid() -> None:
    mdp = book_grid_world(r_forbidden=-1.0)
    start = torch.full((25,), 1 / 25, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    begin = ActorCritic(torch.zeros(25, 5).double(), torch.zeros(25).double())
    where = torch.randint(25, (64,), generator=g)
    agent, _ = actor_critic(
        mdp, begin, where, n_steps=500, actor_rate=5.0, critic_rate=0.2, start=start, generator=g
    )
    before, after = (performance(mdp, theta, start) for theta in (begin.theta, agent.theta))
    assert before < 0 < 7.5 < after


def test_restarts_meet_states_as_often_as_discounted_visits_count_them() -> None:
    mdp, theta, start = world(discount=0.7)
    still = ActorCritic(theta, torch.zeros(4).double())
    g = torch.Generator().manual_seed(0)
    where, met = torch.zeros(4000, dtype=torch.long), torch.zeros(4, dtype=torch.float64)
    for n in range(60):
        _, where = actor_critic(
            mdp, still, where, n_steps=1, actor_rate=0.0, critic_rate=0.0, start=start, generator=g
        )
        if n >= 20:
            met += torch.bincount(where, minlength=4) / (40 * 4000)
    expected = (1 - 0.7) * discounted_visits(mdp, theta.softmax(dim=1), start)
    assert (met - expected).abs().max() < 0.01


def test_what_makes_no_sense_is_refused() -> None:
    mdp, theta, start = world()
    with pytest.raises(ValueError, match=r"^start sums to 2\.0: probabilities sum to 1\.$"):
        discounted_visits(mdp, theta.softmax(dim=1), 2 * start)
    with pytest.raises(ValueError, match=r"^there are 0 copies: at least one walks\.$"):
        actor_critic(
            mdp, ActorCritic(theta, torch.zeros(4).double()), torch.zeros(0, dtype=torch.long),
            n_steps=1, actor_rate=0.1, critic_rate=0.1,
        )  # fmt: skip
