import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.deep_learning.normalization import (
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_cast_first,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(n):
    return 1 + 0.3 * normal(n, seed=10)


def central_differences(f, x, dy, h=1e-5):
    """Return the gradient of sum(dy * f(x)), one entry of x at a time."""
    grad = torch.empty_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        step = step.reshape(x.shape)
        grad.view(-1)[i] = ((f(x + step) - f(x - step)) * dy).sum() / (2 * h)
    return grad


def assert_gradients(grads, f, inputs, dy):
    """Compare with autograd to 1e-10, and with differences to their own error of about h^2."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(f(*leaves), leaves, dy)
    for i, (ours, theirs) in enumerate(zip(grads, expected, strict=True)):
        assert_exact(ours, theirs)

        def alone(t, i=i):
            return f(*inputs[:i], t, *inputs[i + 1 :])

        numeric = central_differences(alone, inputs[i], dy)
        torch.testing.assert_close(ours, numeric, rtol=1e-6, atol=1e-6)


# Forward, by plain Python


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_layer_norm_equals_the_sums_in_plain_python(eps):
    x, w, b = normal(4, 6), gain(6), normal(6, seed=2)
    rows = []
    for row in x.tolist():
        mean = math.fsum(row) / 6
        var = math.fsum((v - mean) ** 2 for v in row) / 6
        rows.append(
            [
                g * (v - mean) / math.sqrt(var + eps) + s
                for v, g, s in zip(row, w.tolist(), b.tolist(), strict=True)
            ]
        )
    assert_exact(layer_norm(x, w, b, eps=eps), rows)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_rms_norm_equals_the_sums_in_plain_python(eps):
    x, w = normal(4, 6), gain(6)
    rows = []
    for row in x.tolist():
        root = math.sqrt(math.fsum(v * v for v in row) / 6 + eps)
        rows.append([g * v / root for v, g in zip(row, w.tolist(), strict=True)])
    assert_exact(rms_norm(x, w, eps=eps), rows)


@pytest.mark.parametrize("n_groups", [1, 2, 3, 6])
def test_group_norm_equals_a_loop_over_examples_and_groups(n_groups):
    x, w, b = normal(3, 6, 2, 4), gain(6), normal(6, seed=2)
    expected = torch.empty_like(x)
    for i in range(3):
        for group in torch.arange(6).chunk(n_groups):
            part = x[i, group]
            std = part.flatten().std(correction=0)
            expected[i, group] = (part - part.mean()) / (std**2 + 1e-3).sqrt()
    expected = expected * w[:, None, None] + b[:, None, None]
    assert_exact(group_norm(x, w, b, n_groups=n_groups, eps=1e-3), expected)


# Relations and limits


def test_layer_norm_is_rms_norm_of_the_centred_vector():
    x, w = normal(5, 8), gain(8)
    centred = x - x.mean(dim=-1, keepdim=True)
    assert_exact(layer_norm(x, w, torch.zeros(8).double()), rms_norm(centred, w, eps=1e-5))


def test_one_group_without_space_is_layer_norm_and_c_groups_are_instance_norm():
    x, w, b = normal(5, 8), gain(8), normal(8, seed=2)
    assert_exact(group_norm(x, w, b, n_groups=1), layer_norm(x, w, b))
    maps = normal(2, 8, 3, 3)
    each = layer_norm(maps.flatten(2), torch.ones(9).double(), torch.zeros(9).double())
    expected = each.reshape(maps.shape) * w[:, None, None] + b[:, None, None]
    assert_exact(group_norm(maps, w, b, n_groups=8), expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_layer_norm_ignores_scale_and_shift_and_rms_norm_only_scale(seed, scale, shift):
    x, ones, zeros = normal(3, 7, seed=seed), torch.ones(7).double(), torch.zeros(7).double()
    plain = layer_norm(x, ones, zeros, eps=0.0)
    torch.testing.assert_close(
        layer_norm(scale * x + shift, ones, zeros, eps=0.0), plain, rtol=0, atol=1e-8
    )
    assert_exact(rms_norm(scale * x, ones, eps=0.0), rms_norm(x, ones, eps=0.0))
    if abs(shift) > 0.1:
        assert not torch.allclose(rms_norm(x + shift, ones), rms_norm(x, ones), atol=1e-3)


def test_two_numbers_keep_only_their_order():
    x, ones, zeros = normal(50, 2), torch.ones(2).double(), torch.zeros(2).double()
    y = layer_norm(x, ones, zeros, eps=0.0)
    assert_exact(y, torch.stack([x[:, 0] - x[:, 1], x[:, 1] - x[:, 0]], dim=1).sign())


def test_a_vector_of_zeros_stays_zero_and_a_constant_one_becomes_the_shift():
    assert rms_norm(torch.zeros(4), torch.ones(4)).tolist() == [0] * 4
    assert (
        layer_norm(torch.full((4,), 3.0), torch.ones(4), torch.full((4,), 0.5)).tolist()
        == [0.5] * 4
    )


def test_eps_under_the_root_bounds_the_gain_by_its_inverse_root():
    x = 1e-9 * normal(8)
    assert_exact(rms_norm(x, torch.ones(8).double(), eps=1e-6) / x, torch.full((8,), 1e3))


# Gradients


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_layer_norm_backward_equals_autograd_and_finite_differences(shape):
    x, w, b, dy = normal(*shape), gain(6), normal(6, seed=2), normal(*shape, seed=3)
    grads = layer_norm_backward(dy, x, w, eps=1e-3)
    assert_gradients(grads, lambda *t: layer_norm(*t, eps=1e-3), [x, w, b], dy)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_rms_norm_backward_equals_autograd_and_finite_differences(shape):
    x, w, dy = normal(*shape), gain(6), normal(*shape, seed=3)
    grads = rms_norm_backward(dy, x, w, eps=1e-3)
    assert grads.dbias is None
    assert_gradients(grads[:2], lambda *t: rms_norm(*t, eps=1e-3), [x, w], dy)


@pytest.mark.parametrize("n_groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 6, 2, 3)])
def test_group_norm_backward_equals_autograd_and_finite_differences(n_groups, shape):
    x, w, b, dy = normal(*shape), gain(6), normal(6, seed=2), normal(*shape, seed=3)
    grads = group_norm_backward(dy, x, w, n_groups=n_groups, eps=1e-3)

    def forward(*tensors):
        return group_norm(*tensors, n_groups=n_groups, eps=1e-3)

    assert_gradients(grads, forward, [x, w, b], dy)


def test_the_jacobian_is_a_projection_times_one_over_the_deviation():
    x, ones, zeros = normal(6), torch.ones(6).double(), torch.zeros(6).double()
    J = torch.autograd.functional.jacobian(lambda v: layer_norm(v, ones, zeros, eps=0.0), x)
    P = x.std(correction=0) * J
    assert_exact(P @ P, P)
    assert_exact(P, P.T)
    assert_exact(P.trace(), 4)
    assert_exact(P @ torch.stack([torch.ones(6).double(), x], dim=1), torch.zeros(6, 2))


def test_the_gradient_never_exceeds_gain_over_deviation_times_that_of_the_output():
    x, ones, dy = normal(200, 16), torch.ones(16).double(), normal(200, 16, seed=1)
    dx = layer_norm_backward(dy, x, ones).dx
    assert (dx.norm(dim=-1) <= dy.norm(dim=-1) / x.std(dim=-1, correction=0)).all()


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_input_and_gradients_that_of_what_they_belong_to(dtype):
    x, w, b = normal(3, 8).to(dtype), gain(8).float(), torch.zeros(8)
    assert layer_norm(x, w, b).dtype == dtype
    assert rms_norm(x, w).dtype == dtype
    assert rms_norm_cast_first(x, w).dtype == dtype
    assert group_norm(x, w, b, n_groups=2).dtype == dtype
    for grads in (
        layer_norm_backward(x, x, w),
        rms_norm_backward(x, x, w),
        group_norm_backward(x, x, w, n_groups=2),
    ):
        assert grads.dx.dtype == dtype
        assert grads.dweight.dtype == torch.float32


def test_half_precision_is_computed_in_float32_and_rounded_once():
    x, w, b = normal(64, 100).half(), gain(100).half(), normal(100, seed=2).half()
    assert torch.equal(rms_norm(x, w), rms_norm(x.float(), w.float()).half())
    assert torch.equal(layer_norm(x, w, b), layer_norm(x.float(), w.float(), b.float()).half())


def test_a_square_that_overflows_in_half_precision_does_not():
    x = torch.full((4,), 300.0).half()
    assert x.square().isinf().all()
    assert rms_norm(x, torch.ones(4).half()).tolist() == [1.0] * 4


def test_casting_first_is_the_same_in_float32_and_errs_more_in_bfloat16():
    x, w = normal(64, 256).float(), gain(256).float()
    assert torch.equal(rms_norm(x, w), rms_norm_cast_first(x, w))
    x, w = x.bfloat16(), w.bfloat16()
    truth = rms_norm(x.double(), w.double())
    once, twice = (
        (f(x, w).double() - truth).square().mean() for f in (rms_norm, rms_norm_cast_first)
    )
    # Two roundings of one size, independent: the mean square error doubles, about.
    assert 1.5 * once < twice < 2.5 * once


# Refusals


@pytest.mark.parametrize("n_groups", [4, 0, -1])
def test_groups_that_do_not_divide_the_channels_are_refused(n_groups):
    message = rf"^there are 6 channels and {n_groups} groups: {n_groups} must divide 6\.$"
    x, one = torch.zeros(2, 6), torch.ones(6)
    with pytest.raises(ValueError, match=message):
        group_norm(x, one, one, n_groups=n_groups)
    with pytest.raises(ValueError, match=message):
        group_norm_backward(x, x, one, n_groups=n_groups)
