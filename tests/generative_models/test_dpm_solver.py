import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_sample, ddim_times
from zhizhi.generative_models.dpm_solver import (
    dpm_solver_pp_sample,
    dpm_solver_pp_step,
    dpm_solver_sample,
    dpm_solver_step,
)
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.noise_schedule import alpha_bar, linear_beta
from zhizhi.generative_models.ode_solver import rk4
from zhizhi.generative_models.paths import straight_path
from zhizhi.generative_models.prediction import Path

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0], [0.0], [1.5]], dtype=torch.float64),
    torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64),
)
FORMS = {
    "noise": (dpm_solver_step, dpm_solver_sample),
    "data": (dpm_solver_pp_step, dpm_solver_pp_sample),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vp(lam):
    return Path((2 * lam).sigmoid().sqrt(), (-2 * lam).sigmoid().sqrt())


def straight(lam):
    return Path(lam.sigmoid(), (-lam).sigmoid())


def ve(lam):
    return Path(torch.ones_like(lam), (-lam).exp())


def grid(low, high, n):
    return torch.linspace(low, high, n + 1, dtype=torch.float64)


def noise(x, path):
    return gaussian_mixture.predict_noise(MIXTURE, x, a=path.a, b=path.b)


def data(x, path):
    return gaussian_mixture.denoise(MIXTURE, x, a=path.a, b=path.b)


def truth(x, lam, n=8):
    """x at all lam, by Runge-Kutta on d(x / a) = eps d(b / a) between neighbours."""

    def field(y, sigma):
        return noise(y, Path(torch.ones_like(sigma), sigma))

    points = [x]
    for here, there in itertools.pairwise(lam):
        ratio = (-torch.linspace(here.item(), there.item(), n + 1, dtype=torch.float64)).exp()
        y = rk4(field, points[-1] / vp(here).a, ratio)[-1]
        points.append(y * vp(there).a)
    return points


def slopes(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


START = truth(normal(200, 1), grid(-3.0, 0.2, 1), 60)[-1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_error_of_one_step_falls_with_one_order_more_than_the_order(form, K):
    step, model = FORMS[form][0], noise if form == "noise" else data
    errors = []
    for h in (0.1, 0.05, 0.025):
        lam = 0.2 + h * torch.arange(K + 1, dtype=torch.float64)
        points = truth(START, lam)
        seen = torch.stack([model(x, vp(m)) for x, m in zip(points[:-1], lam[:-1], strict=True)])
        errors.append((step(points[-2], seen, vp(lam)) - points[-1]).abs().mean().item())
    assert all(abs(slope - (K + 1)) < 0.35 for slope in slopes(errors)), slopes(errors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2])
def test_the_error_of_the_whole_way_falls_with_the_order(form, order):
    model, x = noise if form == "noise" else data, normal(200, 1)
    end = truth(x, grid(-5, 4, 1), 300)[-1]
    errors = [
        (FORMS[form][1](model, x, vp(grid(-5, 4, n)), order=order)[-1] - end).abs().mean().item()
        for n in (20, 40, 80)
    ]
    assert all(abs(slope - order) < 0.25 for slope in slopes(errors)), slopes(errors)


@pytest.mark.parametrize("form", FORMS)
def test_the_third_order_needs_the_whole_second_derivative(form):
    """With half of D_2, as published code has it, the step is of order 2 (see the page)."""
    step, model = FORMS[form][0], noise if form == "noise" else data
    errors = []
    for h in (0.05, 0.025, 0.0125):
        lam = 0.2 + h * torch.arange(4, dtype=torch.float64)
        points, path = truth(START, lam), vp(lam)
        seen = torch.stack([model(x, vp(m)) for x, m in zip(points[:-1], lam[:-1], strict=True)])
        signed, last = (h, path.b[-1]) if form == "noise" else (-h, path.a[-1])
        phi_3 = ((math.expm1(signed) - signed) / signed**2) - 0.5
        half = (seen[2] - 2 * seen[1] + seen[0]) / 2  # D_2 / 2 on an even grid
        theirs = step(points[-2], seen, path) + last * phi_3 * half
        errors.append((theirs - points[-1]).abs().mean().item())
    assert abs(slopes(errors)[-1] - 3) < 0.35, slopes(errors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_a_step_integrates_polynomials_of_its_degree_exactly(form, K):
    """By Simpson's rule on the integral of (eq:pfode-dpm-exact), on an uneven grid."""
    lam = torch.tensor([-0.9, -0.2, 0.3, 1.1], dtype=torch.float64)[-(K + 1) :]
    path, x = vp(lam), torch.tensor(0.7, dtype=torch.float64)
    shape = [0.4, -0.6, 0.9][:K]

    def prediction(m):
        return sum(c * m**i for i, c in enumerate(shape))

    fine = torch.linspace(lam[-2].item(), lam[-1].item(), 2001, dtype=torch.float64)
    weight = torch.ones(2001, dtype=torch.float64)
    weight[1:-1:2], weight[2:-1:2] = 4, 2
    weight = weight * (fine[1] - fine[0]) / 3
    if form == "noise":
        integral = (weight * (-fine).exp() * prediction(fine)).sum()
        wanted = path.a[-1] / path.a[-2] * x - path.a[-1] * integral
    else:
        integral = (weight * fine.exp() * prediction(fine)).sum()
        wanted = path.b[-1] / path.b[-2] * x + path.b[-1] * integral
    found = FORMS[form][0](x, prediction(lam[:-1]), path)
    if K == 2:  # phi_1 / 2 in place of phi_2: of the same order, not the same number
        h = lam[-1] - lam[-2]
        sign, last = (1, path.b[-1]) if form == "noise" else (-1, path.a[-1])
        phi_1 = torch.expm1(sign * h)
        found = found + last * (phi_1 / 2 - (phi_1 / (sign * h) - 1)) * shape[1] * h
    assert_exact(found, wanted)


def test_order_one_of_both_forms_is_ddim():
    shares = alpha_bar(linear_beta(n_steps=1000))
    times = ddim_times(1000, 12)
    x = normal(6, 1)

    def at_times(x, t):
        a, b = shares[t[0]].sqrt(), (1 - shares[t[0]]).sqrt()
        return noise(x, Path(a, b))

    ours = ddim_sample(at_times, x, alpha_bar=shares, times=times)
    path = Path(shares[times].sqrt(), (1 - shares[times]).sqrt())
    assert_exact(dpm_solver_pp_sample(data, x, path, order=1), ours)
    inner = Path(path.a[:-1], path.b[:-1])
    assert_exact(dpm_solver_sample(noise, x, inner, order=1), ours[:-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_of_a_path_only_lambda_matters(form, order):
    """(eq:pfode-dpm-exact): x / a depends on lambda alone, so all paths give one answer."""
    model, sample = noise if form == "noise" else data, FORMS[form][1]
    lam, x = grid(-3, 3, 9), normal(5, 1)
    ends = []
    for path_of in (vp, straight, ve):
        path = path_of(lam)
        ends.append(sample(model, path.a[0] * x, path, order=order)[-1] / path.a[-1])
    assert_exact(ends[1], ends[0])
    assert_exact(ends[2], ends[0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_data_form_walks_from_pure_noise_to_pure_data(order):
    path = straight_path(torch.linspace(1, 0, 11, dtype=torch.float64))
    x = normal(100, 1)
    end = dpm_solver_pp_sample(data, x, path, order=order)[-1]
    assert end.isfinite().all()
    ratio = torch.exp(-grid(-7, 6, 300))
    fine = rk4(lambda y, s: noise(y, Path(torch.ones_like(s), s)), x * ratio[0], ratio)[-1]
    assert (end - fine).abs().mean() < (0.15 if order == 1 else 0.06)


def test_a_constant_prediction_is_followed_exactly_in_one_step():
    path, x_0, eps = vp(grid(-2, 2, 1)), normal(4), normal(4, seed=1)
    x, wanted = (path.a[i] * x_0 + path.b[i] * eps for i in range(2))
    assert_exact(dpm_solver_step(x, eps[None], path), wanted)
    assert_exact(dpm_solver_pp_step(x, x_0[None], path), wanted)


def test_the_way_back_is_the_way_forth():
    x, lam = normal(50, 1), grid(-4, 3, 60)
    there = dpm_solver_sample(noise, x, vp(lam), order=2)[-1]
    back = dpm_solver_sample(noise, there, vp(lam.flip(0)), order=2)[-1]
    assert (back - x).abs().mean() < 0.01


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [False, True])
def test_orders_rise_at_the_start_and_fall_at_the_end_if_asked(order, lower):
    lam, x = grid(-2, 2, 5), normal(3, 1)
    path = vp(lam)
    walked = dpm_solver_pp_sample(data, x, path, order=order, lower_order_final=lower)
    y, seen = x, []
    wanted = {1: [1, 1, 1, 1, 1], 2: [1, 2, 2, 2, 2], 3: [1, 2, 3, 3, 3]}[order]
    falling = {1: [1, 1, 1, 1, 1], 2: [1, 2, 2, 2, 1], 3: [1, 2, 3, 2, 1]}[order]
    for i, K in enumerate(falling if lower else wanted):
        seen.append(data(y, Path(path.a[i], path.b[i])))
        here = slice(i + 1 - K, i + 2)
        y = dpm_solver_pp_step(y, torch.stack(seen[-K:]), Path(path.a[here], path.b[here]))
        assert_exact(walked[i + 1], y)


def test_refusals():
    path, x = vp(grid(-1, 1, 4)), normal(2)
    with pytest.raises(ValueError, match=r"order is 4: 1, 2 or 3\."):
        dpm_solver_sample(noise, x, path, order=4)
    with pytest.raises(ValueError, match="the path has 1 points: at least 2"):
        dpm_solver_pp_sample(data, x, vp(torch.zeros(1)), order=1)
    with pytest.raises(ValueError, match="there are 4 predictions: 1, 2 or 3"):
        dpm_solver_step(x, normal(4, 2), path)
    with pytest.raises(ValueError, match="there are 0 predictions"):
        dpm_solver_pp_step(x, normal(0, 2), path)
    with pytest.raises(ValueError, match="2 predictions and 5 points: one point more"):
        dpm_solver_pp_step(x, normal(2, 2), path)
    up = Path(torch.tensor([1.0, 0.8, 0.0]), torch.tensor([0.0, 0.6, 1.0]))
    down = Path(up.b, up.a)
    for step, good, bad in ((dpm_solver_step, up, down), (dpm_solver_pp_step, down, up)):
        letter = "a" if step is dpm_solver_step else "b"
        with pytest.raises(ValueError, match=f"K is 2 and {letter} is 0 at the end: only K = 1"):
            step(x, normal(2, 2), good)
        for ends in (slice(0, 2), slice(1, 3)):
            assert step(x, normal(1, 2), Path(good.a[ends], good.b[ends])).isfinite().all()
            with pytest.raises(ValueError, match=f"{letter} is 0 at the start or"):
                step(x, normal(1, 2), Path(bad.a[ends], bad.b[ends]))


def test_each_form_goes_to_and_from_the_end_where_its_prediction_is_all():
    """Noise form up to a = 0: x is the noise; data form down to b = 0: x is the data."""
    up = Path(torch.tensor([0.8, 0.0]), torch.tensor([0.6, 1.0]))
    x, seen = normal(3), normal(1, 3, seed=1)
    assert_exact(dpm_solver_step(x, seen, up), seen[0])
    assert_exact(dpm_solver_pp_step(x, seen, Path(up.b, up.a)), seen[0])
