import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from tests.closeness import assert_exact

from zhizhi.generative_models.discrepancy import (
    energy_distance,
    frechet_distance,
    wasserstein_1d,
    wasserstein_2,
)


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def test_energy_distance_is_a_loop_over_pairs():
    x, y = normal(7, 3), normal(5, 3, seed=1) + 1
    across = sum((a - b).norm() for a in x for b in y) / 35
    in_x = sum((x[i] - x[j]).norm() for i in range(7) for j in range(7) if i != j) / 42
    in_y = sum((y[i] - y[j]).norm() for i in range(5) for j in range(5) if i != j) / 20
    assert_exact(energy_distance(x, y), 2 * across - in_x - in_y)


def test_energy_distance_tends_to_the_square_of_scipy_s():
    """SciPy keeps each point with itself and takes the root; at 2,000 points that is little."""
    x, y = normal(2000), normal(2000, seed=1) + 1
    ours = energy_distance(x[:, None], y[:, None]).item()
    assert ours == pytest.approx(scipy_energy(x.numpy(), y.numpy()) ** 2, rel=0.01)


def test_energy_distance_of_one_distribution_is_zero_on_average():
    values = torch.stack(
        [energy_distance(normal(50, 2, seed=s), normal(50, 2, seed=s + 1000)) for s in range(200)]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert values.min() < 0


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_on_a_line(p):
    x, y = normal(200), 2 * normal(200, seed=1) + 1
    if p == 1:
        wanted = wasserstein_distance(x.numpy(), y.numpy())
    else:
        wanted = wasserstein_2(x[:, None], y[:, None])
    assert_exact(wasserstein_1d(x, y, p=p), wanted)


def test_wasserstein_2_is_the_best_of_all_assignments():
    from itertools import permutations

    x, y = normal(5, 2), normal(5, 2, seed=1)
    best = min((x - y[list(order)]).square().sum(1).mean() for order in permutations(range(5)))
    assert_exact(wasserstein_2(x, y), best.sqrt())


def test_frechet_distance_is_that_of_the_formula_with_a_matrix_root():
    x, y = normal(40, 3), normal(30, 3, seed=1) @ normal(3, 3, seed=2) + 1
    s_x, s_y = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    shift = (x.mean(0) - y.mean(0)).square().sum().item()
    wanted = shift + np.trace(s_x + s_y - 2 * sqrtm(s_x @ s_y).real)
    assert_exact(frechet_distance(x, y), wanted)


def test_frechet_distance_in_one_dimension():
    x, y = normal(40, 1), 2 * normal(30, 1, seed=1) + 1
    wanted = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert_exact(frechet_distance(x, y), wanted)


def test_near_points_are_not_lost_to_cancellation():
    x = 100 + normal(300, 2) * 1e-3
    assert wasserstein_2(x, x.clone()) == 0


def test_gradients_reach_the_samples():
    x = normal(6, 2).requires_grad_()
    for distance in (energy_distance, wasserstein_2, frechet_distance):
        (grad,) = torch.autograd.grad(distance(x, normal(6, 2, seed=1) + 1), x)
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


def test_refusals():
    one, two = torch.zeros(1, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="1 and 2 points: at least 2 each"):
        energy_distance(one, two)
    with pytest.raises(ValueError, match="1 and 2 points: at least 2 each"):
        frechet_distance(one, two)
    with pytest.raises(ValueError, match="1 and 2 points: the same number"):
        wasserstein_2(one, two)
    with pytest.raises(ValueError, match="3 and 2 points: the same number"):
        wasserstein_1d(torch.zeros(3), torch.zeros(2))
