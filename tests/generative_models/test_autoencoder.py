import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn

from zhizhi.deep_learning.digits import digits_split
from zhizhi.generative_models.autoencoder import (
    Autoencoder,
    autoencoder_loss,
    fit,
    kl_to_standard_normal,
    reparameterise,
)
from zhizhi.generative_models.ddpm import gaussian_kl


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_divergence_is_that_of_two_gaussians_and_an_integral():
    """(eq:vae-kl)"""
    mean, log_variance = normal(7), normal(7, seed=1)
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    kl = kl_to_standard_normal(mean, log_variance)
    assert_exact(kl, gaussian_kl(mean, log_variance.exp(), mean_p=zero, variance_p=one))
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    p = torch.distributions.Normal(zero, one)
    integral = (q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid))).sum(0) * 1e-3
    torch.testing.assert_close(kl, integral, rtol=1e-8, atol=1e-8)
    assert (kl > 0).all()
    assert_exact(kl_to_standard_normal(zero, zero), zero)


def test_draws_have_the_mean_and_the_variance_and_pass_gradients():
    """(eq:vae-reparameterise): a log-variance is halved before it is a deviation."""
    mean = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([[math.log(4.0), math.log(0.25)]], dtype=torch.float64)
    log_variance.requires_grad_()
    n = 100_000
    z = reparameterise(mean, log_variance, n_samples=n, generator=seeded())
    assert z.shape == (n, 1, 2)
    variance = log_variance.exp()
    assert ((z.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / n)).all()
    to_mean, to_log_variance = torch.autograd.grad(z[0].sum(), [mean, log_variance])
    assert_exact(to_mean, torch.ones(1, 2))
    assert_exact(to_log_variance, 0.5 * (z[0] - mean))  # d(s eps) / d log s^2


def test_the_same_generator_gives_the_same_network_and_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    first, second = (Autoencoder(generator=seeded(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    weight = next(first.encoder.parameters())
    assert weight.abs().max() <= 1 / 8  # 64 inputs
    assert weight.abs().max() > 0.99 / 8


def test_latents_are_eight_and_come_back_as_pixels():
    model = Autoencoder(generator=seeded())
    posterior = model.encode(torch.rand(3, 2, 64, generator=seeded()))
    assert posterior.mean.shape == posterior.log_variance.shape == (3, 2, 8)
    assert model.decode(posterior.mean).shape == (3, 2, 64)
    sizes = [(p.shape[1], p.shape[0]) for p in model.parameters() if p.ndim == 2]
    assert sizes == [(64, 128), (128, 128), (128, 16), (8, 128), (128, 128), (128, 64)]


def test_log_variances_are_kept_within_bounds():
    model = Autoencoder(n_pixels=1, n_latents=2, width=1, generator=seeded())
    weight, bias = model.encoder[-1].parameters()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
    posterior = model.encode(torch.zeros(1, 1))
    assert posterior.mean.tolist() == [[50.0, -50.0]]
    assert posterior.log_variance.tolist() == [[20.0, -30.0]]


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_loss_is_a_slow_sum(kl_weight):
    model, x = Autoencoder(generator=seeded()), torch.rand(3, 64, generator=seeded(1))
    loss = autoencoder_loss(model, x, kl_weight=kl_weight, generator=seeded(2))
    noise, total = torch.randn(1, 3, 8, generator=seeded(2))[0], 0.0
    for image, eps in zip(x, noise, strict=True):
        mean, log_variance = model.encode(image)
        x_hat = model.decode(mean + (log_variance / 2).exp() * eps)
        square = sum((a - b) ** 2 for a, b in zip(image, x_hat, strict=True)) / 2
        kl = sum((m**2 + v.exp() - 1 - v) / 2 for m, v in zip(mean, log_variance, strict=True))
        total += (square + kl_weight * kl) / 3
    assert_float32(loss, total)


def test_eight_latents_rebuild_unseen_digits():
    digits = digits_split(generator=seeded())
    train, test = 2 * digits.x_train - 1, 2 * digits.x_test - 1
    g = seeded()
    model = Autoencoder(generator=g)

    def loss(x):
        return autoencoder_loss(model, x, kl_weight=1e-3, generator=g)

    fit(model, train, loss=loss, n_steps=300, generator=g)
    rebuilt = model.decode(model.encode(test).mean)
    assert (rebuilt - test).square().mean() < 0.35 * test.var(dim=0).mean()
    assert not any(p.requires_grad for p in model.parameters())


def test_fit_is_adam_with_a_cosine():
    """Two steps by hand, on a model of one number."""
    x, moved = torch.tensor([[1.0]]), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        moved.weight.zero_()
    fit(moved, x, loss=lambda b: (b - moved(b)).sum(), n_steps=2, batch_size=1, lr=0.1)
    # The gradient is -1 at every step, so Adam moves by the rate: 0.1, then half a cosine on.
    assert moved.weight.item() == pytest.approx(0.1 + 0.1 * (1 + math.cos(math.pi / 2)) / 2)


def test_refusals():
    zero = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"^n_samples is 0: n_samples >= 1\.$"):
        reparameterise(zero, zero, n_samples=0)
    with pytest.raises(ValueError, match=r"^kl_weight is -0\.1: kl_weight >= 0\.$"):
        autoencoder_loss(Autoencoder(), torch.zeros(1, 64), kl_weight=-0.1)
