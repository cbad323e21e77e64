import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import logsumexp as scipy_logsumexp
from tests.closeness import assert_exact, assert_float32

from zhizhi.deep_learning.softmax_cross_entropy import (
    ExpSum,
    calibration_error,
    cross_entropy,
    cross_entropy_grad,
    exp_sum,
    fit_temperature,
    log_sum_exp,
    merge_exp_sums,
    rebase,
    smoothed_cross_entropy,
    softmax,
)


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(n, n_classes, seed=0):
    return torch.randint(n_classes, (n,), generator=torch.Generator().manual_seed(seed))


# Sums of exponentials


def test_log_sum_exp_equals_the_loop_in_exact_order_and_scipy():
    x = normal(5, 7, scale=3)
    by_loop = [math.log(sum(math.exp(v) for v in row)) for row in x.tolist()]
    assert_exact(log_sum_exp(x), by_loop)
    assert_exact(log_sum_exp(1e4 * x), scipy_logsumexp(1e4 * x.numpy(), axis=-1))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-700, 700) | st.just(-math.inf), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=3),
    st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_is_the_whole_sum(values, cuts, random):
    x = torch.tensor(values, dtype=torch.float64)
    bounds = sorted({0, len(x), *(min(cut, len(x)) for cut in cuts)})
    parts = [exp_sum(x[a:b]) for a, b in itertools.pairwise(bounds)]
    parts.append(ExpSum(torch.tensor(-math.inf).double(), torch.tensor(0.0).double()))
    random.shuffle(parts)
    m, z = functools.reduce(merge_exp_sums, parts)
    assert m == x.max()
    assert_exact(m + z.log(), torch.logsumexp(x, dim=-1))


def test_a_row_without_terms_is_the_zero_of_merging_and_has_log_minus_infinity():
    nothing = exp_sum(torch.full((2, 3), -math.inf))
    assert nothing.z.tolist() == [0, 0]
    assert merge_exp_sums(nothing, nothing).m.tolist() == [-math.inf] * 2
    assert log_sum_exp(torch.full((3,), -math.inf)).item() == -math.inf
    assert [t.item() for t in rebase(torch.tensor(-math.inf), torch.tensor(-math.inf))[1:]] == [
        0,
        0,
    ]


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_moves_the_log_sum_exp_and_leaves_the_softmax(shift):
    x = normal(4, 6)
    assert_exact(log_sum_exp(x + shift) - shift, log_sum_exp(x))
    assert_exact(softmax(x + shift), softmax(x))


def test_the_log_sum_exp_lies_between_the_maximum_and_that_plus_log_c():
    x = normal(100, 9, scale=5)
    excess = log_sum_exp(x) - x.amax(dim=-1)
    assert (excess >= 0).all()
    assert (excess <= math.log(9)).all()


# Softmax


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_softmax_equals_scipy_at_every_temperature(temperature):
    x = normal(5, 8, scale=20)
    expected = np.exp(scipy_log_softmax(x.numpy() / temperature, axis=-1))
    assert_exact(softmax(x, temperature=temperature), expected)


def test_temperature_goes_from_one_hot_to_uniform():
    x = torch.tensor([1.0, 3.0, 2.0])
    assert_float32(softmax(x, temperature=1e-3), torch.tensor([0.0, 1.0, 0.0]))
    assert_float32(softmax(x, temperature=1e7), torch.full((3,), 1 / 3))


def test_two_classes_are_the_sigmoid_of_the_difference():
    x = normal(20, 2, scale=4)
    assert_exact(softmax(x)[:, 0], torch.sigmoid(x[:, 0] - x[:, 1]))


# Cross-entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_equals_torch_and_keeps_the_dtype(dtype):
    x, y = normal(50, 6, scale=10).to(dtype), labels(50, 6)
    ours = cross_entropy(x, y)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, F.cross_entropy(x, y, reduction="none"))


def test_where_the_quotient_overflows_the_loss_is_the_difference_of_logits():
    x = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert x.exp().isinf().any()
    assert cross_entropy(x, torch.tensor([0, 0])).tolist() == [0.0, 1000.0]


def test_the_gradient_is_that_of_autograd_and_sums_to_zero():
    x, y = normal(5, 7, scale=3).requires_grad_(), labels(5, 7)
    (grad,) = torch.autograd.grad(cross_entropy(x, y).sum(), x)
    ours = cross_entropy_grad(x.detach(), y)
    assert_exact(ours, grad)
    assert_exact(ours.sum(dim=-1), torch.zeros(5))


def test_gradcheck_in_float64():
    x, y = normal(3, 4).requires_grad_(), labels(3, 4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, y), (x,))
    assert torch.autograd.gradcheck(lambda x: smoothed_cross_entropy(x, y, smoothing=0.3), (x,))


def test_the_hessian_is_the_covariance_of_the_one_hot_draw():
    x, y = normal(5), torch.tensor([2])
    hessian = torch.autograd.functional.hessian(lambda v: cross_entropy(v[None], y)[0], x)
    p = softmax(x)
    assert_exact(hessian, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_equals_torch(smoothing):
    x, y = normal(30, 6, scale=5), labels(30, 6)
    expected = F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing)
    assert_exact(smoothed_cross_entropy(x, y, smoothing=smoothing), expected)


def test_the_smoothed_loss_is_least_at_the_smoothed_label_where_it_is_its_entropy():
    C, eps = 5, 0.2
    q = torch.full((C,), eps / C, dtype=torch.float64)
    q[3] += 1 - eps
    y = torch.tensor([3])
    least = smoothed_cross_entropy(q.log()[None], y, smoothing=eps)
    assert_exact(least, -(q * q.log()).sum()[None])
    for seed in range(20):
        moved = q.log()[None] + normal(1, C, seed=seed, scale=0.3)
        assert smoothed_cross_entropy(moved, y, smoothing=eps) >= least
    gap = q.log()[3] - q.log()[0]
    assert_exact(gap, math.log((C * (1 - eps) + eps) / eps))


# Calibration


def test_calibration_error_equals_the_sum_over_bins_in_plain_python():
    p, y = softmax(normal(400, 4, scale=2)), labels(400, 4)
    confidence, predicted = p.max(dim=-1)
    expected = 0.0
    for b in range(10):
        inside = [
            (c, k == t)
            for c, k, t in zip(confidence.tolist(), predicted.tolist(), y.tolist(), strict=True)
            if b / 10 < c <= (b + 1) / 10
        ]
        if inside:
            mean = [sum(column) / len(inside) for column in zip(*inside, strict=True)]
            expected += len(inside) / 400 * abs(mean[1] - mean[0])
    assert_exact(calibration_error(p, y, n_bins=10), expected)


def test_labels_drawn_from_the_probabilities_have_an_error_that_vanishes():
    p = softmax(normal(100_000, 3, scale=2))
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    # Each of 15 bins errs by a standard error of at most 1 / (2 sqrt(n_b)); summed with weights
    # n_b / N this is at most sqrt(15 / N) / 2 by Cauchy-Schwarz.
    assert calibration_error(p, y) < 4 * (15 / 100_000) ** 0.5 / 2


def test_the_temperature_equals_the_minimum_found_by_scipy():
    x, y = normal(300, 5, scale=6), labels(300, 5)
    y[:200] = x[:200].argmax(dim=-1)

    def loss(log_temperature):
        return F.cross_entropy(x / math.exp(log_temperature), y).item()

    found = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10})
    assert fit_temperature(x, y) == pytest.approx(math.exp(found.x), rel=1e-6)


def test_at_the_best_temperature_the_expected_logit_is_the_mean_true_one():
    x, y = normal(300, 5), labels(300, 5)
    y[:150] = x[:150].argmax(dim=-1)
    p = softmax(x, temperature=fit_temperature(x, y))
    assert_exact((p * x).sum(dim=-1).mean(), x.gather(1, y[:, None]).mean())


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scaled_logits_have_a_scaled_temperature(factor):
    x, y = normal(300, 5), labels(300, 5)
    y[:150] = x[:150].argmax(dim=-1)
    assert fit_temperature(factor * x, y) == pytest.approx(factor * fit_temperature(x, y), rel=1e-9)


# Refusals


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=rf"^temperature is {temperature}: temperature > 0\.$"):
        softmax(torch.zeros(2), temperature=temperature)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_target_that_is_no_class_is_refused(wrong):
    message = rf"^a target is {wrong} of 3 classes: 0 <= target < 3\.$"
    y = torch.tensor([0, wrong])
    for function in (
        cross_entropy,
        cross_entropy_grad,
        functools.partial(smoothed_cross_entropy, smoothing=0.1),
        calibration_error,
        fit_temperature,
    ):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 3), y)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_a_share_outside_zero_one_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"^smoothing is {smoothing}: 0 <= smoothing <= 1\.$"):
        smoothed_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), smoothing=smoothing)


def test_no_bins_are_refused():
    with pytest.raises(ValueError, match=r"^n_bins is 0: n_bins >= 1\.$"):
        calibration_error(torch.ones(1, 1), torch.tensor([0]), n_bins=0)


def test_a_temperature_that_does_not_exist_is_refused():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"^every target has the largest logit: the best temp"):
        fit_temperature(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^targets have no larger logits than the average: no te"):
        fit_temperature(x, torch.tensor([1, 0]))
