import warnings

import numpy as np
import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.ode_solver import euler
from zhizhi.generative_models.sd3 import (
    cosmap_density,
    logit_normal_timesteps,
    mode_timesteps,
    shift_timesteps,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        pytest.importorskip("diffusers")
        import diffusers.training_utils

        return diffusers


def generator():
    return torch.Generator().manual_seed(0)


def test_logit_normal_times_are_those_of_diffusers(diffusers):
    theirs = diffusers.training_utils.compute_density_for_timestep_sampling(
        "logit_normal", 1000, logit_mean=0.4, logit_std=0.8, generator=generator()
    )
    assert_float32(logit_normal_timesteps(1000, mean=0.4, std=0.8, generator=generator()), theirs)


@pytest.mark.parametrize("scale", [0.0, 0.81, 1.29])
def test_mode_times_are_those_of_diffusers(diffusers, scale):
    theirs = diffusers.training_utils.compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=scale, generator=generator()
    )
    assert_float32(mode_timesteps(1000, scale=scale, generator=generator()), theirs)


def test_cosmap_is_the_weighting_of_diffusers(diffusers):
    t = torch.linspace(0, 1, 101)
    theirs = diffusers.training_utils.compute_loss_weighting_for_sd3("cosmap", t)
    assert_float32(cosmap_density(t), theirs)


def test_a_run_is_that_of_the_scheduler_when_its_times_are_given(diffusers):
    n, g = 20, generator()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    times = shift_timesteps(torch.linspace(1, 0, n + 1), alpha=3.0)
    assert_float32(times, theirs.sigmas)
    a, x = torch.randn(5, 5, generator=g), torch.randn(3, 5, generator=g)
    walked = x
    for t in theirs.timesteps:
        walked = theirs.step(walked @ a * (t / 1000), t, walked).prev_sample
    ours = euler(lambda y, t: y @ a * t, x, times)[-1]
    torch.testing.assert_close(ours, walked, rtol=1e-4, atol=1e-4)


def test_left_alone_the_scheduler_shifts_its_lower_end_twice(diffusers):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(20)
    once = shift_timesteps(torch.tensor(1 / 1000), alpha=3.0)
    twice = shift_timesteps(once, alpha=3.0)
    assert theirs.sigma_min == pytest.approx(once.item(), rel=1e-5)
    assert theirs.sigmas[-2].item() == pytest.approx(twice.item(), rel=1e-5)
    assert f"{once:.4f} {twice:.4f}" == "0.0030 0.0089"
