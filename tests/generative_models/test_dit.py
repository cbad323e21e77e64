import math

import pytest
import torch
from tests.closeness import assert_float32
from torch import nn

from zhizhi.generative_models.dit import (
    DiT,
    DiTBlock,
    dit_xl_2,
    modulate,
    patchify,
    sincos_2d,
    unpatchify,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return module


def small(**changes):
    sizes = {"d_in": 1, "d_out": 1, "side": 8, "patch": 2, "d_model": 32}
    return DiT(**(sizes | {"n_blocks": 2, "n_heads": 2} | changes))


def test_patches_are_the_squares_of_the_image():
    x = normal(2, 3, 6, 4)
    patches = patchify(x, size=2)
    assert patches.shape == (2, 6, 12)
    for row in range(3):
        for column in range(2):
            square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            flat = square.permute(0, 2, 3, 1).flatten(1)
            assert torch.equal(patches[:, 2 * row + column], flat)
    assert torch.equal(unpatchify(patches, size=2, height=6), x)


def test_a_linear_layer_on_patches_is_a_strided_convolution():
    conv, x = nn.Conv2d(3, 5, 2, stride=2), normal(2, 3, 6, 4)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    ours = patchify(x, size=2) @ weight.T + conv.bias
    assert_float32(ours, conv(x).flatten(2).transpose(1, 2))


def test_positions_entry_by_entry():
    rows, columns = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 3.0])
    table = sincos_2d(rows, columns, dim=8, base=100.0)
    assert table.shape == (6, 8)
    for i, y in enumerate(rows.tolist()):
        for j, x in enumerate(columns.tolist()):
            wanted = [
                wave(place * w)
                for place in (x, y)
                for wave in (math.sin, math.cos)
                for w in (1.0, 100**-0.5)
            ]
            assert table[2 * i + j].tolist() == pytest.approx(wanted, abs=1e-12)


def test_modulation_leaves_tokens_apart():
    x, shift, scale = normal(2, 3, 4), normal(2, 4, seed=1), normal(2, 4, seed=2)
    got = modulate(x, shift, scale)
    for b in range(2):
        for n in range(3):
            assert_float32(got[b, n], x[b, n] * (1 + scale[b]) + shift[b])


def test_block_is_its_formula():
    block, x, c = fill(DiTBlock(8, n_heads=2)), normal(2, 5, 8), normal(2, 8, seed=1)
    parts = (c * torch.sigmoid(c)) @ block.condition.weight.T + block.condition.bias
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts.reshape(2, 6, 8).unbind(1)

    def normed(h, shift, scale):
        centred = h - h.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return h * (1 + scale[:, None]) + shift[:, None]

    h = normed(x, shift_1, scale_1) @ block.qkv.weight.T + block.qkv.bias
    q, k, v = h.split(8, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ v[..., part])
    y = x + gate_1[:, None] * (torch.cat(heads, -1) @ block.out.weight.T + block.out.bias)
    wanted = y + gate_2[:, None] * block.mlp(normed(y, shift_2, scale_2))
    torch.testing.assert_close(block(x, c), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_open_layer_by_layer():
    """Zero gates: first only the head learns, then the gates, then what lies behind them."""
    net, x = small(), normal(4, 1, 8, 8)
    t, label, target = torch.tensor([1, 5, 9, 20]), torch.tensor([0, 1, 2, 10]), normal(4, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def learning():
        optimizer.zero_grad()
        (net(x, t, label) - target).square().sum().backward()
        names = {n.split(".")[0] for n, p in net.named_parameters() if p.grad.abs().sum() > 0}
        block = net.blocks[0]
        moved = [block.condition, block.qkv, block.mlp[0]]
        optimizer.step()
        return names, [m.weight.grad.abs().sum().item() > 0 for m in moved]

    assert learning() == ({"head"}, [False, False, False])
    assert learning()[1] == [True, False, False]
    names, inside = learning()
    assert inside == [True, True, True]
    assert names == {"embed", "time", "label", "blocks", "condition", "head"}


def test_the_published_size():
    with torch.device("meta"):
        net = dit_xl_2()
    count = sum(p.numel() for p in net.parameters())
    assert count + net.position.numel() == 675_129_632  # as DiT's code counts: positions, too
    assert net(torch.zeros(1, 4, 32, 32, device="meta"), torch.zeros(1, device="meta"),
               torch.zeros(1, dtype=torch.long, device="meta")).shape == (1, 8, 32, 32)  # fmt: skip


def test_time_class_and_place_reach_the_output():
    net, x = fill(small()), normal(2, 1, 8, 8)
    t, label = torch.tensor([3, 3]), torch.tensor([1, 1])
    out = net(x, t, label)
    assert not torch.allclose(net(x, t + 1, label), out)
    assert not torch.allclose(net(x, t, label + 1), out)
    # Without positions, patches that change places would only change places in the output.
    moved = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    back = torch.cat([out[..., 4:], out[..., :4]], dim=-1)
    assert not torch.allclose(net(moved, t, label), back)
    net.position.zero_()
    out = net(x, t, label)
    back = torch.cat([out[..., 4:], out[..., :4]], dim=-1)
    torch.testing.assert_close(net(moved, t, label), back, rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"images of \(6, 5\): sides are multiples of 2"):
        patchify(torch.zeros(1, 1, 6, 5), size=2)
    with pytest.raises(ValueError, match="5 patches of side 2 do not fill a height of 4"):
        unpatchify(torch.zeros(1, 5, 4), size=2, height=4)
    with pytest.raises(ValueError, match="6 patches of side 2 do not fill a height of 5"):
        unpatchify(torch.zeros(1, 6, 4), size=2, height=5)
    with pytest.raises(ValueError, match="dim is 6: a multiple of 4"):
        sincos_2d(torch.zeros(1), torch.zeros(1), dim=6)
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        DiTBlock(8, n_heads=3)
    with pytest.raises(ValueError, match="patches of 3 do not fill a side of 8"):
        small(patch=3)
