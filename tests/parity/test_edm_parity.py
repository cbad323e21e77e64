import warnings

import pytest
import torch

from zhizhi.generative_models.edm import (
    edm_denoise,
    edm_field,
    edm_heun_sample,
    edm_preconditioning,
    karras_sigmas,
)
from zhizhi.generative_models.ode_solver import euler

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, c_noise):  # any function; both sides must call it with the same numbers
    return torch.sin(2 * x) * (1 + c_noise.reshape(-1, 1))


def denoise(x, sigma):
    return edm_denoise(network, x, sigma)


def scheduler(diffusers, n_steps):
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    theirs.set_timesteps(n_steps)
    return theirs


@pytest.mark.parametrize("n_steps", [1, 18, 50])
def test_levels_and_what_the_network_is_told(diffusers, n_steps):
    theirs, ours = scheduler(diffusers, n_steps), karras_sigmas(n_steps)
    torch.testing.assert_close(ours.float(), theirs.sigmas, rtol=1e-6, atol=0)
    c_noise = edm_preconditioning(ours[:-1]).c_noise
    torch.testing.assert_close(c_noise.float(), theirs.timesteps, rtol=1e-5, atol=1e-6)


def test_the_wrapping_is_theirs(diffusers):
    theirs, x, out = scheduler(diffusers, 4), normal(3, 8, seed=0), normal(3, 8, seed=1)
    for sigma in (0.01, 0.5, 60.0):
        level = torch.full((3,), sigma)
        seen = []

        def spy(x, c_noise, seen=seen):
            seen.append(x)
            return out

        ours = edm_denoise(spy, x, level)
        torch.testing.assert_close(seen[0], theirs.precondition_inputs(x, sigma))
        torch.testing.assert_close(ours, theirs.precondition_outputs(x, out, sigma))


def test_the_whole_way_by_euler(diffusers):
    theirs, x = scheduler(diffusers, 18), 80 * normal(4, 6, seed=0)
    ours = euler(edm_field(denoise), x, karras_sigmas(18))[-1]
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t)
        x = theirs.step(network(seen, t.expand(4)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_a_churned_euler_step(diffusers):
    theirs, x = scheduler(diffusers, 18), 80 * normal(4, 6, seed=0)
    t, options = theirs.timesteps[0], {"s_churn": 5.0, "s_noise": 1.003}
    # Their step churns after the network has been asked, so here they are given the denoised x_hat.
    gamma, z = 5.0 / 18, normal(4, 6, seed=9)
    x_hat = x + 80 * ((1 + gamma) ** 2 - 1) ** 0.5 * 1.003 * z
    data = denoise(x_hat, torch.full((4,), 80 * (1 + gamma)))
    theirs.scale_model_input(x, t)
    wanted = theirs.step(
        data, t, x, **options, generator=torch.Generator().manual_seed(9), pred_original_sample=data
    ).prev_sample
    sigmas = karras_sigmas(18)

    def once(x, sigma):  # the second evaluation of Heun's step repeats the first slope
        if sigma[0] > sigmas[0]:
            return denoise(x, sigma)
        return x - sigma[:, None] * (x_hat - data) / (80 * (1 + gamma))

    ours = edm_heun_sample(
        once, x, sigmas, **options, s_min=79.0, generator=torch.Generator().manual_seed(9)
    )[1]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-3)


def test_heun_is_their_heun_in_2n_minus_1_evaluations(diffusers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # np.array(tensor), on their side
        theirs = diffusers.HeunDiscreteScheduler(
            1000, 1e-4, 0.02, "linear", prediction_type="epsilon", use_karras_sigmas=True
        )
        theirs.set_timesteps(12)
    assert len(theirs.timesteps) == 2 * 12 - 1
    share = theirs.alphas_cumprod.double()
    ends = {
        "sigma_min": ((1 - share[0]) / share[0]).sqrt().item(),
        "sigma_max": ((1 - share[-1]) / share[-1]).sqrt().item(),
    }
    ours = karras_sigmas(12, **ends)
    torch.testing.assert_close(
        theirs.sigmas[[0, *range(1, 23, 2)]].double(), ours[:12], rtol=1e-4, atol=0
    )

    def noise_hat(x):  # of x / sqrt(1 + sigma^2), as their networks are asked
        return torch.sin(2 * x) + x / 2

    def by_noise(x, sigma):
        s = sigma[:, None]
        return x - s * noise_hat(x / (1 + s**2).sqrt())

    x = ours[0].item() * normal(4, 6, seed=0)
    end = edm_heun_sample(by_noise, x.double(), theirs.sigmas[[0, *range(1, 24, 2)]].double())[-1]
    y = x
    for t in theirs.timesteps:
        y = theirs.step(noise_hat(theirs.scale_model_input(y, t)), t, y).prev_sample
    torch.testing.assert_close(y.double(), end, rtol=1e-4, atol=1e-4)
