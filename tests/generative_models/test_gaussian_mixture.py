"""The mixture against autograd of its density, torch.distributions, quadrature and Monte Carlo."""

import pytest
import torch
from tests.closeness import assert_exact
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from zhizhi.generative_models.gaussian_mixture import (
    GaussianMixture,
    component_posterior,
    denoise,
    log_prob,
    predict_noise,
    sample,
    sample_components,
    sample_given,
    score,
    velocity,
)

PATHS = [(1.0, 0.0), (1.0, 0.7), (0.8, 0.6), (0.3, 0.7), (0.0, 1.0)]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def three() -> GaussianMixture:
    return GaussianMixture(
        f64([0.5, 0.3, 0.2]), f64([[-2.0, 0.0], [1.0, 1.5], [0.5, -1.0]]), f64([0.5, 0.3, 0.8])
    )


def places(n: int = 50, d: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return 2 * torch.randn(n, d, generator=g, dtype=torch.float64)


def peer(m: GaussianMixture, a: float, b: float) -> MixtureSameFamily:
    scale = (a**2 * m.std**2 + b**2).sqrt()[:, None].expand_as(m.means)
    return MixtureSameFamily(
        Categorical(probs=m.weights), Independent(Normal(a * m.means, scale), 1)
    )


@pytest.mark.parametrize(("a", "b"), PATHS)
def test_the_log_density_is_that_of_torch_distributions(a: float, b: float) -> None:
    assert_exact(log_prob(three(), places(), a=a, b=b), peer(three(), a, b).log_prob(places()))


@pytest.mark.parametrize(("a", "b"), PATHS)
def test_the_score_is_the_gradient_of_the_log_density(a: float, b: float) -> None:
    x = places().requires_grad_()
    (expected,) = torch.autograd.grad(peer(three(), a, b).log_prob(x).sum(), x)
    assert_exact(score(three(), x.detach(), a=a, b=b), expected)


@pytest.mark.parametrize(("a", "b"), PATHS)
def test_the_posterior_of_a_component_is_the_gradient_by_its_log_weight(a: float, b: float) -> None:
    m, x = three(), places()
    log_w = m.weights.log().requires_grad_()
    for i in (0, 7, 49):
        parts = torch.stack(
            [
                Normal(a * mu, (a**2 * s**2 + b**2).sqrt()).log_prob(x[i]).sum()
                for mu, s in zip(m.means, m.std, strict=True)
            ]
        )
        (expected,) = torch.autograd.grad((log_w + parts).logsumexp(0), log_w)
        assert_exact(component_posterior(m, x, a=a, b=b)[i], expected)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.5), (0.8, 0.6), (0.5, 0.5)])
def test_denoiser_noise_and_velocity_are_means_over_a_grid_of_data(a: float, b: float) -> None:
    m = GaussianMixture(f64([0.6, 0.4]), f64([[-1.0], [1.5]]), f64([0.3, 0.5]))
    x_t = f64([[-2.0], [0.1], [0.7], [3.0]])
    x_0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = peer(m, 1.0, 0.0).log_prob(x_0[:, None])
    weight = (prior + Normal(a * x_0, b).log_prob(x_t)).softmax(dim=1)  # [4, grid]
    noise = (x_t - a * x_0) / b
    assert_exact(denoise(m, x_t, a=a, b=b)[:, 0], (weight * x_0).sum(1))
    assert_exact(predict_noise(m, x_t, a=a, b=b)[:, 0], (weight * noise).sum(1))
    moving = (weight * (-0.7 * x_0 + 1.3 * noise)).sum(1)
    assert_exact(velocity(m, x_t, a=a, b=b, d_a=-0.7, d_b=1.3)[:, 0], moving)


@pytest.mark.parametrize(("a", "b"), PATHS)
def test_data_and_noise_make_up_what_is_seen_and_the_score_is_the_noise(a: float, b: float) -> None:
    m, x = three(), places()
    x_hat, noise_hat = denoise(m, x, a=a, b=b), predict_noise(m, x, a=a, b=b)
    assert_exact(a * x_hat + b * noise_hat, x)
    assert_exact(noise_hat, -b * score(m, x, a=a, b=b))
    assert_exact(a * x_hat, x + b**2 * score(m, x, a=a, b=b))  # Tweedie


def test_the_denoiser_beats_its_neighbours_and_leaves_no_correlation() -> None:
    m, a, b, n = three(), 0.8, 0.6, 200_000
    g = torch.Generator().manual_seed(1)
    x_0 = sample(m, n, generator=g)
    noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x_t = a * x_0 + b * noise
    for truth, guess in (
        (x_0, denoise(m, x_t, a=a, b=b)),
        (noise, predict_noise(m, x_t, a=a, b=b)),
        (noise - x_0, velocity(m, x_t, a=a, b=b, d_a=-1.0, d_b=1.0)),
    ):
        for feature in (torch.ones_like(x_t), x_t, x_t.sin(), guess):
            left = ((truth - guess) * feature).sum(1)  # orthogonal to any function of x_t
            assert left.mean().abs() < 4 * left.std() / n**0.5


def test_samples_have_the_moments_and_the_shares_of_the_mixture() -> None:
    m, n = three(), 100_000
    g = torch.Generator().manual_seed(2)
    x = sample(m, n, generator=g)
    mean = m.weights @ m.means
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / n**0.5).all()
    second = m.weights @ (m.means.square() + m.std.square()[:, None])
    assert ((x.square().mean(0) - second).abs() < 4 * x.square().std(0) / n**0.5).all()
    k = sample_components(m, n, generator=g)
    share = torch.bincount(k, minlength=3) / n
    assert ((share - m.weights).abs() < 4 * (m.weights * (1 - m.weights) / n).sqrt()).all()
    own = sample_given(m, k, generator=g) - m.means[k]
    spread = torch.stack([own[k == i].std() for i in range(3)])
    assert ((spread / m.std - 1).abs() < 4 / (2 * 2 * 0.2 * n) ** 0.5).all()


def test_the_same_generator_gives_the_same_samples() -> None:
    draws = [sample(three(), 9, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_coefficients_may_differ_from_sample_to_sample() -> None:
    m, x = three(), places(5)
    a, b = f64([1.0, 0.8, 0.5, 0.3, 0.0]), f64([0.1, 0.6, 0.5, 0.9, 1.0])
    d_a, d_b = -a, 2 * b
    every = velocity(m, x, a=a, b=b, d_a=d_a, d_b=d_b)
    for i in range(5):
        one = {"a": a[i].item(), "b": b[i].item()}
        assert_exact(log_prob(m, x, a=a, b=b)[i], log_prob(m, x[i], **one))
        assert_exact(score(m, x, a=a, b=b)[i], score(m, x[i], **one))
        assert_exact(denoise(m, x, a=a, b=b)[i], denoise(m, x[i], **one))
        rates = {"d_a": d_a[i].item(), "d_b": d_b[i].item()}
        assert_exact(every[i], velocity(m, x[i], **one, **rates))
    grid = places(12).reshape(3, 4, 2)
    assert_exact(score(m, grid, a=0.8, b=0.6)[2, 1], score(m, grid[2, 1], a=0.8, b=0.6))


def test_the_limits_are_no_noise_and_no_data() -> None:
    m, x = three(), places()
    assert_exact(denoise(m, x), x)
    assert_exact(predict_noise(m, x), torch.zeros_like(x))
    assert_exact(denoise(m, x, a=0, b=1), (m.weights @ m.means).expand_as(x))
    assert_exact(score(m, x, a=0, b=2), -x / 4)


def test_points_are_a_data_set_whose_denoiser_is_a_softmax_over_distances() -> None:
    points = places(6)
    m = GaussianMixture(torch.full((6,), 1 / 6).double(), points, torch.zeros(6).double())
    x = places(3)
    weight = (-torch.cdist(x, points).square() / (2 * 0.5**2)).softmax(dim=1)
    assert_exact(denoise(m, x, b=0.5), weight @ points)
    assert (torch.cdist(sample(m, 20), points).min(dim=1).values == 0).all()


def test_far_from_all_components_nothing_underflows() -> None:
    x = f64([[1e3, -1e3]])
    assert log_prob(three(), x).isfinite().all()
    assert score(three(), x).isfinite().all()
    assert_exact(component_posterior(three(), x).sum(), 1.0)


def test_the_result_has_the_dtype_of_the_place() -> None:
    x = places().float()
    for out in (
        log_prob(three(), x, b=1),
        score(three(), x, b=1),
        denoise(three(), x, b=f64(1.0)),
        predict_noise(three(), x, b=1),
        velocity(three(), x, a=1, b=1, d_a=-1, d_b=1),
    ):
        assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GaussianMixture(f64([0.5, 0.6]), f64([[0.0], [1.0]]), f64([1.0, 1.0])),
            r"^the smallest weight is 0\.5 and the sum is 1\.1: "
            r"weights are non-negative and sum to 1\.$",
        ),
        (
            lambda: GaussianMixture(f64([-0.5, 1.5]), f64([[0.0], [1.0]]), f64([1.0, 1.0])),
            r"^the smallest weight is -0\.5 and the sum is 1: ",
        ),
        (
            lambda: GaussianMixture(f64([1.0]), f64([[0.0]]), f64([-1.0])),
            r"^the smallest std is -1: std >= 0\.$",
        ),
        (
            lambda: score(GaussianMixture(f64([1.0]), f64([[0.0]]), f64([0.0])), f64([[1.0]])),
            r"^the smallest a\^2 s\^2 \+ b\^2 is 0: "
            r"a point has no density, so it must be positive\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
