import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_sample, ddim_sigma, ddim_step, ddim_times, slerp
from zhizhi.generative_models.ddpm import q_posterior
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.noise_schedule import alpha_bar, linear_beta
from zhizhi.generative_models.ode_solver import euler

SHARES = alpha_bar(linear_beta(n_steps=1000))
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0], [0.0], [1.5]], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64),
)


def exact(x, t):
    share = SHARES[t]
    return gaussian_mixture.predict_noise(MIXTURE, x, a=share.sqrt(), b=(1 - share).sqrt())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_marginals(eta):
    """Undetermined coefficients: the variance at s is 1 - alpha_bar_s whatever sigma is."""
    t, s = SHARES[700], SHARES[300]
    sigma = ddim_sigma(t, s, eta=eta)
    m = ((1 - s - sigma**2) / (1 - t)).sqrt()
    k = s.sqrt() - m * t.sqrt()
    assert_exact(k + m * t.sqrt(), s.sqrt())  # mean of x_s given x_0
    assert_exact(m**2 * (1 - t) + sigma**2, 1 - s)  # its variance

    x_0 = torch.tensor(1.7, dtype=torch.float64)
    g, noise = torch.Generator().manual_seed(1), normal(200_000)
    x_t = t.sqrt() * x_0 + (1 - t).sqrt() * noise
    x_s = ddim_step(x_t, noise, alpha_bar_t=t, alpha_bar_s=s, eta=eta, generator=g)
    assert abs(x_s.mean() - s.sqrt() * x_0) < 4 * ((1 - s) / 200_000).sqrt()
    assert abs(x_s.var() / (1 - s) - 1) < 4 * math.sqrt(2 / 200_000)


def test_eta_one_is_the_posterior_of_ddpm():
    for t in (1, 2, 500, 1000):
        x_0, x_t = normal(4), normal(4, seed=1)
        levels = {"alpha_bar_t": SHARES[t], "alpha_bar_s": SHARES[t - 1]}
        mean, variance = q_posterior(x_0, x_t, alpha_bar_t=SHARES[t], alpha_bar_prev=SHARES[t - 1])
        sigma = ddim_sigma(*levels.values(), eta=1.0)
        assert_exact(sigma**2, variance)
        noise = (x_t - SHARES[t].sqrt() * x_0) / (1 - SHARES[t]).sqrt()
        ours = ddim_step(x_t, noise, **levels, eta=1.0, generator=torch.Generator().manual_seed(2))
        z = torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert_exact(ours - sigma * z, mean)


def test_the_same_noise_gives_the_same_image_only_without_fresh_noise():
    x, times = normal(5, 1), ddim_times(1000, 20)
    for eta, same in ((0.0, True), (1.0, False)):
        ends = [
            ddim_sample(
                exact, x, alpha_bar=SHARES, times=times, eta=eta,
                generator=torch.Generator().manual_seed(seed),
            )[-1]
            for seed in (0, 1)
        ]  # fmt: skip
        assert torch.equal(*ends) == same


def test_in_small_steps_eta_one_relies_on_the_guess_twice_as_much():
    t, s = SHARES[500], SHARES[499]
    k = [
        s.sqrt() - ((1 - s - ddim_sigma(t, s, eta=eta) ** 2) / (1 - t)).sqrt() * t.sqrt()
        for eta in (0.0, 1.0)
    ]
    assert (k[1] / k[0]).item() == pytest.approx(2, rel=0.01)


def test_eta_zero_is_euler_in_the_noise_to_signal_ratio():
    times = ddim_times(1000, 25)
    ours = ddim_sample(exact, normal(6, 1), alpha_bar=SHARES, times=times)
    sigma = ((1 - SHARES) / SHARES).sqrt()

    def field(y, s):  # y = x / sqrt(alpha_bar), dy / d sigma = eps
        level = 1 / (1 + s**2)
        return gaussian_mixture.predict_noise(
            MIXTURE, y * level.sqrt(), a=level.sqrt(), b=(1 - level).sqrt()
        )

    start = ours[0] / SHARES[times[0]].sqrt()
    assert_exact(euler(field, start, sigma[times])[-1], ours[-1])


def test_the_error_of_a_trajectory_is_of_first_order():
    x = normal(400, 1, seed=3)
    fine = ddim_sample(exact, x, alpha_bar=SHARES, times=ddim_times(1000, 1000))[-1]
    errors = [
        (ddim_sample(exact, x, alpha_bar=SHARES, times=ddim_times(1000, n))[-1] - fine).abs().mean()
        for n in (10, 20, 40, 80)
    ]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.7 < slope < 1.4 for slope in slopes)


def test_up_and_down_again_loses_little():
    x_0 = gaussian_mixture.sample(MIXTURE, 200, generator=torch.Generator().manual_seed(4))
    lost = []
    for n in (50, 500):
        times = ddim_times(1000, n)
        noise = ddim_sample(exact, x_0, alpha_bar=SHARES, times=times.flip(0))[-1]
        back = ddim_sample(exact, noise, alpha_bar=SHARES, times=times)[-1]
        lost.append((back - x_0).abs().mean().item())
    assert lost[1] < lost[0] / 5
    assert lost[1] < 0.02


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(("T", "n"), [(1000, 50), (1000, 1000), (1000, 1), (10, 3)])
def test_times_fall_to_zero(spacing, T, n):
    times = ddim_times(T, n, spacing=spacing)
    assert len(times) == n + 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert times[0] <= T
    assert (spacing == "leading") or times[0] == T


def test_slerp_keeps_the_length_that_noise_has():
    x, y = normal(50, 500), normal(50, 500, seed=1)
    between = slerp(x, y, weight=0.5)
    assert (between.norm(dim=1) / 500**0.5).mean().item() == pytest.approx(1, abs=0.02)
    assert (((x + y) / 2).norm(dim=1) / 500**0.5).mean().item() == pytest.approx(0.5**0.5, abs=0.02)
    assert_exact(slerp(x, y, weight=0.0), x)
    assert_exact(slerp(x, y, weight=1.0), y)


def test_the_missing_variance_is_the_width_of_the_posterior_that_one_guess_left_out():
    """(eq:ddim-missing) and (eq:ddim-hat), for Gaussian data, where all of it is linear."""
    v_0 = torch.tensor(0.3, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    t, s = SHARES[600], SHARES[200]
    v_t = t * v_0 + 1 - t
    levels = {"alpha_bar_t": t, "alpha_bar_s": s}
    for eta in (0.0, 0.5, 1.0):
        sigma = ddim_sigma(t, s, eta=eta)
        noise_hat = (1 - t).sqrt() / v_t * one  # E[noise | x_t = 1]
        quiet = ddim_step(one, noise_hat, **levels, eta=0.0)
        k = s.sqrt() - ((1 - s - sigma**2) / (1 - t)).sqrt() * t.sqrt()
        direction = (1 - s - sigma**2).sqrt() - (1 - s).sqrt()
        gain = quiet + direction * noise_hat  # the step is linear in x_t, plus sigma z
        posterior = v_0 * (1 - t) / v_t
        missing = s * v_0 + 1 - s - (gain.square() * v_t + sigma**2)[0]
        assert_exact(missing, k**2 * posterior)
    assert_exact(1 - t / s, sigma**2 + k**2 * (1 - t))  # eta is 1: (eq:ddim-hat)


def test_the_levels_are_not_rounded_to_the_dtype_of_the_image():
    blank, up = torch.zeros(2, 3), torch.tensor([0, 1])
    x = ddim_sample(lambda x, t: torch.ones_like(x), blank, alpha_bar=SHARES, times=up)[-1]
    assert x.dtype == torch.float32
    # sqrt(1 - alpha_bar_1) is 0.01; with alpha_bar_1 in float32 it is off by 8e-5 of itself.
    assert (x / 0.01 - 1).abs().max() < 1e-6


def test_refusals():
    low, high = SHARES[900], SHARES[100]
    x = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        ddim_sigma(low, high, eta=1.5)
    with pytest.raises(ValueError, match="only eta = 0 goes there"):
        ddim_step(x, x, alpha_bar_t=high, alpha_bar_s=low, eta=0.5)
    with pytest.raises(ValueError, match="n_steps is 11 of 10"):
        ddim_times(10, 11)
    with pytest.raises(ValueError, match="spacing is 'middle'"):
        ddim_times(10, 5, spacing="middle")
    with pytest.raises(ValueError, match="all falling or all rising"):
        ddim_sample(exact, x[None], alpha_bar=SHARES, times=torch.tensor([5, 3, 4]))
    with pytest.raises(ValueError, match="parallel"):
        slerp(torch.ones(2), 2 * torch.ones(2), weight=0.5)
