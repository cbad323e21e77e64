import pytest
import torch
from sklearn.decomposition import PCA
from tests.closeness import assert_exact

from zhizhi.generative_models.vae_elbo import (
    LinearGaussian,
    ppca_fit,
    ppca_log_prob,
    ppca_posterior,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def x():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    return torch.randn(200, 6, generator=g, dtype=torch.float64) @ mix + 1.0


def test_density_is_that_of_sklearn(x):
    pca = PCA(2, svd_solver="full").fit(x.numpy())
    axes, spread, rest = (
        torch.tensor(v, dtype=torch.float64)
        for v in (pca.components_, pca.explained_variance_, pca.noise_variance_)
    )
    model = LinearGaussian(axes.T * (spread - rest).sqrt(), x.mean(dim=0), rest)
    assert_exact(ppca_log_prob(x, model), pca.score_samples(x.numpy()))
    assert_exact(
        model.weight @ model.weight.T + rest * torch.eye(6, dtype=torch.float64),
        pca.get_covariance(),
    )


@pytest.mark.parametrize("n_latents", [1, 2, 5])
def test_fit_is_that_of_sklearn_up_to_the_divisor(x, n_latents):
    """They divide by N - 1, maximum likelihood by N."""
    pca = PCA(n_latents, svd_solver="full").fit(x.numpy())
    ours, n = ppca_fit(x, n_latents=n_latents), len(x)
    covariance = ours.weight @ ours.weight.T + ours.variance * torch.eye(6, dtype=torch.float64)
    assert_exact(covariance * n / (n - 1), pca.get_covariance())
    assert ppca_log_prob(x, ours).mean() > pca.score(x.numpy())


def test_posterior_mean_is_a_shrunk_projection(x):
    pca = PCA(2, svd_solver="full").fit(x.numpy())
    model = ppca_fit(x, n_latents=2)
    mean, _ = ppca_posterior(x, model)
    n, projected = len(x), torch.tensor(pca.transform(x.numpy()))
    eigenvalues = torch.tensor(pca.explained_variance_) * (n - 1) / n
    wanted = projected * (eigenvalues - model.variance).sqrt() / eigenvalues
    assert_exact(mean.abs(), wanted.abs())
