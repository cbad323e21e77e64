import itertools
import warnings

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models.score_sde import langevin_corrector, reverse_diffusion
from zhizhi.generative_models.sde import euler_maruyama

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_path_is_that_of_torchsde_on_the_same_brownian_motion():
    torchsde = pytest.importorskip("torchsde")

    class Both(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, x):
            return torch.sin(x) - t * x

        def g(self, t, x):
            return 0.5 + 0.1 * torch.cos(x) + t

    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    start = normal(4, 3, seed=0).double()
    motion = torchsde.BrownianInterval(t0=0.0, t1=1.0, size=(4, 3), dtype=torch.float64, entropy=1)
    theirs = torchsde.sdeint(Both(), start, times, bm=motion, method="euler", dt=1 / 32)
    dw = torch.stack([motion(s, t) for s, t in itertools.pairwise(times)])
    both = Both()
    ours = euler_maruyama(
        lambda x, t: both.f(t, x), lambda x, t: both.g(t, x), start, times, increments=dw
    )
    assert_exact(ours, theirs)


@pytest.fixture
def scheduler(diffusers):
    theirs = diffusers.ScoreSdeVeScheduler(1000, sigma_min=0.01, sigma_max=50, snr=0.15)
    theirs.set_timesteps(1000)
    theirs.set_sigmas(1000)
    return theirs


@pytest.mark.parametrize("i", [0, 500, 998])
def test_their_predictor_is_reverse_diffusion_and_not_the_ancestral_step(scheduler, i):
    x, score, t = normal(2, 3, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2), scheduler.timesteps[i]
    theirs = scheduler.step_pred(score, t, 50 * x, generator=torch.Generator().manual_seed(3))
    index = int(t * 999)
    sigma, below = scheduler.discrete_sigmas[[index, index - 1]] if index else (
        scheduler.discrete_sigmas[0], torch.tensor(0.0)
    )  # fmt: skip
    mean, variance = reverse_diffusion(50 * x, score, gain=1.0, variance=sigma**2 - below**2)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean, theirs.prev_sample_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean + variance**0.5 * z, theirs.prev_sample, rtol=1e-5, atol=1e-5)


def test_their_corrector_is_ours(scheduler):
    x, score = normal(5, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    theirs = scheduler.step_correct(score, x, generator=torch.Generator().manual_seed(3))
    ours = langevin_corrector(x, score, snr=0.15, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-6, atol=1e-6)
