import warnings

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.rectified_flow import (
    interpolate,
    rectified_flow_loss,
    reflow_pairs,
    trajectory,
    transport_cost,
)

pytestmark = pytest.mark.parity


def peer(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # imports warn of optional packages
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def diffusers():
    return peer("diffusers")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(x, t):
    return torch.sin(3 * x) - t.reshape(-1, *[1] * (x.ndim - 1)) * x


def loss_by_target(points, target, t):
    return (model(points, t) - target).square().flatten(1).sum(dim=1)


def test_torchcfm_counts_the_other_way_and_its_target_has_the_other_sign():
    matcher = peer("torchcfm.conditional_flow_matching").ConditionalFlowMatcher(sigma=0.0)
    x_0, noise, t = normal(5, 2, 3, seed=0), normal(5, 2, 3, seed=1), torch.rand(5)
    # Their x0 is the source, our noise; their x1 is the target, our data.
    _, points, target = matcher.sample_location_and_conditional_flow(noise, x_0, t=1 - t)
    assert_float32(points, interpolate(x_0, noise, t=t))
    assert_float32(-target, noise - x_0)
    assert_float32(loss_by_target(points, -target, t), rectified_flow_loss(model, x_0, noise, t=t))
    # Only one of the two changes is a mistake: the same target with the other sign of the model.
    assert (loss_by_target(points, target, t) - loss_by_target(points, -target, t)).abs().max() > 1


def test_flow_matching_counts_the_other_way_and_its_target_has_the_other_sign():
    path = peer("flow_matching.path").CondOTProbPath()
    x_0, noise, t = normal(5, 4, seed=0), normal(5, 4, seed=1), torch.rand(5)
    sample = path.sample(x_0=noise, x_1=x_0, t=1 - t)
    assert_float32(sample.x_t, interpolate(x_0, noise, t=t))
    assert_float32(-sample.dx_t, noise - x_0)
    ours = rectified_flow_loss(model, x_0, noise, t=t)
    assert_float32(loss_by_target(sample.x_t, -sample.dx_t, t), ours)


def test_the_same_curve_in_the_other_direction():
    """Reverse the time and the sign, and torchdiffeq walks our trajectory from their 0 to 1."""
    torchdiffeq = peer("torchdiffeq")
    noise = normal(6, 3, seed=0).double()
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    theirs = torchdiffeq.odeint(
        lambda s, x: -model(x, 1 - s), noise, 1 - times, method="euler"
    )  # s = 1 - t
    assert_exact(theirs, trajectory(model, noise, times=times))


def test_noising_is_that_of_diffusers(diffusers):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=1.0)
    x_0, noise = normal(3, 4, 8, 8, seed=0), normal(3, 4, 8, 8, seed=1)
    steps = scheduler.timesteps[[0, 400, 999]]
    theirs = scheduler.scale_noise(x_0, steps, noise)
    assert_float32(theirs, interpolate(x_0, noise, t=steps / 1000))


@pytest.mark.parametrize("n_steps", [1, 4, 28])
def test_every_step_is_that_of_diffusers(diffusers, n_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=1.0)
    scheduler.set_timesteps(n_steps)
    x = normal(2, 4, 8, 8, seed=0)
    ours = trajectory(model, x, times=scheduler.sigmas)
    for i, step in enumerate(scheduler.timesteps):
        assert step / 1000 == pytest.approx(scheduler.sigmas[i].item(), abs=1e-6)
        x = scheduler.step(model(x, scheduler.sigmas[i].expand(2)), step, x).prev_sample
        torch.testing.assert_close(ours[i + 1], x, rtol=1e-5, atol=1e-5)


def test_their_default_grid_is_no_equal_division_of_the_interval(diffusers):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=1.0)
    scheduler.set_timesteps(5)
    assert_float32(scheduler.sigmas[:-1], torch.linspace(1, 0.001, 5))
    assert scheduler.sigmas[-1] == 0


def test_no_coupling_is_cheaper_than_the_plan_of_pot():
    """In one dimension the pairs of a flow are sorted, which is the plan."""
    ot = peer("ot")
    noise = normal(60, 1, seed=0).double()

    def velocity(x, t):  # increasing in x at all times: lines of a monotone map
        return 0.5 * torch.tanh(2 * x)

    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    z_0, z_1 = reflow_pairs(velocity, noise, times=times)
    even = torch.full((60,), 1 / 60, dtype=torch.float64)
    least = ot.emd2(even, even, ot.dist(z_1, z_0))
    assert_exact(transport_cost(z_0, z_1).mean(), least)
    shuffled = z_0[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert transport_cost(shuffled, z_1).mean() > 2 * least
