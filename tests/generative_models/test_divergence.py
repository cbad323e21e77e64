"""Divergence: against Jacobians worked out by hand, and the variance of the estimate."""

import itertools

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models.divergence import (
    rademacher_like,
    value_and_divergence,
    value_and_hutchinson,
)

D = 4


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(D, D, generator=g, dtype=torch.float64) for _ in range(2))


def field(x: torch.Tensor) -> torch.Tensor:
    w_1, w_2 = weights()
    return (x @ w_1).tanh() @ w_2 + x.sin()


def places(n: int = 6) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def jacobians(x: torch.Tensor) -> torch.Tensor:
    w_1, w_2 = weights()
    slope = 1 - (x @ w_1).tanh().square()
    through = torch.einsum("kj,nk,ik->nji", w_2, slope, w_1)
    return through + torch.diag_embed(x.cos())


def test_the_divergence_is_the_trace_of_the_jacobian() -> None:
    value, divergence = value_and_divergence(field, places())
    assert_exact(value, field(places()))
    assert_exact(divergence, jacobians(places()).diagonal(dim1=1, dim2=2).sum(1))


def test_the_average_over_all_signs_is_the_divergence() -> None:
    x = places()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)
    estimates = [value_and_hutchinson(field, x, v.expand_as(x))[1] for v in signs]
    assert_exact(torch.stack(estimates).mean(0), value_and_divergence(field, x)[1])
    assert_exact(value_and_hutchinson(field, x, x)[0], field(x))


def test_an_estimate_is_the_quadratic_form_of_its_probe() -> None:
    x, v = places(), places().flip(0)
    form = torch.einsum("ni,nij,nj->n", v, jacobians(x), v)
    assert_exact(value_and_hutchinson(field, x, v)[1], form)


def test_the_variance_is_that_of_the_symmetric_part_and_signs_spare_its_diagonal() -> None:
    a, n = weights()[0], 400_000
    symmetric = (a + a.T) / 2
    squares = symmetric.square()
    x = torch.zeros(n, D, dtype=torch.float64)
    g = torch.Generator().manual_seed(2)
    normal = torch.randn(n, D, generator=g, dtype=torch.float64)
    for v, expected in (
        (normal, 2 * squares.sum()),
        (rademacher_like(x, generator=g), 2 * (squares.sum() - squares.diagonal().sum())),
    ):
        with torch.no_grad():
            estimate = value_and_hutchinson(lambda y: y @ a.T, x, v)[1]
        spread = (estimate - estimate.mean()).square()
        assert (spread.mean() - expected).abs() < 4 * spread.std() / n**0.5
        assert (estimate.mean() - a.trace()).abs() < 4 * estimate.std() / n**0.5


def test_parameters_are_trained_through_both() -> None:
    w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    for result in (
        value_and_divergence(lambda y: w * y**2, x)[1],  # 2 w_i x_i
        value_and_hutchinson(lambda y: w * y**2, x, torch.ones_like(x))[1],
    ):
        (grad,) = torch.autograd.grad(result.sum(), w)
        assert_exact(grad, 2 * x.sum(0))


def test_a_place_that_wants_gradients_gets_them() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value_and_divergence(lambda y: y**3, x)[1].sum(), x)
    assert_exact(grad, 6 * x.detach())


@pytest.mark.parametrize("probe", [False, True])
def test_without_gradients_the_results_are_numbers_and_the_input_is_as_it_was(probe: bool) -> None:
    x = places()
    with torch.no_grad():
        pair = value_and_hutchinson(field, x, x) if probe else value_and_divergence(field, x)
    assert not any(out.requires_grad for out in pair)
    assert not x.requires_grad
    assert x.grad is None


def test_a_coordinate_that_is_not_used_adds_nothing() -> None:
    w = torch.ones(1, requires_grad=True)
    x = torch.ones(2, 2)
    _, divergence = value_and_divergence(lambda y: w.expand(2, 2), x)
    assert divergence.tolist() == [0.0, 0.0]


def test_signs_are_fair_independent_and_reproducible() -> None:
    x = torch.zeros(100_000, 3, dtype=torch.float64)
    v = rademacher_like(x, generator=torch.Generator().manual_seed(0))
    assert v.dtype == torch.float64
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    off = v.T @ v / len(v) - torch.eye(3)
    assert (off.abs() < 4 / len(v) ** 0.5).all()
    assert (v.mean(0).abs() < 4 / len(v) ** 0.5).all()
    assert torch.equal(v, rademacher_like(x, generator=torch.Generator().manual_seed(0)))


def test_batch_normalization_mixes_rows_and_has_no_divergence_of_its_own() -> None:
    def normalized(y):
        return (y - y.mean(0)) / y.std(0, unbiased=False)

    x = places()
    whole = value_and_divergence(normalized, x)[1]
    jacobian = torch.autograd.functional.jacobian(normalized, x)  # [N, D, N, D]
    alone = torch.einsum("ndnd->n", jacobian)
    assert (whole - alone).abs().max() > 0.1
