import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models.ode_solver import euler
from zhizhi.generative_models.sde import (
    affine_moments,
    brownian_increments,
    euler_maruyama,
    euler_maruyama_moments,
)

MU, SIGMA = 0.3, 0.6


def linspace(n, start=0.0, end=1.0):
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64)


def geometric(x, t):
    return SIGMA * x


def growing(x, t):
    return MU * x


def slopes(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_increments_have_the_variance_of_their_step_and_no_memory():
    times = torch.tensor([0.0, 0.5, 0.6, 2.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    dw = brownian_increments(torch.zeros(200_000, dtype=torch.float64), times, generator=g)
    assert dw.shape == (3, 200_000)
    bound = 4 * (2 / 200_000) ** 0.5
    assert ((dw.var(dim=1) / times.diff() - 1).abs() < bound).all()
    off = torch.corrcoef(dw) - torch.eye(3, dtype=torch.float64)
    assert off.abs().max() < 4 / 200_000**0.5


def test_increments_take_the_dtype_of_x_and_a_grid_that_runs_backwards():
    dw = brownian_increments(torch.zeros(2, 3), linspace(4, 1.0, 0.0))
    assert dw.dtype == torch.float32
    assert dw.shape == (4, 2, 3)
    assert dw.isfinite().all()


def test_a_step_is_drift_times_dt_and_diffusion_times_the_increment():
    """(eq:score-sde-euler-maruyama), in a loop of plain numbers; on the way back dt is negative."""
    for times in (linspace(5), linspace(5, 2.0, 1.0)):
        dw = brownian_increments(ones(3), times, generator=torch.Generator().manual_seed(1))
        ours = euler_maruyama(
            lambda x, t: t - x, lambda x, t: 1 + t * x, ones(3), times, increments=dw
        )
        for j in range(3):
            x = 1.0
            for i in range(5):
                t, h = times[i].item(), (times[i + 1] - times[i]).item()
                x = x + h * (t - x) + (1 + t * x) * dw[i, j].item()
                assert_exact(ours[i + 1, j], x)


def test_the_generator_draws_the_increments():
    args = (growing, geometric, ones(4), linspace(6))
    given = brownian_increments(ones(4), linspace(6), generator=torch.Generator().manual_seed(2))
    drawn = euler_maruyama(*args, generator=torch.Generator().manual_seed(2))
    assert torch.equal(drawn, euler_maruyama(*args, increments=given))


def test_without_noise_it_is_the_method_of_euler():
    def still(x, t):
        return torch.zeros_like(x)

    times = linspace(7, 1.0, 0.0)
    ours = euler_maruyama(growing, still, ones(2), times)
    assert_exact(ours, euler(growing, ones(2), times))


def test_the_path_converges_by_the_root_of_h_and_by_h_where_the_noise_is_additive():
    """One Brownian path on grids of different steps; the truth in closed form."""
    fine = 2**10
    dw = brownian_increments(ones(2000), linspace(fine), generator=torch.Generator().manual_seed(3))
    truth = (MU - SIGMA**2 / 2 + SIGMA * dw.sum(dim=0)).exp()  # of dx = mu x dt + sigma x dw
    strong, additive = [], []
    finest = None
    for n in (fine, 2**7, 2**6, 2**5, 2**4):
        coarse = dw.unflatten(0, (n, fine // n)).sum(dim=1)
        end = euler_maruyama(growing, geometric, ones(2000), linspace(n), increments=coarse)[-1]
        strong.append((end - truth).abs().mean().item())
        end = euler_maruyama(
            lambda x, t: -2 * x, lambda x, t: 1 + t, ones(2000), linspace(n), increments=coarse
        )[-1]
        finest = end if finest is None else finest
        additive.append((end - finest).abs().mean().item())
    assert all(-0.6 < slope < -0.4 for slope in slopes(strong[1:]))
    assert all(-1.2 < slope < -0.9 for slope in slopes(additive[1:]))


def test_the_diffusion_is_read_at_the_start_of_the_step():
    """Itô: E x = exp(mu t). Stratonovich would add sigma^2 / 2 to the rate."""
    end = euler_maruyama(
        growing, geometric, ones(100_000), linspace(50), generator=torch.Generator().manual_seed(4)
    )[-1]
    error = (end.mean() - math.exp(MU)) / (end.std() / 100_000**0.5)
    assert abs(error) < 4.5  # 4 s.e., and the bias of 50 steps
    assert end.mean() < math.exp(MU + SIGMA**2 / 2) - 0.1


def test_moments_are_those_of_the_samples():
    def pull(x, t):
        return (1 + t) * (2.0 - x)

    def shake(x, t):
        return (0.5 + t) * torch.ones_like(x)

    times = linspace(8)
    mean, variance = euler_maruyama_moments(pull, shake, ones(2), 0.3 * ones(2), times)
    g = torch.Generator().manual_seed(5)
    n = 200_000
    x = 1 + 0.3**0.5 * torch.randn(n, 2, generator=g, dtype=torch.float64)
    end = euler_maruyama(pull, shake, x, times, generator=g)
    for i in (1, 8):
        assert ((end[i].mean(dim=0) - mean[i]).abs() < 4 * (variance[i] / n).sqrt()).all()
        assert ((end[i].var(dim=0) / variance[i] - 1).abs() < 4 * (2 / n) ** 0.5).all()


def test_the_law_of_an_ornstein_uhlenbeck_process_converges_by_h():
    errors = []
    for n in (50, 100, 200, 400):
        mean, variance = euler_maruyama_moments(
            lambda x, t: -2 * x, lambda x, t: torch.ones_like(x), ones(1), 0 * ones(1), linspace(n)
        )
        exact = (math.exp(-2), (1 - math.exp(-4)) / 4)
        errors.append(abs(mean[-1].item() - exact[0]) + abs(variance[-1].item() - exact[1]))
    assert all(0.95 < slope < 1.05 for slope in slopes(errors))


def test_moments_of_an_affine_step_by_hand():
    mean, variance = affine_moments(
        lambda x: torch.tensor([2.0, -1.0]).double() * x + 3,
        torch.tensor([1.0, 5.0]).double(),
        torch.tensor([1.0, 4.0]).double(),
        noise_variance=torch.tensor(0.5).double(),
    )
    assert_exact(mean, [5.0, -2.0])
    assert_exact(variance, [4.5, 4.5])


def test_refusals():
    x = ones(2)
    with pytest.raises(ValueError, match=r"the grid has 1 times: at least 2\."):
        euler_maruyama(growing, geometric, x, linspace(0))
    with pytest.raises(ValueError, match=r"the grid has 1 times: at least 2\."):
        euler_maruyama_moments(growing, geometric, x, x, linspace(0))
    with pytest.raises(ValueError, match=r"there are 3 increments and 3 times: one a step, 2\."):
        euler_maruyama(growing, geometric, x, linspace(2), increments=ones(3, 2))
    with pytest.raises(ValueError, match=r"the step bends by 2: it must be affine in x\."):
        affine_moments(lambda x: x**2, x, x, noise_variance=x)
