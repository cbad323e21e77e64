import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from tests.closeness import assert_exact

from zhizhi.reinforcement_learning.stochastic_approximation import (
    dvoretzky_path,
    polyak_average,
    robbins_monro,
    running_mean,
    step_sizes,
)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Step sizes


def test_step_sizes_are_the_formula_in_python():
    expected = [0.3 * (k + 5) ** -0.7 for k in range(1, 6)]
    assert_exact(step_sizes(5, scale=0.3, power=0.7, offset=5.0), expected)
    assert step_sizes(0).shape == (0,)


def test_only_powers_above_a_half_have_a_finite_sum_of_squares():
    n = 100_000
    assert step_sizes(n).square().sum().item() == pytest.approx(math.pi**2 / 6, abs=2 / n)
    for power, grows in ((1.0, False), (0.7, False), (0.5, True), (0.0, True)):
        squares = step_sizes(n, power=power).square()
        tail = squares[n // 2 :].sum() / squares[: n // 2].sum()
        assert (tail > 0.05) == grows


# Means


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(-1e3, 1e3))
def test_with_one_over_k_every_estimate_is_the_average_so_far(values, start):
    x = torch.tensor(values, dtype=torch.float64)
    path = running_mean(x, step_sizes(len(x)), start=torch.tensor(start, dtype=torch.float64))
    assert path[0] == start
    assert_exact(path[1:], np.cumsum(values) / np.arange(1, len(values) + 1))


def test_its_variance_is_that_of_the_average():
    n, runs = 400, 4000
    end = running_mean(normal(n, runs), step_sizes(n))[-1]
    # The variance of a sample variance of normal draws is 2 / (runs - 1) of its square.
    assert abs(end.var().item() * n - 1) < 4 * (2 / (runs - 1)) ** 0.5
    assert abs(end.mean().item()) < 4 / (n * runs) ** 0.5


def test_steps_that_sum_to_a_finite_number_stay_halfway():
    n = 4000
    path = running_mean(torch.zeros(n, 1).double(), step_sizes(n, power=2.0, offset=1.0),
                        start=torch.tensor([-12.0]).double())  # fmt: skip
    assert_exact(path[-1], [-12 * (n + 2) / (2 * (n + 1))])  # the product telescopes to one half


def test_a_constant_step_keeps_a_variance_of_alpha_over_two_minus_alpha():
    n, runs, alpha = 300, 4000, 0.1
    end = running_mean(normal(n, runs), step_sizes(n, scale=alpha, power=0.0))[-1]
    expected = alpha / (2 - alpha) * (1 - (1 - alpha) ** (2 * n))
    assert abs(end.var().item() / expected - 1) < 4 * (2 / (runs - 1)) ** 0.5


# Roots


def test_without_noise_the_error_of_tanh_falls_like_one_over_k():
    path = robbins_monro(lambda w: torch.tanh(w - 1), torch.tensor(3.0).double(), step_sizes(1000))
    assert [round(w, 3) for w in path[:4].tolist()] == [3.0, 2.036, 1.648, 1.458]
    assert (path[100] - 1).item() == pytest.approx(0.0144, abs=1e-4)
    assert ((path[1000] - 1) / (path[100] - 1)).item() == pytest.approx(0.1, rel=0.01)


def noisy_cubic(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda w: w**3 - 5 + torch.randn(w.shape, generator=generator, dtype=torch.float64)


def test_the_books_cubic_diverges_as_printed_and_converges_with_smaller_first_steps():
    """Zhao's Fig. 6.3: the slope of w^3 is not bounded, so the theorem says nothing."""
    start = torch.zeros(20).double()
    as_printed = robbins_monro(noisy_cubic(0), start, step_sizes(50))[-1]
    assert not as_printed.isfinite().any()
    later = robbins_monro(noisy_cubic(0), start, step_sizes(2000, offset=5.0))[-1]
    assert (later - 5 ** (1 / 3)).abs().max() < 0.05
    far = robbins_monro(noisy_cubic(0), start + 5, step_sizes(50, offset=5.0))[-1]
    assert not far.isfinite().any()


def test_noise_that_is_not_normal_is_no_obstacle():
    generator = torch.Generator().manual_seed(0)

    def coin(w):
        return w - 2 + torch.randint(0, 2, w.shape, generator=generator).double() * 2 - 1

    end = robbins_monro(coin, torch.zeros(400).double(), step_sizes(2000))[-1]
    assert (end - 2).square().mean().sqrt() < 2 / 2000**0.5


def test_the_walk_with_one_over_k_on_the_gradient_of_squares_is_torchs_sgd():
    x = normal(30)
    w = torch.nn.Parameter(torch.tensor(3.0).double())
    optimizer = torch.optim.SGD([w], lr=1.0)
    theirs = [w.item()]
    for k, sample in enumerate(x, start=1):
        optimizer.param_groups[0]["lr"] = 1 / k
        optimizer.zero_grad()
        (0.5 * (w - sample) ** 2).backward()
        optimizer.step()
        theirs.append(w.item())
    ours = running_mean(x, step_sizes(30), start=torch.tensor(3.0).double())
    assert_exact(ours, theirs)


# The error


def test_the_path_of_an_error_equals_the_loop():
    alpha, beta, noise = (normal(9, seed=i).abs() for i in range(3))
    delta, expected = 2.0, [2.0]
    for a, b, e in zip(alpha.tolist(), beta.tolist(), noise.tolist(), strict=True):
        delta = (1 - a) * delta + b * e
        expected.append(delta)
    assert_exact(dvoretzky_path(alpha, beta, noise, start=2.0), expected)


@pytest.mark.parametrize("slope", [0.25, 1.0, 2.0])
def test_one_over_k_is_fast_only_if_the_slope_times_the_scale_exceeds_a_half(slope):
    n, runs = 4000, 2000
    a = step_sizes(n, scale=slope)
    error = dvoretzky_path(a.clamp(max=1), a, normal(n, runs)).square().mean(dim=1).sqrt()
    rate = math.log(error[n] / error[n // 20]) / math.log(20)
    assert rate == pytest.approx(-min(slope, 0.5), abs=0.06)
    if slope > 0.5:
        predicted = slope / ((2 * slope - 1) * n) ** 0.5
        assert error[n].item() == pytest.approx(predicted, rel=0.08)


def test_noise_whose_squares_do_not_sum_leaves_a_floor():
    n, runs = 5000, 500
    k = torch.arange(1, n + 1).double()
    settled = dvoretzky_path(1 / k, 1 / k, normal(n, runs))[-1].square().mean().sqrt()
    kept = dvoretzky_path(1 / k, k**-0.5, normal(n, runs))[-1].square().mean().sqrt()
    assert settled < 0.03
    # sum_k (k / n)^2 / k is one half
    assert kept.item() == pytest.approx(0.5**0.5, rel=0.15)


# Averages


def test_averaging_a_walk_with_large_steps_beats_its_end_on_a_real_regression():
    X, y = load_diabetes(return_X_y=True)
    X, y = torch.from_numpy(X[:, :4] / X[:, :4].std(0)), torch.from_numpy((y - y.mean()) / y.std())
    solution = torch.from_numpy(np.linalg.lstsq(X.numpy(), y.numpy(), rcond=None)[0])
    generator = torch.Generator().manual_seed(0)

    def one_row(w):
        i = torch.randint(len(X), (), generator=generator)
        return X[i] * (X[i] @ w - y[i])

    path = robbins_monro(one_row, torch.zeros(4).double(), step_sizes(4000, scale=0.05, power=0.0))
    last = (path[-1000:] - solution).norm(dim=1).mean()
    assert (polyak_average(path, burn_in=1000) - solution).norm() < last / 3


# Refusals


@pytest.mark.parametrize(("n", "offset"), [(-1, 0.0), (3, -1.0)])
def test_step_sizes_that_make_no_sense_are_refused(n, offset):
    message = rf"^n is {n} and offset {offset}: n >= 0 and offset > -1\.$"
    with pytest.raises(ValueError, match=message):
        step_sizes(n, offset=offset)


def test_other_counts_are_refused():
    with pytest.raises(ValueError, match=r"^3 samples and 2 steps: they must be as many\.$"):
        running_mean(torch.zeros(3), step_sizes(2))
    message = r"^2 alphas, 2 betas, 3 noises: they must be as many\.$"
    with pytest.raises(ValueError, match=message):
        dvoretzky_path(torch.zeros(2), torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("burn_in", [-1, 3])
def test_an_average_of_nothing_is_refused(burn_in):
    with pytest.raises(ValueError, match=rf"^burn_in is {burn_in} of 3: 0 <= burn_in < 3\.$"):
        polyak_average(torch.zeros(3), burn_in=burn_in)
