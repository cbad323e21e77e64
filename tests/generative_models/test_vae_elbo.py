import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from zhizhi.deep_learning.digits import digits_split
from zhizhi.generative_models.autoencoder import kl_to_standard_normal, reparameterise
from zhizhi.generative_models.vae_elbo import (
    LinearGaussian,
    active_units,
    aggregate_log_prob,
    bernoulli_likelihood,
    elbo,
    gaussian_likelihood,
    gaussian_log_prob,
    importance_weighted_bound,
    linear_elbo,
    log_weights,
    mutual_information,
    ppca_fit,
    ppca_log_prob,
    ppca_posterior,
    reparameterised_gradient,
    score_function_gradient,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


TOY = LinearGaussian(normal(5, 2), normal(5, seed=1), torch.tensor(0.5, dtype=torch.float64))
X = normal(4, 5, seed=2)
TOY_LIKELIHOOD = gaussian_likelihood(lambda z: TOY.mean + z @ TOY.weight.T, X, std=math.sqrt(0.5))


def best_log_variance(model=TOY):
    M = model.weight.T @ model.weight + model.variance * torch.eye(2, dtype=torch.float64)
    return (model.variance / M.diagonal()).log()[None]


def test_the_densities_are_those_of_torch_and_of_a_loop():
    mean, log_variance = normal(4, 5, seed=3), normal(4, 5, seed=4)
    wanted = Normal(mean, (log_variance / 2).exp()).log_prob(X).sum(-1)
    assert_exact(gaussian_log_prob(X, mean, log_variance), wanted)
    bits, logits = (X > 0).double(), normal(3, 4, 5, seed=5)
    found = bernoulli_likelihood(lambda z: z, bits)(logits)
    assert_exact(found, Bernoulli(logits=logits).log_prob(bits).sum(-1))
    found = gaussian_likelihood(lambda z: 2 * z, X, std=0.7)(normal(3, 4, 5, seed=6))
    for k, b in itertools.product(range(3), range(4)):
        total = sum(
            -((X[b, d] - 2 * normal(3, 4, 5, seed=6)[k, b, d]) ** 2) / (2 * 0.49)
            - 0.5 * math.log(2 * math.pi * 0.49)
            for d in range(5)
        )
        assert_exact(found[k, b], total)


def test_grey_pixels_have_no_bernoulli_likelihood():
    likelihood = bernoulli_likelihood(lambda z: z, torch.tensor([[0.5, 1.0]]))
    with pytest.raises(ValueError, match=r"x holds 0\.5"):
        likelihood(torch.zeros(1, 1, 2))


def test_the_marginal_is_the_integral_over_z():
    model = LinearGaussian(
        torch.tensor([[1.5], [-0.4]]).double(), torch.tensor([0.2, 0.1]).double(),
        torch.tensor(0.3).double(),
    )  # fmt: skip
    x, z = (
        torch.tensor([[1.0, 0.5]]).double(),
        torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None],
    )
    likelihood = gaussian_likelihood(
        lambda z: model.mean + z @ model.weight.T, x, std=model.variance.sqrt().item()
    )
    joint = likelihood(z[:, None])[:, 0] + Normal(0.0, 1.0).log_prob(z[:, 0])
    assert_exact(ppca_log_prob(x, model), (joint.logsumexp(0) + math.log(1e-3))[None])
    p = joint.softmax(0)
    mean, covariance = ppca_posterior(x, model)
    assert_exact(mean[0, 0], (p * z[:, 0]).sum())
    assert_exact(covariance[0, 0], (p * (z[:, 0] - mean[0, 0]) ** 2).sum())


def test_the_bound_and_the_divergence_from_the_posterior_make_the_evidence():
    """(eq:vae-gap), for any diagonal q; and no q does better than the one derived."""
    mean, covariance = ppca_posterior(X, TOY)
    truth, best = ppca_log_prob(X, TOY), linear_elbo(X, TOY, mean, best_log_variance())
    for m, log_variance in (
        (mean, best_log_variance()),
        (mean + 0.3, best_log_variance() - 1),
        (normal(4, 2, seed=7), normal(4, 2, seed=8)),
    ):
        bound = linear_elbo(X, TOY, m, log_variance)
        scale = (log_variance / 2).exp().expand_as(m).diag_embed()
        gap = kl_divergence(
            MultivariateNormal(m, scale_tril=scale), MultivariateNormal(mean, covariance)
        )
        assert_exact(bound + gap, truth)
        assert (bound <= best + 1e-12).all()


def test_the_gap_of_the_best_diagonal_q_is_that_of_hadamard():
    """(eq:vae-hadamard)"""
    mean, _ = ppca_posterior(X, TOY)
    M = TOY.weight.T @ TOY.weight + TOY.variance * torch.eye(2, dtype=torch.float64)
    wanted = 0.5 * (M.diagonal().log().sum() - M.logdet())
    gap = ppca_log_prob(X, TOY) - linear_elbo(X, TOY, mean, best_log_variance())
    assert_exact(gap, wanted.expand(4))
    U, S, _ = torch.linalg.svd(TOY.weight, full_matrices=False)
    turned = TOY._replace(weight=U * S)  # the same density, columns at right angles
    mean, _ = ppca_posterior(X, turned)
    bound = linear_elbo(X, turned, mean, best_log_variance(turned))
    assert_exact(bound, ppca_log_prob(X, TOY))


def test_drawn_and_derived_bounds_agree():
    mean, _ = ppca_posterior(X, TOY)
    mean, log_variance, n = mean + 0.2, best_log_variance().expand(4, 2) - 0.3, 100_000
    for beta in (0.0, 1.0, 4.0):
        wanted = linear_elbo(X, TOY, mean, log_variance, beta=beta)
        found = elbo(TOY_LIKELIHOOD, mean, log_variance, n_samples=n, beta=beta, generator=seeded())
        z = reparameterise(mean, log_variance, n_samples=n, generator=seeded())
        error = TOY_LIKELIHOOD(z).std(dim=0) / math.sqrt(n)
        assert ((found - wanted).abs() < 4 * error).all()
    log_w = log_weights(TOY_LIKELIHOOD, mean, log_variance, n_samples=n, generator=seeded())
    wanted = linear_elbo(X, TOY, mean, log_variance)
    assert ((log_w.mean(0) - wanted).abs() < 4 * log_w.std(0) / math.sqrt(n)).all()


def test_weights_are_those_of_torch_and_average_to_the_evidence():
    mean, covariance = ppca_posterior(X, TOY)
    log_variance = (1.5 * covariance.diagonal()).log().expand(4, 2)
    n = 100_000
    log_w = log_weights(TOY_LIKELIHOOD, mean, log_variance, n_samples=n, generator=seeded())
    z = reparameterise(mean, log_variance, n_samples=n, generator=seeded())
    q = Normal(mean, (log_variance / 2).exp())
    wanted = TOY_LIKELIHOOD(z) + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    assert_exact(log_w, wanted)
    ratio = (log_w - ppca_log_prob(X, TOY)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(n)).all()


def test_a_weight_of_the_true_posterior_is_the_evidence_itself():
    U, S, _ = torch.linalg.svd(TOY.weight, full_matrices=False)
    turned = TOY._replace(weight=U * S)
    mean, covariance = ppca_posterior(X, turned)
    likelihood = gaussian_likelihood(
        lambda z: TOY.mean + z @ turned.weight.T, X, std=math.sqrt(0.5)
    )
    log_w = log_weights(
        likelihood, mean, covariance.diagonal().log().expand(4, 2), n_samples=3,
        generator=seeded(),
    )  # fmt: skip
    assert_exact(log_w, ppca_log_prob(X, TOY).expand(3, 4))


def test_the_bound_tightens_with_the_number_of_draws():
    """(eq:vae-iwae): on the same draws, exactly, because the logarithm is concave."""
    log_w = 2 * normal(64, 10, seed=9)
    bounds = [importance_weighted_bound(log_w.view(K, -1, 10)).mean(0) for K in (1, 2, 4, 16, 64)]
    assert_exact(bounds[0], log_w.mean(0))
    assert_exact(bounds[-1], log_w.exp().mean(0).log())
    for loose, tight in itertools.pairwise(bounds):
        assert (loose < tight).all()
    huge = torch.tensor([-2000.0, -2000.0])
    assert importance_weighted_bound(huge).item() == -2000  # no underflow


def test_both_gradients_are_unbiased_and_their_variances_as_derived():
    """(eq:vae-variances)"""
    D, n = 5, 100_000
    mean, log_variance = torch.zeros(D).double(), torch.zeros(D).double()

    def f(z):
        return z.square().sum(-1)

    estimates = (
        (reparameterised_gradient(f, mean, log_variance, n_samples=n, generator=seeded()), 4),
        (
            score_function_gradient(f, mean, log_variance, n_samples=n, generator=seeded()),
            (D + 2) * (D + 4),
        ),
        (
            score_function_gradient(
                f, mean, log_variance, n_samples=n, baseline=float(D), generator=seeded()
            ),
            2 * D + 8,
        ),
    )
    for estimate, variance in estimates:
        assert (estimate.mean(0).abs() < 4 * math.sqrt(variance / n)).all()
        assert estimate.var(0).mean().item() == pytest.approx(variance, rel=0.05)

    mean, log_variance = normal(D, seed=1), normal(D, seed=2)  # E |z|^2 = |mean|^2 + ...
    for gradient in (reparameterised_gradient, score_function_gradient):
        estimate = gradient(f, mean, log_variance, n_samples=n, generator=seeded())
        error = estimate.std(0) / math.sqrt(n)
        assert ((estimate.mean(0) - 2 * mean).abs() < 4 * error).all()


def test_a_step_has_no_gradient_by_the_draw_but_one_by_the_score():
    """P(z > 0) of N(mean, 1) has the derivative phi(mean); only values of f are needed."""
    mean, log_variance, n = torch.tensor([0.3]).double(), torch.zeros(1).double(), 200_000

    def f(z):
        return (z[:, 0] > 0).double() + 0 * z[:, 0]

    through = reparameterised_gradient(f, mean, log_variance, n_samples=10, generator=seeded())
    assert through.abs().max() == 0
    by_score = score_function_gradient(f, mean, log_variance, n_samples=n, generator=seeded())
    wanted = math.exp(-0.045) / math.sqrt(2 * math.pi)
    assert abs(by_score.mean() - wanted) < 4 * by_score.std() / math.sqrt(n)


def test_nothing_beats_the_closed_form():
    """(eq:vae-ppca): a stationary point by autograd, and better than its neighbours."""
    x = digits_split().x_train.double()[:, 10:30]
    best = ppca_fit(x, n_latents=3)
    W, log_v = best.weight.clone().requires_grad_(), best.variance.log().requires_grad_()
    value = ppca_log_prob(x, LinearGaussian(W, best.mean, log_v.exp())).mean()
    for gradient in torch.autograd.grad(value, [W, log_v]):
        assert gradient.abs().max() < 1e-9
    for seed in range(5):
        near = best._replace(weight=best.weight + 0.01 * normal(20, 3, seed=seed))
        assert ppca_log_prob(x, near).mean() < value
    # The mean log-likelihood at the optimum, from the eigenvalues alone.
    offset = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(offset.T @ offset / len(x)).flip(0)
    assert_exact(best.variance, eigenvalues[3:].mean())
    logs = eigenvalues[:3].log().sum() + 17 * best.variance.log()
    assert_exact(value, -0.5 * (20 * math.log(2 * math.pi) + logs + 20))


def test_directions_below_a_given_variance_are_dropped():
    """(eq:vae-water): rate and distortion of the best model are Shannon's."""
    x = digits_split().x_train.double()
    offset = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(offset.T @ offset / len(x)).flip(0)
    level = 0.25
    model = ppca_fit(x, n_latents=10, variance=level)
    alive = (model.weight.square().sum(0) > 0).sum()
    assert alive == (eigenvalues > level).sum() == 5
    mean, covariance = ppca_posterior(x, model)
    assert active_units(mean).sum() == 5
    log_variance = covariance.diagonal().log()
    rate = kl_to_standard_normal(mean, log_variance.expand_as(mean)).sum(1).mean()
    assert_exact(rate, 0.5 * (eigenvalues / level).clamp_min(1).log().sum())
    missed = (offset - mean @ model.weight.T).square().sum(1).mean()
    missed += (log_variance.exp() * model.weight.square()).sum()
    assert_exact(missed, eigenvalues.clamp_max(level).sum())


def test_beta_is_a_larger_variance():
    """(eq:vae-beta): one objective is beta times the other, up to a constant."""
    constant = []
    for seed in range(3):
        mean, log_variance = normal(4, 2, seed=seed), normal(4, 2, seed=seed + 10)
        small = linear_elbo(X, TOY, mean, log_variance, beta=3.0)
        large = linear_elbo(X, TOY._replace(variance=3 * TOY.variance), mean, log_variance)
        constant.append(small - 3 * large)
    assert_exact(constant[0], constant[1])
    assert_exact(constant[0], constant[2])


def test_the_aggregate_is_torchs_mixture():
    mean, log_variance = normal(6, 2), normal(6, 2, seed=1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6).double()),
        torch.distributions.Independent(Normal(mean, (log_variance / 2).exp()), 1),
    )
    z = normal(9, 2, seed=2)
    assert_exact(aggregate_log_prob(z, mean, log_variance), mixture.log_prob(z))


def test_information_and_the_divergence_to_the_prior_make_the_mean_divergence():
    """(eq:vae-surgery), with the second term integrated on a grid."""
    mean, log_variance = 1.5 * normal(3000, 1).sign(), torch.full((3000, 1), -0.5).double()
    grid = torch.linspace(-9, 9, 3001, dtype=torch.float64)[:, None]
    log_q = aggregate_log_prob(grid, mean, log_variance)
    to_prior = (log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(grid[:, 0]))).sum() * 0.006
    own = -0.5 * math.log(2 * math.pi) + 0.25 - 0.5  # minus the entropy of q(z | x)
    information = own - (log_q.exp() * log_q).sum() * 0.006
    assert 0.3 < information < math.log(2)  # two overlapping balls
    kl = kl_to_standard_normal(mean, log_variance).sum(1).mean()
    torch.testing.assert_close(information + to_prior, kl, rtol=1e-8, atol=1e-8)
    found = mutual_information(mean, log_variance, generator=seeded())
    assert abs(found - information) < 4 * 1.0 / math.sqrt(3000)


def test_information_is_at_most_the_logarithm_of_the_number_of_images():
    mean = normal(50, 3)
    for log_variance, wanted in ((-40.0, math.log(50)), (20.0, 0.0)):
        s = torch.full((50, 3), log_variance).double()
        found = mutual_information(mean, s, generator=seeded()).item()
        assert found == pytest.approx(wanted, abs=0.01)
        assert found <= math.log(50) + 1e-12


def test_a_latent_that_ignores_the_image_is_not_active():
    mean = torch.stack([normal(100), torch.full((100,), 3.0), 0.05 * normal(100)], dim=1)
    assert active_units(mean.double()).tolist() == [True, False, False]
    assert active_units(mean.double(), threshold=1e-4).tolist() == [True, False, True]


def test_refusals():
    one = torch.zeros(1, 2)
    likelihood = gaussian_likelihood(lambda z: z, one, std=1.0)
    with pytest.raises(ValueError, match=r"^std is 0\.0: std > 0\.$"):
        gaussian_likelihood(lambda z: z, one, std=0.0)
    with pytest.raises(ValueError, match=r"^beta is -1\.0: beta >= 0\.$"):
        elbo(likelihood, one, one, beta=-1.0)
    for draw in (elbo, log_weights):
        with pytest.raises(ValueError, match=r"^n_samples is 0: n_samples >= 1\.$"):
            draw(likelihood, one, one, n_samples=0)
    for gradient in (reparameterised_gradient, score_function_gradient):
        with pytest.raises(ValueError, match=r"^n_samples is 0: n_samples >= 1\.$"):
            gradient(lambda z: z.sum(-1), one[0], one[0], n_samples=0)
    x = normal(10, 3)
    for n_latents in (0, 3):
        message = rf"^n_latents is {n_latents} of 3: 1 <= n_latents < 3\.$"
        with pytest.raises(ValueError, match=message):
            ppca_fit(x, n_latents=n_latents)
    with pytest.raises(ValueError, match=r"^variance is 0\.0: variance > 0\.$"):
        ppca_fit(x, n_latents=1, variance=0.0)
