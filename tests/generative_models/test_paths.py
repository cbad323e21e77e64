import itertools

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models.noise_schedule import alpha_bar, linear_beta
from zhizhi.generative_models.paths import (
    linear_sde,
    log_snr,
    straight_path,
    sub_vp_path,
    ve_path,
    vp_path,
)
from zhizhi.generative_models.prediction import Path

PATHS = {"vp": vp_path, "sub-vp": sub_vp_path, "ve": ve_path, "straight": straight_path}
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives_are_those_of_autograd(path):
    t = TIMES.clone().requires_grad_()
    a, b, d_a, d_b = path(t)
    for value, rate in ((a, d_a), (b, d_b)):
        total = (value + 0 * t).sum()  # a of the exploding path does not depend on t
        (grad,) = torch.autograd.grad(total, t, retain_graph=True)
        assert_exact(rate.detach(), grad)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_sde_carries_mean_and_variance_along_the_path(path):
    """m' = f m and V' = 2 f V + g^2 by classical Runge-Kutta, from t = 0.05 to 0.95."""

    def rate(state, t):
        f, g_squared = linear_sde(path(t))
        return torch.stack([f * state[0], 2 * f * state[1] + g_squared])

    grid = torch.linspace(0.05, 0.95, 2001, dtype=torch.float64)
    start = path(grid[0])
    state = torch.stack([start.a, start.b.square()])
    for t, after in itertools.pairwise(grid):
        h = after - t
        k_1 = rate(state, t)
        k_2 = rate(state + h / 2 * k_1, t + h / 2)
        k_3 = rate(state + h / 2 * k_2, t + h / 2)
        state = state + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + rate(state + h * k_3, after))
    end = path(grid[-1])
    torch.testing.assert_close(state, torch.stack([end.a, end.b.square()]), rtol=1e-8, atol=1e-10)


def test_the_named_rates_of_song():
    beta = 0.1 + 19.9 * TIMES
    f, g_squared = linear_sde(vp_path(TIMES))
    assert_exact(f, -beta / 2)
    assert_exact(g_squared, beta)
    f, g_squared = linear_sde(sub_vp_path(TIMES))
    integral = 0.1 * TIMES + 19.9 / 2 * TIMES**2
    assert_exact(f, -beta / 2)
    assert_exact(g_squared, beta * (1 - (-2 * integral).exp()))
    f, g_squared = linear_sde(ve_path(TIMES))
    sigma = 0.01 * 5000.0**TIMES
    assert_exact(f, 0 * TIMES)
    assert_exact(g_squared, 2 * sigma**2 * torch.tensor(5000.0).double().log())


def test_vp_preserves_unit_variance_and_sub_vp_stays_below():
    vp, sub = vp_path(TIMES), sub_vp_path(TIMES)
    assert_exact(vp.a**2 + vp.b**2, torch.ones(7))
    assert (sub.a**2 + sub.b**2 < 1).all()
    assert_exact(sub.b, vp.b**2)


def test_the_chain_of_ddpm_tends_to_the_vp_path():
    """The product of 1 - beta(i / N) / N; its gap to the integral falls like 1 / N."""
    end = vp_path(torch.tensor(1.0, dtype=torch.float64)).a ** 2
    gaps = []
    for n in (1000, 10_000):
        beta = linear_beta(n_steps=n, start=0.1 / n, end=20 / n)
        gaps.append(abs(alpha_bar(beta)[-1] / end - 1).item())
    assert gaps[0] < 0.1
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


def test_ends():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert vp_path(zero)[:2] == (1, 0)
    assert ve_path(zero).b.item() == pytest.approx(0.01)
    assert ve_path(one).b.item() == pytest.approx(50)
    assert straight_path(one)[:2] == (0, 1)


def test_float32_times_keep_their_type():
    for path in PATHS.values():
        assert all(c.dtype == torch.float32 for c in path(TIMES.float()))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_times_outside_are_refused(path, t):
    with pytest.raises(ValueError, match=r"times run from .*: 0 <= t <= 1"):
        path(torch.tensor([0.5, t]))


def test_refusals():
    t = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"beta runs from 0\.0 to 20\.0: both are positive"):
        vp_path(t, beta_min=0.0)
    with pytest.raises(ValueError, match=r"sigma runs from 2\.0 to 1\.0"):
        ve_path(t, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="needs d_a and d_b"):
        linear_sde(Path(t, t))
    with pytest.raises(ValueError, match=r"smallest g\^2 is -.*must not grow"):
        linear_sde(Path(t, t, torch.tensor(1.0), torch.tensor(-1.0)))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_log_snr_falls_and_its_slope_is_the_noise_of_the_sde(path):
    t = TIMES.clone().requires_grad_()
    at = path(t)
    slope = torch.autograd.grad(log_snr(at).sum(), t)[0]
    assert (slope < 0).all()
    g_squared = linear_sde(path(TIMES))[1]
    assert_exact(g_squared, -(at.b.detach() ** 2) * slope)
    assert_exact(log_snr(at).detach(), (at.a**2 / at.b**2).log().detach())
