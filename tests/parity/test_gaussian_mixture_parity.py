"""The mixture against scikit-learn, whose components may be spherical."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Peer
from tests.closeness import assert_exact

from zhizhi.generative_models.gaussian_mixture import (
    GaussianMixture,
    component_posterior,
    log_prob,
)

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.8, 0.6), (0.3, 1.5)])
def test_density_and_posterior_are_those_of_scikit_learn(a, b):
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(4, generator=g, dtype=torch.float64).add(0.1)
    mixture = GaussianMixture(
        weights / weights.sum(),
        2 * torch.randn(4, 3, generator=g, dtype=torch.float64),
        torch.rand(4, generator=g, dtype=torch.float64).add(0.2),
    )
    peer = Peer(4, covariance_type="spherical")
    peer.weights_ = mixture.weights.numpy()
    peer.means_ = a * mixture.means.numpy()
    peer.covariances_ = (a * mixture.std.numpy()) ** 2 + b**2
    peer.precisions_cholesky_ = 1 / np.sqrt(peer.covariances_)
    x = 3 * torch.randn(50, 3, generator=g, dtype=torch.float64)
    assert_exact(log_prob(mixture, x, a=a, b=b), peer.score_samples(x.numpy()))
    assert_exact(component_posterior(mixture, x, a=a, b=b), peer.predict_proba(x.numpy()))
