import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch.distributions import Normal, kl_divergence

from zhizhi.generative_models.ddpm import (
    NoiseMLP,
    ddpm_loss,
    ddpm_sample,
    ddpm_step,
    elbo_weights,
    gaussian_kl,
    mean_from_noise,
    q_posterior,
    q_sample,
)
from zhizhi.generative_models.noise_schedule import alpha_bar, cosine_beta, linear_beta, snr

BETA = linear_beta(n_steps=1000)
ALPHA_BAR = alpha_bar(BETA)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def at(t):
    return {"alpha_bar_t": ALPHA_BAR[t], "alpha_bar_prev": ALPHA_BAR[t - 1]}


@pytest.mark.parametrize("t", [1, 10, 1000])
def test_q_sample_has_the_moments_of_the_chain_walked_step_by_step(t):
    factor, variance = 1.0, 0.0
    for beta in BETA[:t].tolist():
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert_exact(q_sample(one, zero, alpha_bar_t=ALPHA_BAR[t]), [factor])
    assert_exact(q_sample(zero, one, alpha_bar_t=ALPHA_BAR[t]).square(), [variance])


def test_q_sample_with_a_time_for_each_image_equals_a_loop_over_images():
    x_0, noise, t = normal(3, 2, 4), normal(3, 2, 4, seed=1), torch.tensor([0, 5, 1000])
    together = q_sample(x_0, noise, alpha_bar_t=ALPHA_BAR[t])
    alone = [
        q_sample(x_0[i : i + 1], noise[i : i + 1], alpha_bar_t=ALPHA_BAR[t[i]]) for i in range(3)
    ]
    assert_exact(together, torch.cat(alone))
    assert_exact(together[0], x_0[0])


def test_the_result_has_the_dtype_of_the_image_and_not_of_the_schedule():
    x, t = torch.ones(2, 3), torch.tensor([3, 7])
    levels = {"alpha_bar_t": ALPHA_BAR[t], "alpha_bar_prev": ALPHA_BAR[t - 1]}
    results = [
        q_sample(x, x, alpha_bar_t=ALPHA_BAR[t]),
        *q_posterior(x, x, **levels),
        mean_from_noise(x, x, **levels),
        ddpm_step(x, x, **levels),
    ]
    assert {r.dtype for r in results} == {torch.float32}


@pytest.mark.parametrize("t", [2, 30, 1000])
def test_q_posterior_is_bayes_rule_on_a_grid(t):
    x_0, x_t = 0.75, 0.7
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    prior = Normal(ALPHA_BAR[t - 1].sqrt() * x_0, (1 - ALPHA_BAR[t - 1]).sqrt())
    likelihood = Normal((1 - BETA[t - 1]).sqrt() * grid, BETA[t - 1].sqrt())
    density = (
        prior.log_prob(grid) + likelihood.log_prob(torch.tensor(x_t, dtype=torch.float64))
    ).exp()
    density = density / density.sum()
    mean = (density * grid).sum()
    variance = (density * (grid - mean).square()).sum()
    one = torch.ones(1, dtype=torch.float64)
    ours = q_posterior(x_0 * one, x_t * one, **at(t))
    assert_exact(ours[0], mean[None])
    assert_exact(ours[1], variance)


def test_q_posterior_of_the_first_step_is_the_data_for_certain():
    x_0 = normal(2, 3)
    mean, variance = q_posterior(x_0, normal(2, 3, seed=1), **at(1))
    assert_exact(mean, x_0)
    assert variance.item() == 0.0


def test_q_posterior_variance_broadcasts_over_images_with_their_own_times():
    t = torch.tensor([2, 9])
    levels = {"alpha_bar_t": ALPHA_BAR[t], "alpha_bar_prev": ALPHA_BAR[t - 1]}
    mean, variance = q_posterior(normal(2, 3, 4), normal(2, 3, 4, seed=1), **levels)
    assert mean.shape == (2, 3, 4)
    assert variance.shape == (2, 1, 1)


def test_gaussian_kl_equals_torch_and_is_zero_for_equal_arguments():
    mean, mean_p = normal(5), normal(5, seed=1)
    variance, variance_p = normal(5, seed=2).exp(), normal(5, seed=3).exp()
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(mean_p, variance_p.sqrt()))
    assert_exact(gaussian_kl(mean, variance, mean_p=mean_p, variance_p=variance_p), expected)
    assert gaussian_kl(mean, variance, mean_p=mean, variance_p=variance).abs().max() == 0.0


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_mean_from_the_true_noise_is_the_posterior_mean(t):
    x_0, noise = normal(4, 3), normal(4, 3, seed=1)
    x_t = q_sample(x_0, noise, alpha_bar_t=ALPHA_BAR[t])
    assert_exact(mean_from_noise(x_t, noise, **at(t)), q_posterior(x_0, x_t, **at(t))[0])


@pytest.mark.parametrize("schedule", [linear_beta, cosine_beta])
def test_small_elbo_weights_are_half_the_relative_fall_of_the_snr(schedule):
    signal = alpha_bar(schedule(n_steps=200))
    ratio = snr(signal)[1:-1] / snr(signal)[2:]
    torch.testing.assert_close(elbo_weights(signal), (ratio - 1) / 2, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_elbo_weights_turn_a_noise_error_into_the_kl_divergence_of_the_means(variance):
    t, x_0, noise, noise_hat = 40, normal(6), normal(6, seed=1), normal(6, seed=2)
    x_t = q_sample(x_0, noise, alpha_bar_t=ALPHA_BAR[t])
    mean, small = q_posterior(x_0, x_t, **at(t))
    sigma_squared = small if variance == "small" else BETA[t - 1]
    mean_hat = mean_from_noise(x_t, noise_hat, **at(t))
    kl = gaussian_kl(mean, sigma_squared, mean_p=mean_hat, variance_p=sigma_squared)
    weight = elbo_weights(ALPHA_BAR, variance=variance)[t - 2]
    assert_exact(weight * (noise - noise_hat).square(), kl)


def test_elbo_weights_have_the_published_size():
    weights = elbo_weights(ALPHA_BAR)
    expected = {2: 0.5997, 10: 0.0864, 100: 0.01027, 1000: 0.01020}
    for t, value in expected.items():
        assert weights[t - 2].item() == pytest.approx(value, rel=1e-3)


def test_the_bound_of_a_gaussian_misses_the_entropy_by_the_kl_of_the_last_marginal():
    # x_0 ~ N(1.5, 0.25): the best noise prediction and the true reverse variance are known.
    m, v_0, H = 1.5, 0.25, 0.5 * math.log(2 * math.pi * math.e * 0.25)
    v = ALPHA_BAR * v_0 + 1 - ALPHA_BAR  # variance of x_t, t = 0 to T
    error = ALPHA_BAR[1:] * v_0 / v[1:]  # E (noise - best noise_hat)^2
    true = BETA * v[:-1] / v[1:]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    _, small = q_posterior(
        zero.expand(1000),
        zero.expand(1000),
        alpha_bar_t=ALPHA_BAR[1:],
        alpha_bar_prev=ALPHA_BAR[:-1],
    )
    # E over x_0 of KL(q(x_T | x_0) || N(0, 1)): quadratic in the mean, so the second moment enters.
    root = (ALPHA_BAR[-1:] * (m**2 + v_0)).sqrt()
    bound = gaussian_kl(root, 1 - ALPHA_BAR[-1:], mean_p=zero, variance_p=one).sum()
    kl_variance = gaussian_kl(zero, small[1:], mean_p=zero, variance_p=true[1:])
    weights = elbo_weights(ALPHA_BAR) * small[1:] / true[1:]
    bound = bound + (kl_variance + weights * error[1:]).sum()
    bound = bound + 0.5 * math.log(2 * math.pi * true[0]) + 0.5  # -log p(x_0 | x_1)
    gap = gaussian_kl(ALPHA_BAR[-1:].sqrt() * m, v[-1:], mean_p=zero, variance_p=one)
    assert gap.item() == pytest.approx(4.5403e-5, rel=1e-4)
    assert_exact(bound - H, gap.sum())


def test_ddpm_loss_equals_a_loop_over_images_with_the_same_draws():
    x_0 = normal(5, 3)

    def model(x_t, t):
        return 0.3 * x_t + 0.001 * t[:, None].double()

    loss = ddpm_loss(model, x_0, alpha_bar=ALPHA_BAR, generator=generator(7))
    g = generator(7)
    t = torch.randint(1, 1001, (5,), generator=g)
    noise = torch.randn(5, 3, generator=g, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        a = ALPHA_BAR[t[i]].item()
        for j in range(3):
            e = noise[i, j].item()
            x_t = math.sqrt(a) * x_0[i, j].item() + math.sqrt(1 - a) * e
            total += (e - 0.3 * x_t - 0.001 * t[i].item()) ** 2
    assert_exact(loss, total / 15)


def test_ddpm_loss_is_zero_for_a_model_that_knows_the_data():
    x_0 = normal(64, 2)

    def model(x_t, t):
        a = ALPHA_BAR[t, None]
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    assert_exact(ddpm_loss(model, x_0, alpha_bar=ALPHA_BAR, generator=generator()), 0.0)


def test_ddpm_loss_draws_every_time_from_one_to_the_last():
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t

    signal = alpha_bar(cosine_beta(n_steps=5))
    ddpm_loss(model, normal(2000, 1), alpha_bar=signal, generator=generator())
    assert torch.cat(seen).unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_step_has_the_mean_of_the_noise_and_the_variance_asked_for(variance):
    n, t = 40_000, 300
    x_t, noise_hat = torch.full((n,), 0.5).double(), torch.full((n,), -0.2).double()
    x_prev = ddpm_step(x_t, noise_hat, **at(t), variance=variance, generator=generator())
    expected = BETA[t - 1].item()
    if variance == "small":
        expected *= ((1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])).item()
    mean = mean_from_noise(x_t, noise_hat, **at(t))[0].item()
    assert abs(x_prev.mean().item() - mean) < 4 * math.sqrt(expected / n)
    assert abs(x_prev.var().item() / expected - 1) < 4 * math.sqrt(2 / n)


def test_ddpm_step_small_and_large_differ_as_the_posterior_says_for_equal_draws():
    x_t = normal(8)
    mean = mean_from_noise(x_t, x_t, **at(2))
    small = ddpm_step(x_t, x_t, **at(2), variance="small", generator=generator()) - mean
    large = ddpm_step(x_t, x_t, **at(2), variance="large", generator=generator()) - mean
    ratio = (1 - ALPHA_BAR[1]) / (1 - ALPHA_BAR[2])
    torch.testing.assert_close((small / large).square(), ratio.expand(8), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_last_step_adds_nothing_also_when_other_images_are_elsewhere(variance):
    x_t, noise_hat, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([1, 2])
    levels = {"alpha_bar_t": ALPHA_BAR[t], "alpha_bar_prev": ALPHA_BAR[t - 1]}
    x_prev = ddpm_step(x_t, noise_hat, **levels, variance=variance, generator=generator())
    mean = mean_from_noise(x_t, noise_hat, **levels)
    assert_exact(x_prev[0], mean[0])
    assert (x_prev[1] != mean[1]).all()


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_sample_with_the_best_prediction_gives_the_gaussian_it_should(variance):
    signal, m, v_0, n = alpha_bar(linear_beta(n_steps=40, start=1e-3, end=0.3)), 1.5, 0.25, 40_000
    v = signal * v_0 + 1 - signal
    best = (1 - signal).sqrt() / v

    def model(x_t, t):
        return best[t] * (x_t - signal[t].sqrt() * m)

    chain = ddpm_sample(
        model, normal(n, seed=3), alpha_bar=signal, variance=variance, generator=generator()
    )
    # The chain is linear, so its moments obey a recursion of two numbers.
    mean, var = 0.0, 1.0
    for t in range(40, 0, -1):
        alpha, beta = (signal[t] / signal[t - 1]).item(), (1 - signal[t] / signal[t - 1]).item()
        ratio = ((1 - signal[t - 1]) / (1 - signal[t])).item()
        shift = beta / math.sqrt(1 - signal[t].item()) * best[t].item()
        mean = (mean - shift * (mean - signal[t].sqrt().item() * m)) / math.sqrt(alpha)
        var = (1 - shift) ** 2 / alpha * var
        var += 0.0 if t == 1 else beta * (ratio if variance == "small" else 1.0)
    assert chain.shape == (41, n)
    assert abs(chain[0].mean().item() - mean) < 4 * math.sqrt(var / n)
    assert abs(chain[0].var().item() / var - 1) < 4 * math.sqrt(2 / n)
    assert abs(mean - m) < 0.01  # and the recursion ends near the data


def test_ddpm_sample_keeps_the_chain_in_the_order_of_time():
    x_T = normal(2, 3)
    chain = ddpm_sample(lambda x, t: x, x_T, alpha_bar=ALPHA_BAR[:4], generator=generator())
    g, x = generator(), x_T
    for t in (3, 2, 1):
        x = ddpm_step(x, x, **at(t), generator=g)
        assert_exact(chain[t - 1], x)
    assert_exact(chain[3], x_T)


def test_noise_mlp_hears_the_time_and_adds_a_gated_copy_of_its_input():
    model = NoiseMLP(n_pixels=3, width=8, n_frequencies=2)
    x_t, times = normal(2, 3).float(), (5, 50)
    waves = [[f(w * t) for f in (math.sin, math.cos) for w in (1.0, 1e-4)] for t in times]
    out = model.layers(torch.cat([x_t, torch.tensor(waves)], dim=1))
    assert_float32(model(x_t, torch.tensor(times)), out[:, :3] + out[:, 3:] * x_t)
    assert not torch.equal(model(x_t, torch.tensor((5, 6)))[1], model(x_t, torch.tensor(times))[1])


def test_noise_mlp_learns_the_noise_of_a_point():
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = NoiseMLP(n_pixels=2, width=32)
    torch.set_rng_state(torch_state)
    signal, g = alpha_bar(linear_beta(n_steps=20, start=0.01, end=0.5)), generator()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = ddpm_loss(model, torch.zeros(128, 2), alpha_bar=signal, generator=g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert sum(losses[-20:]) / 20 < 0.1


def test_functions_refuse_an_unknown_variance():
    message = r'^variance is \'medium\': "small" or "large"\.$'
    with pytest.raises(ValueError, match=message):
        elbo_weights(ALPHA_BAR, variance="medium")
    with pytest.raises(ValueError, match=message):
        ddpm_step(normal(2), normal(2), **at(3), variance="medium")
    with pytest.raises(ValueError, match=message):
        ddpm_sample(lambda x, t: x, normal(2), alpha_bar=ALPHA_BAR, variance="medium")


def test_functions_refuse_a_schedule_that_starts_after_the_data():
    message = r"^alpha_bar\[0\] is 0\.99\d*: time 0 has no noise, so it is 1\.$"
    shifted = ALPHA_BAR[1:]  # what diffusers calls alphas_cumprod
    with pytest.raises(ValueError, match=message):
        elbo_weights(shifted)
    with pytest.raises(ValueError, match=message):
        ddpm_loss(lambda x, t: x, normal(2), alpha_bar=shifted)
    with pytest.raises(ValueError, match=message):
        ddpm_sample(lambda x, t: x, normal(2), alpha_bar=shifted)
