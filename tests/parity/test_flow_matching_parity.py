import math
import warnings

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.flow_matching import (
    affine_coupling,
    affine_coupling_inverse,
    cnf_log_prob,
    conditional_velocity,
    minibatch_coupling,
    optimal_transport_path,
)
from zhizhi.generative_models.ode_solver import euler
from zhizhi.generative_models.prediction import Path

pytestmark = pytest.mark.parity


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn of optional packages
        return pytest.importorskip(name)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine_path(t):
    a, b = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
    return Path(a, b, -math.pi / 2 * b, math.pi / 2 * a)


def test_a_coupling_is_that_of_zuko():
    zuko = library("zuko")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = zuko.flows.NICE(5, transforms=2, hidden_features=(16,)).double()
    x = normal(6, 5, seed=0)
    for layer in theirs.transform.transforms:  # affine layers, in spite of the name
        transform = layer()
        mask = layer.mask.bool()
        wanted, log_det = transform.call_and_ladj(x)
        bound = math.log(1e3)  # zuko bounds the log scale softly, with slope 1e-3

        def conditioner(x_A, layer=layer, mask=mask, bound=bound):
            shift, raw = layer.hyper(x_A[:, mask]).reshape(len(x_A), -1, 2).unbind(-1)
            full = x_A.new_zeros(2, *x_A.shape)
            full[0][:, ~mask] = raw / (1 + (raw / bound).abs())
            full[1][:, ~mask] = shift
            return full[0], full[1]

        with torch.no_grad():
            ours, our_log_det = affine_coupling(x, conditioner, mask=mask)
            assert_exact(ours, wanted.detach())
            assert_exact(our_log_det, log_det.detach())
            assert_exact(affine_coupling_inverse(wanted, conditioner, mask=mask), x)


def test_the_likelihood_of_a_cnf_is_that_of_zuko():
    zuko = library("zuko")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = zuko.flows.CNF(3, hidden_features=(16,), atol=1e-10, rtol=1e-10).double()
    transform, x = theirs().transform, normal(5, 3, seed=0)
    with torch.no_grad():
        ours = cnf_log_prob(
            lambda x, t: transform.f(t, x), x, torch.linspace(0, 1, 101, dtype=torch.float64)
        )
        torch.testing.assert_close(ours, theirs().log_prob(x), rtol=1e-6, atol=1e-6)


def test_the_likelihood_of_a_cnf_is_that_of_torchdiffeq():
    torchdiffeq = library("torchdiffeq")
    w, x = normal(3, 3, seed=1), normal(5, 3, seed=2)

    def field(x, t):
        return torch.tanh(x @ w) * (1 + t)

    def augmented(t, state):
        y = state[0]
        slope = 1 - torch.tanh(y @ w) ** 2
        return field(y, t), ((slope * w.diagonal()).sum(dim=1)) * (1 + t)  # by hand

    start, ends = (x, torch.zeros(5, dtype=torch.float64)), torch.tensor([0.0, 1.0]).double()
    y, gained = torchdiffeq.odeint(augmented, start, ends, method="dopri5", atol=1e-11, rtol=1e-11)
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(y[-1]).sum(dim=1) + gained[-1]
    with torch.no_grad():
        ours = cnf_log_prob(field, x, torch.linspace(0, 1, 201, dtype=torch.float64))
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_path_and_velocity_are_those_of_torchcfm_in_reversed_time(sigma_min):
    matchers = library("torchcfm.conditional_flow_matching")
    data, s = normal(6, 2, seed=0), torch.rand(6, dtype=torch.float64)
    matcher = matchers.TargetConditionalFlowMatcher(sigma=sigma_min)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, x, u, noise = matcher.sample_location_and_conditional_flow(
            torch.zeros_like(data), data, t=s, return_noise=True
        )
    path = optimal_transport_path(1 - s[:, None], sigma_min=sigma_min)
    assert_exact(path.a * data + path.b * noise, x)
    assert_exact(-conditional_velocity(x, data, path), u)


def test_the_cosine_path_is_theirs_too():
    matchers = library("torchcfm.conditional_flow_matching")
    data, noise = normal(6, 2, seed=0), normal(6, 2, seed=1)
    s = torch.rand(6, dtype=torch.float64)
    matcher = matchers.VariancePreservingConditionalFlowMatcher(sigma=0.0)
    _, x, u = matcher.sample_location_and_conditional_flow(noise, data, t=s)
    path = cosine_path(1 - s[:, None])
    torch.testing.assert_close(path.a * data + path.b * noise, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-conditional_velocity(x, data, path), u, rtol=1e-5, atol=1e-5)


def test_paths_velocities_and_euler_are_those_of_the_flow_matching_package():
    library("flow_matching.path")
    from flow_matching.path import AffineProbPath, CondOTProbPath
    from flow_matching.path.scheduler import CosineScheduler
    from flow_matching.solver import ODESolver

    data, noise = normal(6, 2, seed=0).float(), normal(6, 2, seed=1).float()
    s = torch.rand(6, generator=torch.Generator().manual_seed(2)) * 0.9
    for theirs, path_of in (
        (CondOTProbPath(), optimal_transport_path),
        (AffineProbPath(CosineScheduler()), cosine_path),
    ):
        sample = theirs.sample(noise, data, s)
        path = path_of(1 - s[:, None])
        assert_float32(path.a * data + path.b * noise, sample.x_t)
        velocity = conditional_velocity(sample.x_t, data, path)
        torch.testing.assert_close(-velocity, sample.dx_t, rtol=1e-5, atol=1e-5)

    class Field(torch.nn.Module):
        def forward(self, x, t):
            return torch.sin(x) * (1 + t)

    wanted = ODESolver(Field()).sample(noise, step_size=0.125, method="euler")
    grid = torch.linspace(1, 0, 9)
    ours = euler(lambda x, t: -Field()(x, 1 - t), noise, grid)[-1]
    assert_float32(ours, wanted)


def test_their_likelihood_is_ours_with_minus_the_field():
    library("flow_matching.solver")
    from flow_matching.solver import ODESolver

    x = normal(5, 2, seed=0)

    def theirs(x, t):  # from noise at 0 to data at 1
        return torch.sin(x) * (1 + t)

    class Field(torch.nn.Module):
        def forward(self, x, t):
            return theirs(x, t)

    _, wanted = ODESolver(Field()).compute_likelihood(
        x, lambda z: torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1),
        step_size=0.002, method="midpoint", exact_divergence=True,
    )  # fmt: skip
    with torch.no_grad():
        ours = cnf_log_prob(
            lambda x, t: -theirs(x, 1 - t), x, torch.linspace(0, 1, 101, dtype=torch.float64)
        )
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_coupling_of_a_batch_is_that_of_pot_and_of_torchcfm():
    ot = library("ot")
    x_0, noise = normal(40, 3, seed=0), normal(40, 3, seed=1)
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    plan = ot.emd(uniform, uniform, torch.cdist(x_0, noise).square())
    assert torch.equal(plan.argmax(dim=1), minibatch_coupling(x_0, noise))
    sampler = library("torchcfm.optimal_transport").OTPlanSampler("exact")
    theirs = torch.as_tensor(sampler.get_map(x_0, noise))
    assert torch.equal(theirs.argmax(dim=1), minibatch_coupling(x_0, noise))
