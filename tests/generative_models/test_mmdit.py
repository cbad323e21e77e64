import math
import re

import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch.nn import functional as F

from zhizhi.generative_models.dit import DiTBlock, sincos_2d
from zhizhi.generative_models.mmdit import (
    MMDiT,
    MMDiTBlock,
    Projections,
    Stream,
    grid_places,
    joint_attention,
    sd3_5_large,
    sd3_5_medium,
    sd3_medium,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module, *, seed=0):
    """Give every parameter random values: a fresh block is the identity and proves nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return module


def as_dit(stream, d_model, n_heads):
    block = DiTBlock(d_model, n_heads=n_heads).double()
    block.load_state_dict(
        {
            name.replace("joint.", ""): value
            for name, value in stream.state_dict().items()
            if "gain" not in name
        }
    )
    return block


def test_joint_attention_is_a_loop_over_queries_and_heads():
    x, c = (
        [normal(2, 3, 2, 4, seed=i) for i in range(3)],
        [normal(2, 5, 2, 4, seed=i) for i in (3, 4, 5)],
    )
    o_x, o_c = joint_attention(*x, *c)
    for b in range(2):
        for h in range(2):
            keys = torch.cat([x[1][b, :, h], c[1][b, :, h]])
            values = torch.cat([x[2][b, :, h], c[2][b, :, h]])
            for queries, out in ((x[0], o_x), (c[0], o_c)):
                for i in range(queries.shape[1]):
                    p = (keys @ queries[b, i, h] / 2).softmax(0)
                    assert_exact(out[b, i, h], p @ values)


def test_joint_attention_mixes_self_and_cross_attention_by_their_partition_sums():
    """(eq:sd3-mixture)"""
    (q, k, v), (q_c, k_c, v_c) = (
        [normal(1, n, 1, 4, seed=10 * n + i) for i in range(3)] for n in (3, 5)
    )
    scores = [q[0, :, 0] @ keys[0, :, 0].T / 2 for keys in (k, k_c)]
    z = [s.exp().sum(dim=1, keepdim=True) for s in scores]
    own, cross = (s.softmax(dim=1) @ u[0, :, 0] for s, u in zip(scores, (v, v_c), strict=True))
    share = z[0] / (z[0] + z[1])
    out, _ = joint_attention(q, k, v, q_c, k_c, v_c)
    assert_exact(out[0, :, 0], share * own + (1 - share) * cross)


def test_a_block_without_text_is_a_dit_block():
    block = filled(MMDiTBlock(8, n_heads=2))
    x, e = normal(2, 6, 8), normal(2, 8, seed=1)
    y, c = block(x, torch.zeros(2, 0, 8, dtype=torch.float64), e)
    assert_exact(y, as_dit(block.image, 8, 2)(x, e))
    assert c.shape == (2, 0, 8)


def test_two_streams_of_the_same_weights_are_one_transformer_on_all_tokens():
    block = filled(MMDiTBlock(8, n_heads=2))
    block.text.load_state_dict(block.image.state_dict())
    x, c, e = normal(2, 6, 8), normal(2, 3, 8, seed=1), normal(2, 8, seed=2)
    y, d = block(x, c, e)
    assert_exact(torch.cat([y, d], dim=1), as_dit(block.image, 8, 2)(torch.cat([x, c], dim=1), e))


def test_the_order_of_the_text_tokens_is_nothing_to_the_image():
    block = filled(MMDiTBlock(8, n_heads=2, qk_norm=True))
    x, c, e = normal(2, 6, 8), normal(2, 4, 8, seed=1), normal(2, 8, seed=2)
    y, d = block(x, c, e)
    y_2, d_2 = block(x, c[:, [2, 0, 3, 1]], e)
    assert_exact(y_2, y)
    assert_exact(d_2, d[:, [2, 0, 3, 1]])


def test_each_stream_hears_the_other():
    block = filled(MMDiTBlock(8, n_heads=2))
    x, c = normal(1, 6, 8).requires_grad_(), normal(1, 4, 8, seed=1).requires_grad_()
    y, d = block(x, c, normal(1, 8, seed=2))
    assert torch.autograd.grad(y.sum(), c, retain_graph=True)[0].abs().min() > 0
    assert torch.autograd.grad(d.sum(), x)[0].abs().min() > 0


def test_the_last_block_reads_the_text_and_leaves_it():
    block = filled(MMDiTBlock(8, n_heads=2, last=True))
    x, c, e = normal(1, 6, 8), normal(1, 4, 8, seed=1).requires_grad_(), normal(1, 8, seed=2)
    y, d = block(x, c, e)
    assert d is c
    assert torch.autograd.grad(y.sum(), c)[0].abs().min() > 0
    names = {name for name, _ in block.text.named_parameters()}
    assert names == {"condition.weight", "condition.bias", "joint.qkv.weight", "joint.qkv.bias"}
    assert block.text.condition.out_features == 2 * 8


def test_the_second_attention_sees_only_the_image():
    stream = filled(Stream(8, n_heads=2, qk_norm=True, dual=True))
    x, e = normal(2, 5, 8), normal(2, 8, seed=1)
    vectors = [v.clone() for v in stream.vectors(e)]
    vectors[2].zero_()  # the gates of the joint attention and of the MLP
    vectors[5].zero_()
    out = stream.write(x, normal(2, 5, 2, 4, seed=2), tuple(vectors))
    shift, scale, gate = vectors[6:]
    h = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    q, k, v = (part.transpose(1, 2) for part in stream.alone(h))
    own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_exact(out, x + gate[:, None] * stream.alone.out(own))


def test_normalised_queries_and_keys_bound_the_scores():
    """(eq:sd3-qk-bound), and the gains can reach it."""
    layer = filled(Projections(16, n_heads=2, qk_norm=True))
    h = 50 * normal(2, 6, 16)
    q, k, _ = layer(h)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
    bound = math.sqrt(8) * layer.gain_q.abs().max() * layer.gain_k.abs().max()
    assert scores.abs().max() <= bound
    plain = filled(Projections(16, n_heads=2))
    raw_q, raw_k, raw_v = plain(h)
    assert torch.einsum("bthd,bshd->bhts", raw_q, raw_k).abs().max() / math.sqrt(8) > 50 * bound
    assert raw_v.shape == (2, 6, 2, 8)
    unit = Projections(16, n_heads=2, qk_norm=True).double()
    with torch.no_grad():
        unit.qkv.bias.zero_()
    for scaled, same in zip(unit(1000 * h)[:2], unit(h)[:2], strict=True):
        torch.testing.assert_close(scaled, same, rtol=1e-5, atol=1e-5)


def test_the_norm_is_for_each_head_and_after_the_projection():
    layer = filled(Projections(16, n_heads=2, qk_norm=True), seed=3)
    h = normal(1, 4, 16)
    raw = layer.qkv(h)[..., :16].reshape(1, 4, 2, 8)
    wanted = layer.gain_q * raw / (raw.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert_float32(layer(h)[0], wanted)


def test_heads_go_back_in_the_order_they_came():
    layer = filled(Projections(8, n_heads=2))
    o = normal(1, 3, 2, 4)
    assert_exact(layer.back(o), layer.out(torch.cat([o[:, :, 0], o[:, :, 1]], dim=-1)))


def test_places_are_the_middle_of_one_table():
    n_max, n_base = 12, 8
    table = sincos_2d(torch.arange(12) * (8 / 12), torch.arange(12) * (8 / 12), dim=16).reshape(
        12, 12, 16
    )
    for height, width in ((12, 12), (4, 8), (5, 2), (1, 11)):
        rows, columns = (grid_places(n, n_max=n_max, n_base=n_base) for n in (height, width))
        top, left = (12 - height) // 2, (12 - width) // 2
        wanted = table[top : top + height, left : left + width].reshape(-1, 16)
        torch.testing.assert_close(
            sincos_2d(rows, columns, dim=16), wanted, rtol=1e-6, atol=1e-6
        )  # places are float32


def test_neighbours_are_equally_far_apart_in_every_shape():
    for n in (2, 7, 64):
        steps = grid_places(n, n_max=192, n_base=64).double().diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / 3), rtol=0, atol=1e-5)


def small(**options):
    return MMDiT(
        d_in=2,
        d_text=6,
        d_pooled=3,
        d_model=16,
        n_blocks=3,
        n_heads=2,
        n_max=8,
        n_base=4,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "n_dual": 2}])
def test_the_net_is_its_blocks_between_patches(options):
    net = filled(small(**options))
    z, t = normal(2, 2, 8, 4), torch.tensor([0.2, 0.9]).double()
    text, pooled = normal(2, 5, 6, seed=1), normal(2, 3, seed=2)
    out = net(z, t, text, pooled)
    assert out.shape == z.shape

    kernel = net.embed.weight.reshape(16, 2, 2, 2).permute(0, 3, 1, 2)  # p q C to C p q
    x = F.conv2d(z, kernel, net.embed.bias, stride=2).flatten(2).mT + net.positions(4, 2)
    angle = 1000 * t.float()[:, None] * 10_000 ** -(torch.arange(128) / 128)
    wave = torch.cat([angle.cos(), angle.sin()], dim=1).double()
    e, c = net.time(wave) + net.pooled(pooled), net.words(text)
    for block in net.blocks:
        x, c = block(x, c, e)
    shift, scale = net.condition(F.silu(e)).chunk(2, dim=1)
    x = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    patches = net.head(x).reshape(2, 4, 2, 2, 2, 2)  # rows, columns, p, q, channels
    wanted = patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 2, 8, 4)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)  # angles up to 1000 in float32


def test_a_fresh_net_says_nothing_and_learns():
    net = small()
    z, text, pooled = (normal(2, *s).float() for s in ((2, 4, 4), (5, 6), (3,)))
    out = net(z, torch.tensor([0.2, 0.9]), text, pooled)
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().mean().backward()
    assert net.head.bias.grad.abs().min() > 0


def polynomial(d, *, gains=False, dual=0):
    """Count by hand: (eq:sd3-size) and what the edges add."""
    D, patch = 64 * d, 2 * 2 * 16
    stream = 18 * D**2 + 15 * D + (128 if gains else 0)
    cut = 13 * D**2 + 10 * D  # of the last text stream: gates, output, MLP
    second = 3 * D**2 + 3 * D + 4 * D**2 + 4 * D + (128 if gains else 0)
    waves = 256 * D + D + D**2 + D
    edges = (patch * D + D) + waves + (2048 * D + D + D**2 + D) + (4096 * D + D)
    return 2 * d * stream - cut + dual * second + edges + (2 * D**2 + 2 * D) + (patch * D + patch)


@pytest.mark.parametrize(
    ("build", "options", "count"),
    [
        (sd3_medium, {"d": 24}, 2_028_328_000),
        (sd3_5_large, {"d": 38, "gains": True}, 8_056_627_520),
        (sd3_5_medium, {"d": 24, "gains": True, "dual": 13}, 2_243_171_520),
    ],
)
def test_the_released_sizes_come_out_to_the_last_parameter(build, options, count):
    with torch.device("meta"):
        net = build()
    assert sum(p.numel() for p in net.parameters()) == count == polynomial(**options)


def test_refusals():
    message = "3 heads do not divide 8 channels."
    for build in (Projections, Stream, MMDiTBlock):
        with pytest.raises(ValueError, match=re.escape(message)):
            build(8, n_heads=3)
    with pytest.raises(ValueError, match=re.escape(message)):
        MMDiT(d_model=8, n_heads=3, n_blocks=1)
    for n in (0, 9):
        message = f"there are {n} tokens along a side and 8 places: 1 <= n <= n_max."
        with pytest.raises(ValueError, match=re.escape(message)):
            grid_places(n, n_max=8, n_base=4)
