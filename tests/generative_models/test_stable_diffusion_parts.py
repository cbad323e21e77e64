import pytest
import torch
from torch.nn import functional as F

from zhizhi.generative_models.stable_diffusion_parts import AutoencoderKL, ClipTextEncoder


def count(module):
    return sum(p.numel() for p in module.parameters())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return module


def small_vae():
    return fill(AutoencoderKL(d_image=1, d_latent=2, widths=(4, 8), n_blocks=1, n_groups=2))


def small_text(n_layers=2):
    return fill(ClipTextEncoder(n_tokens=11, length=6, d_model=8, n_layers=n_layers, n_heads=2))


def group_norm(x, norm):
    parts = x.reshape(len(x), norm.num_groups, -1)
    mean, var = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, unbiased=False)
    y = ((parts - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


def layer_norm(x, norm):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return y * norm.weight + norm.bias


def affine(x, layer):
    return x @ layer.weight.T + layer.bias


def residual(x, block):
    def silu(h):
        return h * torch.sigmoid(h)

    h = block.conv_1(silu(group_norm(x, block.norm_1)))
    return block.skip(x) + block.conv_2(silu(group_norm(h, block.norm_2)))


def look_around(x, block):
    """Attention of one head, by a loop over positions."""
    h = group_norm(x, block.norm).flatten(2).mT
    q, k, v = affine(h, block.q), affine(h, block.k), affine(h, block.v)
    out = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for n in range(h.shape[1]):
            weights = (k[b] @ q[b, n] / h.shape[2] ** 0.5).exp()
            out[b, n] = weights @ v[b] / weights.sum()
    return x + affine(out, block.out).mT.reshape(x.shape)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_parameters_of_the_released_networks():
    with torch.device("meta"):
        vae, text = AutoencoderKL(), ClipTextEncoder()
    assert count(vae) == 83_653_863
    assert count(vae.encoder) == 34_163_592
    assert count(vae.decoder) == 49_490_179
    assert count(vae.to_posterior) + count(vae.from_latent) == 72 + 20
    assert count(text) == 123_060_480


def test_the_parameters_of_the_text_encoder_by_their_formula():
    D = 768
    block = 4 * (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D
    with torch.device("meta"):
        text = ClipTextEncoder()
    assert count(text) == 49_408 * D + 77 * D + 12 * block + 2 * D


def test_sizes_of_stable_diffusion():
    with torch.device("meta"):
        vae, text = AutoencoderKL(), ClipTextEncoder()
        posterior = vae.encode(torch.zeros(1, 3, 512, 512))
        assert posterior.mean.shape == posterior.log_variance.shape == (1, 4, 64, 64)
        assert vae.decode(posterior.mean).shape == (1, 3, 512, 512)
        assert text(torch.zeros(1, 77, dtype=torch.long)).shape == (1, 77, 768)


def test_the_encoder_step_by_step():
    vae, x = small_vae(), normal(2, 1, 4, 6)
    conv_in, first, halve, second, third, attend, fourth, norm, _, conv_out = vae.encoder
    h = residual(conv_in(x), first)
    wide = torch.zeros(2, 4, 5, 7)
    wide[:, :, :4, :6] = h  # zeros to the right and below, none to the left and above
    h = F.conv2d(wide, halve.weight, halve.bias, stride=2)
    assert h.shape[2:] == (2, 3)
    h = residual(look_around(residual(residual(h, second), third), attend), fourth)
    h = group_norm(h, norm)
    h = conv_out(h * torch.sigmoid(h))
    weight, bias = vae.to_posterior.weight[:, :, 0, 0], vae.to_posterior.bias
    h = torch.einsum("oc,bcyx->boyx", weight, h) + bias[:, None, None]
    posterior = vae.encode(x)
    close(posterior.mean, h[:, :2])
    close(posterior.log_variance, h[:, 2:])


def test_the_decoder_step_by_step():
    vae, z = small_vae(), normal(2, 2, 2, 3)
    conv_in, first, attend, second, third, fourth, _, conv_up, *rest = vae.decoder
    weight, bias = vae.from_latent.weight[:, :, 0, 0], vae.from_latent.bias
    h = conv_in(torch.einsum("oc,bcyx->boyx", weight, z) + bias[:, None, None])
    h = residual(look_around(residual(h, first), attend), second)
    h = residual(residual(h, third), fourth)
    h = conv_up(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    h = residual(residual(h, rest[0]), rest[1])
    h = group_norm(h, rest[2])
    close(vae.decode(z), rest[4](h * torch.sigmoid(h)))


def test_log_variances_are_kept_within_bounds():
    vae = small_vae()
    with torch.no_grad():
        vae.to_posterior.weight.mul_(1e6)
    log_variance = vae.encode(normal(2, 1, 4, 4)).log_variance
    assert log_variance.min() == -30
    assert log_variance.max() == 20


def test_the_text_encoder_is_a_loop_over_heads_and_positions():
    text, tokens = small_text(n_layers=1), torch.tensor([[1, 4, 7, 2], [1, 9, 2, 2]])
    x = text.token.weight[tokens] + text.position.weight[:4]
    block = text.blocks[0]
    h = layer_norm(x, block.norm_1)
    q, k, v = affine(h, block.q), affine(h, block.k), affine(h, block.v)
    o = torch.zeros_like(x)
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            for s in range(4):
                weights = (k[b, : s + 1, head] @ q[b, s, head] / 2).exp()
                o[b, s, head] = weights @ v[b, : s + 1, head] / weights.sum()
    x = x + affine(o, block.out)
    h = affine(layer_norm(x, block.norm_2), block.up)
    x = x + affine(h / (1 + torch.exp(-1.702 * h)), block.down)
    close(text(tokens), layer_norm(x, text.norm))


def test_a_token_changes_what_stands_at_it_and_behind_it_only():
    text, tokens = small_text(), torch.tensor([[1, 4, 7, 2, 2, 2]])
    for s in range(6):
        changed = tokens.clone()
        changed[0, s] = 10
        moved = (text(changed) - text(tokens))[0].abs().amax(dim=-1) > 1e-6
        assert moved.tolist() == [place >= s for place in range(6)]


def test_every_parameter_gets_a_gradient():
    vae, text = small_vae(), small_text()
    posterior = vae.encode(normal(2, 1, 4, 4))
    z = posterior.mean + (0.5 * posterior.log_variance).exp() * normal(2, 2, 2, 2, seed=1)
    vae.decode(z).square().sum().backward()
    text(torch.arange(6)[None]).square().sum().backward()
    for p in (*vae.parameters(), *text.parameters()):
        assert p.grad is not None


def test_refusals():
    with pytest.raises(ValueError, match=r"images of \(4, 5\): sides are multiples of 2"):
        small_vae().encode(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        ClipTextEncoder(n_tokens=4, length=3, d_model=8, n_layers=1, n_heads=3)
    with pytest.raises(ValueError, match="7 tokens, and 6 positions: not more"):
        small_text()(torch.zeros(1, 7, dtype=torch.long))
