import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.generative_models.noise_schedule import (
    alpha_bar,
    cosine_beta,
    linear_beta,
    min_snr_weight,
    scaled_linear_beta,
    snr,
    zero_terminal_snr,
)


def test_linear_beta_is_the_straight_line_of_ddpm():
    expected = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert_exact(linear_beta(n_steps=1000), expected)


def test_scaled_linear_beta_is_a_straight_line_before_squaring():
    first, last = 0.00085**0.5, 0.012**0.5
    expected = [(first + (last - first) * t / 999) ** 2 for t in range(1000)]
    assert_exact(scaled_linear_beta(n_steps=1000), expected)


def test_linear_beta_may_fall_because_growth_is_a_choice():
    falling = linear_beta(n_steps=10, start=0.02, end=1e-4)
    assert (falling.diff() < 0).all()
    assert_exact(alpha_bar(falling)[-1], alpha_bar(falling.flip(0))[-1])


def test_cosine_beta_gives_the_squared_cosine_until_the_limit_binds():
    n, s = 50, 0.008
    f = [math.cos((t / n + s) / (1 + s) * math.pi / 2) ** 2 for t in range(n + 1)]
    beta = cosine_beta(n_steps=n)
    assert_exact(alpha_bar(beta)[:n], [f[t] / f[0] for t in range(n)])
    assert beta[-1].item() == 0.999


def test_cosine_beta_starts_below_one_pixel_bin():
    # The reason for s = 0.008 in the paper: sqrt(beta_0) just under 1/127.5.
    first = cosine_beta(n_steps=1000)[0].sqrt().item()
    assert 0.8 / 127.5 < first < 1 / 127.5


def test_alpha_bar_is_the_running_product_with_a_one_in_front():
    beta = cosine_beta(n_steps=20)
    expected, product = [1.0], 1.0
    for value in beta.tolist():
        product *= 1 - value
        expected.append(product)
    assert_exact(alpha_bar(beta), expected)


def test_alpha_bar_has_the_published_ends():
    linear, scaled = (
        alpha_bar(linear_beta(n_steps=1000)),
        alpha_bar(scaled_linear_beta(n_steps=1000)),
    )
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert linear[-1].sqrt().item() == pytest.approx(0.00635, rel=1e-3)
    assert scaled[-1].sqrt().item() == pytest.approx(0.0683, rel=1e-3)


def test_float32_loses_the_noise_of_the_first_step_by_cancellation():
    exact = 1 - alpha_bar(linear_beta(n_steps=1000))
    rounded = 1 - alpha_bar(linear_beta(n_steps=1000, dtype=torch.float32))
    error = ((rounded.double() - exact) / exact)[1:].abs()
    assert error[0] > 1e-4  # 1000 times the rounding error of float32
    assert error[-1] < 1e-7


@given(st.lists(st.floats(1e-4, 0.999), min_size=1, max_size=30))
def test_alpha_bar_and_snr_fall_with_every_step(values):
    signal = alpha_bar(torch.tensor(values, dtype=torch.float64))
    assert (signal.diff() < 0).all()
    assert (snr(signal).diff() < 0).all()


def test_snr_is_the_exponential_of_the_logit():
    signal = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert_exact(snr(signal), signal.logit().exp())


def test_snr_is_infinite_at_the_data_and_zero_at_pure_noise():
    assert snr(torch.tensor([1.0, 0.0])).tolist() == [math.inf, 0.0]


def test_zero_terminal_snr_keeps_the_first_step_and_ends_at_exactly_zero():
    beta = scaled_linear_beta(n_steps=1000)
    rescaled = zero_terminal_snr(beta)
    assert_exact(rescaled[0], beta[0])
    assert rescaled[-1].item() == 1.0
    assert alpha_bar(rescaled)[-1].item() == 0.0


def test_zero_terminal_snr_is_affine_in_the_root_of_alpha_bar():
    beta = linear_beta(n_steps=1000)
    old, new = alpha_bar(beta)[1:].sqrt(), alpha_bar(zero_terminal_snr(beta))[1:].sqrt()
    slope = (new[0] - new[500]) / (old[0] - old[500])
    assert_exact(new, new[0] + slope * (old - old[0]))


@pytest.mark.parametrize("schedule", [linear_beta, scaled_linear_beta, cosine_beta])
def test_dtype_is_the_one_asked_for(schedule):
    assert schedule(n_steps=4).dtype == torch.float64
    beta = schedule(n_steps=4, dtype=torch.float32)
    assert {beta.dtype, alpha_bar(beta).dtype, zero_terminal_snr(beta).dtype} == {torch.float32}


@pytest.mark.parametrize("schedule", [linear_beta, scaled_linear_beta, cosine_beta])
def test_schedules_refuse_to_have_no_step(schedule):
    with pytest.raises(ValueError, match=r"^n_steps is 0: n_steps >= 1\.$"):
        schedule(n_steps=0)


@pytest.mark.parametrize("schedule", [linear_beta, scaled_linear_beta])
def test_schedules_refuse_a_variance_outside_zero_and_one(schedule):
    with pytest.raises(ValueError, match=r"^start is 0\.0: 0 < start < 1\.$"):
        schedule(n_steps=3, start=0.0)
    with pytest.raises(ValueError, match=r"^end is 1\.0: 0 < end < 1\.$"):
        schedule(n_steps=3, end=1.0)


def test_cosine_beta_refuses_a_limit_of_one_and_a_negative_offset():
    with pytest.raises(ValueError, match=r"^beta_max is 1\.0: 0 < beta_max < 1\.$"):
        cosine_beta(n_steps=3, beta_max=1.0)
    with pytest.raises(ValueError, match=r"^s is -0\.1: s >= 0\.$"):
        cosine_beta(n_steps=3, s=-0.1)


def test_zero_terminal_snr_refuses_a_single_step():
    message = r"^beta has 1 steps: the first and the last must differ, T >= 2\.$"
    with pytest.raises(ValueError, match=message):
        zero_terminal_snr(torch.tensor([0.5]))


def test_min_snr_weight_caps_the_weight_of_the_data():
    ratios = torch.tensor([0.01, 1.0, 4.9, 5.1, 1000.0], dtype=torch.float64)
    assert_exact(
        min_snr_weight(ratios) * ratios,
        torch.tensor([0.01, 1.0, 4.9, 5.0, 5.0], dtype=torch.float64),
    )
    assert_exact(min_snr_weight(ratios, gamma=1.0) * ratios, ratios.clamp(max=1.0))
    with pytest.raises(ValueError, match=r"gamma is 0\.0"):
        min_snr_weight(ratios, gamma=0.0)
