import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddpm import ddpm_step, mean_from_noise
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.noise_schedule import alpha_bar, linear_beta
from zhizhi.generative_models.score_matching import langevin_step
from zhizhi.generative_models.score_sde import (
    ancestral_ve,
    ancestral_vp,
    fokker_planck_residual,
    langevin_corrector,
    predictor_corrector,
    reverse_diffusion,
    reverse_drift,
    reverse_sde,
)
from zhizhi.generative_models.sde import affine_moments, euler_maruyama, euler_maruyama_moments

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0], [0.0], [1.5]], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64),
)


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def beta(t):
    return 0.1 + 19.9 * t


def signal(t):  # a(t)
    return torch.exp(-0.5 * (0.1 * t + 9.95 * t**2))


def noise(t):  # b(t)
    return (1 - signal(t) ** 2).sqrt()


def coefficients(t):
    return -0.5 * beta(t), beta(t)


def score_of(mixture):
    return lambda x, t: gaussian_mixture.score(mixture, x, a=signal(t), b=noise(t))


def log_density(x, t):
    return gaussian_mixture.log_prob(MIXTURE, x, a=signal(t), b=noise(t))


def slopes(errors):
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def test_lam_one_is_anderson_and_lam_zero_the_ode():
    f, s = normal(5), normal(5, seed=1)
    assert_exact(reverse_drift(f, s, g_squared=3.0), f - 3 * s)
    assert_exact(reverse_drift(f, s, g_squared=3.0, lam=0.0), f - 1.5 * s)
    assert_exact(reverse_drift(f, s, g_squared=3.0, lam=2.0), f - 7.5 * s)


def test_reverse_sde_hands_over_drift_and_noise_of_one_lam():
    x, t = normal(4, 1), double(0.4)
    drift, diffusion = reverse_sde(score_of(MIXTURE), coefficients, lam=0.5)
    s = score_of(MIXTURE)(x, t)
    assert_exact(drift(x, t), -0.5 * beta(t) * x - 0.625 * beta(t) * s)
    assert_exact(diffusion(x, t), 0.5 * beta(t).sqrt())


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_the_noised_mixture_follows_the_forward_equation(t):
    """(eq:score-sde-fokker-planck)"""
    x, t = normal(50, 1), double(t)
    residual = fokker_planck_residual(
        log_density, lambda x, t: -0.5 * beta(t) * x, x, t, g_squared=beta(t)
    )
    assert_exact(residual, torch.zeros(50))


def test_the_residual_is_that_of_finite_differences():
    """A drift that is wrong, so that the residual is not 0."""
    x, t, h = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], double(0.3), 1e-4

    def drift(x, t):
        return torch.sin(x) * t

    def p(x, t):
        return log_density(x, t).exp()

    d_t = (p(x, t + h) - p(x, t - h)) / (2 * h)
    flow = (drift(x + h, t)[:, 0] * p(x + h, t) - drift(x - h, t)[:, 0] * p(x - h, t)) / (2 * h)
    bend = (p(x + h, t) - 2 * p(x, t) + p(x - h, t)) / h**2
    slow = (d_t + flow - 0.5 * 2.5 * bend) / p(x, t)
    ours = fokker_planck_residual(log_density, drift, x, t, g_squared=2.5)
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, slow, rtol=1e-5, atol=1e-5)


def test_the_residual_in_two_dimensions_sums_over_both():
    def rotating(x, t):  # a standard normal turns without changing
        return torch.stack([-x[:, 1], x[:, 0]], dim=1)

    def standard(x, t):
        return -0.5 * x.square().sum(dim=1) + 0 * t

    x = normal(6, 2)
    zero = torch.zeros(6)
    assert_exact(fokker_planck_residual(standard, rotating, x, double(0.5), g_squared=0.0), zero)
    pulled = fokker_planck_residual(
        standard, lambda x, t: rotating(x, t) - x, x, double(0.5), g_squared=2.0
    )
    assert_exact(pulled, zero)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.5])
def test_the_whole_family_has_the_marginals_of_the_forward_process(lam):
    """(eq:score-sde-family): on the way back the noise spreads as t falls, so g^2 is negative."""
    x, t = normal(50, 1), double(0.3)
    drift, diffusion = reverse_sde(score_of(MIXTURE), coefficients, lam=lam)
    backwards = -(diffusion(x, t) ** 2)
    residual = fokker_planck_residual(log_density, drift, x, t, g_squared=backwards)
    assert_exact(residual, torch.zeros(50))
    if lam > 0:  # a sign forgotten shows
        wrong = fokker_planck_residual(log_density, drift, x, t, g_squared=-backwards)
        assert wrong.abs().max() > 1


def test_the_ode_keeps_the_mismatch_of_the_prior_and_noise_forgets_it():
    """(eq:score-sde-mismatch), with the integral by the trapezoidal rule."""
    one = double(1.0)
    fine = torch.linspace(0, 1, 4001, dtype=torch.float64)
    v = signal(fine) ** 2 * 0.25 + noise(fine) ** 2
    total = torch.trapezoid(beta(fine) / v, fine)

    def score(x, t):
        return -(x - 1.5 * signal(t)) / (0.25 * signal(t) ** 2 + noise(t) ** 2)

    for lam in (0.0, 0.5):
        drift, diffusion = reverse_sde(score, coefficients, lam=lam)
        ends = [
            euler_maruyama_moments(
                drift, diffusion, double(0.0), one,
                torch.linspace(1, 0, n + 1, dtype=torch.float64),
            )[0][-1]
            for n in (100, 200)
        ]  # fmt: skip
        limit = 2 * ends[1] - ends[0]  # of first order, so the leading error is gone
        kept = (0.25 / v[-1]).sqrt() * (-(lam**2) / 2 * total).exp()
        assert kept * 1.5 * signal(one) > 1e-3
        assert abs(limit - (1.5 - kept * 1.5 * signal(one))).item() < 1e-4


def test_reverse_diffusion_turns_the_sign_of_the_forward_step():
    x, s = normal(7), normal(7, seed=1)
    mean, variance = reverse_diffusion(x, s, gain=0.9, variance=0.19)
    assert_exact(mean, (2 - 0.9) * x + 0.19 * s)
    assert variance == 0.19


def test_the_ancestral_step_is_that_of_ddpm_with_its_larger_variance():
    shares = alpha_bar(linear_beta(n_steps=1000))
    for t in (2, 500, 1000):
        x, eps = normal(2, 3), normal(2, 3, seed=1)
        step_beta = 1 - shares[t] / shares[t - 1]
        mean, variance = ancestral_vp(x, -eps / (1 - shares[t]).sqrt(), beta=step_beta)
        levels = {"alpha_bar_t": shares[t], "alpha_bar_prev": shares[t - 1]}
        assert_exact(mean, mean_from_noise(x, eps, **levels))
        theirs = ddpm_step(
            x, eps, **levels, variance="large", generator=torch.Generator().manual_seed(2)
        )
        z = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert_exact(mean + variance.sqrt() * z, theirs)


def test_the_ancestral_step_of_smld_is_a_posterior():
    """Given x_0: a normal prior at level i - 1 and one observation at level i."""
    x_0, sigma, sigma_prev = 0.7, 2.0, 1.2
    x = normal(5)
    mean, variance = ancestral_ve(x, (x_0 - x) / sigma**2, sigma=sigma, sigma_prev=sigma_prev)
    precision = 1 / sigma_prev**2 + 1 / (sigma**2 - sigma_prev**2)
    assert_exact(variance, 1 / precision)
    expected = (x_0 / sigma_prev**2 + x / (sigma**2 - sigma_prev**2)) / precision
    assert_exact(mean, expected)


def test_what_each_step_adds_to_the_variance_of_gaussian_data():
    """(eq:score-sde-excess): exact steps up to the square of what the step adds."""
    v_0 = double(0.25)
    t, s = double(0.5), double(0.48)
    b_t = 1 - (signal(t) / signal(s)) ** 2
    v_t, v_s = (signal(u) ** 2 * v_0 + noise(u) ** 2 for u in (t, s))
    zero = double([0.0])

    def moment(step, at):
        return affine_moments(
            lambda x: step(x, -x / at)[0], zero, at[None], noise_variance=step(zero, zero)[1]
        )[1][0]

    grown = moment(lambda x, sc: ancestral_vp(x, sc, beta=b_t), v_t) - v_s
    assert_exact(grown, b_t**2 * (1 / v_t - 1) / (1 - b_t))

    sigma, sigma_prev = double(1.0), double(0.8)
    added, v = sigma**2 - sigma_prev**2, v_0 + sigma**2
    grown = moment(lambda x, sc: reverse_diffusion(x, sc, gain=1.0, variance=added), v)
    assert_exact(grown - (v - added), added**2 / v)
    grown = moment(lambda x, sc: ancestral_ve(x, sc, sigma=sigma, sigma_prev=sigma_prev), v)
    assert_exact(grown - (v - added), -(added**2) * v_0 / (v * sigma**2))


def test_the_three_discretisations_differ_by_the_square_of_the_step():
    x, t = double([0.9]), double(0.4)
    far = {"reverse diffusion": [], "Euler-Maruyama": []}
    for n in (100, 200, 400):
        h = 1 / n
        b_t = 1 - (signal(t) / signal(t - h)) ** 2
        s = score_of(MIXTURE)(x[:, None], t)[:, 0]
        ours, _ = ancestral_vp(x, s, beta=b_t)
        other, _ = reverse_diffusion(x, s, gain=(1 - b_t).sqrt(), variance=b_t)
        drift = reverse_drift(-0.5 * beta(t) * x, s, g_squared=beta(t))
        far["reverse diffusion"].append((other - ours).abs().item())
        far["Euler-Maruyama"].append((x - h * drift - ours).abs().item())
    for errors in far.values():
        assert all(1.9 < slope < 2.1 for slope in slopes(errors))


def test_the_corrector_is_a_langevin_step_of_twice_its_step():
    """The factor 2: the paper of Langevin writes alpha / 2 and the root of alpha."""
    x, s = normal(6, 3, 2), normal(6, 3, 2, seed=1)
    ours = langevin_corrector(x, s, snr=0.16, generator=torch.Generator().manual_seed(3))
    z = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    length = [sum(v[i].norm().item() for i in range(6)) / 6 for v in (z, s)]
    step = 2 * (0.16 * length[0] / length[1]) ** 2
    wanted = langevin_step(
        x.flatten(1), s.flatten(1), step_size=2 * step, generator=torch.Generator().manual_seed(3)
    )
    assert_exact(ours.flatten(1), wanted)
    half = langevin_corrector(x, 0 * s + 1, snr=0.2, alpha=0.5)
    assert half.shape == x.shape


def test_alpha_scales_the_step_of_the_corrector():
    x, s = torch.zeros(4, 3, dtype=torch.float64), normal(4, 3, seed=1)
    one, quarter = (
        langevin_corrector(x, s, snr=0.2, alpha=a, generator=torch.Generator().manual_seed(0))
        for a in (1.0, 0.25)
    )
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 2 * (0.2 * z.norm(dim=1).mean() / s.norm(dim=1).mean()) ** 2
    assert_exact(one, step * s + (2 * step).sqrt() * z)
    assert_exact(quarter, step / 4 * s + (step / 2).sqrt() * z)


def test_the_corrector_alone_settles_above_the_variance():
    """(eq:score-sde-corrector-bias): V (1 + r^2), with D large, whatever the number of steps."""
    snr, v = 0.3, 0.6
    x = v**0.5 * normal(200, 400)
    g = torch.Generator().manual_seed(4)
    seen = []
    for i in range(60):
        x = langevin_corrector(x, -x / v, snr=snr, generator=g)
        if i >= 30:
            seen.append(x.var().item())
    assert sum(seen) / len(seen) == pytest.approx(v * (1 + snr**2), rel=0.01)


def ve_score(x, t):
    return gaussian_mixture.score(MIXTURE, x, b=t)


def ancestral(x, s, t, after):
    return ancestral_ve(x, s, sigma=t, sigma_prev=after)


def test_predictor_and_corrector_together_are_the_loop_written_out():
    times, x = double([3.0, 1.0, 0.2]), 3 * normal(5, 1)
    ours = predictor_corrector(
        ve_score, ancestral, x, times, n_corrections=2, snr=0.1,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    g = torch.Generator().manual_seed(5)
    for t, after in ((3.0, 1.0), (1.0, 0.2)):
        for _ in range(2):
            x = langevin_corrector(x, ve_score(x, double(t)), snr=0.1, generator=g)
        mean = x + (t**2 - after**2) * ve_score(x, double(t))
        z = torch.randn(5, 1, generator=g, dtype=torch.float64)
        x = mean + math.sqrt(after**2 * (t**2 - after**2) / t**2) * z
    assert_exact(ours, mean)  # the last mean, without noise


def test_a_mixture_is_sampled_with_its_weights():
    times = torch.cat([torch.logspace(1, -1.5, 60, dtype=torch.float64), double([0.0])])
    n = 4000
    for n_corrections in (0, 1):
        x = predictor_corrector(
            ve_score, ancestral, 10 * normal(n, 1, seed=6), times, n_corrections=n_corrections,
            snr=0.1, generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        owner = gaussian_mixture.component_posterior(MIXTURE, x, b=1e-3).mean(dim=0)
        assert (owner - MIXTURE.weights).abs().max() < 4 * 0.5 / n**0.5
        assert x.std().item() == pytest.approx(1.5, abs=0.1)


def test_the_alpha_of_a_time_reaches_the_corrector():
    times, x = double([0.5, 0.4]), normal(3, 1)
    seen = []

    def alpha(t):
        seen.append(t.item())
        return 1 - t

    predictor_corrector(ve_score, ancestral, x, times, alpha=alpha)
    assert seen == [0.5]


def test_the_reverse_sde_leads_back_to_the_data():
    n = 4000
    drift, diffusion = reverse_sde(score_of(MIXTURE), coefficients)
    times = torch.linspace(1, 1e-3, 301, dtype=torch.float64)
    g = torch.Generator().manual_seed(8)
    x = euler_maruyama(drift, diffusion, normal(n, 1, seed=9), times, generator=g)[-1]
    shares = gaussian_mixture.component_posterior(MIXTURE, x, b=1e-3).mean(dim=0)
    assert (shares - MIXTURE.weights).abs().max() < 4 * 0.5 / n**0.5


def test_refusals():
    x = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"lam is -1\.0: lam >= 0\."):
        reverse_drift(x, x, g_squared=1.0, lam=-1.0)
    with pytest.raises(ValueError, match=r"beta is 1: 0 < beta < 1\."):
        ancestral_vp(x, x, beta=1.0)
    with pytest.raises(ValueError, match=r"beta is 0: 0 < beta < 1\."):
        ancestral_vp(x, x, beta=double(0.0))
    with pytest.raises(
        ValueError, match=r"sigma_prev is 2 and sigma is 1: 0 <= sigma_prev < sigma\."
    ):
        ancestral_ve(x, x, sigma=1.0, sigma_prev=2.0)
    with pytest.raises(ValueError, match=r"snr is 0\.0: snr > 0\."):
        langevin_corrector(x, x, snr=0.0)
    with pytest.raises(ValueError, match=r"times are \[0\.0, 1\.0\]: at least two, and falling\."):
        predictor_corrector(ve_score, ancestral, x, double([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"times are \[1\.0\]: at least two, and falling\."):
        predictor_corrector(ve_score, ancestral, x, double([1.0]))
    with pytest.raises(ValueError, match=r"n_corrections is -1: n_corrections >= 0\."):
        predictor_corrector(ve_score, ancestral, x, double([1.0, 0.5]), n_corrections=-1)
