import itertools
import math
import warnings

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.ode_solver import euler, heun, rk4
from zhizhi.generative_models.paths import straight_path, vp_path
from zhizhi.generative_models.probability_flow_ode import log_likelihood, probability_flow_velocity

pytestmark = pytest.mark.parity

PLANE = GaussianMixture(
    torch.tensor([0.4, 0.6], dtype=torch.float64),
    torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64),
    torch.tensor([0.4, 0.6], dtype=torch.float64),
)


def velocity(x, t):
    path = vp_path(t)
    score = gaussian_mixture.score(PLANE, x, a=path.a, b=path.b)
    return probability_flow_velocity(x, score, path)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def odeint():
    return pytest.importorskip("torchdiffeq").odeint


@pytest.mark.parametrize(("solve", "method"), [(euler, "euler"), (heun, "heun2")])
def test_euler_and_heun_are_those_of_torchdiffeq(odeint, solve, method):
    x, times = normal(6, 2), torch.linspace(1, 0.1, 12, dtype=torch.float64)
    wanted = odeint(lambda t, y: velocity(y, t), x, times, method=method)
    assert_exact(solve(velocity, x, times), wanted)


def test_their_rk4_is_another_rule_of_the_same_order(odeint):
    x, fine = normal(6, 2), torch.linspace(1, 0.1, 100, dtype=torch.float64)
    truth = rk4(velocity, x, fine)[-1]
    apart, off = [], []
    for n in (6, 12, 24):
        times = torch.linspace(1, 0.1, n + 1, dtype=torch.float64)
        ours = rk4(velocity, x, times)[-1]
        theirs = odeint(lambda t, y: velocity(y, t), x, times, method="rk4")[-1]
        apart.append((ours - theirs).abs().mean().item())
        off.append((theirs - truth).abs().mean().item())
    assert apart[0] > 1e-8  # the 3/8 rule
    for errors in (apart, off):
        assert all(math.log2(a / b) > 3.3 for a, b in itertools.pairwise(errors)), errors


def test_the_likelihood_is_that_of_an_adaptive_solver_on_both_equations(odeint):
    x = gaussian_mixture.sample(PLANE, 5, generator=torch.Generator().manual_seed(1))
    end = vp_path(torch.tensor(0.9, dtype=torch.float64))

    def both(t, state):
        y = state[:, :2].detach().requires_grad_()
        with torch.enable_grad():
            u = velocity(y, t)
            rows = [torch.autograd.grad(u[:, i].sum(), y, retain_graph=True)[0] for i in (0, 1)]
        return torch.cat([u, (rows[0][:, 0] + rows[1][:, 1])[:, None]], dim=1).detach()

    start = torch.cat([x, torch.zeros(5, 1, dtype=torch.float64)], dim=1)
    ends = torch.tensor([0.01, 0.9], dtype=torch.float64)
    last = odeint(both, start, ends, method="dopri5", rtol=1e-9, atol=1e-9)[-1]
    wanted = gaussian_mixture.log_prob(PLANE, last[:, :2], a=end.a, b=end.b) + last[:, 2]
    with torch.no_grad():
        ours = log_likelihood(
            velocity, x, torch.linspace(0.01, 0.9, 120, dtype=torch.float64),
            log_prior=lambda y: gaussian_mixture.log_prob(PLANE, y, a=end.a, b=end.b),
        )  # fmt: skip
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_the_likelihood_is_that_of_flow_matching_with_its_time_reversed():
    """Their time 0 is noise and 1 is data, so their velocity has the other sign."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver = pytest.importorskip("flow_matching.solver")
    low, high = 0.02, 0.98

    def straight(x, t):
        p = straight_path(t)
        return gaussian_mixture.velocity(PLANE, x, a=p.a, b=p.b, d_a=p.d_a, d_b=p.d_b)

    end = straight_path(torch.tensor(high, dtype=torch.float64))

    def log_prior(y):
        return gaussian_mixture.log_prob(PLANE, y, a=end.a, b=end.b)

    x = gaussian_mixture.sample(PLANE, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = log_likelihood(
            straight, x, torch.linspace(low, high, 97, dtype=torch.float64), log_prior=log_prior
        )
    width = high - low  # they insist on all times from 0 to 1
    flow = solver.ODESolver(velocity_model=lambda x, t: -width * straight(x, low + width * (1 - t)))
    _, theirs = flow.compute_likelihood(
        x_1=x,
        log_p0=log_prior,
        step_size=0.01,
        method="rk4",
        time_grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
        exact_divergence=True,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
