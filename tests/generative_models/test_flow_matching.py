import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_step
from zhizhi.generative_models.divergence import rademacher_like
from zhizhi.generative_models.flow_matching import (
    RealNVP,
    affine_coupling,
    affine_coupling_inverse,
    cnf_log_prob,
    conditional_flow_matching_loss,
    conditional_velocity,
    minibatch_coupling,
    optimal_transport_path,
)
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.ode_solver import euler, rk4
from zhizhi.generative_models.paths import linear_sde, straight_path
from zhizhi.generative_models.prediction import Path, convert

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0, 0.5], [0.0, -1.0], [1.5, 1.0]], dtype=torch.float64),
    torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64),
)
MASK = torch.tensor([True, False, False, True])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioner(x_A):
    log_scale, shift = (x_A @ normal(4, 8, seed=9)).sin().chunk(2, dim=1)
    return log_scale, shift


def small_flow(n_dims=3):
    flow = RealNVP(n_dims=n_dims, n_layers=4, width=8).double()
    with torch.no_grad():
        for i, p in enumerate(flow.parameters()):
            p.copy_(normal(*p.shape, seed=i) * 0.4)
    return flow.requires_grad_(False)


def straight(x, t):
    return gaussian_mixture.velocity(MIXTURE, x, a=1 - t, b=t, d_a=-1.0, d_b=1.0)


def times(n):
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


def cosine_path(t):
    a, b = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
    return Path(a, b, -math.pi / 2 * b, math.pi / 2 * a)


def test_a_coupling_moves_only_half_b_and_its_log_det_is_that_of_the_whole_jacobian():
    """(eq:flow-matching-coupling-det)"""
    x = normal(5, 4)
    y, log_det = affine_coupling(x, conditioner, mask=MASK)
    assert torch.equal(y[:, MASK], x[:, MASK])
    assert not torch.isclose(y[:, ~MASK], x[:, ~MASK]).any()
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: affine_coupling(row[None], conditioner, mask=MASK)[0][0], x[i]
        )
        sign, wanted = torch.linalg.slogdet(jacobian)
        assert sign == 1
        assert_exact(log_det[i], wanted)


def test_the_inverse_undoes_a_coupling_whatever_the_conditioner():
    x = normal(5, 4)
    y, _ = affine_coupling(x, conditioner, mask=MASK)
    assert_exact(affine_coupling_inverse(y, conditioner, mask=MASK), x)


def test_the_conditioner_never_sees_half_b():
    def peeping(x_A):
        assert (x_A[:, ~MASK] == 0).all()
        return torch.zeros_like(x_A), torch.zeros_like(x_A)

    affine_coupling(normal(2, 4), peeping, mask=MASK)
    affine_coupling_inverse(normal(2, 4), peeping, mask=MASK)


def test_real_nvp_begins_as_the_identity():
    flow, x = RealNVP(n_dims=3, n_layers=2, width=4).double(), normal(4, 3)
    z, log_det = flow(x)
    assert_exact(z, x)
    assert_exact(log_det, torch.zeros(4))
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(dim=1)
    assert_exact(flow.log_prob(x).detach(), wanted)


def test_real_nvp_is_a_density_by_the_change_of_variables():
    """(eq:flow-matching-stack): by autograd, by its inverse, and by its mass on a grid."""
    flow, x = small_flow(), normal(4, 3)
    z, log_det = flow(x)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], x[i])
        assert_exact(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)
    assert_exact(flow.inverse(z), x)
    normal_part = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1)
    assert_exact(flow.log_prob(x), normal_part + log_det)
    assert not torch.isclose(z, x).any()  # two layers of each mask: every coordinate moves

    flat, line = small_flow(2), torch.linspace(-12, 12, 601, dtype=torch.float64)
    mass = flat.log_prob(torch.cartesian_prod(line, line)).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_every_log_scale_stays_below_one():
    flow, x = small_flow(), 100 * normal(50, 3)
    _, log_det = flow(x)
    assert log_det.abs().max() <= 6  # 4 layers, 2 + 1 + 2 + 1 coordinates freed


def test_a_linear_flow_has_the_density_of_its_gaussian():
    """exp(A) takes the data to a standard normal: log p gains exactly the trace of A."""
    A, x = normal(3, 3) / 4, normal(20, 3, seed=1)
    undo = torch.linalg.matrix_exp(-A)
    wanted = torch.distributions.MultivariateNormal(normal(3) * 0, undo @ undo.T).log_prob(x)
    with torch.no_grad():
        found = cnf_log_prob(lambda x, t: x @ A.T, x, times(100))
    assert_exact(found, wanted)
    end = x @ torch.linalg.matrix_exp(A).T
    gained = found - torch.distributions.Normal(0.0, 1.0).log_prob(end).sum(dim=1)
    assert_exact(gained, A.trace().expand(20))


def test_the_exact_velocity_gives_the_data_their_density_to_fourth_order():
    x = gaussian_mixture.sample(MIXTURE, 30, generator=torch.Generator().manual_seed(1))
    wanted, errors = gaussian_mixture.log_prob(MIXTURE, x), []
    for n in (8, 16, 32):
        with torch.no_grad():
            errors.append((cnf_log_prob(straight, x, times(n)) - wanted).abs().mean().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(3.3 < slope < 5 for slope in slopes)
    assert errors[-1] < 1e-4


def test_probes_estimate_the_log_density_without_bias():
    x, A = normal(1, 3), normal(3, 3, seed=2)

    def field(x, t):
        return torch.sin(x @ A.T) * (1 + t)

    with torch.no_grad():
        exact = cnf_log_prob(field, x, times(20))
        # All eight sign vectors, each equally likely: the mean is over the whole distribution.
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
        all_of_them = cnf_log_prob(field, x.expand(8, 3).clone(), times(20), probes=signs)
    assert_exact(all_of_them.mean(), exact[0])
    assert all_of_them.std() > 0.1
    assert all_of_them.exp().mean() > exact[0].exp()  # of the density itself it is no estimate


def test_the_likelihood_can_be_trained_through():
    """By finite differences, with exact divergence and with probes."""
    x, probes = normal(4, 2), rademacher_like(normal(4, 2))
    for options in ({}, {"probes": probes}):
        theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def total(value, options=options):
            return cnf_log_prob(lambda x, t: torch.sin(value * x), x, times(5), **options).sum()

        (slope,) = torch.autograd.grad(total(theta), theta)
        with torch.no_grad():
            by_difference = (total(theta + 1e-5) - total(theta - 1e-5)) / 2e-5
        torch.testing.assert_close(slope, by_difference, rtol=1e-6, atol=1e-6)


def test_the_path_is_that_of_the_paper_in_reversed_time():
    """Lipman et al., Eq. (20) and (21), where s = 1 - t and x_1 is the data."""
    for sigma_min in (0.0, 0.1):
        t = torch.linspace(0.05, 1, 7, dtype=torch.float64)[:, None]
        path, s = optimal_transport_path(t, sigma_min=sigma_min), 1 - t
        assert_exact(path.a, s)
        assert_exact(path.b, 1 - (1 - sigma_min) * s)
        x, x_1 = normal(7, 3), normal(7, 3, seed=1)
        theirs = (x_1 - (1 - sigma_min) * x) / (1 - (1 - sigma_min) * s)
        assert_exact(conditional_velocity(x, x_1, path), -theirs)
    zero = torch.zeros((), dtype=torch.float64)
    assert optimal_transport_path(zero, sigma_min=0.1).b == 0.1
    assert optimal_transport_path(zero) == straight_path(zero)
    assert optimal_transport_path(zero).b == 0


@pytest.mark.parametrize("path_of", [optimal_transport_path, cosine_path])
def test_the_derivatives_of_a_path_are_its_slopes(path_of):
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    path = path_of(t)
    for value, slope in ((path.a, path.d_a), (path.b, path.d_b)):
        assert_exact(torch.autograd.grad(value, t, retain_graph=True)[0], slope.detach())


def test_the_conditional_flow_carries_the_noise_to_the_gaussian_around_its_point():
    """Theorem 3: solved from eps, x_t is a x_0 + b eps at all times."""
    x_0, noise = normal(5, 2), normal(5, 2, seed=1)
    grid = torch.linspace(1, 0.1, 400, dtype=torch.float64)
    way = rk4(lambda x, t: conditional_velocity(x, x_0, cosine_path(t)), noise, grid)
    wanted = torch.stack([cosine_path(t).a * x_0 + cosine_path(t).b * noise for t in grid])
    torch.testing.assert_close(way, wanted, rtol=1e-8, atol=1e-8)


def test_the_marginal_velocity_is_the_posterior_mean_of_the_conditional_ones():
    """(eq:flow-matching-marginal), by a loop over three points."""
    points = GaussianMixture(MIXTURE.weights, MIXTURE.means, torch.zeros(3, dtype=torch.float64))
    path, x = cosine_path(torch.tensor(0.4, dtype=torch.float64)), normal(6, 2)
    wanted = torch.zeros(6, 2, dtype=torch.float64)
    for i, row in enumerate(x):
        densities = [
            w * math.exp(-((row - path.a * m).square().sum() / (2 * path.b**2)).item())
            for w, m in zip(points.weights, points.means, strict=True)
        ]
        for density, m in zip(densities, points.means, strict=True):
            wanted[i] += density / sum(densities) * conditional_velocity(row, m, path)
    assert_exact(gaussian_mixture.velocity(points, x, **path._asdict()), wanted)


def test_the_gradient_of_the_conditional_loss_is_that_of_the_marginal_loss():
    """(eq:flow-matching-gap): by quadrature over one dimension, data being three points."""
    weights, points = (
        torch.tensor([0.2, 0.5, 0.3]).double(),
        torch.tensor([-1.5, 0.2, 1.8]).double(),
    )
    mixture = GaussianMixture(weights, points[:, None], torch.zeros(3, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def velocity(x, t):
        return net(torch.cat([x, t[:, None]], dim=1))

    eps = torch.linspace(-8, 8, 801, dtype=torch.float64)
    share = (-eps.square() / 2).softmax(0)
    t = 0.6
    at = {"a": 1 - t, "b": t}
    cfm = fm = floor = torch.zeros((), dtype=torch.float64)
    for w, x_0 in zip(weights, points, strict=True):
        rows = torch.full((801, 1), x_0.item(), dtype=torch.float64)
        time = torch.full((801,), t, dtype=torch.float64)
        each = conditional_flow_matching_loss(velocity, rows, eps[:, None], time)
        cfm = cfm + w * (share * each).sum()
        x_t = (1 - t) * rows + t * eps[:, None]
        u = gaussian_mixture.velocity(mixture, x_t, **at, d_a=-1.0, d_b=1.0)
        fm = fm + w * (share * (velocity(x_t, time) - u)[:, 0].square()).sum()
        floor = floor + w * (share * (eps - x_0 - u[:, 0]).square()).sum()
    of_cfm = torch.autograd.grad(cfm, list(net.parameters()), retain_graph=True)
    of_fm = torch.autograd.grad(fm, list(net.parameters()))
    for p, q in zip(of_cfm, of_fm, strict=True):
        assert_exact(p, q)
    assert_exact((cfm - fm).detach(), floor)
    assert floor > 0.5  # the loss of a perfect network


def test_the_loss_is_the_squared_distance_to_the_target_on_any_path():
    x_0, noise, t = normal(5, 3), normal(5, 3, seed=1), torch.rand(5, dtype=torch.float64)
    loss = conditional_flow_matching_loss(lambda x, t: 2 * x, x_0, noise, t, path=cosine_path)
    for i in range(5):
        a, b, d_a, d_b = cosine_path(t[i])
        off = 2 * (a * x_0[i] + b * noise[i]) - (d_a * x_0[i] + d_b * noise[i])
        assert_exact(loss[i], off @ off)
    perfect = conditional_flow_matching_loss(
        lambda x, t: noise - x_0, x_0, noise, torch.zeros(5, dtype=torch.float64)
    )
    assert_exact(perfect, torch.zeros(5))  # at t = 0 nothing is divided by


@pytest.mark.parametrize("path_of", [optimal_transport_path, cosine_path])
def test_every_gaussian_path_has_the_velocity_of_its_probability_flow(path_of):
    """(eq:flow-matching-drift) and (eq:flow-matching-weight)"""
    path, x = path_of(torch.tensor(0.35, dtype=torch.float64)), normal(20, 2)
    u = gaussian_mixture.velocity(MIXTURE, x, **path._asdict())
    f, g_squared = linear_sde(path)
    score = gaussian_mixture.score(MIXTURE, x, a=path.a, b=path.b)
    assert_exact(u, f * x - g_squared / 2 * score)

    guess = normal(20, 2, seed=1)  # of the noise
    noise, data = (convert(u, x, path, source="velocity", target=k) for k in ("noise", "data"))
    off = convert(guess, x, path, source="noise", target="velocity") - u
    assert_exact(off.square(), ((path.d_b - path.d_a * path.b / path.a) * (guess - noise)).square())
    x_hat = convert(guess, x, path, source="noise", target="data")
    assert_exact(off.square(), ((path.d_a - path.a * path.d_b / path.b) * (x_hat - data)).square())


def test_an_euler_step_is_a_ddim_step_on_the_straight_path_only():
    """(eq:flow-matching-ddim)"""
    x, t, s = normal(20, 2), *torch.tensor([0.7, 0.4], dtype=torch.float64)
    for path_of, same in ((optimal_transport_path, True), (cosine_path, False)):

        def field(x, t, path_of=path_of):
            return gaussian_mixture.velocity(MIXTURE, x, **path_of(t)._asdict())

        (a_t, b_t, *_), (a_s, b_s, *_) = path_of(t), path_of(s)
        noise = gaussian_mixture.predict_noise(MIXTURE, x, a=a_t, b=b_t)
        data = gaussian_mixture.denoise(MIXTURE, x, a=a_t, b=b_t)
        shares = [torch.as_tensor(a**2 / (a**2 + b**2)) for a, b in ((a_t, b_t), (a_s, b_s))]
        size_t, size_s = (a_t**2 + b_t**2) ** 0.5, (a_s**2 + b_s**2) ** 0.5
        step = ddim_step(x / size_t, noise, alpha_bar_t=shares[0], alpha_bar_s=shares[1])
        assert_exact(size_s * step, a_s * data + b_s * noise)
        found = euler(field, x, torch.stack([t, s]))[-1]
        assert torch.allclose(found, size_s * step, rtol=1e-10, atol=1e-10) == same


def test_reversed_time_is_minus_the_velocity():
    """(eq:flow-matching-time)"""
    noise = normal(10, 2)
    ours = rk4(straight, noise, times(20).flip(0))[-1]
    theirs = rk4(lambda x, s: -straight(x, 1 - s), noise, times(20))[-1]
    assert_exact(ours, theirs)


def test_one_step_of_a_perfect_network_is_the_mean_of_the_data():
    """With independent noise, whatever the data: straight lines are not straight streamlines."""
    noise = normal(10, 2)
    end = euler(straight, noise, torch.tensor([1.0, 0.0], dtype=torch.float64))[-1]
    assert_exact(end, (MIXTURE.weights @ MIXTURE.means).expand(10, 2))


def test_the_coupling_of_a_batch_is_the_best_of_all_permutations():
    x_0, noise = normal(6, 3), normal(6, 3, seed=1)
    order = minibatch_coupling(x_0, noise)

    def cost(permutation):
        return (x_0 - noise[list(permutation)]).square().sum()

    assert_exact(cost(order.tolist()), min(cost(p) for p in itertools.permutations(range(6))))
    assert sorted(order.tolist()) == list(range(6))  # the marginals of the batch stay


def test_in_one_dimension_the_coupling_sorts_and_a_batch_of_one_does_nothing():
    x_0, noise = normal(50, 1), normal(50, 1, seed=1)
    paired = noise[minibatch_coupling(x_0, noise)]
    assert torch.equal(paired[x_0[:, 0].argsort()], noise.sort(dim=0).values)
    assert minibatch_coupling(x_0[:1], noise[:1]).tolist() == [0]


def test_pairing_ties_the_noise_to_the_label():
    label = torch.arange(200) % 2
    x_0 = normal(200, 2) * 0.3 + torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)[label]
    noise = normal(200, 2, seed=1)
    paired = noise[minibatch_coupling(x_0, noise)]
    means = [n[label == 0, 0].mean().item() for n in (noise, paired)]
    assert abs(means[0]) < 0.3
    assert means[1] > 0.6


def test_the_marginal_flow_is_not_optimal_transport():
    """The gradient of a convex function has a symmetric Jacobian; this map has not."""
    noise = normal(50, 2).requires_grad_()
    end = rk4(straight, noise, times(40).flip(0))[-1]
    J = torch.stack(
        [torch.autograd.grad(end[:, i].sum(), noise, retain_graph=True)[0] for i in range(2)], dim=1
    )
    assert (J[:, 0, 1] - J[:, 1, 0]).abs().max() > 0.1


def test_the_results_have_the_dtype_of_the_input():
    x, noise, t = normal(3, 2).float(), normal(3, 2, seed=1).float(), torch.rand(3)
    assert conditional_flow_matching_loss(lambda x, t: x, x, noise, t).dtype == torch.float32
    with torch.no_grad():
        found = cnf_log_prob(lambda x, t: -x, x, torch.linspace(0, 1, 11))
        wanted = cnf_log_prob(lambda x, t: -x, x.double(), times(10))
    assert found.dtype == torch.float32
    assert_float32(found, wanted)


def test_refusals():
    with pytest.raises(ValueError, match=r"n_dims is 1 and n_layers is 4: both at least 2"):
        RealNVP(n_dims=1, n_layers=4, width=8)
    with pytest.raises(ValueError, match=r"n_dims is 2 and n_layers is 1: both at least 2"):
        RealNVP(n_dims=2, n_layers=1, width=8)
    with pytest.raises(ValueError, match=r"times are \[1\.0, 0\.0\]: they rise"):
        cnf_log_prob(straight, normal(1, 2), torch.tensor([1.0, 0.0], dtype=torch.float64))
    for sigma_min in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"sigma_min is {sigma_min}: 0 <= sigma_min < 1"):
            optimal_transport_path(torch.zeros(1), sigma_min=sigma_min)
    x = normal(1, 2)
    with pytest.raises(ValueError, match="the path has no derivatives"):
        conditional_velocity(x, x, Path(0.5, 0.5))
    with pytest.raises(ValueError, match="the path has no derivatives"):
        conditional_flow_matching_loss(
            lambda x, t: x, x, x, torch.zeros(1, dtype=torch.float64), path=lambda t: Path(1 - t, t)
        )
