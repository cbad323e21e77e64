import cmath
import itertools
import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.large_models.rope import (
    by_parts_frequencies,
    grid_angles,
    interleaved_to_half,
    interpolated_frequencies,
    ntk_frequencies,
    rope_frequencies,
    rotate,
    rotate_by,
    yarn_frequencies,
    yarn_temperature,
)

LAYOUTS = ["half", "interleaved"]


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(q, k, m, n, frequencies, layout="half"):
    """Return the score of one query at m with one key at n."""
    turned = [
        rotate(x.reshape(1, 1, -1), torch.tensor([p]), frequencies, layout=layout).flatten()
        for x, p in ((q, m), (k, n))
    ]
    return turned[0] @ turned[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_is_a_complex_number_times_a_phase(layout):
    x, positions = some(3, 2, 8), torch.tensor([0, 5, 1000])
    got = rotate(x, positions, rope_frequencies(8), layout=layout)
    for t, m in enumerate(positions.tolist()):
        for h in range(2):
            for i in range(4):
                a, b = (i, i + 4) if layout == "half" else (2 * i, 2 * i + 1)
                phase = cmath.exp(1j * m * 10_000 ** (-2 * i / 8))
                z = complex(x[t, h, a], x[t, h, b]) * phase
                assert_exact(got[t, h, [a, b]], [z.real, z.imag])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_score_depends_on_the_distance_alone(layout):
    q, k, f = some(16), some(16, seed=1), rope_frequencies(16)
    for m, n in ((0, 3), (7, 10), (1000, 1003), (123_456, 123_459)):
        assert_exact(score(q, k, m, n, f, layout), score(q, k, 0, 3, f, layout))
    assert abs(score(q, k, 0, 3, f) - score(q, k, 0, 4, f)) > 1e-3
    assert abs(score(q, k, 0, 3, f) - score(q, k, 3, 0, f)) > 1e-3  # and on its sign


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_stay_and_position_zero_changes_nothing(layout):
    x = some(5, 3, 8)
    turned = rotate(x, torch.arange(5), rope_frequencies(8), layout=layout)
    assert_exact(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0])


def test_turns_add_up():
    x, f = some(4, 1, 8), rope_frequencies(8)
    twice = rotate(rotate(x, torch.full((4,), 3), f), torch.full((4,), 8), f)
    assert_exact(twice, rotate(x, torch.full((4,), 11), f))


def test_rows_may_have_positions_of_their_own():
    x, positions = some(2, 3, 1, 8), torch.tensor([[0, 1, 2], [5, 6, 9]])
    got = rotate(x, positions, rope_frequencies(8))
    for row in range(2):
        assert_exact(got[row], rotate(x[row], positions[row], rope_frequencies(8)))


def test_the_two_layouts_are_one_up_to_a_reordering_of_the_weights():
    w_q, w_k, x = some(2 * 8, 10), some(2 * 8, 10, seed=1), some(6, 10, seed=2)
    positions, f = torch.arange(6), rope_frequencies(8)

    def scores(w_q, w_k, layout):
        q, k = (rotate((x @ w.T).reshape(6, 2, 8), positions, f, layout=layout) for w in (w_q, w_k))
        return torch.einsum("thd,shd->hts", q, k)

    wanted = scores(w_q, w_k, "interleaved")
    moved = [interleaved_to_half(w, n_heads=2) for w in (w_q, w_k)]
    assert_exact(scores(*moved, "half"), wanted)
    assert (scores(w_q, w_k, "half") - wanted).abs().max() > 1  # the trap: it runs, and is wrong


def test_half_precision_is_turned_in_float32():
    x, positions = some(1, 1, 64), torch.tensor([4099])
    got = rotate(x.bfloat16(), positions, rope_frequencies(64))
    wanted = rotate(x.bfloat16().double(), positions, rope_frequencies(64))
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_bfloat16_positions_collide():
    assert torch.tensor(256.0).bfloat16() == torch.tensor(257.0).bfloat16()
    assert torch.tensor(255.0).bfloat16() != torch.tensor(256.0).bfloat16()


def test_patches_score_by_both_differences():
    q, k = some(1, 1, 16), some(1, 1, 16, seed=1)

    def between(a, b):
        turned = [
            rotate_by(x, grid_angles(torch.tensor([r]), torch.tensor([c]), d=16))
            for x, (r, c) in ((q, a), (k, b))
        ]
        return (turned[0] * turned[1]).sum()

    assert_exact(between((0, 0), (2, 5)), between((7, 1), (9, 6)))
    assert abs(between((0, 0), (2, 5)) - between((0, 0), (5, 2))) > 1e-3


def test_in_one_row_the_grid_is_the_line():
    x, zero, t = some(4, 1, 16), torch.zeros(4, dtype=torch.long), torch.arange(4)
    got = rotate_by(x, grid_angles(zero, t, d=16), layout="interleaved")
    assert torch.equal(got[..., :8], x[..., :8])
    assert_exact(got[..., 8:], rotate(x[..., 8:], t, rope_frequencies(8), layout="interleaved"))


# Stretching


def test_interpolation_puts_the_new_end_where_the_old_one_was():
    f = rope_frequencies(32)
    assert_exact(interpolated_frequencies(f, scale=4.0) * 8192, f * 2048)
    assert_exact(interpolated_frequencies(f, scale=1.0), f)


def test_ntk_slows_the_slowest_by_the_scale_and_the_fastest_not():
    f, d = rope_frequencies(32), 32
    got = ntk_frequencies(d, scale=4.0)
    slow = [f[i].item() * 4.0 ** (-2 * i / (d - 2)) for i in range(16)]
    assert_exact(got, slow)
    assert_exact(got[0], 1.0)
    assert_exact(got[-1], f[-1] / 4)


def test_yarn_leaves_fast_pairs_and_interpolates_slow_ones():
    d, L, s = 128, 4096, 8.0
    f = rope_frequencies(d)
    ratio = (yarn_frequencies(d, scale=s, trained_length=L) / f).tolist()
    turns = [L * x / (2 * math.pi) for x in f.tolist()]
    # The ends are rounded outwards, so one pair at each end may begin the ramp early.
    assert all(r == pytest.approx(1.0) for r, n in zip(ratio, turns, strict=True) if n > 40)
    assert all(r == pytest.approx(1 / s) for r, n in zip(ratio, turns, strict=True) if n < 0.8)
    assert all(a >= b for a, b in itertools.pairwise(ratio))
    between = [r for r, n in zip(ratio, turns, strict=True) if 1.5 < n < 25]
    assert len(between) > 10
    steps = [a - b for a, b in itertools.pairwise(between)]
    assert max(steps) - min(steps) < 1e-9  # a straight line in the pair


def test_yarn_without_stretching_changes_nothing():
    assert_exact(yarn_frequencies(64, scale=1.0, trained_length=512), rope_frequencies(64))
    assert yarn_temperature(1.0) == 1.0
    assert_exact(yarn_temperature(math.exp(10)), 2.0)


def test_by_parts_is_a_line_in_turns_and_differs_from_the_code_of_yarn():
    f = rope_frequencies(128)
    ratio = by_parts_frequencies(128, scale=8.0, trained_length=4096) / f
    for r, theta in zip(ratio.tolist(), f.tolist(), strict=True):
        turns = 4096 * theta / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - 1) / 31))
        assert r == pytest.approx(keep + (1 - keep) / 8)
    other = yarn_frequencies(128, scale=8.0, trained_length=4096) / f
    assert (other / ratio).max() > 1.5  # the paper interpolates the middle much more


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_frequencies(7), "d is 7"),
        (lambda: rope_frequencies(0), "d is 0"),
        (lambda: rope_frequencies(8, base=1.0), "base is 1.0"),
        (lambda: rotate_by(some(1, 1, 8), some(1, 3)), "3 angles for heads of width 8"),
        (lambda: grid_angles(torch.tensor([0]), torch.tensor([0]), d=6), "d is 6"),
        (lambda: interleaved_to_half(some(6, 2), n_heads=2), "6 rows are not 2 heads"),
        (lambda: interpolated_frequencies(some(2), scale=0.5), "scale is 0.5"),
        (lambda: ntk_frequencies(8, scale=0.5), "scale is 0.5"),
        (lambda: ntk_frequencies(2, scale=2.0), "d 2"),
        (lambda: yarn_frequencies(8, scale=0.5, trained_length=8), "scale is 0.5"),
        (lambda: yarn_frequencies(8, scale=2.0, trained_length=8, fast=1.0), "fast 1.0"),
        (lambda: by_parts_frequencies(8, scale=0.5, trained_length=8), "scale is 0.5"),
        (lambda: yarn_temperature(0.5), "scale is 0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
