"""Two ways to the same guided score, and what neither of them samples."""

import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_step
from zhizhi.generative_models.ddpm import mean_from_noise
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.guidance import (
    classifier_free_guidance,
    classifier_gradient,
    classifier_guidance,
    classifier_guided_mean,
    drop_condition,
    guidance_interval,
    rescale_guidance,
)
from zhizhi.generative_models.ode_solver import rk4
from zhizhi.generative_models.prediction import KINDS, Path, convert


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Two classes of two components each.
MIXTURE = GaussianMixture(
    doubles([0.1, 0.2, 0.3, 0.4]),
    doubles([[-2.0, 0.0], [-1.0, 1.5], [1.0, 1.0], [1.5, -1.0]]),
    doubles([0.3, 0.5, 0.4, 0.6]),
)
CLASSES = [
    GaussianMixture(MIXTURE.weights[:2] / 0.3, MIXTURE.means[:2], MIXTURE.std[:2]),
    GaussianMixture(MIXTURE.weights[2:] / 0.7, MIXTURE.means[2:], MIXTURE.std[2:]),
]


def logits(a, b):
    """Return the classifier of Bayes on x_t = a x_0 + b eps."""

    def classifier(x):
        posterior = gaussian_mixture.component_posterior(MIXTURE, x, a=a, b=b)
        return torch.stack([posterior[:, :2].sum(dim=1), posterior[:, 2:].sum(dim=1)], dim=1).log()

    return classifier


@pytest.mark.parametrize(("a", "b"), [(0.9, 0.3), (0.5, 0.8), (1.0, 4.0)])
def test_the_rule_of_bayes_holds_for_scores_at_every_noise(a, b):
    """(eq:guidance-bayes), and (eq:guidance-noise) with scale 1."""
    x = 2 * normal(50, 2)
    for y in (0, 1):
        gradient = classifier_gradient(logits(a, b), x, torch.full((50,), y))
        plain = gaussian_mixture.predict_noise(MIXTURE, x, a=a, b=b)
        wanted = gaussian_mixture.predict_noise(CLASSES[y], x, a=a, b=b)
        assert_exact(classifier_guidance(plain, gradient, scale=1.0, b=b), wanted)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 7.5])
def test_classifier_guidance_equals_classifier_free_guidance(scale):
    """(eq:guidance-implicit); on a conditional base, gamma is s - 1."""
    a, b, x = 0.6, 0.8, normal(50, 2)
    gradient = classifier_gradient(logits(a, b), x, torch.ones(50, dtype=torch.long))
    plain = gaussian_mixture.predict_noise(MIXTURE, x, a=a, b=b)
    given = gaussian_mixture.predict_noise(CLASSES[1], x, a=a, b=b)
    free = classifier_free_guidance(given, plain, scale=scale)
    assert_exact(classifier_guidance(plain, gradient, scale=scale, b=b), free)
    assert_exact(classifier_guidance(given, gradient, scale=scale - 1, b=b), free)


def test_s_is_one_more_than_w():
    c, u, w = normal(5), normal(5, seed=1), 2.5
    assert_exact(classifier_free_guidance(c, u, scale=1 + w), (1 + w) * c - w * u)
    assert torch.equal(classifier_free_guidance(c, u, scale=0.0), u)
    assert_exact(classifier_free_guidance(c, u, scale=1.0), c)
    assert_exact(classifier_free_guidance(c, c, scale=7.5), c)  # no opinion, nothing happens
    each = classifier_free_guidance(
        c[:, None], u[:, None], scale=torch.arange(5.0).double()[:, None]
    )
    for i in range(5):
        assert_exact(each[i, 0], u[i] + i * (c[i] - u[i]))


def test_the_gradient_is_that_of_a_slow_difference():
    weight, x, label = normal(4, 3), normal(6, 4, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])

    def classifier(y):
        return y.sin() @ weight

    ours, h = classifier_gradient(classifier, x, label), 1e-5
    for i in range(6):
        for j in range(4):
            step = torch.zeros_like(x)
            step[i, j] = h
            up, down = (classifier(x + s * step).log_softmax(1)[i, label[i]] for s in (1, -1))
            assert abs((up - down) / (2 * h) - ours[i, j]) < 1e-8
    assert not ours.requires_grad
    with torch.no_grad():
        assert_exact(classifier_gradient(classifier, x, label), ours)


def test_the_mean_of_a_ddpm_step_moves_exactly_by_beta_over_root_alpha():
    """(eq:guidance-exact-mean): no Taylor series, and the gradient is the one at x_t."""
    share, before = doubles(0.4), doubles(0.5)
    a, b = share.sqrt(), (1 - share).sqrt()
    x = normal(20, 2)
    gradient = classifier_gradient(logits(a, b), x, torch.ones(20, dtype=torch.long))
    plain, given = (gaussian_mixture.predict_noise(p, x, a=a, b=b) for p in (MIXTURE, CLASSES[1]))
    mean, exact = (
        mean_from_noise(x, eps, alpha_bar_t=share, alpha_bar_prev=before) for eps in (plain, given)
    )
    alpha = share / before
    variance = (1 - alpha) / alpha.sqrt()
    assert_exact(classifier_guided_mean(mean, gradient, scale=1.0, variance=variance), exact)

    # The posterior mean of x_s given x_t and y, by quadrature over x_s in one dimension.
    one = GaussianMixture(doubles([0.3, 0.7]), doubles([[-1.0], [2.0]]), doubles([0.5, 0.4]))
    x_t, grid = doubles([[0.3]]), torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    joint = gaussian_mixture.log_prob(one, grid, a=before.sqrt(), b=(1 - before).sqrt())
    joint = joint - (x_t - alpha.sqrt() * grid)[:, 0].square() / (2 * (1 - alpha))
    at_s = gaussian_mixture.component_posterior(one, grid, a=before.sqrt(), b=(1 - before).sqrt())
    free = joint.softmax(0) @ grid[:, 0]
    wanted = (joint + at_s[:, 1].log()).softmax(0) @ grid[:, 0]
    pull = classifier_gradient(
        lambda y: gaussian_mixture.component_posterior(one, y, a=a, b=b).log(),
        x_t,
        torch.tensor([1]),
    )[0, 0]
    assert_exact(classifier_guided_mean(free, pull, scale=1.0, variance=variance), wanted)


def test_the_classifier_of_a_noisy_image_averages_over_clean_ones():
    """(eq:guidance-average): p(y|x_t) = E[p(y|x_0)|x_t], not p(y | E[x_0|x_t])."""
    one = GaussianMixture(doubles([0.5, 0.5]), doubles([[-1.0], [1.0]]), doubles([0.5, 0.5]))
    b, x_t = 1.0, doubles([[0.7]])
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    posterior = gaussian_mixture.log_prob(one, grid) - (x_t - grid)[:, 0].square() / (2 * b**2)
    clean = gaussian_mixture.component_posterior(one, grid)[:, 1]
    exact = gaussian_mixture.component_posterior(one, x_t, b=b)[0, 1]
    assert_exact(posterior.softmax(0) @ clean, exact)
    at_the_mean = gaussian_mixture.component_posterior(
        one, gaussian_mixture.denoise(one, x_t, b=b)
    )[0, 1]
    assert at_the_mean - exact > 0.05


def test_guiding_commutes_with_every_change_of_prediction_but_rescaling_does_not():
    path, x = Path(0.6, 0.8, -0.8, 0.6), normal(3, 16)
    c, u = normal(3, 16, seed=1), normal(3, 16, seed=2)
    guided = classifier_free_guidance(c, u, scale=4.0)
    rescaled = rescale_guidance(guided, c, amount=1.0)
    for kind in KINDS:
        c_k, u_k = (convert(eps, x, path, source="noise", target=kind) for eps in (c, u))
        guided_k = classifier_free_guidance(c_k, u_k, scale=4.0)
        assert_exact(convert(guided_k, x, path, source=kind, target="noise"), guided)
        rescaled_k = rescale_guidance(guided_k, c_k, amount=1.0)
        apart = convert(rescaled_k, x, path, source=kind, target="noise") - rescaled
        assert (apart.abs().max() < 1e-10) == (kind in ("noise", "score"))


V, v, m = 2.0, 0.5, 1.0  # all data, one class, and where the class is
ALL = GaussianMixture(doubles([1.0]), doubles([[0.0]]), doubles([V**0.5]))
CLASS = GaussianMixture(doubles([1.0]), doubles([[m]]), doubles([v**0.5]))


def guided_field(scale):
    def field(x, sigma):
        c, u = (gaussian_mixture.predict_noise(p, x, b=sigma) for p in (CLASS, ALL))
        return classifier_free_guidance(c, u, scale=scale)

    return field


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 3.0])
def test_the_quiet_sampler_takes_the_geometric_mean_of_variances(scale):
    """(eq:guidance-ode-variance), against the numbers of Runge and Kutta."""
    top = 2e3
    sigmas = torch.linspace(math.log(top), math.log(1e-3), 200, dtype=torch.float64).exp()
    two = rk4(guided_field(scale), doubles([[-top], [top]]), sigmas)[-1]
    std = (two[1] - two[0]) / 2
    assert (std.square() / (v**scale * V ** (1 - scale)) - 1).abs() < 1e-3
    if scale > 1:
        assert std.square() < 0.98 / (scale / v + (1 - scale) / V)  # narrower than the tilted law


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_the_random_sampler_has_another_variance(scale):
    """(eq:guidance-sde-variance), by the recursion of one linear step after the other."""
    u = torch.linspace(math.log(1e7), math.log(1e-6), 40_000, dtype=torch.float64).exp()
    slope = scale / (v + u) + (1 - scale) / (V + u)  # score is -slope x
    variance = 1e7
    for k, step in zip(slope[:-1].tolist(), (-u.diff()).tolist(), strict=True):
        variance = variance * math.exp(-2 * k * step) + step
    wanted = (V * v - V ** (2 - 2 * scale) * v ** (2 * scale)) / ((2 * scale - 1) * (V - v))
    assert abs(variance / wanted - 1) < 0.01


def test_a_guided_step_of_ddim_is_linear_in_the_guided_noise():
    """Guiding the noise of a step or mixing two steps is the same: (eq:guidance-free) is affine."""
    x, c, u = normal(7), normal(7, seed=1), normal(7, seed=2)
    levels = {"alpha_bar_t": doubles(0.3), "alpha_bar_s": doubles(0.6)}
    one = ddim_step(x, classifier_free_guidance(c, u, scale=3.0), **levels)
    both = (ddim_step(x, eps, **levels) for eps in (c, u))
    assert_exact(one, classifier_free_guidance(*both, scale=3.0))


def test_labels_are_dropped_as_often_as_told_and_apart_from_one_another():
    label = torch.arange(10).repeat(5000)
    g = torch.Generator().manual_seed(0)
    dropped = drop_condition(label, p=0.1, null=10, generator=g)
    hidden = dropped == 10
    assert torch.equal(dropped[~hidden], label[~hidden])
    assert abs(hidden.double().mean() - 0.1) < 4 * math.sqrt(0.09 / len(label))
    both = (hidden[1:] & hidden[:-1]).double().mean()
    assert abs(both - 0.01) < 4 * math.sqrt(0.0099 / len(label)) * 1.5
    assert torch.equal(drop_condition(label, p=0.0, null=10), label)
    assert label.max() == 9  # the input is as it was


def test_rescaling_sets_the_standard_deviation_of_each_image():
    guided, c = 3 * normal(4, 2, 8, 8), normal(4, 2, 8, 8, seed=1)
    full = rescale_guidance(guided, c, amount=1.0)
    for i in range(4):
        assert_exact(full[i].std(), c[i].std())
        factor = full[i] / guided[i]
        assert_exact(factor, factor.mean().expand_as(factor))
    assert torch.equal(rescale_guidance(guided, c, amount=0.0), guided)
    assert_exact(rescale_guidance(guided, c, amount=0.7), 0.7 * full + 0.3 * guided)


def test_outside_of_the_interval_the_model_is_plainly_conditional():
    sigma = doubles([10.0, 3.0, 2.0, 0.5, 0.49])
    scale = guidance_interval(sigma, scale=4.0, low=0.5, high=3.0)
    assert_exact(scale, [1, 4, 4, 1, 1])
    c, u = normal(5), normal(5, seed=1)
    guided = classifier_free_guidance(c, u, scale=scale)
    assert_exact(guided[[0, 3, 4]], c[[0, 3, 4]])


def test_refusals():
    label = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"p is 1\.1: 0 <= p <= 1\."):
        drop_condition(label, p=1.1, null=10)
    with pytest.raises(ValueError, match="null is 3, and so is a label"):
        drop_condition(label, p=0.1, null=3)
    with pytest.raises(ValueError, match=r"amount is -0\.1: 0 <= amount <= 1\."):
        rescale_guidance(normal(1, 2), normal(1, 2), amount=-0.1)
    with pytest.raises(ValueError, match=r"low is 2\.0 and high is 2\.0: low < high\."):
        guidance_interval(doubles([1.0]), scale=2.0, low=2.0, high=2.0)
