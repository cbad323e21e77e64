from itertools import pairwise

import pytest
import torch
from tests.closeness import EXACT, assert_exact, assert_float32
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zhizhi.generative_models import noise_schedule
from zhizhi.generative_models.autoencoder import Posterior
from zhizhi.generative_models.ddim import ddim_step, ddim_times
from zhizhi.generative_models.stable_diffusion import (
    decode,
    encode,
    img2img_start,
    latent_diffusion_loss,
    latent_scale,
    sample_latents,
)
from zhizhi.generative_models.unet import stable_diffusion_1

ALPHA_BAR = noise_schedule.alpha_bar(noise_schedule.scaled_linear_beta(n_steps=1000))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Doubling(nn.Module):
    """An autoencoder whose latents are twice the image, with a deviation that is given."""

    def __init__(self, log_variance):
        super().__init__()
        self.log_variance = log_variance

    def encode(self, x):
        return Posterior(2 * x, torch.full_like(x, self.log_variance))

    def decode(self, z):
        return z / 2


def linear_net(z_t, t, context):
    """Depends on all three arguments."""
    shift = context.sum(dim=(1, 2)) + t / 1000
    return 0.5 * z_t + shift.reshape(-1, *[1] * (z_t.ndim - 1))


def test_scaled_latents_have_a_standard_deviation_of_one():
    z = 5.49 * normal(50, 4, 8, 8) + 2.0
    assert_exact((latent_scale(z) * z).std(), 1.0)
    assert_exact(latent_scale(3 * z), latent_scale(z) / 3)


def test_the_scale_is_one_number_for_all_channels():
    z = torch.stack([normal(1000), 3 * normal(1000, seed=1)], dim=1)
    c = latent_scale(z)
    assert 0.3 < (c * z).std(dim=0)[0] < 0.6 < 1.2 < (c * z).std(dim=0)[1]


def test_decode_undoes_encode():
    x = normal(5, 1, 4, 4)
    for scale in (0.18215, 1.0, 3.0):
        z = encode(Doubling(-200.0), x, scale=scale)
        torch.testing.assert_close(z, scale * 2 * x, **EXACT)
        torch.testing.assert_close(decode(Doubling(0.0), z, scale=scale), x, **EXACT)


def test_encode_draws_with_the_deviation_of_the_posterior_times_the_scale():
    n, x = 40_000, torch.full((40_000, 1), 0.7, dtype=torch.float64)
    z = encode(Doubling(-2.0), x, scale=0.3, generator=torch.Generator().manual_seed(0))
    std = 0.3 * torch.tensor(-1.0).exp().item()
    assert abs(z.mean() - 0.3 * 1.4) < 4 * std / n**0.5
    assert abs(z.std() / std - 1) < 4 / (2 * n) ** 0.5


def test_loss_is_a_loop_over_latents():
    z, context = normal(6, 2, 3, 3), normal(6, 4, 5, seed=1)
    g = torch.Generator().manual_seed(3)
    got = latent_diffusion_loss(linear_net, z, context, alpha_bar=ALPHA_BAR, generator=g)
    g = torch.Generator().manual_seed(3)
    t = torch.randint(1, 1001, (6,), generator=g)
    noise = torch.randn(z.shape, generator=g, dtype=z.dtype)
    total = 0.0
    for i in range(6):
        a, b = ALPHA_BAR[t[i]].sqrt(), (1 - ALPHA_BAR[t[i]]).sqrt()
        z_t = (a * z[i] + b * noise[i])[None]
        total += (noise[i] - linear_net(z_t, t[i : i + 1], context[i : i + 1])[0]).square().sum()
    assert_exact(got, total / z.numel())


def test_loss_asks_for_all_times_but_zero():
    seen = []

    def net(z_t, t, context):
        seen.append(t)
        return z_t

    latent_diffusion_loss(
        net, normal(4000, 1), normal(4000, 1, 1), alpha_bar=ALPHA_BAR[:4],
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert seen[0].unique().tolist() == [1, 2, 3]


def test_sampling_is_ddim_with_two_separate_calls_mixed():
    z, context, null = normal(3, 2, 2, 2), normal(3, 4, 5, seed=1), normal(4, 5, seed=2)
    times = ddim_times(1000, 7)
    got = sample_latents(
        linear_net, z, context, null=null, guidance=7.5, alpha_bar=ALPHA_BAR, times=times
    )
    for i in range(3):
        x = z[i : i + 1]
        for t, s in pairwise(times):
            with_text = linear_net(x, t[None], context[i : i + 1])
            without = linear_net(x, t[None], null[None])
            x = ddim_step(
                x, -6.5 * without + 7.5 * with_text,
                alpha_bar_t=ALPHA_BAR[t], alpha_bar_s=ALPHA_BAR[s],
            )  # fmt: skip
        torch.testing.assert_close(got[i : i + 1], x, **EXACT)


def test_a_scale_of_zero_sees_the_null_alone_and_of_one_the_prompt_alone():
    z, context, null = normal(3, 4), normal(3, 2, 5, seed=1), normal(2, 5, seed=2)
    settings = {"alpha_bar": ALPHA_BAR, "times": ddim_times(1000, 5)}
    rows = []

    def net(z_t, t, c):
        rows.append(len(z_t))
        return linear_net(z_t, t, c)

    blind = sample_latents(net, z, context, null=null, guidance=0.0, **settings)
    other = sample_latents(net, z, context + 1, null=null, guidance=0.0, **settings)
    torch.testing.assert_close(blind, other, **EXACT)
    assert rows == [6] * 10
    rows.clear()
    plain = sample_latents(net, z, context, null=null, guidance=1.0, **settings)
    nearly = sample_latents(linear_net, z, context, null=null, guidance=1 + 1e-13, **settings)
    assert rows == [3] * 5
    torch.testing.assert_close(plain, nearly, **EXACT)
    as_prompt = null.expand(3, -1, -1)
    torch.testing.assert_close(
        blind, sample_latents(net, z, as_prompt, null=null, guidance=1.0, **settings), **EXACT
    )


def test_the_exact_network_turns_noise_into_the_data():
    """For latents N(2, 0.5^2) noise_hat is linear in z_t, and the samples are such latents."""
    n = 20_000

    def exact(z_t, t, context):
        a, b = ALPHA_BAR[t[0]].sqrt(), (1 - ALPHA_BAR[t[0]]).sqrt()
        return b * (z_t - 2 * a) / (0.25 * a**2 + b**2)

    z = sample_latents(
        exact, normal(n, 1), torch.zeros(n, 1, 1), null=torch.zeros(1, 1), guidance=1.0,
        alpha_bar=ALPHA_BAR, times=ddim_times(1000, 200),
    )  # fmt: skip
    # The walk starts from N(0, 1) and not from N(2 * 0.068, ...): the terminal SNR is not zero.
    assert abs(z.mean() - 2) < 0.1
    assert abs(z.std() - 0.5) < 0.02


def test_img2img_starts_with_the_right_mean_and_spread():
    times = ddim_times(1000, 50)
    z_0 = torch.full((40_000, 1), 3.0, dtype=torch.float64)
    z, rest = img2img_start(
        z_0, strength=0.6, alpha_bar=ALPHA_BAR, times=times,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rest.tolist() == times[20:].tolist()
    assert rest[0] == 600
    a, b = ALPHA_BAR[600].sqrt(), (1 - ALPHA_BAR[600]).sqrt()
    assert abs(z.mean() - 3 * a) < 4 * b / 200
    assert abs(z.std() / b - 1) < 4 / 80_000**0.5


def test_img2img_of_strength_zero_changes_nothing():
    z_0, times = normal(2, 3), ddim_times(1000, 10)
    z, rest = img2img_start(z_0, strength=0.0, alpha_bar=ALPHA_BAR, times=times)
    assert torch.equal(z, z_0)
    assert rest.tolist() == [0]
    context = normal(2, 1, 1)
    out = sample_latents(
        linear_net, z, context, null=context[0], guidance=2.0, alpha_bar=ALPHA_BAR, times=rest
    )
    assert torch.equal(out, z_0)


def test_img2img_of_strength_one_still_remembers_the_image():
    times = ddim_times(1000, 10)
    z_0 = normal(2, 3)
    g = torch.Generator().manual_seed(5)
    z, rest = img2img_start(z_0, strength=1.0, alpha_bar=ALPHA_BAR, times=times, generator=g)
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(z_0.shape, generator=g, dtype=torch.float64)
    assert rest.tolist() == times.tolist()
    assert_exact(z - (1 - ALPHA_BAR[-1]).sqrt() * noise, ALPHA_BAR[-1].sqrt() * z_0)


def test_the_terminal_signal_of_stable_diffusion():
    assert ALPHA_BAR[-1].sqrt().item() == pytest.approx(0.06826, abs=1e-5)
    sigma = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
    assert sigma[-1].item() == pytest.approx(14.6146, abs=1e-4)
    assert sigma[1].item() == pytest.approx(0.0292, abs=1e-4)


def test_float32_stays():
    z, context = normal(2, 3).float(), normal(2, 4, 5).float()
    settings = {"alpha_bar": ALPHA_BAR, "times": ddim_times(1000, 3)}
    out = sample_latents(linear_net, z, context, null=context[0], guidance=2.0, **settings)
    assert out.dtype == torch.float32
    start, _ = img2img_start(z, strength=0.5, **settings)
    assert start.dtype == torch.float32
    double = sample_latents(
        linear_net, z.double(), context.double(), null=context[0].double(), guidance=2.0, **settings
    )
    assert_float32(out / double.abs().max(), double / double.abs().max())


def test_the_cost_of_the_same_unet_on_pixels():
    """The page scales all but the self-attention by 64, and that by 64^2; counted anew here."""
    costs = {}
    with torch.device("meta"):
        net = stable_diffusion_1()
        for side in (64, 128):
            with FlopCounterMode(display=False) as counter:
                net(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 77, 768))
            costs[side] = counter.get_total_flops() / 2
    attention = sum(
        2 * (side**2) ** 2 * width * count
        for side, width, count in ((64, 320, 5), (32, 640, 5), (16, 1280, 5), (8, 1280, 1))
    )
    scaled = 4 * (costs[64] - attention) + 16 * attention
    assert abs(scaled / costs[128] - 1) < 0.003  # keys and values of the text do not grow


def test_refusals():
    with pytest.raises(ValueError, match=r"the latents have a standard deviation of 0\.0"):
        latent_scale(torch.ones(3, 2))
    settings = {"alpha_bar": ALPHA_BAR, "times": ddim_times(1000, 3)}
    with pytest.raises(ValueError, match="prompts of 4 tokens, null of 3: as many"):
        sample_latents(
            linear_net, normal(2, 3), normal(2, 4, 5), null=normal(3, 5), guidance=2.0, **settings
        )
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"strength is {strength}: 0 <= strength <= 1"):
            img2img_start(normal(2, 3), strength=strength, **settings)
