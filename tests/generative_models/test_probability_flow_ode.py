import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.divergence import rademacher_like
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.ode_solver import euler, heun, rk4
from zhizhi.generative_models.paths import (
    linear_sde,
    straight_path,
    sub_vp_path,
    ve_path,
    vp_path,
)
from zhizhi.generative_models.prediction import Path
from zhizhi.generative_models.probability_flow_ode import (
    gaussian_flow,
    log_likelihood,
    probability_flow_velocity,
)

LINE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0], [0.0], [1.5]], dtype=torch.float64),
    torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64),
)
PLANE = GaussianMixture(
    torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
    torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.2]], dtype=torch.float64),
    torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64),
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(t):
    return torch.tensor(t, dtype=torch.float64)


def flow_of(mixture, path_of=vp_path):
    """The velocity field of a mixture along a path, as solvers take it."""

    def velocity(x, t):
        path = path_of(t)
        s = gaussian_mixture.score(mixture, x, a=path.a, b=path.b)
        return probability_flow_velocity(x, s, path)

    return velocity


def prior_of(mixture, path):
    return lambda x: gaussian_mixture.log_prob(mixture, x, a=path.a, b=path.b)


@pytest.mark.parametrize("path_of", [vp_path, sub_vp_path, ve_path, straight_path])
@pytest.mark.parametrize("t", [0.01, 0.5, 0.9])
def test_the_velocity_is_the_mean_of_the_velocities_of_the_path(path_of, t):
    path, x = path_of(at(t)), normal(7, 2)
    mean = gaussian_mixture.velocity(PLANE, x, a=path.a, b=path.b, d_a=path.d_a, d_b=path.d_b)
    assert_exact(flow_of(PLANE, path_of)(x, at(t)), mean)


def test_each_row_may_have_its_own_time():
    t, x = torch.tensor([0.2, 0.7], dtype=torch.float64), normal(2, 2)
    one_by_one = torch.cat(
        [flow_of(PLANE)(row[None], when) for row, when in zip(x, t, strict=True)]
    )
    path = vp_path(t)
    s = gaussian_mixture.score(PLANE, x, a=path.a, b=path.b)
    assert_exact(probability_flow_velocity(x, s, path), one_by_one)


@pytest.mark.parametrize("path_of", [vp_path, ve_path, straight_path])
def test_the_density_of_the_path_obeys_the_continuity_equation(path_of):
    """(eq:pfode-continuity): both sides by automatic differentiation."""
    x = normal(9, 2).requires_grad_()
    t = at(0.4).requires_grad_()
    path = path_of(t)
    p = gaussian_mixture.log_prob(PLANE, x, a=path.a, b=path.b).exp()
    change = torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in p])
    flux = p[:, None] * flow_of(PLANE, path_of)(x, t)
    outflow = sum(
        torch.autograd.grad(flux[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    assert_exact(change, -outflow)


@pytest.mark.parametrize("noise", [0.0, 0.6, 1.0, 2.0])
def test_every_amount_of_noise_keeps_the_marginals_of_a_gaussian(noise):
    """(eq:pfode-family): one variance for all, by the equations of mean and variance."""
    mean, variance, t = 0.7, 0.2, 0.5
    path = vp_path(at(t))
    f, g_squared = linear_sde(path)
    V = path.a**2 * variance + path.b**2
    h_squared = noise * g_squared
    # dx = (u - h^2 score / 2) dt + h dw-bar backwards; score = -(x - a mean) / V
    slope = f + 0.5 * (g_squared + h_squared) / V  # of the drift, by x - a mean
    assert_exact(2 * slope * V - h_squared, 2 * f * V + g_squared)  # dV/dt of the path
    x = path.a * mean
    drift = f * x  # the score is 0 at the mean
    assert_exact(drift, path.d_a * mean)


def test_gaussian_flow_is_the_solution_of_the_ode_both_ways():
    mean, std = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 2.0]).double()
    x, times = normal(5, 2), torch.linspace(1, 0.05, 150, dtype=torch.float64)

    def velocity(x, t):
        path = vp_path(t)
        score = -(x - path.a * mean) / ((path.a * std) ** 2 + path.b**2)
        return probability_flow_velocity(x, score, path)

    ends = {"mean": mean, "std": std, "start": vp_path(times[0]), "end": vp_path(times[-1])}
    exact = gaussian_flow(x, **ends)
    torch.testing.assert_close(rk4(velocity, x, times)[-1], exact, rtol=1e-6, atol=1e-6)
    back = gaussian_flow(exact, mean=mean, std=std, start=ends["end"], end=ends["start"])
    assert_exact(back, x)


def test_gaussian_flow_has_the_moments_of_both_ends():
    mean, std = torch.tensor([3.0], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    options = {"mean": mean, "std": std, "start": Path(0.0, 1.0), "end": Path(1.0, 0.0)}
    assert_exact(gaussian_flow(0 * one, **options), 3 * one)
    assert_exact(gaussian_flow(one, **options), 3.25 * one)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2), (rk4, 4)])
def test_the_error_on_a_gaussian_falls_with_the_order_of_the_solver(solve, order):
    one = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.full((1, 1), 0.5, dtype=torch.float64),
        torch.full((1,), 0.5, dtype=torch.float64),
    )
    x = normal(100, 1)
    exact = gaussian_flow(
        x, mean=one.means[0], std=one.std[:1], start=vp_path(at(1.0)), end=vp_path(at(0.01))
    )
    errors = [
        (solve(flow_of(one), x, torch.linspace(1, 0.01, n + 1, dtype=torch.float64))[-1] - exact)
        .abs()
        .mean()
        for n in (20, 40, 80)
    ]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.35 for slope in slopes)


def test_on_a_line_the_map_keeps_the_share_below_each_point():
    def cdf(x, path):
        spread = ((path.a * LINE.std) ** 2 + path.b**2).sqrt()
        return (LINE.weights * torch.special.ndtr((x - path.a * LINE.means[:, 0]) / spread)).sum(1)

    x = normal(50, 1)
    times = torch.linspace(1, 0.001, 150, dtype=torch.float64)
    end = rk4(flow_of(LINE), x, times)[-1]
    assert (cdf(end, vp_path(times[-1])) - cdf(x, vp_path(times[0]))).abs().max() < 1e-6
    assert (end.sort(dim=0).values == end[x[:, 0].argsort()]).all()


@pytest.mark.parametrize("path_of", [vp_path, sub_vp_path, straight_path])
def test_the_likelihood_of_a_mixture_is_its_density(path_of):
    begin, end = 0.01, 0.99
    x = gaussian_mixture.sample(PLANE, 20, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(begin, end, 100, dtype=torch.float64)
    with torch.no_grad():
        found = log_likelihood(
            flow_of(PLANE, path_of), x, times, log_prior=prior_of(PLANE, path_of(at(end)))
        )
    path = path_of(at(begin))
    exact = gaussian_mixture.log_prob(PLANE, x, a=path.a, b=path.b)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_a_standard_normal_in_place_of_the_last_marginal_costs_likelihood():
    """The mixture at t = 1 is not quite N(0, I): a mismatch, not an error of the solver."""
    x = gaussian_mixture.sample(LINE, 50, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    start = vp_path(times[0])
    exact = gaussian_mixture.log_prob(LINE, x, a=start.a, b=start.b)

    def standard(y):
        return -0.5 * (y.square() + math.log(2 * math.pi)).sum(dim=1)

    off = []
    with torch.no_grad():
        for prior in (prior_of(LINE, vp_path(at(1.0))), standard):
            found = log_likelihood(flow_of(LINE), x, times, log_prior=prior)
            off.append((found - exact).abs().mean().item())
    assert off[0] < 1e-5
    assert off[1] > 100 * off[0]
    assert off[1] < 0.05


def test_probes_give_the_log_likelihood_without_bias_and_the_likelihood_with():
    n = 2000
    x = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(n, 2)
    times = torch.linspace(0.02, 1, 25, dtype=torch.float64)
    options = {"log_prior": prior_of(PLANE, vp_path(at(1.0)))}
    with torch.no_grad():
        exact = log_likelihood(flow_of(PLANE), x[:1], times, **options)
        g = torch.Generator().manual_seed(2)
        v = torch.randn(n, 2, generator=g, dtype=torch.float64)
        found = log_likelihood(flow_of(PLANE), x, times, **options, probes=v)
        signs = rademacher_like(x, generator=g)
        steady = log_likelihood(flow_of(PLANE), x, times, **options, probes=signs)
    for sample in (found, steady):
        assert abs(sample.mean() - exact) < 4 * sample.std() / n**0.5
    assert steady.std() < found.std()
    ratio = (found - exact).exp()
    assert ratio.mean() - 1 > 4 * ratio.std() / n**0.5  # Jensen


def test_the_whole_way_can_be_trained_through():
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def standard(y):
        return -0.5 * (y.square() + math.log(2 * math.pi)).sum(dim=1)

    x, times = normal(4, 2), torch.linspace(0, 1, 20, dtype=torch.float64)
    log_p = log_likelihood(lambda x, t: scale * x, x, times, log_prior=standard)
    (slope,) = torch.autograd.grad(log_p.sum(), scale)
    # y = e^s x: log p = -e^{2s} |x|^2 / 2 + 2 s + const
    wanted = (2 - (2 * scale).exp() * x.square().sum(dim=1)).sum()
    torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-6)


def test_refusals():
    x = normal(2, 1)
    with pytest.raises(ValueError, match=r"the SDE needs d_a and d_b of the path\."):
        probability_flow_velocity(x, x, Path(at(0.5), at(0.5)))
    with pytest.raises(ValueError, match="must not grow with t"):
        probability_flow_velocity(x, x, Path(at(0.5), at(0.5), at(0.1), at(0.0)))
    with pytest.raises(ValueError, match="the grid has 1 times: at least 2"):
        log_likelihood(lambda x, t: x, x, torch.ones(1).double(), log_prior=lambda y: y[:, 0])
    with pytest.raises(ValueError, match="variance at the start is 0: it must be positive"):
        gaussian_flow(x, mean=x, std=torch.zeros(2, 1), start=Path(1.0, 0.0), end=Path(0.5, 0.5))
