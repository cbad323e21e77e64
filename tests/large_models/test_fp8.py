import pytest
import torch

from zhizhi.large_models.fp8 import (
    E4M3_MAX,
    fp8_matmul,
    quantize_blocks,
    quantize_tiles,
    short_sum,
)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_tile_uses_the_whole_range_and_comes_back():
    x = some(5, 24) * torch.logspace(-3, 3, 24)
    q = quantize_tiles(x, tile=8)
    assert q.values.dtype == torch.float8_e4m3fn
    assert q.scales.shape == (5, 3)
    tops = q.values.float().reshape(5, 3, 8).abs().amax(dim=-1)
    assert (tops == E4M3_MAX).all()
    back = q.values.float() * q.scales.repeat_interleave(8, dim=1)
    # Three fraction bits: half a step is 1/16 of a number, near zero 2^-10 of the scale.
    assert ((back - x).abs() <= x.abs() / 16 + q.scales.repeat_interleave(8, dim=1) * 2**-10).all()


def test_each_square_of_a_weight_has_one_scale():
    w = some(6, 8)
    q = quantize_blocks(w, block=2)
    for i in range(3):
        for j in range(4):
            square = w[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert q.scales[i, j] == square.abs().max() / E4M3_MAX
            got = q.values[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].float()
            assert torch.equal(got, (square / q.scales[i, j]).to(torch.float8_e4m3fn).float())


def test_the_product_is_that_of_the_numbers_that_come_back():
    x, w = some(3, 16), some(8, 16, seed=1)
    q_x, q_w = quantize_tiles(x, tile=4), quantize_blocks(w, block=4)
    back_x = q_x.values.float() * q_x.scales.repeat_interleave(4, dim=1)
    back_w = q_w.values.float() * q_w.scales.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    torch.testing.assert_close(
        fp8_matmul(q_x, q_w, tile=4), back_x @ back_w.T, rtol=1e-5, atol=1e-5
    )
    error = (fp8_matmul(q_x, q_w, tile=4) - x @ w.T).norm() / (x @ w.T).norm()
    assert error < 0.06


def test_channels_of_unlike_size_need_fine_scales():
    channel = (some(512, seed=2) * 4).exp()
    x = some(64, 512) * channel
    keep = channel < channel.median()  # the small channels are what one scale a row would lose

    def error(tile, dtype):
        q = quantize_tiles(x, tile=tile, dtype=dtype)
        back = q.values.float() * q.scales.repeat_interleave(tile, dim=1)
        return ((back - x)[:, keep].norm() / x[:, keep].norm()).item()

    assert error(8, torch.float8_e4m3fn) < 0.8 * error(512, torch.float8_e4m3fn)


def test_an_exponent_bit_more_costs_a_digit():
    x = some(64, 512)
    errors = []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        q = quantize_tiles(x, tile=128, dtype=dtype)
        back = q.values.float() * q.scales.repeat_interleave(128, dim=1)
        errors.append((back - x).norm() / x.norm())
    assert 1.8 < errors[1] / errors[0] < 2.2


def cut(x, bits):
    if x == 0:
        return 0.0
    import math

    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.trunc(mantissa * 2**bits) / 2**bits, exponent)


@pytest.mark.parametrize("promote", [None, 16])
def test_the_short_sum_cuts_after_every_step(promote):
    x = some(64)
    total = held = 0.0
    for i in range(0, 64, 4):
        held = cut(torch.tensor(held + x[i : i + 4].sum().item()).item(), 10)
        if promote and (i + 4) % promote == 0:
            total, held = total + held, 0.0
    got = short_sum(x, bits=10, step=4, promote=promote)
    assert got.item() == pytest.approx(total + held, rel=1e-3, abs=1e-3)


def test_promotion_saves_what_a_short_accumulator_loses():
    products = some(200, 4096).abs()
    exact = products.double().sum(dim=1)

    def worst(**how):
        return ((short_sum(products, **how) - exact) / exact).abs().max().item()

    assert worst(bits=14) > 2e-3
    assert worst(bits=14, promote=128) < worst(bits=14) / 10
    assert worst(bits=24) < 1e-4


def test_lengths_must_divide():
    with pytest.raises(ValueError, match="K is 10 and tile 4"):
        quantize_tiles(some(2, 10), tile=4)
    with pytest.raises(ValueError, match=r"\(4, 6\) in blocks of 4"):
        quantize_blocks(some(4, 6), block=4)
