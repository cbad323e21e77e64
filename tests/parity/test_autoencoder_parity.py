import warnings

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.autoencoder import kl_to_standard_normal, reparameterise

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def distribution():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    g = torch.Generator().manual_seed(0)
    parameters = torch.randn(2, 8, 4, 4, generator=g, dtype=torch.float64)
    parameters[0, 4, 0, 0], parameters[0, 5, 0, 0] = -60.0, 30.0  # they clamp to [-30, 20]
    return vae.DiagonalGaussianDistribution(parameters)


def test_divergence_is_that_of_diffusers(distribution):
    ours = kl_to_standard_normal(distribution.mean, distribution.logvar).sum(dim=(1, 2, 3))
    assert_exact(ours, distribution.kl())
    assert distribution.logvar.min() == -30
    assert distribution.logvar.max() == 20


def test_draws_are_those_of_diffusers(distribution):
    theirs = distribution.sample(torch.Generator().manual_seed(1))
    ours = reparameterise(
        distribution.mean, distribution.logvar, n_samples=1,
        generator=torch.Generator().manual_seed(1),
    )[0]  # fmt: skip
    assert_exact(ours, theirs)


def test_the_posterior_of_a_tiny_autoencoder_kl_has_our_divergence():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = diffusers.AutoencoderKL(
                in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8,),
                norm_num_groups=4,
            )  # fmt: skip
            with torch.no_grad():
                posterior = model.encode(torch.rand(3, 1, 8, 8)).latent_dist
    ours = kl_to_standard_normal(posterior.mean, posterior.logvar).sum(dim=(1, 2, 3))
    assert_float32(ours, posterior.kl())


def test_divergence_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 8, generator=g, dtype=torch.float64)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)),
    )
    assert_exact(kl_to_standard_normal(mean, log_variance), theirs)
