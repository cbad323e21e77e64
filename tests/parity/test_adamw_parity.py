import numpy as np
import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.deep_learning.adamw import adam_step

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_equals_scikit_learn_whose_eps_joins_the_uncorrected_root(eps):
    """scikit-learn's Adam is NumPy; its eps equals ours times sqrt(1 - beta_2^t)."""
    optimizers = pytest.importorskip("sklearn.neural_network._stochastic_optimizers")
    theta = np.array([1.0, -2.0, 0.5])
    peer = optimizers.AdamOptimizer([theta], learning_rate_init=0.05)
    ours = torch.from_numpy(theta.copy())
    m, v = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(1, 101):
        g = np.sin(theta + t)
        peer.epsilon = eps * (1 - 0.999**t) ** 0.5
        ours, m, v = adam_step(ours, torch.from_numpy(g), m, v, t=t, lr=0.05, eps=eps)
        peer.update_params([theta], [g])
        assert_exact(ours, theta)
