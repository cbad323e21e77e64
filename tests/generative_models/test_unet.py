import math

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.unet import (
    GEGLU,
    CrossAttention,
    ResBlock,
    SpatialTransformer,
    Stage,
    UNet,
    UNetEncoder,
    stable_diffusion_1,
    timestep_embedding,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return module


SMALL = {"d_in": 1, "widths": (32, 64), "attention": (False, True), "d_context": 8}


def test_timestep_embedding_entry_by_entry():
    got = timestep_embedding(torch.tensor([0.0, 3.0, 999.0]), dim=6, max_period=100.0)
    for row, t in zip(got, (0.0, 3.0, 999.0), strict=True):
        for i in range(3):
            w = 100 ** (-2 * i / 6)
            assert row[i].item() == pytest.approx(math.cos(w * t), abs=1e-4)
            assert row[3 + i].item() == pytest.approx(math.sin(w * t), abs=1e-4)


def test_inner_products_of_embeddings_depend_on_the_difference_alone():
    e = timestep_embedding(torch.arange(200), dim=64)
    products = e @ e.T
    for shift in (0, 7, 100):
        diagonal = products.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-3)
    assert_float32(products.diagonal(), torch.full((200,), 32.0))


def test_res_block_is_its_formula():
    block, x, e = fill(ResBlock(4, 6, d_time=5, n_groups=2)), normal(3, 4, 4, 4), normal(3, 5)

    def group_norm(h, norm):
        parts = h.reshape(3, 2, -1)
        mean, var = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, unbiased=False)
        h = ((parts - mean) / (var + 1e-5).sqrt()).reshape(h.shape)
        return h * norm.weight[:, None, None] + norm.bias[:, None, None]

    def silu(h):
        return h * torch.sigmoid(h)

    h = block.conv_1(silu(group_norm(x, block.norm_1)))
    h = h + (silu(e) @ block.time.weight.T + block.time.bias)[..., None, None]
    wanted = block.skip(x) + block.conv_2(silu(group_norm(h, block.norm_2)))
    torch.testing.assert_close(block(x, e), wanted, rtol=1e-4, atol=1e-5)


def test_cross_attention_is_a_loop_over_heads_and_positions():
    attend, x, c = fill(CrossAttention(6, d_context=4, n_heads=2)), normal(2, 5, 6), normal(2, 3, 4)
    q, k, v = x @ attend.q.weight.T, c @ attend.k.weight.T, c @ attend.v.weight.T
    wanted = torch.zeros(2, 5, 6)
    for b in range(2):
        for head in (slice(0, 3), slice(3, 6)):
            for n in range(5):
                scores = torch.stack([q[b, n, head] @ k[b, s, head] for s in range(3)]) / 3**0.5
                weights = scores.exp() / scores.exp().sum()
                wanted[b, n, head] = sum(w * v[b, s, head] for s, w in enumerate(weights))
    wanted = wanted @ attend.out.weight.T + attend.out.bias
    assert_float32(attend(x, c), wanted)
    alone = fill(CrossAttention(6, d_context=6, n_heads=2))
    assert_float32(alone(x), alone(x, x))


def test_geglu_gates_with_the_second_half():
    layer, x = fill(GEGLU(4)), normal(2, 3, 4)
    both = x @ layer.up.weight.T + layer.up.bias
    u, g = both[..., :16], both[..., 16:]
    gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
    assert_float32(layer(x), (u * gelu) @ layer.down.weight.T + layer.down.bias)


def test_a_spatial_transformer_without_its_branches_is_the_shortcut():
    block, x = fill(SpatialTransformer(8, d_context=4, n_heads=2, n_groups=2)), normal(2, 8, 2, 3)
    with torch.no_grad():
        block.proj_out.weight.zero_()
        block.proj_out.bias.zero_()
    assert torch.equal(block(x, normal(2, 5, 4)), x)


def test_a_spatial_transformer_does_not_care_for_the_order_of_pixels_or_tokens():
    """It has no positions of its own: the convolutions around it bring them."""
    block = fill(SpatialTransformer(8, d_context=4, n_heads=2, n_groups=2))
    x, c = normal(2, 8, 2, 3), normal(2, 5, 4)
    flat = block(x.flip(-1), c.flip(1))
    torch.testing.assert_close(flat.flip(-1), block(x, c), rtol=1e-4, atol=1e-5)


def test_the_parameters_of_the_released_networks():
    with torch.device("meta"):
        first = stable_diffusion_1()
        second = UNet(
            d_in=4, d_out=4, widths=(320, 640, 1280, 1280), attention=(True, True, True, False),
            d_context=1024,
        )  # fmt: skip
    assert count(first) == 859_520_964
    assert count(second) == 865_910_724
    assert count(first.encoder) == 348_712_960  # what ControlNet copies


def test_skips_come_one_for_each_stage_and_each_halving():
    with torch.device("meta"):
        encoder = stable_diffusion_1().encoder
        x, t, context = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
        skips, h, e = encoder(x, t, context)
    shapes = [tuple(s.shape[1:]) for s in skips]
    assert shapes == [
        (320, 64, 64), (320, 64, 64), (320, 64, 64), (320, 32, 32),
        (640, 32, 32), (640, 32, 32), (640, 16, 16),
        (1280, 16, 16), (1280, 16, 16), (1280, 8, 8), (1280, 8, 8), (1280, 8, 8),
    ]  # fmt: skip
    assert h.shape[1:] == (1280, 8, 8)
    assert e.shape == (1, 1280)


def test_forward_is_encode_then_decode_and_uses_every_skip():
    net = fill(UNet(d_out=2, **SMALL))
    x, t, c = normal(2, 1, 8, 8), torch.tensor([1, 50]), normal(2, 3, 8)
    skips, h, e = net.encoder(x, t, c)
    out = net.decode(skips, h, e, c)
    assert out.shape == (2, 2, 8, 8)
    assert torch.equal(out, net(x, t, c))
    for i in range(len(skips)):
        changed = [s + (j == i) for j, s in enumerate(skips)]
        assert not torch.allclose(net.decode(changed, h, e, c), out)
    assert len(skips) == 6  # nothing was taken out of the caller's list


def test_every_parameter_time_and_context_reach_the_output():
    net = fill(UNet(d_out=1, **SMALL))
    x, t, c = normal(2, 1, 8, 8), torch.tensor([1, 50]), normal(2, 3, 8)
    out = net(x, t, c)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.allclose(net(x, t + 1, c), out)
    assert not torch.allclose(net(x, t, c + 1), out)


def test_what_is_added_stands_behind_the_first_convolution():
    encoder = fill(UNetEncoder(**SMALL))
    x, t, c = normal(1, 1, 8, 8), torch.tensor([3]), normal(1, 3, 8)
    extra = normal(1, 32, 8, 8, seed=1)
    assert torch.equal(encoder(x, t, c, added=extra)[0][0], encoder(x, t, c)[0][0] + extra)


def test_without_a_context_there_is_no_transformer():
    net = UNet(d_in=1, d_out=1, widths=(32, 32), attention=(True, True))
    assert not any(isinstance(m, SpatialTransformer) for m in net.modules())
    assert net(normal(1, 1, 4, 4), torch.tensor([3])).shape == (1, 1, 4, 4)


def test_double_precision_stays_double():
    net = fill(UNet(d_out=1, **SMALL)).double()
    out = net(normal(1, 1, 8, 8).double(), torch.tensor([3]), normal(1, 3, 8).double())
    assert out.dtype == torch.float64
    assert_exact(out.shape[0], 1)


def test_refusals():
    with pytest.raises(ValueError, match="dim is 3: an even number"):
        timestep_embedding(torch.zeros(1), dim=3)
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        CrossAttention(8, d_context=8, n_heads=3)
    with pytest.raises(ValueError, match="2 widths and 1 entries of attention"):
        UNet(d_in=1, d_out=1, widths=(32, 32), attention=(True,))
    net = UNet(d_out=1, **SMALL)
    with pytest.raises(ValueError, match=r"images of \(8, 7\): sides are multiples of 2"):
        net(torch.zeros(1, 1, 8, 7), torch.zeros(1), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="pass one"):
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="pass one"):
        Stage(32, 32, d_time=8, d_context=4, n_heads=2, n_groups=32)(
            torch.zeros(1, 32, 2, 2), torch.zeros(1, 8), None
        )
