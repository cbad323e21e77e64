"""DPO against loops, closed forms, and the limits that its derivation promises."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_exact, assert_float32

from zhizhi.large_models.dpo import (
    bradley_terry_loss,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_reward,
    ipo_loss,
    kl_optimal_policy,
    sequence_log_probs,
)

LOSSES = (dpo_loss, cdpo_loss, ipo_loss, hinge_loss)


def pair_logps(n_pairs: int = 5, seed: int = 0) -> list[torch.Tensor]:
    """Return log-probabilities of chosen, rejected, and both again under the reference."""
    generator = torch.Generator().manual_seed(seed)
    return list(-20 * torch.rand(4, n_pairs, generator=generator, dtype=torch.float64))


def six_responses(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward, scores = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return reward, scores.log_softmax(0)


def objective(
    logp: torch.Tensor, reward: torch.Tensor, logp_ref: torch.Tensor, beta: float
) -> torch.Tensor:
    return (logp.exp() * (reward - beta * (logp - logp_ref))).sum(-1)


# The closed form


def test_optimal_policy_equals_the_definition_summed_in_a_loop():
    reward, logp_ref = six_responses()
    terms = [math.exp(q + r / 0.3) for r, q in zip(reward.tolist(), logp_ref.tolist(), strict=True)]
    logp, log_z = kl_optimal_policy(reward, logp_ref, beta=0.3)
    assert_exact(log_z, math.log(sum(terms)))
    assert_exact(logp, [math.log(term / sum(terms)) for term in terms])


@given(seed=st.integers(0, 10**6), beta=st.floats(0.05, 20.0))
def test_every_policy_falls_short_of_beta_log_z_by_beta_times_its_kl_to_the_optimum(seed, beta):
    reward, logp_ref = six_responses(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    logp = (3 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
    logp_star, log_z = kl_optimal_policy(reward, logp_ref, beta=beta)
    gap = beta * (logp.exp() * (logp - logp_star)).sum()
    assert_exact(objective(logp, reward, logp_ref, beta), beta * log_z - gap)
    assert gap >= -1e-12


def test_optimal_policy_is_the_reference_as_beta_grows_and_the_best_response_as_it_vanishes():
    reward, logp_ref = six_responses()
    torch.testing.assert_close(kl_optimal_policy(reward, logp_ref, beta=1e9)[0], logp_ref)
    assert kl_optimal_policy(reward, logp_ref, beta=1e-3)[0].exp()[reward.argmax()] > 1 - 1e-6


def test_optimal_policy_never_gives_what_the_reference_does_not():
    logp_ref = torch.tensor([0.5, 0.5, 0.0]).log()
    logp, log_z = kl_optimal_policy(torch.tensor([0.0, 0.0, 100.0]), logp_ref, beta=1.0)
    assert_float32(logp.exp(), torch.tensor([0.5, 0.5, 0.0]))
    assert_float32(log_z, torch.tensor(0.0))


def test_optimal_policy_treats_each_prompt_of_a_batch_alone():
    (reward_a, ref_a), (reward_b, ref_b) = six_responses(1), six_responses(2)
    logp, log_z = kl_optimal_policy(
        torch.stack([reward_a, reward_b]), torch.stack([ref_a, ref_b]), beta=0.7
    )
    assert_exact(logp[1], kl_optimal_policy(reward_b, ref_b, beta=0.7)[0])
    assert_exact(log_z[0], kl_optimal_policy(reward_a, ref_a, beta=0.7)[1])


def test_implicit_reward_of_the_optimal_policy_is_the_reward_less_beta_log_z():
    reward, logp_ref = six_responses()
    logp, log_z = kl_optimal_policy(reward, logp_ref, beta=0.3)
    assert_exact(implicit_reward(logp, logp_ref, beta=0.3), reward - 0.3 * log_z)


def test_implicit_reward_is_the_member_of_its_class_whose_normaliser_is_one():
    (_, logp), (_, logp_ref) = six_responses(1), six_responses(2)
    reward = implicit_reward(logp, logp_ref, beta=0.3)
    recovered, log_z = kl_optimal_policy(reward, logp_ref, beta=0.3)
    assert_exact(log_z, 0.0)
    assert_exact(recovered, logp)


# The losses


def test_bradley_terry_probabilities_of_a_pair_and_its_reverse_sum_to_one():
    a, b = pair_logps()[:2]
    forward, backward = bradley_terry_loss(a, b), bradley_terry_loss(b, a)
    assert_exact((-forward).exp() + (-backward).exp(), torch.ones(5))
    expected = [math.log1p(math.exp(l - w)) for w, l in zip(a.tolist(), b.tolist(), strict=True)]
    assert_exact(forward, expected)


def test_bradley_terry_loss_is_finite_where_the_sigmoid_underflows():
    far = torch.tensor([1e4])
    assert_float32(bradley_terry_loss(-far, far), 2 * far)
    assert_float32(bradley_terry_loss(far, -far), torch.zeros(1))


def test_dpo_loss_equals_the_formula_in_a_loop():
    w, l, ref_w, ref_l = pair_logps()
    expected = []
    for i in range(5):
        margin = 0.3 * ((w[i] - ref_w[i]) - (l[i] - ref_l[i])).item()
        expected.append(-math.log(1 / (1 + math.exp(-margin))))
    assert_exact(dpo_loss(w, l, ref_w, ref_l, beta=0.3), expected)


def test_dpo_loss_is_log_two_while_the_policy_is_the_reference():
    w, l, *_ = pair_logps()
    assert_exact(dpo_loss(w, l, w, l, beta=0.7), [math.log(2)] * 5)


def test_dpo_gradient_is_beta_times_the_probability_of_the_wrong_order():
    w, l, ref_w, ref_l = pair_logps()
    w.requires_grad_()
    l.requires_grad_()
    grad_w, grad_l = torch.autograd.grad(dpo_loss(w, l, ref_w, ref_l, beta=0.3).sum(), (w, l))
    wrong = torch.sigmoid(0.3 * ((l - ref_l) - (w - ref_w))).detach()
    assert_exact(grad_w, -0.3 * wrong)
    assert_exact(grad_l, 0.3 * wrong)


def test_dpo_on_every_pair_recovers_the_policy_that_rlhf_would_find():
    reward, logp_ref = six_responses()
    target, _ = kl_optimal_policy(reward, logp_ref, beta=0.5)
    pairs = torch.tensor(list(itertools.permutations(range(6), 2)))
    w, l = pairs.T
    logits = target.clone().requires_grad_()
    logp = logits.log_softmax(0)
    loss = dpo_loss(logp[w], logp[l], logp_ref[w], logp_ref[l], beta=0.5)
    (grad,) = torch.autograd.grad((torch.sigmoid(reward[w] - reward[l]) * loss).sum(), logits)
    assert_exact(grad, torch.zeros(6))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_both_responses_share_with_the_prompt_cancels(loss):
    w, l, ref_w, ref_l = pair_logps()
    assert_exact(loss(w - 3.0, l - 3.0, ref_w, ref_l), loss(w, l, ref_w, ref_l))
    assert_exact(loss(w, l, ref_w + 2.0, ref_l + 2.0), loss(w, l, ref_w, ref_l))


@pytest.mark.parametrize("loss", LOSSES)
def test_autograd_of_the_loss_agrees_with_finite_differences(loss):
    inputs = [t.requires_grad_() for t in pair_logps()]
    assert torch.autograd.gradcheck(lambda *args: loss(*args, beta=0.3), inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_falls_when_the_chosen_response_gains_probability_at_first(loss):
    zero = torch.zeros(1, dtype=torch.float64)
    assert loss(zero + 0.1, zero, zero, zero) < loss(zero, zero, zero, zero)
    assert loss(zero, zero + 0.1, zero, zero) > loss(zero, zero, zero, zero)


def test_cdpo_without_smoothing_is_dpo_and_with_it_the_mean_over_flipped_labels():
    w, l, ref_w, ref_l = pair_logps()
    plain = dpo_loss(w, l, ref_w, ref_l, beta=0.3)
    flipped = dpo_loss(l, w, ref_l, ref_w, beta=0.3)
    assert_exact(cdpo_loss(w, l, ref_w, ref_l, beta=0.3, label_smoothing=0.0), plain)
    smoothed = cdpo_loss(w, l, ref_w, ref_l, beta=0.3, label_smoothing=0.2)
    assert_exact(smoothed, 0.8 * plain + 0.2 * flipped)


def test_cdpo_stops_where_the_margin_explains_the_flipped_labels():
    h = torch.tensor([math.log(0.8 / 0.2) / 0.3], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = cdpo_loss(h, zero, zero, zero, beta=0.3, label_smoothing=0.2)
    assert_exact(torch.autograd.grad(loss.sum(), h)[0], zero)


def test_ipo_is_the_regression_on_both_orders_of_a_pair_up_to_a_constant():
    w, l, ref_w, ref_l = pair_logps()
    h = (w - l) - (ref_w - ref_l)
    both_orders = ((h - 1 / 0.3) ** 2 + (-h) ** 2) / 2
    assert_exact(ipo_loss(w, l, ref_w, ref_l, beta=0.3) + 1 / (4 * 0.3**2), both_orders)


def test_hinge_is_zero_past_a_margin_of_one_and_has_slope_beta_before_it():
    h = torch.tensor([-4.0, 1.0, 3.4, 50.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    loss = hinge_loss(h, zero, zero, zero, beta=0.3)
    assert_exact(loss, [2.2, 0.7, 0.0, 0.0])
    assert_exact(torch.autograd.grad(loss.sum(), h)[0], [-0.3, -0.3, 0.0, 0.0])


# The bookkeeping


def test_sequence_log_probs_equals_a_loop_over_counted_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[0, :3], labels[1, 4:], labels[2, 2] = -100, -100, -100
    expected = [0.0, 0.0, 0.0]
    for b, t in itertools.product(range(3), range(1, 6)):
        if labels[b, t] != -100:
            scores = logits[b, t - 1].tolist()
            expected[b] += scores[labels[b, t]] - math.log(sum(map(math.exp, scores)))
    assert_exact(sequence_log_probs(logits, labels), expected)


def test_probabilities_of_all_responses_of_one_length_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, 4, generator=generator, dtype=torch.float64)  # a bigram model
    responses = torch.tensor(list(itertools.product(range(4), repeat=3)))
    ids = torch.cat([torch.full((64, 1), 2), responses], dim=1)
    assert_exact(sequence_log_probs(table[ids], ids).exp().sum(), 1.0)


def test_logits_that_predict_masked_labels_do_not_matter_even_when_infinite():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 7, generator=generator)
    labels = torch.tensor([[-100, -100, 3, 1, -100]])
    expected = sequence_log_probs(logits, labels)
    logits[0, 0] += 50.0
    logits[0, 3:, 2:] = -torch.inf
    torch.testing.assert_close(sequence_log_probs(logits, labels), expected)


def test_first_label_is_never_counted_and_another_ignore_index_is_obeyed():
    logits = torch.zeros(1, 3, 10)
    assert_float32(
        sequence_log_probs(logits, torch.tensor([[1, 2, 0]]), ignore_index=0),
        -torch.tensor([10.0]).log(),
    )


# Refusals


@pytest.mark.parametrize("beta", [0.0, -0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_refuse_a_beta_that_is_not_positive(loss, beta):
    with pytest.raises(ValueError, match=rf"^beta is {beta}: it must be greater than 0\.$"):
        loss(*pair_logps(), beta=beta)


def test_closed_form_and_implicit_reward_refuse_a_beta_that_is_not_positive():
    reward, logp_ref = six_responses()
    for call in (kl_optimal_policy, implicit_reward):
        with pytest.raises(ValueError, match=r"^beta is -1\.0: it must be greater than 0\.$"):
            call(reward, logp_ref, beta=-1.0)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5])
def test_cdpo_refuses_a_flip_probability_outside_its_range(label_smoothing):
    message = rf"^label_smoothing is {label_smoothing}: it must be in \[0, 0\.5\)\.$"
    with pytest.raises(ValueError, match=message):
        cdpo_loss(*pair_logps(), label_smoothing=label_smoothing)


def test_sequence_log_probs_refuses_a_response_that_truncation_has_emptied():
    labels = torch.tensor([[-100, 4, 5, 1], [7, -100, -100, -100]])
    message = r"^row 1 counts 0 of 3 labels: a response needs at least 1 token\.$"
    with pytest.raises(ValueError, match=message):
        sequence_log_probs(torch.zeros(2, 4, 8), labels)
