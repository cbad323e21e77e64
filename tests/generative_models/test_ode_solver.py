import itertools
import math

import pytest
import torch

from zhizhi.generative_models.ode_solver import euler, heun, rk4


def field(x, t):
    return -x * (1 + t.cos())  # x = exp(-t - sin t)


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2), (rk4, 4)])
def test_the_error_falls_with_the_order(solve, order):
    errors = []
    for n in (20, 40, 80):
        times = torch.linspace(0, 2, n + 1, dtype=torch.float64)
        end = solve(field, torch.ones(1, dtype=torch.float64), times)[-1].item()
        errors.append(abs(end - math.exp(-2 - math.sin(2))))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solve", [heun, rk4])
def test_backwards_leads_back(solve):
    times = torch.linspace(0, 1, 200, dtype=torch.float64)
    there = solve(field, torch.ones(2, dtype=torch.float64), times)
    back = solve(field, there[-1], times.flip(0))
    assert there.shape == (200, 2)
    torch.testing.assert_close(back[-1], there[0], atol=1e-4, rtol=0.0)


def test_a_straight_line_takes_one_step():
    times = torch.tensor([0.0, 1.0])
    for solve in (euler, heun, rk4):
        assert solve(lambda x, t: torch.full_like(x, 2.0), torch.zeros(1), times)[-1].item() == 2.0


@pytest.mark.parametrize("solve", [euler, heun, rk4])
def test_a_grid_needs_a_step(solve):
    with pytest.raises(ValueError, match="the grid has 1 times"):
        solve(field, torch.zeros(1), torch.zeros(1))
