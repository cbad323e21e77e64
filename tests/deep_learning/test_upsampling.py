import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from tests.closeness import assert_exact
from torch import nn

from zhizhi.deep_learning.upsampling import (
    bilinear_kernel,
    conv_transpose2d,
    cubic_matrix,
    icnr,
    linear_matrix,
    nearest_matrix,
    overlap_count,
    pixel_shuffle,
    pixel_unshuffle,
    resize,
    source_coordinates,
)

SIZES = [(5, 8), (8, 5), (3, 6), (4, 4), (7, 3), (2, 9), (1, 5), (6, 1)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Interpolation as a matrix


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_linear_interpolation_equals_torch_for_both_conventions(n, m):
    x = normal(2, 3, n, 4)
    for align in (False, True):
        A, B = (linear_matrix(a, b, align_corners=align) for a, b in ((n, m), (4, 7)))
        theirs = F.interpolate(x, (m, 7), mode="bilinear", align_corners=align)
        assert_exact(resize(x, A, B), theirs)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_nearest_equals_torchs_nearest_exact(n, m):
    x = normal(1, 1, n, 4)
    theirs = F.interpolate(x, (m, 9), mode="nearest-exact")
    assert torch.equal(resize(x, nearest_matrix(n, m), nearest_matrix(4, 9)), theirs)


def test_torchs_nearest_forgets_the_half():
    x = torch.arange(5.0)[None, None]
    assert F.interpolate(x, 8, mode="nearest").flatten().tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert nearest_matrix(5, 8).argmax(dim=1).tolist() == [0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_cubic_equals_torchs_bicubic(n, m):
    x = normal(2, 1, n, 5)
    A, B = cubic_matrix(n, m), cubic_matrix(5, 11)
    assert_exact(resize(x, A, B), F.interpolate(x, (m, 11), mode="bicubic"))


@pytest.mark.parametrize(("a", "exact_degree"), [(-0.5, 2), (-0.75, 0), (-1.0, 0)])
def test_only_the_slope_of_keys_reproduces_more_than_constants(a, exact_degree):
    n, m, inside = 12, 36, slice(9, 27)
    u, x = source_coordinates(n, m)[inside], torch.arange(n).double()
    for degree in range(3):
        error = ((cubic_matrix(n, m, a=a) @ x**degree)[inside] - u**degree).abs().max()
        assert (error < 1e-12) == (degree <= exact_degree)


def test_linear_interpolation_reproduces_a_ramp_and_every_matrix_has_rows_of_sum_one():
    ramp = torch.arange(12).double()
    u = source_coordinates(12, 36).clamp(0, 11)
    assert_exact(linear_matrix(12, 36) @ ramp, u)
    for matrix in (linear_matrix(5, 9), nearest_matrix(5, 9), cubic_matrix(5, 9)):
        assert_exact(matrix.sum(dim=1), torch.ones(9))


def test_coordinates_of_three_pixels_by_hand():
    assert_exact(source_coordinates(3, 6), [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25])
    assert_exact(source_coordinates(3, 6, align_corners=True), [0, 0.4, 0.8, 1.2, 1.6, 2.0])
    assert_exact(source_coordinates(3, 1, align_corners=True), [0.0])


def test_the_old_bilinear_module_aligns_corners_and_the_new_one_does_not():
    x = normal(1, 1, 3, 3)
    for module, align in (
        (nn.UpsamplingBilinear2d(6), True),
        (nn.Upsample(6, mode="bilinear"), False),
    ):
        A = linear_matrix(3, 6, align_corners=align)
        assert_exact(module(x), resize(x, A, A))


def test_resize_keeps_the_dtype():
    A = linear_matrix(2, 4)
    assert resize(torch.ones(1, 1, 2, 2), A, A).dtype == torch.float32


# Pixel shuffle


@pytest.mark.parametrize("r", [1, 2, 3])
def test_shuffle_equals_torch_and_the_loop_and_unshuffle_undoes_it(r):
    x = normal(2, 4 * r * r, 3, 5)
    y = pixel_shuffle(x, r)
    assert torch.equal(y, F.pixel_shuffle(x, r))
    for c, i, j, p, q in ((0, 0, 0, 0, 0), (3, 2, 4, r - 1, 0), (1, 1, 2, 0, r - 1)):
        assert torch.equal(y[:, c, r * i + p, r * j + q], x[:, c * r * r + p * r + q, i, j])
    assert torch.equal(pixel_unshuffle(y, r), x)
    assert torch.equal(pixel_unshuffle(y, r), F.pixel_unshuffle(y, r))


# Transposed convolution

CASES = [(1, 3, 0, 0), (1, 3, 1, 0), (2, 3, 1, 1), (2, 4, 1, 0), (3, 5, 2, 2), (2, 2, 0, 0)]


@pytest.mark.parametrize(("s", "k", "p", "op"), CASES)
def test_the_transposed_convolution_equals_torch(s, k, p, op):
    x, w = normal(2, 3, 5, 6), normal(3, 4, k, k, seed=1)
    theirs = F.conv_transpose2d(x, w, stride=s, padding=p, output_padding=op)
    ours = conv_transpose2d(x, w, stride=s, padding=p, output_padding=op)
    assert ours.shape[2] == (5 - 1) * s - 2 * p + k + op
    assert_exact(ours, theirs)


@pytest.mark.parametrize(("s", "k", "p", "op"), CASES)
def test_it_is_the_adjoint_and_the_gradient_of_the_convolution(s, k, p, op):
    w, y = normal(3, 4, k, k), normal(2, 3, 5, 6, seed=1)
    size = [(n - 1) * s - 2 * p + k + op for n in (5, 6)]
    x = normal(2, 4, *size, seed=2).requires_grad_()
    Cx = F.conv2d(x, w, stride=s, padding=p)
    adjoint = conv_transpose2d(y, w, stride=s, padding=p, output_padding=op)
    assert Cx.shape == y.shape
    assert_exact((Cx * y).sum().detach(), (x * adjoint).sum().detach())
    assert_exact(torch.autograd.grad(Cx, x, y)[0], adjoint)


def test_the_adjoint_is_not_the_inverse():
    x, w = normal(1, 1, 6, 6), normal(1, 1, 3, 3, seed=1)
    back = conv_transpose2d(F.conv2d(x, w, padding=1), w, padding=1)
    assert (back - x).abs().max() > 0.5


def test_two_input_sizes_convolve_to_one_and_output_padding_tells_them_apart():
    w = normal(1, 1, 3, 3)
    sizes = {
        F.conv2d(torch.zeros(1, 1, n, n), w.float(), stride=2, padding=1).shape for n in (7, 8)
    }
    assert len(sizes) == 1
    found = [
        conv_transpose2d(
            torch.zeros(1, 1, 4, 4).double(), w, stride=2, padding=1, output_padding=op
        )
        for op in (0, 1)
    ]
    assert [y.shape[-1] for y in found] == [7, 8]


@pytest.mark.parametrize(("k", "s"), [(3, 2), (4, 2), (2, 2), (5, 3), (6, 3), (3, 1)])
def test_the_overlap_is_what_ones_give_and_even_only_if_the_stride_divides(k, s):
    count = overlap_count(9, kernel=k, stride=s)
    ones = F.conv_transpose1d(torch.ones(1, 1, 9), torch.ones(1, 1, k), stride=s)
    assert count.tolist() == ones.flatten().tolist()
    inside = count[k - 1 : -(k - 1)]
    assert (inside.unique().numel() == 1) == (k % s == 0)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_the_bilinear_kernel_interpolates_inside_and_darkens_the_border(factor):
    x, kernel = normal(1, 1, 6, 6), bilinear_kernel(factor)
    padding = math.ceil((factor - 1) / 2)
    y = conv_transpose2d(x, kernel[None, None], stride=factor, padding=padding)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
    assert y.shape == expected.shape
    inside = slice(factor, -factor)
    assert_exact(y[..., inside, inside], expected[..., inside, inside])
    if factor > 1:
        assert (y - expected).abs().max() > 0.1


def as_transposed(w, r):
    """Weights of the transposed convolution that equals convolution and shuffle."""
    return rearrange(w.flip(-2, -1), "(O P Q) C Y X -> C O (Y P) (X Q)", P=r, Q=r)


@pytest.mark.parametrize("r", [2, 3])
def test_convolution_and_shuffle_are_one_transposed_convolution(r):
    x, w = normal(2, 3, 5, 6), normal(2 * r * r, 3, 3, 3, seed=1)
    shuffled = pixel_shuffle(F.conv2d(x, w, padding=1), r)
    one = conv_transpose2d(x, as_transposed(w, r), stride=r, padding=r)
    assert_exact(one, shuffled)


def test_icnr_starts_as_nearest_neighbour_enlargement_of_a_convolution():
    x, w = normal(2, 3, 5, 6), normal(2, 3, 3, 3, seed=1)
    shuffled = pixel_shuffle(F.conv2d(x, icnr(w, 2), padding=1), 2)
    assert_exact(shuffled, F.interpolate(F.conv2d(x, w, padding=1), scale_factor=2))


def test_unpooling_puts_every_maximum_back_where_it_was():
    x = normal(1, 3, 6, 6)
    pooled, where = F.max_pool2d(x, 2, return_indices=True)
    restored = F.max_unpool2d(pooled, where, 2)
    kept = restored != 0
    assert kept.sum() == 27
    assert torch.equal(restored[kept], x[kept])
    assert torch.equal(F.max_pool2d(restored, 2)[pooled > 0], pooled[pooled > 0])


# Refusals


@pytest.mark.parametrize("function", [nearest_matrix, linear_matrix, cubic_matrix])
def test_no_pixels_are_refused(function):
    with pytest.raises(ValueError, match=r"^n is 0: n >= 1\.$"):
        function(0, 3)
    with pytest.raises(ValueError, match=r"^m is 0: m >= 1\.$"):
        function(3, 0)


def test_channels_that_do_not_fit_the_factor_are_refused():
    with pytest.raises(
        ValueError, match=r"^x has 6 channels and r is 2: r \* r must divide them\.$"
    ):
        pixel_shuffle(torch.zeros(1, 6, 2, 2), 2)
    with pytest.raises(ValueError, match=r"^x is 4 x 5 and r is 2: r must divide both\.$"):
        pixel_unshuffle(torch.zeros(1, 1, 4, 5), 2)


def test_paddings_that_make_no_sense_are_refused():
    x, w = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3)
    with pytest.raises(ValueError, match=r"^padding is 3 and the kernel 3: 0 <= padding < 3\.$"):
        conv_transpose2d(x, w, padding=3)
    message = r"^output_padding is 2 and stride 2: 0 <= output_padding < stride\.$"
    with pytest.raises(ValueError, match=message):
        conv_transpose2d(x, w, stride=2, output_padding=2)


def test_sizes_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match=r"^stride is 0: stride >= 1\.$"):
        overlap_count(3, kernel=3, stride=0)
    with pytest.raises(ValueError, match=r"^factor is 0: factor >= 1\.$"):
        bilinear_kernel(0)
