import pytest
import torch
from scipy.stats import norm
from tests.closeness import assert_float32
from torch import nn

from zhizhi.large_models.nf4 import (
    NF4Linear,
    bits_per_weight,
    dequantize_nf4,
    dequantize_scales,
    nf4_levels,
    quantize_nf4,
    quantize_scales,
)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_levels_are_quantiles_of_the_normal_distribution():
    delta = 0.9677083
    up = [norm.ppf(delta + (0.5 - delta) * i / 8) for i in range(8)]
    down = [-norm.ppf(delta + (0.5 - delta) * i / 7) for i in range(7)]
    wanted = sorted([*down, 0.0, *up])
    wanted = torch.tensor(wanted).float() / max(wanted)
    torch.testing.assert_close(nf4_levels(), wanted, rtol=0, atol=1e-6)


def test_there_is_a_zero_seven_below_and_eight_above():
    levels = nf4_levels()
    assert (levels < 0).sum() == 7
    assert (levels == 0).sum() == 1
    assert levels[0] == -1
    assert levels[-1] == 1
    assert (levels.diff() > 0).all()


def test_each_weight_goes_to_the_nearest_level_of_its_block():
    w = some(6, 32)
    q = quantize_nf4(w, block=16)
    levels = nf4_levels().tolist()
    for b, row in enumerate(w.reshape(-1, 16)):
        largest = max(abs(x) for x in row.tolist())
        assert q.absmax[b] == torch.tensor(largest)
        for i, x in enumerate(row.tolist()):
            nearest = min(range(16), key=lambda j: abs(x / largest - levels[j]))
            assert q.codes[16 * b + i] == nearest


def test_what_comes_back_has_the_shape_and_errs_by_half_a_step_at_most():
    w = some(4, 8, 16)
    q = quantize_nf4(w, block=64)
    back = dequantize_nf4(q)
    assert back.shape == w.shape
    widest = nf4_levels().diff().max() / 2
    error = (back - w).abs().reshape(-1, 64).amax(dim=1)
    assert (error <= widest * q.absmax * (1 + 1e-6)).all()
    again = quantize_nf4(back, block=64)
    assert torch.equal(again.codes, q.codes)


def test_zeros_stay_zeros_and_the_largest_stays_itself():
    w = torch.zeros(128)
    w[3] = -5.0
    assert torch.equal(dequantize_nf4(quantize_nf4(w)), w)


def test_on_normal_weights_it_beats_even_steps():
    w = some(256, 64)
    absmax = w.abs().amax(dim=1, keepdim=True)
    even = (w / absmax * 7).round() / 7 * absmax  # 15 even steps, as int4 has them
    nf4 = dequantize_nf4(quantize_nf4(w))
    assert (nf4 - w).square().mean() < 0.8 * (even - w).square().mean()


def test_blocks_must_come_out_even():
    for block in (0, 7):
        with pytest.raises(ValueError, match=f"24 weights in blocks of {block}"):
            quantize_nf4(some(4, 6), block=block)


def test_scales_in_eight_bits_come_back_nearly():
    absmax = quantize_nf4(some(1000, 64)).absmax
    q = quantize_scales(absmax)
    assert q.codes.dtype == torch.float8_e4m3fn
    assert len(q.scales) == 4
    error = (dequantize_scales(q) - absmax).abs()
    # A float8 has three fraction bits: half a step is 1/16 of what is left without the mean.
    assert (error <= (absmax - absmax.mean()).abs() / 16 + 1e-3).all()


def test_bits_are_counted_from_the_tensors():
    w = some(2048, 64)
    q = quantize_nf4(w)
    s = quantize_scales(q.absmax)
    plain = 4 * w.numel() + 32 * len(q.absmax)
    double = 4 * w.numel() + 8 * len(s.codes) + 32 * len(s.scales)
    assert plain / w.numel() == bits_per_weight(scale_block=None)
    assert double / w.numel() == bits_per_weight()
    assert bits_per_weight(scale_block=None) - bits_per_weight() == pytest.approx(0.373, abs=5e-4)


def test_the_layer_uses_the_dequantised_weight_and_passes_gradients():
    linear = nn.Linear(64, 6)
    layer = NF4Linear(linear)
    x = some(3, 64).requires_grad_()
    w = dequantize_nf4(quantize_nf4(linear.weight.detach()))
    assert_float32(layer(x), x @ w.T + linear.bias)
    layer(x).sum().backward()
    assert_float32(x.grad, w.sum(dim=0).expand(3, 64))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"codes", "absmax", "bias"}
