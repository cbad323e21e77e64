import itertools

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.reinforcement_learning.ppo import (
    clipped_surrogate,
    gae,
    group_advantages,
    grpo_loss,
    kl_estimates,
    ppo_loss,
)
from zhizhi.reinforcement_learning.rl_basics import discounted_returns


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(*positions, n):
    out = torch.zeros(n, dtype=torch.bool)
    out[list(positions)] = True
    return out


# Advantages


def test_gae_is_the_weighted_mean_of_all_n_step_advantages():
    # (eq:ppo-mixture), written from its definition: n-step estimates, weights (1 - lam) lam^(n-1).
    T, discount, lam = 7, 0.9, 0.6
    rewards, v = drawn(T), drawn(T + 1, seed=1)
    never = flags(n=T)
    ours = gae(rewards, v[:-1], v[1:], never, never, discount=discount, lam=lam)
    for t in range(T):
        total, left = 0.0, 1.0
        for n in range(1, T - t + 1):
            G = sum(discount**i * rewards[t + i] for i in range(n)) + discount**n * v[t + n]
            weight = (1 - lam) * lam ** (n - 1) if n < T - t else left
            left -= weight
            total += weight * (G - v[t])
        assert_exact(ours[t], total)


def test_at_lam_one_it_is_the_return_minus_the_value_and_at_lam_zero_one_td_error():
    rewards, v, last = drawn(3, 6), drawn(3, 6, seed=1), flags(5, n=6).expand(3, 6)
    following = torch.cat([v[:, 1:], drawn(3, 1, seed=2)], dim=1)
    ends = rewards, v, following, last, torch.zeros_like(last)
    assert_exact(gae(*ends, discount=0.9, lam=1.0), discounted_returns(rewards, discount=0.9) - v)
    delta = rewards + 0.9 * following * ~last - v
    assert_exact(gae(*ends, discount=0.9, lam=0.0), delta)


def test_with_the_true_values_of_a_deterministic_chain_nothing_is_an_advantage():
    v = torch.full((5,), 1 / (1 - 0.9), dtype=torch.float64)  # reward 1 for ever
    one, no, cut = torch.ones(5).double(), flags(n=5), flags(2, 4, n=5)
    assert_exact(gae(one, v, v, no, cut, discount=0.9, lam=0.95), torch.zeros(5))
    wrong = gae(one, v, v, cut, no, discount=0.9, lam=0.95)
    assert_exact(wrong[4], -0.9 * v[4])
    assert (wrong < 0).all()


@pytest.mark.parametrize("which", ["terminated", "truncated"])
def test_nothing_leaks_over_the_end_of_an_episode(which):
    ends, none = flags(2, n=6), flags(n=6)
    terminated, truncated = (ends, none) if which == "terminated" else (none, ends)
    rewards, v, following = drawn(6), drawn(6, seed=1), drawn(6, seed=2)
    before = gae(rewards, v, following, terminated, truncated, discount=0.9, lam=0.9)
    changed = torch.cat([rewards[:3], rewards[3:] + 100])
    after = gae(changed, v, following, terminated, truncated, discount=0.9, lam=0.9)
    assert_exact(after[:3], before[:3])
    assert (after[3:] - before[3:] > 99).all()
    bootstrapped = gae(rewards, v, following + 1, terminated, truncated, discount=0.9, lam=0.9)
    assert (bootstrapped[2] == before[2]) == (which == "terminated")


@pytest.mark.parametrize(("discount", "lam"), [(1.1, 0.5), (0.9, -0.1)])
def test_a_rate_outside_the_unit_interval_is_refused(discount, lam):
    x, no = torch.zeros(2), flags(n=2)
    with pytest.raises(ValueError) as error:
        gae(x, x, x, no, no, discount=discount, lam=lam)
    assert str(error.value) == (
        f"discount is {discount} and lam is {lam}: both must lie in [0, 1]."
    )


# The clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "moves"),
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 2.4, False),  # better, and already more likely: enough
        (0.5, 2.0, 1.0, True),  # better, and less likely: bring it back
        (1.0, -2.0, -2.0, True),
        (1.5, -2.0, -3.0, True),  # worse, and more likely: bring it back
        (0.5, -2.0, -1.6, False),  # worse, and already less likely: enough
        (1.5, 0.0, 0.0, False),
    ],
)
def test_every_case_of_the_clip(ratio, advantage, value, moves):
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    A = torch.tensor([advantage], dtype=torch.float64)
    out = clipped_surrogate(logp, torch.zeros(1).double(), A, epsilon=0.2)
    assert_exact(out, [value])
    (slope,) = torch.autograd.grad(out.sum(), logp)
    assert_exact(slope, [ratio * advantage if moves else 0.0])


def test_it_is_a_lower_bound_of_the_unclipped_one_and_touches_it_at_the_old_policy():
    log_ratio, A = drawn(500), drawn(500, seed=1)
    old = torch.zeros(500).double()
    assert (clipped_surrogate(log_ratio, old, A, epsilon=0.2) <= log_ratio.exp() * A).all()
    assert_exact(clipped_surrogate(old, old, A, epsilon=0.2), A)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_an_epsilon_outside_the_open_unit_interval_is_refused(epsilon):
    with pytest.raises(ValueError) as error:
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), epsilon=epsilon)
    assert str(error.value) == f"epsilon is {epsilon}: 0 < epsilon < 1."


def test_the_gradient_of_the_loss_at_the_old_policy_is_that_of_actor_critic():
    logits, values = drawn(6, 3).requires_grad_(), drawn(6, seed=1).requires_grad_()
    actions, A, G = torch.tensor([0, 2, 1, 1, 0, 2]), drawn(6, seed=2), drawn(6, seed=3)
    logp = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    weights = {"value_weight": 0.7, "entropy_weight": 0.3}
    loss = ppo_loss(logits, values, actions, logp.detach(), A, G, **weights)
    ours = torch.autograd.grad(loss, (logits, values))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    a2c = (-logp * A + 0.7 * (values - G) ** 2 - 0.3 * entropy).mean()
    for mine, theirs in zip(ours, torch.autograd.grad(a2c, (logits, values)), strict=True):
        assert_exact(mine, theirs)


# The KL divergence


def test_k1_and_k3_have_the_divergence_as_their_mean_and_k2_does_not():
    q, p = drawn(5).softmax(0), drawn(5, seed=1).softmax(0)
    exact = (q * (q / p).log()).sum()
    k1, k2, k3 = (float((q * k).sum()) for k in kl_estimates(q.log(), p.log()))
    assert_exact([k1, k3], [exact, exact])
    assert abs(k2 - exact) > 0.02
    estimates = kl_estimates(q.log(), p.log())
    assert estimates.k1.min() < 0 <= min(estimates.k2.min(), estimates.k3.min())


def test_k3_keeps_its_digits_where_the_two_policies_nearly_agree():
    near = torch.tensor([1e-6])  # in float32: exp(x) - 1 - x would be rounding alone
    assert kl_estimates(torch.zeros(1), near).k3.item() >= 0


def test_what_the_gradients_of_the_three_estimates_point_to():
    # Samples of the policy itself: the mean gradient of k1 is nothing, of k2 that of KL(q || p),
    # of k3 that of KL(p || q).
    theta, p = drawn(4).requires_grad_(), drawn(4, seed=1).softmax(0)
    logq = theta.log_softmax(0)
    drawn_with = logq.exp().detach()
    means = [(drawn_with * k).sum() for k in kl_estimates(logq, p.log())]
    towards = [
        0 * theta.sum(),
        (logq.exp() * (logq - p.log())).sum(),
        (p * (p.log() - logq)).sum(),
    ]
    for mean, target in zip(means, towards, strict=True):
        (ours,) = torch.autograd.grad(mean, theta, retain_graph=True)
        (theirs,) = torch.autograd.grad(target, theta, retain_graph=True)
        assert_exact(ours, theirs)


# GRPO


def test_group_advantages_do_not_see_shift_and_scale_of_the_reward():
    rewards = drawn(3, 5)
    ours = group_advantages(rewards, eps=0.0)
    assert_exact(group_advantages(7 * rewards - 3, eps=0.0), ours)
    assert_exact(ours.mean(dim=1), torch.zeros(3))
    assert_exact(ours.std(dim=1), torch.ones(3))


def test_a_group_of_equals_teaches_nothing():
    assert torch.equal(group_advantages(torch.ones(2, 4)), torch.zeros(2, 4))


def test_the_mean_of_the_group_shrinks_the_gradient_and_does_not_turn_it():
    # All 27 groups of three answers: the mean over them is (G - 1) / G of the policy gradient.
    theta, rewards, G = drawn(3).requires_grad_(), drawn(3, seed=1), 3
    logp = theta.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * rewards).sum(), theta, retain_graph=True)
    total = torch.zeros(3).double()
    for group in itertools.product(range(3), repeat=G):
        chosen = list(group)
        R = rewards[chosen]
        surrogate = ((R - R.mean()) * logp[chosen]).mean()
        (grad,) = torch.autograd.grad(surrogate, theta, retain_graph=True)
        total += logp[chosen].sum().exp().detach() * grad
    assert_exact(total, (G - 1) / G * exact)


def test_grpo_loss_equals_the_loop_over_answers_and_tokens():
    logp, old, ref = (drawn(3, 4, seed=s) * 0.3 - 2 for s in range(3))
    A = drawn(3, seed=3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    total = 0.0
    for i in range(3):
        terms = []
        for t in range(4):
            if mask[i, t]:
                rho = (logp[i, t] - old[i, t]).exp().item()
                r = (ref[i, t] - logp[i, t]).exp().item()
                best = min(rho * A[i].item(), min(max(rho, 0.8), 1.2) * A[i].item())
                terms.append(best - 0.1 * (r - 1 - (ref[i, t] - logp[i, t]).item()))
        total += sum(terms) / len(terms) / 3
    assert_exact(grpo_loss(logp, old, ref, A, mask, epsilon=0.2, beta=0.1), -total)


def test_what_stands_behind_the_mask_is_never_read():
    logp, old = drawn(2, 3).requires_grad_(), drawn(2, 3, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    ref = drawn(2, 3, seed=2)
    ref[0, 2] = -torch.inf
    loss = grpo_loss(logp, old, ref, drawn(2, seed=3), mask)
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, logp)
    assert grad[0, 2] == 0
    assert grad.isfinite().all()


def test_one_answer_is_no_group():
    with pytest.raises(ValueError) as error:
        group_advantages(torch.zeros(3, 1))
    assert str(error.value) == (
        "a group has 1 answers: at least 2, or there is nothing to compare."
    )


def test_an_answer_without_tokens_is_refused():
    zero = torch.zeros(2, 3)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    with pytest.raises(ValueError) as error:
        grpo_loss(zero, zero, zero, torch.zeros(2), mask)
    assert str(error.value) == "the shortest answer has 0 tokens: at least 1."
