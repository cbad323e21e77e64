"""Score matching: quadrature of the identities, closed forms of Gaussians, chains at rest."""

import itertools
import math

import numpy as np
import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.divergence import rademacher_like
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.score_matching import (
    annealed_langevin,
    denoising_score_matching_loss,
    explicit_score_matching_loss,
    geometric_sigmas,
    implicit_score_matching_loss,
    langevin_step,
    noise_conditional_loss,
    sliced_score_matching_loss,
    sliced_score_matching_vr_loss,
    tweedie,
)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


MIXTURE = GaussianMixture(
    f64([0.5, 0.3, 0.2]), f64([[-1, 0], [1, 1], [0.5, -1]]), f64([0.5, 0.4, 0.6])
)


def model(x: torch.Tensor) -> torch.Tensor:
    """Return a field that is no gradient of anything."""
    g = torch.Generator().manual_seed(0)
    w_1 = torch.randn(2, 8, generator=g, dtype=torch.float64)
    w_2 = torch.randn(8, 2, generator=g, dtype=torch.float64)
    return (x @ w_1).tanh() @ w_2 / 3 - x / 2


def grid(n: int = 161, edge: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places in the plane, and the area that each stands for."""
    line = torch.linspace(-edge, edge, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2


def average(loss: torch.Tensor, x: torch.Tensor, area: torch.Tensor, b: float = 0.0) -> float:
    return (gaussian_mixture.log_prob(MIXTURE, x, b=b).exp() * loss).sum().item() * area.item()


def test_the_implicit_loss_is_the_explicit_one_less_a_constant() -> None:
    x, area = grid()
    score = gaussian_mixture.score(MIXTURE, x)
    constant = average(0.5 * score.square().sum(1), x, area)
    with torch.no_grad():
        for field in (model, lambda y: -y, lambda y: gaussian_mixture.score(MIXTURE, y)):
            explicit = average(explicit_score_matching_loss(field, x, score), x, area)
            implicit = average(implicit_score_matching_loss(field, x), x, area)
            assert explicit == pytest.approx(implicit + constant, abs=1e-10)


@pytest.mark.parametrize("sliced", [sliced_score_matching_loss, sliced_score_matching_vr_loss])
def test_the_mean_over_all_signs_of_a_sliced_loss_is_the_implicit_one(sliced) -> None:
    x = grid(9)[0]
    with torch.no_grad():
        losses = [
            sliced(model, x, f64(v).expand_as(x)) for v in itertools.product([-1, 1], repeat=2)
        ]
        assert_exact(torch.stack(losses).mean(0), implicit_score_matching_loss(model, x))


def test_the_mean_over_a_normal_direction_is_the_implicit_loss_too() -> None:
    nodes, weights = (f64(a) for a in np.polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    x = grid(5)[0]
    with torch.no_grad():
        for sliced in (sliced_score_matching_loss, sliced_score_matching_vr_loss):
            total = torch.zeros(len(x), dtype=torch.float64)
            for (a, p), (b, q) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
                total += p * q * sliced(model, x, torch.stack([a, b]).expand_as(x))
            assert_exact(total, implicit_score_matching_loss(model, x))


def test_unit_vectors_scale_the_sliced_loss_and_spoil_the_other() -> None:
    x = grid(9)[0]
    unit = [f64(v) / math.sqrt(2) for v in itertools.product([-1, 1], repeat=2)]
    with torch.no_grad():
        whole = implicit_score_matching_loss(model, x)
        plain = torch.stack([sliced_score_matching_loss(model, x, v.expand_as(x)) for v in unit])
        reduced = torch.stack(
            [sliced_score_matching_vr_loss(model, x, v.expand_as(x)) for v in unit]
        )
    assert_exact(plain.mean(0), whole / 2)
    assert_exact(reduced.mean(0), whole / 2 + model(x).square().sum(1) / 4)


def test_the_denoising_loss_is_the_explicit_one_of_the_noised_data_and_a_constant() -> None:
    sigma = 0.7
    nodes, weights = (f64(a) for a in np.polynomial.hermite_e.hermegauss(24))
    weights = weights / weights.sum()
    x, area = grid(61, 5.0)
    y, area_y = grid(121, 8.0)
    score = gaussian_mixture.score(MIXTURE, y, b=sigma)
    fisher = average(score.square().sum(1), y, area_y, b=sigma)
    constant = 0.5 * (2 / sigma**2 - fisher)
    for field in (model, lambda y: gaussian_mixture.score(MIXTURE, y, b=sigma)):
        denoising = torch.zeros(len(x), dtype=torch.float64)
        for (a, p), (b, q) in itertools.product(zip(nodes, weights, strict=True), repeat=2):
            if p * q < 1e-13:
                continue
            noise = torch.stack([a, b]).expand_as(x)
            denoising += p * q * denoising_score_matching_loss(field, x, noise, sigma=sigma)
        explicit = average(explicit_score_matching_loss(field, y, score), y, area_y, b=sigma)
        assert average(denoising, x, area) == pytest.approx(explicit + constant, abs=1e-8)
    assert constant > 0.1  # what the best model is left with


def test_denoising_learns_the_score_of_the_noised_data_and_not_of_the_data() -> None:
    s, sigma = 0.8, 0.6  # x ~ N(0, s^2) in one dimension, score model -w x
    nodes, weights = (f64(a) for a in np.polynomial.hermite_e.hermegauss(6))
    weights = weights / weights.sum()
    w = f64(1.0).requires_grad_()
    loss = sum(
        p
        * q
        * denoising_score_matching_loss(
            lambda y: -w * y, s * a.reshape(1, 1), b.reshape(1, 1), sigma=sigma
        )
        for (a, p), (b, q) in itertools.product(zip(nodes, weights, strict=True), repeat=2)
    ).sum()
    (slope,) = torch.autograd.grad(loss, w)
    best = 1 - slope / (s**2 + sigma**2)  # one Newton step: the loss is quadratic
    assert_exact(best.detach(), 1 / (s**2 + sigma**2))
    assert abs(best.item() - 1 / s**2) > 0.5


def test_the_implicit_loss_of_a_finite_data_set_has_no_bottom() -> None:
    x = grid(3)[0]
    losses = []
    for h in (1.0, 0.1, 0.01):

        def spiky(y, h=h):  # at each point a Gaussian of width h
            nearest = torch.cdist(y, x).argmin(1)
            return -(y - x[nearest]) / h**2

        with torch.no_grad():
            losses.append(implicit_score_matching_loss(spiky, x).mean().item())
    assert losses == pytest.approx([-2.0, -200.0, -20_000.0])


def test_each_coordinate_costs_the_implicit_loss_a_backward_pass(monkeypatch) -> None:
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    x = torch.zeros(3, 7)
    implicit_score_matching_loss(lambda y: -y, x)
    assert len(calls) == 7
    calls.clear()
    sliced_score_matching_loss(lambda y: -y, x, rademacher_like(x))
    assert len(calls) == 1
    calls.clear()
    denoising_score_matching_loss(lambda y: -y, x, x, sigma=1.0)
    assert len(calls) == 0


def test_the_score_does_not_see_the_weights_of_modes_far_apart() -> None:
    at_modes = f64([[-8.0], [-7.0], [7.5], [8.0]])
    scores = [
        gaussian_mixture.score(
            GaussianMixture(f64(w), f64([[-8.0], [8.0]]), f64([1.0, 1.0])), at_modes
        )
        for w in ([0.8, 0.2], [0.5, 0.5])
    ]
    assert_exact(*scores)


@pytest.mark.parametrize("sigma", [0.3, 1.0, f64([0.1, 0.5, 2.0, 3.0])])
def test_tweedie_is_the_posterior_mean_of_the_mixture(sigma) -> None:
    x = f64([[0.0, 0.0], [1.0, 2.0], [-3.0, 0.5], [4.0, -4.0]])
    score = gaussian_mixture.score(MIXTURE, x, b=sigma)
    assert_exact(tweedie(x, score, sigma=sigma), gaussian_mixture.denoise(MIXTURE, x, b=sigma))


def test_a_row_may_have_a_noise_of_its_own() -> None:
    x, noise = grid(2)[0], grid(2)[0].flip(1)
    sigma = f64([0.1, 0.5, 1.0, 2.0])
    whole = denoising_score_matching_loss(model, x, noise, sigma=sigma)
    for i in range(4):
        row = denoising_score_matching_loss(
            model, x[i : i + 1], noise[i : i + 1], sigma=sigma[i].item()
        )
        x_tilde = x[i] + sigma[i] * noise[i]
        by_hand = 0.5 * (model(x_tilde[None])[0] + (x_tilde - x[i]) / sigma[i] ** 2).square().sum()
        assert_exact(whole[i], row[0])
        assert_exact(whole[i], by_hand)


def test_the_noise_conditional_loss_weighs_each_level_with_its_variance() -> None:
    sigmas = geometric_sigmas(first=2.0, last=0.1, n_levels=4)
    x = gaussian_mixture.sample(MIXTURE, 50, generator=torch.Generator().manual_seed(0))
    seen = []

    def score_fn(y, sigma):
        seen.append((y, sigma))
        return -y

    loss = noise_conditional_loss(
        score_fn, x, sigmas=sigmas, generator=torch.Generator().manual_seed(1)
    )
    ((y, sigma),) = seen
    assert set(sigma.tolist()) == set(sigmas.tolist())
    noise = (y - x) / sigma[:, None]
    assert_exact(loss, 0.5 * (-sigma[:, None] * y + noise).square().sum(1))


def test_a_silent_model_pays_half_the_dimension_at_every_level() -> None:
    x = torch.zeros(100_000, 3, dtype=torch.float64)
    sigmas = geometric_sigmas(first=10.0, last=0.01, n_levels=5)
    loss = noise_conditional_loss(
        lambda y, sigma: 0 * y, x, sigmas=sigmas, generator=torch.Generator().manual_seed(0)
    )
    assert abs(loss.mean().item() - 1.5) < 4 * loss.std().item() / len(x) ** 0.5


def test_levels_have_a_constant_ratio() -> None:
    sigmas = geometric_sigmas(first=1.0, last=0.01, n_levels=10)
    assert_exact(sigmas[[0, -1]], [1.0, 0.01])
    assert_exact(sigmas[1:] / sigmas[:-1], [0.01 ** (1 / 9)] * 9)


def test_a_step_is_half_a_step_along_the_score_and_a_root_of_noise() -> None:
    x, score = grid(3)[0], -grid(3)[0]
    z = torch.randn(9, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = langevin_step(x, score, step_size=0.3, generator=torch.Generator().manual_seed(4))
    assert_exact(step, x + 0.15 * score + math.sqrt(0.3) * z)


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.6])
def test_chains_come_to_rest_wider_than_the_density_by_a_known_factor(alpha: float) -> None:
    s_squared, n = 0.25, 100_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    for _ in range(400 if alpha < 0.1 else 60):
        x = langevin_step(x, -x / s_squared, step_size=alpha, generator=g)
    expected = s_squared / (1 - alpha / (4 * s_squared))
    assert abs(x.var().item() / expected - 1) < 4 * (2 / n) ** 0.5


def test_a_step_over_four_variances_blows_up() -> None:
    x = torch.ones(10, 1, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = langevin_step(x, -x / 0.25, step_size=1.2, generator=g)
    assert x.abs().max() > 1e6


def test_the_last_level_has_the_step_and_the_first_a_larger_one() -> None:
    steps = []

    def score_fn(x, sigma):
        steps.append(sigma[0].item())
        return torch.zeros_like(x)

    x = torch.zeros(200_000, 1, dtype=torch.float64)
    sigmas = f64([2.0, 1.0])
    g = torch.Generator().manual_seed(0)
    x = annealed_langevin(score_fn, x, sigmas=sigmas, n_steps_each=3, step_size=0.1, generator=g)
    assert steps == [2.0] * 3 + [1.0] * 3
    expected = 3 * 0.1 * 4 + 3 * 0.1  # without a score the variances of the steps add
    assert abs(x.var().item() / expected - 1) < 4 * (2 / len(x)) ** 0.5


def test_annealing_finds_the_weights_that_plain_chains_lose() -> None:
    far = GaussianMixture(f64([0.8, 0.2]), f64([[-8.0], [8.0]]), f64([1.0, 1.0]))
    g = torch.Generator().manual_seed(0)
    start = 20 * torch.rand(1000, 1, generator=g, dtype=torch.float64) - 10

    def score_fn(x, sigma):
        return gaussian_mixture.score(far, x, b=sigma)

    sigmas = geometric_sigmas(first=20.0, last=0.1, n_levels=12)
    annealed = annealed_langevin(
        score_fn, start, sigmas=sigmas, n_steps_each=50, step_size=0.002, generator=g
    )
    plain = annealed_langevin(
        score_fn, start, sigmas=sigmas[-1:], n_steps_each=600, step_size=0.1, generator=g
    )
    error = 4 * (0.25 / 1000) ** 0.5
    assert abs((plain < 0).double().mean().item() - 0.5) < error
    assert abs((annealed < 0).double().mean().item() - 0.8) < error + 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: denoising_score_matching_loss(model, f64([[1, 2]]), f64([[0, 0]]), sigma=0.0),
            r"^the smallest sigma is 0: sigma > 0\.$",
        ),
        (
            lambda: tweedie(f64([[1.0]]), f64([[1.0]]), sigma=-0.5),
            r"^the smallest sigma is -0\.5: sigma > 0\.$",
        ),
        (
            lambda: geometric_sigmas(first=1.0, last=0.1, n_levels=1),
            r"^n_levels is 1: n_levels >= 2\.$",
        ),
        (
            lambda: geometric_sigmas(first=0.1, last=1.0, n_levels=3),
            r"^first is 0\.1 and last is 1\.0: 0 < last < first\.$",
        ),
        (
            lambda: langevin_step(f64([[1.0]]), f64([[1.0]]), step_size=0.0),
            r"^step_size is 0\.0: step_size > 0\.$",
        ),
        (
            lambda: annealed_langevin(
                lambda x, sigma: x,
                f64([[1.0]]),
                sigmas=f64([1.0, 2.0]),
                n_steps_each=1,
                step_size=1.0,
            ),
            r"^sigmas are \[1\.0, 2\.0\]: each is smaller than the one before\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
