import itertools
import math
import re

import pytest
import torch
from scipy import integrate
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.paths import straight_path, vp_path
from zhizhi.generative_models.prediction import Path, convert
from zhizhi.generative_models.sd3 import (
    MODE_SCALE_MAX,
    cosmap_density,
    cosmap_timesteps,
    flow_weight,
    logit_normal_density,
    logit_normal_timesteps,
    mode_map,
    mode_timesteps,
    shift_timesteps,
)

INSIDE = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
N = 200_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_snr_speed(path_of, t):
    t = t.clone().requires_grad_()
    path = path_of(t)
    (speed,) = torch.autograd.grad((path.a / path.b).square().log().sum(), t)
    return speed


def assert_quantiles(sample, quantile_of):
    """Four standard errors of an empirical distribution function, at nine levels."""
    levels = torch.arange(0.1, 0.95, 0.1, dtype=torch.float64)
    below = torch.stack([(sample <= quantile_of(p)).double().mean() for p in levels])
    assert ((below - levels).abs() < 4 * (levels * (1 - levels) / len(sample)).sqrt()).all()


@pytest.mark.parametrize("path_of", [straight_path, vp_path])
def test_the_weight_turns_an_error_of_noise_into_one_of_velocity(path_of):
    """(eq:sd3-flow-loss), with lambda differentiated by autograd."""
    path, speed = path_of(INSIDE), log_snr_speed(path_of, INSIDE)
    path = Path(*(c.double() for c in path))
    x_t, noise, noise_hat = torch.randn(3, 99, generator=generator(), dtype=torch.float64)
    u, u_hat = (
        convert(n, x_t, path, source="noise", target="velocity") for n in (noise, noise_hat)
    )
    weight = flow_weight(path)
    assert_exact(weight, -speed * path.b**2 / 2)
    ratio = (u_hat - u).square() / (-weight * speed / 2 * (noise_hat - noise).square())
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-8, atol=0)


def test_on_the_straight_path_the_weight_is_the_noise_to_signal_ratio():
    assert_exact(flow_weight(straight_path(INSIDE)), INSIDE / (1 - INSIDE))


def test_the_weight_of_v_prediction_on_the_cosine_path_is_the_same_function_of_the_snr():
    """(eq:sd3-same-weight): w as a function of lambda is what is left of a loss."""
    angle = math.pi / 2 * INSIDE
    a, b = angle.cos(), angle.sin()

    def of(t):
        return Path((math.pi / 2 * t).cos(), (math.pi / 2 * t).sin())

    w = -2 / (log_snr_speed(of, INSIDE) * a**2)  # E|v_hat - v|^2 = E|eps_hat - eps|^2 / a^2
    same_snr = b / (a + b)  # where the straight path has this lambda
    ratio = w / flow_weight(straight_path(same_snr))
    assert_exact(ratio, torch.full_like(ratio, 2 / math.pi))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-0.5, 1.4)])
def test_logit_normal_times_have_normal_logits(mean, std):
    times = logit_normal_timesteps(N, mean=mean, std=std, generator=generator())
    assert_quantiles(times.double(), lambda p: torch.sigmoid(mean + std * torch.special.ndtri(p)))
    area, _ = integrate.quad(
        lambda t: logit_normal_density(
            torch.tensor(t, dtype=torch.float64), mean=mean, std=std
        ).item(),
        0, 1,
    )  # fmt: skip
    assert area == pytest.approx(1, abs=1e-6)


def test_the_logit_normal_density_is_a_change_of_variables():
    t = INSIDE.clone().requires_grad_()
    cdf = torch.special.ndtr((t.logit() - 0.3) / 0.8)
    (slope,) = torch.autograd.grad(cdf.sum(), t)
    assert_exact(logit_normal_density(INSIDE, mean=0.3, std=0.8), slope)
    middle = torch.tensor(0.5, dtype=torch.float64)
    assert_exact(logit_normal_density(middle), 4 / math.sqrt(2 * math.pi))


def test_the_logit_normal_vanishes_at_both_ends_and_the_others_do_not():
    ends = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)
    assert (logit_normal_density(ends) < 1e-10).all()
    assert (cosmap_density(ends) > 0.6).all()
    assert_exact(mode_map(torch.tensor([0.0, 1.0]).double(), scale=1.29), [1.0, 0.0])


def test_a_density_of_times_is_a_weight():
    """E_{t ~ pi} l(t) = E_{t ~ U}[pi(t) l(t)], for a loss that is not a constant."""
    times = logit_normal_timesteps(N, mean=-0.4, std=0.8, generator=generator(1)).double()
    drawn = times.square() + times.cos()
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    weighted = logit_normal_density(grid, mean=-0.4, std=0.8) * (grid.square() + grid.cos())
    assert abs(drawn.mean() - weighted.mean()) < 4 * drawn.std() / math.sqrt(N)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, MODE_SCALE_MAX])
def test_the_mode_map_falls_from_one_to_zero_within_its_bounds(scale):
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    times = mode_map(u, scale=scale)
    assert (times.diff() <= 0).all()
    assert_exact(times[[0, 1000, -1]], [1.0, 0.5, 0.0])


@pytest.mark.parametrize("scale", [-1.01, 1.76])
def test_the_mode_map_refuses_to_turn_back(scale):
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    turned = 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)
    assert (turned.diff() > 0).any()
    message = f"scale is {scale}: -1 <= scale <= 2 / (pi - 2) = 1.7519."
    with pytest.raises(ValueError, match=re.escape(message)):
        mode_map(u, scale=scale)
    with pytest.raises(ValueError, match=re.escape(message)):
        mode_timesteps(3, scale=scale)


def test_mode_times_follow_the_map():
    assert_quantiles(
        mode_timesteps(N, scale=1.29, generator=generator(2)).double(),
        lambda p: mode_map(1 - p, scale=1.29),
    )
    u = torch.rand(5, generator=generator(3))
    drawn = mode_timesteps(5, scale=0.0, generator=generator(3))
    torch.testing.assert_close(drawn, 1 - u)  # scale 0 is uniform


def test_cosmap_times_have_the_snr_of_the_cosine_schedule():
    times = cosmap_timesteps(N, generator=generator(4)).double()
    log_snr = 2 * ((1 - times) / times).log()

    def cosine(p):  # lambda falls in u, so its p-quantile is at u = 1 - p
        angle = math.pi / 2 * (1 - p)
        return 2 * (angle.cos() / angle.sin()).log()

    assert_quantiles(log_snr, cosine)
    t = INSIDE.clone().requires_grad_()
    cdf = 2 / math.pi * (t / (1 - t)).atan()  # u as a function of t
    (slope,) = torch.autograd.grad(cdf.sum(), t)
    assert_exact(cosmap_density(INSIDE), slope)


def test_a_shift_adds_the_logarithm_of_alpha_to_the_logit():
    for alpha in (0.5, 1.0, 3.0, 6.0):
        assert_exact(shift_timesteps(INSIDE, alpha=alpha).logit(), INSIDE.logit() + math.log(alpha))
    assert_exact(shift_timesteps(shift_timesteps(INSIDE, alpha=3.0), alpha=1 / 3), INSIDE)
    twice = shift_timesteps(shift_timesteps(INSIDE, alpha=3.0), alpha=3.0)
    assert_exact(twice, shift_timesteps(INSIDE, alpha=9.0))
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_timesteps(ends, alpha=3.0), ends)


def test_a_higher_resolution_moves_towards_the_noise():
    assert (shift_timesteps(INSIDE, alpha=3.0) > INSIDE).all()


def test_a_shifted_logit_normal_is_a_logit_normal():
    """(eq:sd3-shift-density): change of variables, with the derivative by autograd."""
    t = INSIDE.clone().requires_grad_()
    moved = shift_timesteps(t, alpha=3.0)
    (speed,) = torch.autograd.grad(moved.sum(), t)
    pushed = logit_normal_density(INSIDE, mean=0.2, std=0.9) / speed
    wanted = logit_normal_density(moved.detach(), mean=0.2 + math.log(3), std=0.9)
    assert_exact(pushed, wanted)


def test_the_mean_of_a_constant_image_is_as_uncertain_after_the_shift():
    """(eq:sd3-uncertainty), by simulation: n pixels at t, 4 n pixels at the shifted time."""
    t, value, spread = torch.tensor(0.4), 0.7, []
    for pixels, time in ((64, t), (256, shift_timesteps(t, alpha=2.0))):
        noise = torch.randn(20_000, pixels, generator=generator(5))
        z = (1 - time) * value + time * noise
        spread.append((z.mean(dim=1) / (1 - time)).std().item())
    assert spread[0] == pytest.approx(0.4 / 0.6 / 8, rel=4 / math.sqrt(2 * 20_000))
    assert spread[1] == pytest.approx(spread[0], rel=8 / math.sqrt(2 * 20_000))


def test_float32_times_are_shifted_in_float32():
    t = torch.linspace(0, 1, 11)
    moved = shift_timesteps(t, alpha=3.0)
    assert moved.dtype == torch.float32
    assert_float32(moved, shift_timesteps(t.double(), alpha=3.0))


def test_the_densities_of_the_paper_favour_the_middle_each_its_own_way():
    """1 / |f'| of the mode map in closed form, at the middle and at the ends."""
    half = torch.tensor(0.5).double()
    mode = 1 / (1 + 1.29 * (1 - math.pi / 2)), 1 / (1 + 1.29)
    u = torch.tensor([0.4999, 0.5001, 0.0, 0.0001]).double()
    slopes = mode_map(u, scale=1.29).diff()[::2].abs()
    assert (2e-4 / slopes[0]).item() == pytest.approx(mode[0], rel=1e-4)
    assert (1e-4 / slopes[1]).item() == pytest.approx(mode[1], rel=1e-3)
    heights = [mode[0], logit_normal_density(half), cosmap_density(half), 1.0]
    assert all(a > b for a, b in itertools.pairwise(heights))


def test_refusals():
    for draw in (
        lambda: logit_normal_timesteps(3, std=0.0),
        lambda: logit_normal_density(INSIDE, std=0.0),
    ):
        with pytest.raises(ValueError, match=re.escape("std is 0.0: std > 0.")):
            draw()
    with pytest.raises(ValueError, match=re.escape("alpha is -1.0: alpha > 0.")):
        shift_timesteps(INSIDE, alpha=-1.0)
