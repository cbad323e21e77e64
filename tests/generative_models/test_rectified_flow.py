import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_step
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.ode_solver import euler, heun, rk4
from zhizhi.generative_models.rectified_flow import (
    interpolate,
    rectified_flow_loss,
    reflow_pairs,
    straightness,
    trajectory,
    transport_cost,
)

TWO = GaussianMixture(
    torch.tensor([0.4, 0.6], dtype=torch.float64),
    torch.tensor([[-1.5], [1.0]], dtype=torch.float64),
    torch.tensor([0.25, 0.4], dtype=torch.float64),
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(n_steps):
    return torch.linspace(1, 0, n_steps + 1, dtype=torch.float64)


def quantiles(n):
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def v_two(x, t):
    return gaussian_mixture.velocity(TWO, x, a=1 - t, b=t, d_a=-1.0, d_b=1.0)


def test_the_line_begins_at_the_data_and_ends_at_the_noise():
    x_0, noise, t = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0.0, 0.25, 1.0])
    x_t = interpolate(x_0, noise, t=t)
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[2], noise[2])
    for row in range(3):
        for i, j in itertools.product(range(2), range(4)):
            by_hand = (1 - t[row]) * x_0[row, i, j] + t[row] * noise[row, i, j]
            assert_exact(x_t[row, i, j], by_hand)
    assert_exact(interpolate(x_0, noise, t=0.25)[1], x_t[1])  # one time for all rows
    later = interpolate(x_0, noise, t=torch.tensor(0.75))
    assert_exact((later - interpolate(x_0, noise, t=0.25)) / 0.5, noise - x_0)  # the speed


def test_the_loss_of_rows_is_a_slow_loop():
    x_0, noise, t = normal(5, 2, 3), normal(5, 2, 3, seed=1), torch.rand(5, dtype=torch.float64)

    def velocity(x, t):
        return x.sin() + t[:, None, None]

    losses = rectified_flow_loss(velocity, x_0, noise, t=t)
    for row in range(5):
        total = 0.0
        for i, j in itertools.product(range(2), range(3)):
            x = (1 - t[row]) * x_0[row, i, j] + t[row] * noise[row, i, j]
            total += (x.sin() + t[row] - (noise[row, i, j] - x_0[row, i, j])) ** 2
        assert_exact(losses[row], total)


def test_the_least_loss_is_at_the_conditional_mean():
    """(eq:rectified-flow-loss): what is off is paid in full, on top of a floor."""
    g, n = torch.Generator().manual_seed(2), 100_000
    x_0 = gaussian_mixture.sample(TWO, n, generator=g)
    noise = torch.randn(n, 1, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64)

    def off(x, t):
        return 0.3 * (3 * x + t[:, None]).sin()

    best = rectified_flow_loss(v_two, x_0, noise, t=t)
    other = rectified_flow_loss(lambda x, t: v_two(x, t) + off(x, t), x_0, noise, t=t)
    paid = off(interpolate(x_0, noise, t=t), t).square().sum(dim=1)
    rest = other - best - paid  # mean zero: the cross term
    assert abs(rest.mean()) < 4 * rest.std() / n**0.5
    assert other.mean() > best.mean() + 0.02


def test_at_time_one_the_loss_is_distillation_of_one_step():
    x_0, noise = normal(6, 3), normal(6, 3, seed=1)
    losses = rectified_flow_loss(lambda x, t: x.cos(), x_0, noise, t=torch.ones(6).double())
    one_step = trajectory(lambda x, t: x.cos(), noise, times=falling(1))[-1]
    assert_exact(losses, (one_step - x_0).square().sum(dim=1))


def test_the_flow_keeps_the_marginals():
    """(eq:rectified-flow-marginal), in one dimension by the distribution function at each time."""
    z, times = quantiles(200), falling(200)
    ways = trajectory(v_two, z, times=times, solver=rk4)
    for i in (0, 50, 125, 200):
        t = times[i]
        std = ((1 - t) ** 2 * TWO.std**2 + t**2).sqrt()
        below = torch.special.ndtr((ways[i] - (1 - t) * TWO.means[:, 0]) / std)
        torch.testing.assert_close(
            (TWO.weights * below).sum(dim=1), torch.special.ndtr(z[:, 0]), rtol=0, atol=1e-6
        )


def test_the_flow_runs_both_ways():
    z = normal(20, 1)
    down = trajectory(v_two, z, times=falling(100), solver=rk4)[-1]
    up = trajectory(v_two, down, times=falling(100).flip(0), solver=rk4)[-1]
    assert (up - z).abs().max() < 1e-5


def test_an_euler_step_is_a_step_of_ddim():
    """(eq:rectified-flow-euler): the two differ by the length of (1 - t, t) only."""
    t, s = torch.tensor([0.8, 0.3], dtype=torch.float64)
    x = normal(30, 1)
    length_t, length_s = ((1 - t) ** 2 + t**2).sqrt(), ((1 - s) ** 2 + s**2).sqrt()
    noise_hat = gaussian_mixture.predict_noise(TWO, x, a=1 - t, b=t)
    levels = {
        "alpha_bar_t": ((1 - t) / length_t) ** 2,
        "alpha_bar_s": ((1 - s) / length_s) ** 2,
    }
    ours = trajectory(v_two, x, times=torch.stack([t, s]))[-1]
    assert_exact(ours, ddim_step(x / length_t, noise_hat, **levels) * length_s)


def test_one_euler_step_of_the_first_flow_is_the_mean_of_the_data():
    """(eq:rectified-flow-one-step), whatever the data are."""
    end = trajectory(v_two, normal(50, 1), times=falling(1))[-1]
    mean = (TWO.weights * TWO.means[:, 0]).sum()
    assert_exact(end, mean.expand(50, 1))


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 2.0])
def test_gaussian_data_bend_by_two_minus_half_pi(std):
    """(eq:rectified-flow-gaussian-straightness), by Simpson's rule and by the paths."""
    one = torch.ones(1, dtype=torch.float64)
    ball = GaussianMixture(one, 3 * one[:, None], std * one)

    def v(x, t):
        return gaussian_mixture.velocity(ball, x, a=1 - t, b=t, d_a=-1.0, d_b=1.0)

    times = falling(250)
    path = trajectory(v, one[:, None], times=times, solver=rk4)  # z = 1
    wanted = std * (2 - math.pi / 2)
    assert straightness(path, times=times).item() == pytest.approx(wanted, abs=2e-5)
    assert path[-1].item() == pytest.approx(3 + std, abs=1e-6)

    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2).sqrt()
    weights = torch.ones(2001, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    simpson = (weights * (slope - (1 - std)) ** 2).sum().item() / 6000
    assert simpson == pytest.approx(wanted, abs=1e-8)


def test_straightness_of_known_paths():
    times = torch.tensor([0.0, 0.1, 0.7, 1.0], dtype=torch.float64)
    start, speed = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    line = torch.stack([start + t * speed for t in times])
    assert_exact(straightness(line, times=times), torch.zeros(4))
    assert_exact(straightness(line.flip(0), times=times.flip(0)), torch.zeros(4))
    fine = torch.linspace(0, 1, 1001, dtype=torch.float64)
    parabola = (fine**2)[:, None, None]  # speed 2t against 1: the integral of (2t - 1)^2 is 1/3
    assert straightness(parabola, times=fine).item() == pytest.approx(1 / 3, abs=1e-6)
    same_line = (fine[:, None, None]) ** 3  # a straight line at an uneven speed counts, too
    assert straightness(same_line, times=fine).item() > 0.5


def test_a_straight_flow_is_exact_in_one_step():
    Q = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def turning(x, t):
        between = (1 - t)[:, None, None] * Q + t[:, None, None] * eye
        return torch.linalg.solve(between, x[..., None])[..., 0] @ (eye - Q).T

    noise = normal(50, 2)
    x_0 = noise @ Q.T
    t = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_exact(rectified_flow_loss(turning, x_0, noise, t=t), torch.zeros(50))
    for n in (1, 7):
        assert_exact(trajectory(turning, noise, times=falling(n))[-1], x_0)
    pairs = reflow_pairs(turning, noise, times=falling(3))
    assert_exact(pairs[0], x_0)  # reflow leaves it alone
    # and yet it is not the cheapest: x_0 has the law of the noise
    assert transport_cost(normal(100_000, 2) @ Q.T, normal(100_000, 2)).mean() > 3.9


def test_what_reflow_saves_is_the_floor_of_the_loss_and_the_bend():
    """(eq:rectified-flow-budget) and (eq:rectified-flow-cost)."""
    g, n = torch.Generator().manual_seed(4), 200_000
    x_0 = gaussian_mixture.sample(TWO, n, generator=g)
    noise = torch.randn(n, 1, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64)
    times, z = falling(200), quantiles(4000)
    ways = trajectory(v_two, z, times=times, solver=rk4)
    for p in (1.0, 1.5, 2.0, 4.0):
        after = transport_cost(ways[-1], z, p=p).mean()
        assert after < transport_cost(x_0, noise, p=p).mean()
    rows = transport_cost(x_0, noise) - rectified_flow_loss(v_two, x_0, noise, t=t)
    rest = transport_cost(ways[-1], z).mean() + straightness(ways, times=times).mean()
    assert abs(rows.mean() - rest) < 4 * rows.std() / n**0.5 + 2e-3  # 2e-3: tails of the quantiles


def test_pairs_in_one_dimension_are_sorted_and_their_lines_never_cross():
    z_0, z_1 = reflow_pairs(v_two, normal(300, 1), times=falling(100), solver=heun)
    order = z_1[:, 0].argsort()
    for t in (0.0, 0.3, 0.6, 1.0):
        assert (interpolate(z_0, z_1, t=t)[order, 0].diff() > 0).all()
    shuffled = z_0[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert transport_cost(shuffled, z_1).mean() > 3 * transport_cost(z_0, z_1).mean()


def test_pairs_come_without_gradient_and_solvers_differ():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    noise = normal(4, 1)
    z_0, z_1 = reflow_pairs(lambda x, t: weight * x, noise, times=falling(4))
    assert not z_0.requires_grad
    assert z_1 is noise
    assert_exact(z_0, noise * 0.75**4)
    by_rk4 = reflow_pairs(lambda x, t: weight * x, noise, times=falling(40), solver=rk4)[0]
    assert (by_rk4 - noise * math.exp(-1)).abs().max() < 1e-6


def test_a_velocity_sees_one_time_a_row():
    seen = []

    def velocity(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    trajectory(velocity, torch.zeros(3, 2, 2), times=falling(2), solver=euler)
    assert [t.tolist() for t in seen] == [[1.0] * 3, [0.5] * 3]
    assert all(t.dtype == torch.float32 for t in seen)  # the dtype of x, not of the grid


def test_costs_of_known_pairs():
    x, y = torch.zeros(2, 1, 2), torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert transport_cost(x, y).tolist() == [25.0, 4.0]
    assert transport_cost(x, y, p=1.0).tolist() == [5.0, 2.0]


def test_refusals():
    x, grid = torch.zeros(2, 1), falling(2)
    with pytest.raises(ValueError, match=r"t runs from 0 to 999: 0 <= t <= 1\."):
        interpolate(x, x, t=torch.tensor([0.0, 999.0]))
    with pytest.raises(ValueError, match=r"t runs from -0\.5 to 1: 0 <= t <= 1\."):
        rectified_flow_loss(lambda x, t: x, x, x, t=torch.tensor([-0.5, 1.0]))
    with pytest.raises(ValueError, match=r"times go from 0 to 1: they fall from 1 to 0\."):
        reflow_pairs(lambda x, t: x, x, times=grid.flip(0))
    with pytest.raises(ValueError, match=r"times go from 1 to 0: they fall from 1 to 0\."):
        reflow_pairs(lambda x, t: x, x, times=torch.tensor([1.0, 0.2, 0.4, 0.0]))
    with pytest.raises(ValueError, match=r"times go from 1 to 0\.001: they fall from 1 to 0\."):
        reflow_pairs(lambda x, t: x, x, times=torch.tensor([1.0, 0.5, 0.001]))
    with pytest.raises(ValueError, match="all falling or all rising"):
        straightness(torch.zeros(3, 1, 1), times=torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match=r"p is 0\.5: the cost is convex for p >= 1\."):
        transport_cost(x, x, p=0.5)
