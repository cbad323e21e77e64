import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.ddpm import ddpm_step, mean_from_noise, q_posterior, q_sample
from zhizhi.generative_models.noise_schedule import (
    alpha_bar,
    cosine_beta,
    linear_beta,
    scaled_linear_beta,
    zero_terminal_snr,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "ours", "ends"),
    [
        ("linear", linear_beta, {"beta_start": 1e-4, "beta_end": 0.02}),
        ("scaled_linear", scaled_linear_beta, {"beta_start": 0.00085, "beta_end": 0.012}),
        ("squaredcos_cap_v2", cosine_beta, {}),
    ],
)
def test_betas_equal_those_of_diffusers(diffusers, name, ours, ends):
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule=name, **ends)
    assert_float32(ours(n_steps=1000), scheduler.betas)


def test_rescaled_betas_equal_those_of_diffusers(diffusers):
    scheduler = diffusers.DDPMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True
    )
    ours = alpha_bar(zero_terminal_snr(scaled_linear_beta(n_steps=1000)))[1:].sqrt()
    # diffusers keeps 2^-24 of signal at the end so that sampling does not divide by 0.
    torch.testing.assert_close(scheduler.alphas_cumprod.sqrt().double(), ours, rtol=0.0, atol=3e-4)


def test_noising_equals_add_noise(diffusers):
    scheduler = diffusers.DDPMScheduler(1000)
    x_0, noise, t = (
        normal(4, 3, 8, 8, seed=0),
        normal(4, 3, 8, 8, seed=1),
        torch.tensor([1, 2, 500, 1000]),
    )
    # Their index is ours minus 1, and their table is float32.
    ours = q_sample(x_0, noise, alpha_bar_t=scheduler.alphas_cumprod[t - 1])
    assert_float32(ours, scheduler.add_noise(x_0, noise, t - 1))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 2, 10, 100, 1000])
def test_a_step_equals_the_step_of_diffusers(diffusers, t, variance):
    scheduler = diffusers.DDPMScheduler(1000, variance_type=f"fixed_{variance}", clip_sample=False)
    table = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()
    x_t, noise_hat = normal(2, 3, 4, 4, seed=0), normal(2, 3, 4, 4, seed=1)
    theirs = scheduler.step(
        noise_hat, t - 1, x_t, generator=torch.Generator().manual_seed(5)
    ).prev_sample
    ours = ddpm_step(
        x_t,
        noise_hat,
        alpha_bar_t=table[t],
        alpha_bar_prev=table[t - 1],
        variance=variance,
        generator=torch.Generator().manual_seed(5),
    )
    # float32 on their side: 1 - alpha_bar_t/alpha_bar_{t-1} cancels to 6e-4 of itself at t = 2.
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-6 if t > 10 else 1e-3)


@pytest.mark.parametrize("t", [2, 500])
def test_predicting_data_gives_the_posterior_mean(diffusers, t):
    scheduler = diffusers.DDPMScheduler(1000, prediction_type="sample", clip_sample=False)
    table = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()
    levels = {"alpha_bar_t": table[t], "alpha_bar_prev": table[t - 1]}
    x_0, noise = normal(2, 3, 4, 4, seed=0), normal(2, 3, 4, 4, seed=1)
    x_t = q_sample(x_0, noise, alpha_bar_t=table[t])
    theirs = scheduler.step(x_0, t - 1, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    mean, variance = q_posterior(x_0, x_t, **levels)
    z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(mean + variance.sqrt() * z, theirs, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(mean, mean_from_noise(x_t, noise, **levels), rtol=0.0, atol=1e-4)
