import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.ddim import ddim_step
from zhizhi.generative_models.edm import (
    denoise_on_path,
    edm_denoise,
    edm_field,
    edm_heun_sample,
    edm_loss,
    edm_preconditioning,
    karras_sigmas,
    log_normal_sigmas,
    to_edm,
)
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.ode_solver import euler, heun, rk4
from zhizhi.generative_models.prediction import Path, convert

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64),
    torch.tensor([[-2.0, 1.0], [0.0, 0.0], [1.5, -1.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64),
)
PATHS = {  # a, b and their derivatives at one time
    "VP": Path(math.cos(0.7), math.sin(0.7), -math.sin(0.7), math.cos(0.7)),
    "VE": Path(1.0, 3.0, 0.0, 2.5),
    "FM": Path(0.3, 0.7, -1.0, 1.0),
}


def exact(x, sigma):
    return gaussian_mixture.denoise(MIXTURE, x, b=sigma)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def straight_velocity(x, t):
    path = Path(1 - t, t, -1.0, 1.0)
    return convert(denoise_on_path(exact, x, path), x, path, source="data", target="velocity")


def polar_velocity(x, angle):
    path = Path(angle.cos(), angle.sin(), -angle.sin(), angle.cos())
    return convert(denoise_on_path(exact, x, path), x, path, source="data", target="velocity")


@pytest.mark.parametrize("name", PATHS)
def test_one_denoiser_answers_on_every_path(name):
    """(eq:edm-one-denoiser)"""
    path, x_t = PATHS[name], normal(7, 2)
    x, sigma = to_edm(x_t, path)
    assert_exact(x * path.a, x_t)
    assert_exact(sigma * path.a, path.b)
    wanted = gaussian_mixture.denoise(MIXTURE, x_t, a=path.a, b=path.b)
    assert_exact(denoise_on_path(exact, x_t, path), wanted)


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_of_every_path_is_that_of_one_equation(name):
    """(eq:edm-general) from the score, and (eq:edm-ode) by the chain rule."""
    a, b, d_a, d_b = PATHS[name]
    x_t = normal(7, 2)
    velocity = gaussian_mixture.velocity(MIXTURE, x_t, a=a, b=b, d_a=d_a, d_b=d_b)
    sigma, d_sigma = b / a, (d_b * a - d_a * b) / a**2
    score = gaussian_mixture.score(MIXTURE, x_t, a=a, b=b)
    assert_exact(velocity, d_a / a * x_t - a**2 * d_sigma * sigma * score)
    slope = edm_field(exact)(x_t / a, torch.tensor(sigma, dtype=torch.float64))
    assert_exact((velocity - d_a / a * x_t) / a, d_sigma * slope)
    assert_exact(slope, -sigma * gaussian_mixture.score(MIXTURE, x_t / a, b=sigma))


def test_ddim_and_flow_matching_and_edm_are_one_trajectory_under_euler():
    sigmas = karras_sigmas(20)
    x = sigmas[0] * normal(50, 2)
    by_edm = euler(edm_field(exact), x, sigmas)

    a = 1 / (1 + sigmas**2).sqrt()
    chain = [a[0] * x]
    for i in range(20):
        path = Path(a[i], sigmas[i] * a[i])
        data = denoise_on_path(exact, chain[-1], path)
        noise = convert(data, chain[-1], path, source="data", target="noise")
        levels = {"alpha_bar_t": a[i] ** 2, "alpha_bar_s": a[i + 1] ** 2}
        chain.append(ddim_step(chain[-1], noise, **levels))
    t = sigmas / (1 + sigmas)
    by_flow = euler(straight_velocity, (1 - t[0]) * x, t)

    size = a[:, None, None]  # all three on the scale of VP, where numbers stay near 1
    assert (torch.stack(chain) - size * by_edm).abs().max() < 1e-12
    assert (size * by_flow / (1 - t)[:, None, None] - size * by_edm).abs().max() < 1e-12


def test_between_the_nodes_the_polygons_cover_each_other():
    """(eq:edm-line): a straight path maps straight lines to straight lines, VP to arcs."""
    sigma, after = torch.tensor([3.0, 0.5], dtype=torch.float64)
    x = normal(5, 2)
    way = euler(edm_field(exact), x, torch.stack([sigma, after]))
    for share in (0.1, 0.5, 0.8):
        between = sigma + share * (after - sigma)
        on_line = way[0] + share * (way[1] - way[0])
        t, t_after, t_between = (s / (1 + s) for s in (sigma, after, between))
        weight = (t_between - t) / (t_after - t)
        ends = way[0] * (1 - t), way[1] * (1 - t_after)
        assert_exact(on_line * (1 - t_between), ends[0] + weight * (ends[1] - ends[0]))
        arc = on_line * between.atan().cos()
        data = exact(x, sigma)
        noise = (x - data) / sigma
        assert_exact(arc, between.atan().cos() * data + between.atan().sin() * noise)


def test_euler_leaves_the_path_of_vp_and_heun_differs_between_coordinates():
    """(eq:edm-tangent): only where a and b are affine in time does the tangent stay on the path."""
    sigmas = karras_sigmas(40)[:-1]
    x = sigmas[0] * normal(50, 2)
    truth = rk4(edm_field(exact), x, karras_sigmas(1000)[:-1])[-1]
    angle, t = sigmas.atan(), sigmas / (1 + sigmas)
    errors = {}
    for name, solve in (("euler", euler), ("heun", heun)):
        ends = (
            solve(edm_field(exact), x, sigmas)[-1],
            solve(straight_velocity, (1 - t[0]) * x, t)[-1] / (1 - t[-1]),
            solve(polar_velocity, angle[0].cos() * x, angle)[-1] / angle[-1].cos(),
        )
        errors[name] = [(end - truth).abs().mean().item() for end in ends]
    edm, flow, polar = errors["euler"]
    assert edm == pytest.approx(flow, rel=1e-9)
    assert abs(polar / edm - 1) > 0.3
    edm, flow, polar = errors["heun"]
    assert abs(flow / edm - 1) > 0.3
    assert max(errors["heun"]) < min(errors["euler"])


def test_flow_matching_starts_at_infinity_and_its_first_step_needs_no_network():
    """sigma_max = 80 is t = 80/81; one step from t = 1 lands on the mean plus noise."""
    noise, after = normal(6, 2), torch.tensor(80 / 81, dtype=torch.float64)

    def velocity(x, t):
        return gaussian_mixture.velocity(MIXTURE, x, a=1 - t, b=t, d_a=-1.0, d_b=1.0)

    times = torch.stack([torch.ones((), dtype=torch.float64), after])
    x, sigma = to_edm(euler(velocity, noise, times)[-1], Path(1 - after, after))
    assert sigma.item() == pytest.approx(80)
    mean = MIXTURE.weights @ MIXTURE.means
    assert_exact(x, mean + sigma * noise)
    assert round(after.item(), 5) == 0.98765


def test_levels_are_those_of_the_formula_and_of_both_limits():
    ours = karras_sigmas(18)
    for i in range(18):
        root = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        assert_exact(ours[i], root**7)
    assert ours[-1] == 0
    assert len(ours) == 19
    uniform = karras_sigmas(5, sigma_min=1.0, sigma_max=9.0, rho=1.0)
    assert_exact(uniform, torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0, 0.0]))
    geometric = karras_sigmas(5, sigma_min=1.0, sigma_max=16.0, rho=1e7)
    torch.testing.assert_close(
        geometric[:-1], torch.tensor([16.0, 8, 4, 2, 1]).double(), rtol=1e-5, atol=0
    )
    assert karras_sigmas(1).tolist() == [80.0, 0.0]


@pytest.mark.parametrize("sigma_data", [0.3, 1.0, 2.0])
def test_preconditioning_is_the_smallest_output_scale_that_any_skip_allows(sigma_data):
    """(eq:edm-skip) and (eq:edm-out), by a search over c_skip."""
    for sigma in (0.05, 0.7, 4.0):
        c = edm_preconditioning(torch.tensor(sigma, dtype=torch.float64), sigma_data=sigma_data)
        skips = torch.linspace(-1, 2, 300_001, dtype=torch.float64)
        target = (1 - skips) ** 2 * sigma_data**2 + skips**2 * sigma**2
        assert c.c_out.item() == pytest.approx(target.min().sqrt().item(), rel=1e-6)
        assert c.c_skip.item() == pytest.approx(skips[target.argmin()].item(), abs=1e-5)
        assert c.c_in.item() ** 2 * (sigma**2 + sigma_data**2) == pytest.approx(1)
        assert c.c_noise.item() == pytest.approx(math.log(sigma) / 4)
        # What the skip leaves is uncorrelated with the input.
        assert (1 - c.c_skip) * sigma_data**2 - c.c_skip * sigma**2 == pytest.approx(0, abs=1e-12)


def test_the_target_of_the_network_is_minus_v_for_data_of_variance_one():
    """(eq:edm-is-v): tan(angle) = sigma / sigma_data."""
    x_0, noise, sigma_data, sigma = normal(9), normal(9, seed=1), 0.5, 1.3
    c = edm_preconditioning(torch.tensor(sigma, dtype=torch.float64), sigma_data=sigma_data)
    target = (x_0 - c.c_skip * (x_0 + sigma * noise)) / c.c_out
    angle = math.atan2(sigma, sigma_data)
    path = Path(math.cos(angle), math.sin(angle))
    x_t = path.a * x_0 / sigma_data + path.b * noise
    assert_exact(target, -convert(noise, x_t, path, source="noise", target="v"))


def test_a_network_is_wrapped_row_by_row():
    x, sigma = normal(3, 2, 4), torch.tensor([0.1, 1.0, 30.0]).double()

    def network(x, c_noise):
        return x.sin() + c_noise.reshape(-1, 1, 1)

    ours = edm_denoise(network, x, sigma, sigma_data=0.8)
    for row, level, out in zip(x, sigma.tolist(), ours, strict=True):
        s = level**2 + 0.64
        f = (row / s**0.5).sin() + math.log(level) / 4
        assert_exact(out, 0.64 / s * row + level * 0.8 / s**0.5 * f)


def test_without_noise_the_wrapped_network_returns_its_input():
    x, tiny = normal(4, 3), torch.full((4,), 1e-12).double()
    assert_exact(edm_denoise(lambda x, c: 5 * x, x, tiny), x)


def test_levels_of_training_are_log_normal():
    n = 100_000
    log_sigma = log_normal_sigmas(n, generator=torch.Generator().manual_seed(0)).log()
    assert abs(log_sigma.mean() + 1.2) < 4 * 1.2 / math.sqrt(n)
    assert abs(log_sigma.std() / 1.2 - 1) < 4 / math.sqrt(2 * n)
    assert (log_normal_sigmas(4, p_mean=1.0, p_std=0.0).log() - 1).abs().max() < 1e-6


def test_the_loss_is_that_of_the_released_code():
    x_0, sigma = normal(5, 2, 3), torch.tensor([0.02, 0.3, 1.0, 7.0, 80.0]).double()

    def network(x, c_noise):
        return torch.tanh(x) * c_noise.reshape(-1, 1, 1)

    ours = edm_loss(network, x_0, sigma, generator=torch.Generator().manual_seed(3))
    noise = normal(5, 2, 3, seed=3)
    for i, s in enumerate(sigma.tolist()):
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        x = x_0[i : i + 1] + s * noise[i : i + 1]
        D = edm_denoise(network, x, sigma[i : i + 1])
        assert_exact(ours[i], weight * (D - x_0[i]).square().mean())


def test_weight_and_output_scale_cancel_so_that_the_loss_is_one_at_every_level():
    x_0 = 0.5 * normal(4, 100_000)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0]).double()
    loss = edm_loss(lambda x, c: 0 * x, x_0, sigma, generator=torch.Generator().manual_seed(1))
    assert (loss - 1).abs().max() < 4 * math.sqrt(2 / 100_000) * 1.5


def test_heun_is_heun_and_its_last_step_is_euler_in_2n_minus_1_evaluations():
    sigmas, x = karras_sigmas(9), 80 * normal(6, 2)
    calls = []

    def counted(x, sigma):
        assert sigma.min() > 0
        calls.append(sigma)
        return exact(x, sigma)

    ours = edm_heun_sample(counted, x, sigmas)
    assert len(calls) == 2 * 9 - 1
    wanted = heun(edm_field(exact), x, sigmas[:-1])
    assert_exact(ours[:-1], wanted)
    assert_exact(ours[-1], exact(wanted[-1], sigmas[-2].expand(6)))


def test_at_equal_evaluations_euler_wins_with_few_and_heun_with_many():
    x = 80 * normal(200, 2)
    truth = edm_heun_sample(exact, x, karras_sigmas(1000))[-1]

    def errors(evaluations):
        ends = (
            euler(edm_field(exact), x, karras_sigmas(evaluations))[-1],
            edm_heun_sample(exact, x, karras_sigmas((evaluations + 1) // 2))[-1],
        )
        return [(end - truth).abs().mean().item() for end in ends]

    by_euler, by_heun = errors(9)
    assert by_heun > 2 * by_euler
    by_euler, by_heun = errors(79)
    assert by_heun < by_euler / 2


def test_a_churned_step_by_hand():
    sigmas, x = torch.tensor([4.0, 2.0, 1.0]).double(), normal(3, 2)
    options = {"s_churn": 0.5, "s_min": 3.0, "s_noise": 1.1}
    ours = edm_heun_sample(exact, x, sigmas, **options, generator=torch.Generator().manual_seed(2))
    z, hat = normal(3, 2, seed=2), 4.0 * 1.25  # gamma = 0.5 / 2 steps
    x_hat = x + math.sqrt(hat**2 - 16.0) * 1.1 * z
    first = (x_hat - exact(x_hat, torch.full((3,), hat).double())) / hat
    second_x = x_hat + (2.0 - hat) * first
    second = (second_x - exact(second_x, torch.full((3,), 2.0).double())) / 2.0
    assert_exact(ours[1], x_hat + (2.0 - hat) * (first + second) / 2)
    quiet = edm_heun_sample(exact, ours[1], sigmas[1:])  # 2 and below is out of the window
    assert_exact(ours[2], quiet[-1])


def test_churn_at_most_doubles_the_variance_and_only_inside_its_window():
    seen = []

    def watch(x, sigma):
        seen.append(sigma[0].item())
        return 0 * x

    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0]).double()
    edm_heun_sample(watch, normal(1, 2), sigmas, s_churn=1e9, s_min=3.0, s_max=5.0)
    assert seen == pytest.approx([8, 4, 4 * math.sqrt(2), 2, 2])


def test_churn_keeps_the_law_of_gaussian_data():
    """With an exact denoiser the variance that noise adds is the variance that the way takes."""
    v = 0.25

    def denoise(x, sigma):
        return v / (v + sigma[:, None] ** 2) * x

    sigmas, n = karras_sigmas(80), 20_000
    x = math.sqrt(v + 80**2) * normal(n, 1)
    g = torch.Generator().manual_seed(7)
    end = edm_heun_sample(denoise, x, sigmas, s_churn=30.0, generator=g)[-1]
    quiet = edm_heun_sample(denoise, x, sigmas)[-1]
    assert abs(end.var() / v - 1) < 4 * math.sqrt(2 / n) + 0.02  # 0.02 for the size of the steps
    assert torch.corrcoef(torch.cat([end.T, x.T]))[0, 1].abs() < 0.5  # forgotten
    assert torch.corrcoef(torch.cat([quiet.T, x.T]))[0, 1] > 1 - 1e-9


def test_heun_is_of_second_order():
    x = 80 * normal(100, 2)
    ends = {n: edm_heun_sample(exact, x, karras_sigmas(n)[:-1])[-1] for n in (40, 80, 160, 1000)}
    errors = [(ends[n] - ends[1000]).abs().mean() for n in (40, 80, 160)]
    assert all(1.7 < math.log2(p / q) < 2.5 for p, q in itertools.pairwise(errors))


def test_dtype_of_the_sample_is_kept():
    x = 80 * normal(4, 2)
    single = edm_heun_sample(exact, x.float(), karras_sigmas(6), s_churn=2.0)
    assert single.dtype == torch.float32
    by_edm = euler(edm_field(exact), x.float(), karras_sigmas(6))
    assert by_edm.dtype == torch.float32
    assert_float32(by_edm[-1] / 10, euler(edm_field(exact), x, karras_sigmas(6))[-1].float() / 10)
    assert denoise_on_path(exact, x.float(), Path(0.5, 0.5)).dtype == torch.float32


def test_refusals():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"a is 0 and b is 1: sigma = b / a needs a > 0\."):
        to_edm(x, Path(0.0, 1.0))
    with pytest.raises(ValueError, match="a is 0"):
        denoise_on_path(exact, x, Path(0.0, 1.0))
    with pytest.raises(ValueError, match=r"n_steps is 0 and rho is 7\.0"):
        karras_sigmas(0)
    with pytest.raises(ValueError, match=r"n_steps is 4 and rho is 0\.0"):
        karras_sigmas(4, rho=0.0)
    with pytest.raises(ValueError, match=r"the levels go from 1\.0 to 2\.0"):
        karras_sigmas(4, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"the levels go from 1\.0 to 0\.0"):
        karras_sigmas(4, sigma_min=0.0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"the least sigma is 0 and sigma_data is 0\.5"):
        edm_preconditioning(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"the least sigma is 1 and sigma_data is 0"):
        edm_preconditioning(torch.ones(1), sigma_data=0.0)
    for levels in ([1.0], [1.0, 2.0], [1.0, 1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="at least 2, falling, not below 0"):
            edm_heun_sample(exact, x, torch.tensor(levels))
    with pytest.raises(ValueError, match=r"s_churn is -1\.0"):
        edm_heun_sample(exact, x, karras_sigmas(2), s_churn=-1.0)
