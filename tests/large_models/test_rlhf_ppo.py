import itertools
import math

import pytest
import torch
from tests.closeness import EXACT, assert_exact, assert_float32

from zhizhi.large_models.dpo import bradley_terry_loss
from zhizhi.large_models.rlhf_ppo import (
    adaptive_kl_coefficient,
    best_of_n_kl,
    best_of_n_policy,
    clipped_value_loss,
    kl_shaped_rewards,
    last_token,
    ranking_loss,
    whiten,
)
from zhizhi.reinforcement_learning.ppo import gae

V, T = 3, 3  # vocabulary and length of the enumerated language


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


class Tree(torch.nn.Module):
    """A policy over all texts of T tokens: free logits after each prefix."""

    def __init__(self, seed):
        super().__init__()
        self.logits = torch.nn.ParameterList([normal(V**t, V, seed=seed + t) for t in range(T)])
        self.texts = torch.tensor(list(itertools.product(range(V), repeat=T)))

    def token_logp(self):
        rows, prefix = [], torch.zeros(len(self.texts), dtype=torch.long)
        for t in range(T):
            logp = self.logits[t].log_softmax(-1)[prefix]
            rows.append(logp.gather(-1, self.texts[:, t : t + 1])[:, 0])
            prefix = prefix * V + self.texts[:, t]
        return torch.stack(rows, dim=-1)


def gradient(scalar, model):
    parts = torch.autograd.grad(scalar, list(model.parameters()))
    return torch.cat([p.flatten() for p in parts])


def test_a_ranking_is_the_mean_of_its_pairs():
    rewards = normal(4, 5)
    slow = [
        bradley_terry_loss(rewards[b, i : i + 1], rewards[b, j : j + 1]).item()
        for b in range(4)
        for i in range(5)
        for j in range(i + 1, 5)
    ]
    assert_exact(ranking_loss(rewards), sum(slow) / len(slow))


def test_a_ranking_knows_rewards_up_to_a_constant_of_each_question():
    rewards = normal(4, 5)
    assert_exact(ranking_loss(rewards + normal(4, 1, seed=1)), ranking_loss(rewards))
    assert_exact(ranking_loss(torch.zeros(2, 3, dtype=torch.float64)), math.log(2))


def test_one_answer_cannot_be_ranked():
    with pytest.raises(ValueError, match="K is 1: at least 2"):
        ranking_loss(torch.zeros(3, 1))


def test_the_last_token_is_the_last_under_the_mask_even_with_gaps():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    value, place = last_token(torch.arange(8.0).reshape(2, 4), mask)
    assert value.tolist() == [2.0, 5.0]
    assert place.tolist() == [2, 1]
    with pytest.raises(ValueError, match="no token"):
        last_token(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_shaped_rewards_add_up_to_the_regularised_reward():
    lengths = torch.tensor([1, 4, 3])
    mask = torch.arange(4) < lengths[:, None]
    score, logp, ref = normal(3, seed=1), normal(3, 4, seed=2), normal(3, 4, seed=3)
    rewards = kl_shaped_rewards(score, logp, ref, mask, beta=0.3)
    for b, n in enumerate(lengths):
        ratio = (logp[b, :n] - ref[b, :n]).sum()
        assert_exact(rewards[b].sum(), score[b] - 0.3 * ratio)
        assert (rewards[b, n:] == 0).all()


def test_a_reward_has_no_gradient():
    logp = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="asks for a gradient"):
        kl_shaped_rewards(torch.ones(1), logp, logp.detach(), torch.ones(1, 2) > 0, beta=0.1)


def test_policy_gradient_on_shaped_rewards_is_the_gradient_of_the_objective():
    policy, reference, score, beta = Tree(0), Tree(9), normal(V**T, seed=5), 0.4
    logp, ref = policy.token_logp(), reference.token_logp().detach()
    text_logp = logp.sum(-1)
    objective = (text_logp.exp() * (score - beta * (text_logp - ref.sum(-1)))).sum()
    exact = gradient(objective, policy)

    logp = policy.token_logp()
    every = torch.ones_like(logp) > 0
    rewards = kl_shaped_rewards(score, logp.detach(), ref, every, beta=beta)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    weight = logp.detach().sum(-1).exp()[:, None]
    torch.testing.assert_close(gradient((weight * to_go * logp).sum(), policy), exact, **EXACT)

    # lam = 1 without a critic is the same return.
    zero, no = torch.zeros_like(rewards), torch.zeros_like(every)
    ends = no.clone()
    ends[:, -1] = True
    assert_exact(gae(rewards, zero, zero, ends, no, discount=1.0, lam=1.0), to_go)


def test_a_kl_estimate_as_a_loss_need_not_have_the_gradient_of_the_kl():
    policy, reference = Tree(0), Tree(9)
    ref = reference.token_logp().sum(-1).detach()

    def sampled(loss):
        logp = policy.token_logp().sum(-1)
        return gradient((logp.detach().exp() * loss(logp)).sum(), policy)

    logp = policy.token_logp().sum(-1)
    reverse = gradient((logp.exp() * (logp - ref)).sum(), policy)
    logp = policy.token_logp().sum(-1)
    forward = gradient((ref.exp() * (ref - logp)).sum(), policy)
    k1 = sampled(lambda logp: logp - ref)
    k2 = sampled(lambda logp: (logp - ref) ** 2 / 2)
    k3 = sampled(lambda logp: (ref - logp).expm1() - (ref - logp))
    assert_exact(k1, torch.zeros_like(k1))
    torch.testing.assert_close(k2, reverse, **EXACT)
    torch.testing.assert_close(k3, forward, **EXACT)
    assert (forward - reverse).norm() > 0.1 * reverse.norm()


def test_whitening_is_over_the_mask():
    x, mask = normal(3, 5).float(), normal(3, 5, seed=4) > -0.5
    white = whiten(x, mask)
    assert_float32(white[mask], (x[mask] - x[mask].mean()) / x[mask].std(unbiased=False))
    assert (white[~mask] == 0).all()
    kept = whiten(x, mask, shift_mean=False)
    assert_float32(kept[mask].mean(), x[mask].mean())
    with pytest.raises(ValueError, match="1 numbers count"):
        whiten(x[:1], torch.tensor([[True, False, False, False, False]]))


def test_a_clipped_critic_never_pays_less():
    values, old, returns = normal(50, seed=1), normal(50, seed=2), normal(50, seed=3)
    loss = clipped_value_loss(values, old, returns, clip=0.2)
    assert (loss >= (values - returns) ** 2 / 2).all()
    near = (values - old).abs() < 0.2
    assert near.any()
    assert_exact(loss[near], ((values - returns) ** 2 / 2)[near])
    with pytest.raises(ValueError, match=r"clip is 0\.0"):
        clipped_value_loss(values, old, returns, clip=0.0)


def test_a_clipped_critic_that_has_moved_far_enough_has_no_gradient():
    values = torch.tensor([0.5, 0.1], requires_grad=True)
    clipped_value_loss(values, torch.zeros(2), torch.ones(2), clip=0.2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, pytest.approx(-0.9)]


def test_the_price_settles_where_the_distance_is_the_target():
    beta = 1.0
    for _ in range(2000):  # a policy whose distance falls as the price rises: KL = 3 / beta
        beta = adaptive_kl_coefficient(beta, 3 / beta, target=6.0)
    assert beta == pytest.approx(0.5, rel=1e-6)
    assert adaptive_kl_coefficient(0.1, 1e9, target=6.0) == pytest.approx(0.1 * 1.02)
    assert adaptive_kl_coefficient(0.1, 0.0, target=6.0) == pytest.approx(0.1 * 0.98)
    with pytest.raises(ValueError, match=r"target is 0\.0"):
        adaptive_kl_coefficient(0.1, 1.0, target=0.0)


def test_the_best_of_n_is_enumerated():
    probs, proxy = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    slow = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=4):
        best = max(draws, key=lambda y: proxy[y].item())
        slow[best] += math.prod(probs[y].item() for y in draws)
    assert_exact(best_of_n_policy(probs, proxy, n=4), slow)
    assert_exact(best_of_n_policy(probs, proxy, n=1), probs)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_distance_of_the_best_of_n(n):
    def kl(N):
        probs = torch.full((N,), 1 / N, dtype=torch.float64)
        best = best_of_n_policy(probs, torch.arange(N).double(), n=n)
        return torch.special.xlogy(best, best / probs).sum().item()

    assert kl(400_000) == pytest.approx(best_of_n_kl(n), abs=1e-4)
    assert kl(50) <= best_of_n_kl(n) + 1e-12  # few answers: the formula is a bound
    if n > 1:
        assert kl(5) < best_of_n_kl(n) - 1e-3


def test_the_best_of_none_and_of_equals_is_refused():
    two = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_policy(two, torch.tensor([0.0, 1.0]), n=0)
    with pytest.raises(ValueError, match="n is 0"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match="same reward"):
        best_of_n_policy(two, torch.tensor([1.0, 1.0]), n=2)
