import copy
import itertools

import pytest
import torch
from tests.closeness import assert_float32
from torch import nn

from zhizhi.generative_models.controlnet import (
    ControlNet,
    HintNet,
    cfg_resolution_weights,
    controlled_forward,
    zero_module,
)
from zhizhi.generative_models.guidance import classifier_free_guidance
from zhizhi.generative_models.unet import UNet, stable_diffusion_1


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


def small_unet(seed=0):
    net = UNet(
        d_in=1, d_out=1, widths=(8, 12), attention=(False, True), n_stages=1, d_context=6,
        n_heads=2, n_groups=4,
    )  # fmt: skip
    return fill(net, seed).requires_grad_(False)


def small_control(unet, **options):
    return ControlNet(unet, d_condition=2, hint_widths=(4, 6), **options)


X, T, C = normal(2, 1, 8, 8), torch.tensor([3, 500]), normal(2, 2, 16, 16, seed=1)
CONTEXT = normal(2, 3, 6, seed=2)


def test_zero_module_is_changed_in_place_and_learns_its_weight_first():
    """The gradients of y = W x + b at W = 0, by hand: (eq:controlnet-zero)."""
    layer = fill(nn.Conv2d(3, 2, 1))
    assert zero_module(layer) is layer
    x, g = normal(2, 3, 4, 4).requires_grad_(), normal(2, 2, 4, 4, seed=1)
    y = layer(x)
    assert not y.any()
    y.backward(g)
    assert x.grad is not None
    assert not x.grad.any()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    for out, into in itertools.product(range(2), range(3)):
        wanted = (g[:, out] * x.detach()[:, into]).sum()
        assert_float32(layer.weight.grad[out, into, 0, 0], wanted)
    assert_float32(layer.bias.grad, g.sum((0, 2, 3)))
    with torch.no_grad():
        layer.weight -= layer.weight.grad
    x.grad = None
    layer(x).backward(g)
    assert x.grad.any()


def test_the_hint_network_is_that_of_the_released_code():
    hint = HintNet(320)
    convs = [m for m in hint.layers if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convs] == [
        (3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2),
        (256, 320, 1),
    ]  # fmt: skip
    assert all(m.kernel_size == (3, 3) for m in convs)
    assert sum(isinstance(m, nn.SiLU) for m in hint.layers) == len(convs) - 1
    assert isinstance(hint.layers[-1], nn.Conv2d)  # nothing behind the zero convolution
    assert not hint.layers[-1].weight.any()
    assert not hint.layers[-1].bias.any()
    assert all(m.weight.any() for m in convs[:-1])
    assert count(hint) == 1_086_480
    assert hint(torch.zeros(1, 3, 16, 24)).shape == (1, 320, 2, 3)


def test_the_parameters_of_the_released_network():
    with torch.device("meta"):
        control = ControlNet(stable_diffusion_1())
        x, t, c = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 3, 512, 512)
        deltas = control(x, t, c, torch.zeros(1, 77, 768))
    assert count(control) == 361_279_120
    assert count(control.encoder) == 348_712_960
    assert count(control.hint) == 1_086_480
    assert count(control.zero_convs) == 11_479_680
    assert [tuple(d.shape[1:]) for d in deltas] == [
        (320, 64, 64), (320, 64, 64), (320, 64, 64), (320, 32, 32),
        (640, 32, 32), (640, 32, 32), (640, 16, 16),
        (1280, 16, 16), (1280, 16, 16), (1280, 8, 8), (1280, 8, 8), (1280, 8, 8), (1280, 8, 8),
    ]  # fmt: skip


def test_before_training_nothing_changes():
    unet = small_unet()
    control = small_control(unet)
    assert all(not d.any() for d in control(X, T, C, CONTEXT))
    assert torch.equal(controlled_forward(unet, [control], X, T, [C], CONTEXT), unet(X, T, CONTEXT))


def test_the_copy_is_awake_and_its_own():
    """A deep copy of frozen parameters is frozen: the trap of copying after freezing."""
    unet = small_unet()
    control = small_control(unet)
    assert all(p.requires_grad for p in control.parameters())
    assert not any(p.requires_grad for p in unet.parameters())
    for ours, theirs in zip(control.encoder.parameters(), unet.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    before = copy.deepcopy(unet.state_dict())
    fill(control)
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())


def test_gradients_open_in_three_steps():
    """Step 0: the outer zeros only; step 1: the copy and the inner zero; step 2: the hint."""
    unet = small_unet()
    control = small_control(unet)
    fill(control.hint.layers[:-1])
    groups = {
        "zero": control.zero_convs, "copy": control.encoder, "last": control.hint.layers[-1],
        "hint": control.hint.layers[:-1],
    }  # fmt: skip
    wanted = normal(2, 1, 8, 8, seed=3)
    for step in range(3):
        control.zero_grad()
        out = controlled_forward(unet, [control], X, T, [C], CONTEXT)
        (out - wanted).square().mean().backward()
        alive = {k for k, m in groups.items() if any(p.grad.any() for p in m.parameters())}
        assert alive == set(list(groups)[: (1, 3, 4)[step]])
        with torch.no_grad():
            for p in control.parameters():
                p -= 0.1 * p.grad
    assert all(p.grad is None for p in unet.parameters())


def test_the_frozen_way_down_builds_no_graph():
    unet = small_unet()
    skips, h, e = unet.encoder(X, T, CONTEXT)
    assert not any(s.requires_grad for s in (*skips, h, e))


def test_residuals_are_added_to_skips_and_middle_and_scaled():
    """The route by hand: the sums taken one by one, then the way up."""
    unet = small_unet()
    left, right = fill(small_control(unet), 1), fill(small_control(unet), 2)
    weights = [0.5, 1.0, -1.0, 2.0, 0.0]
    skips, h, e = unet.encoder(X, T, CONTEXT)
    a, b = left(X, T, C, CONTEXT), right(X, T, C.flip(-1), CONTEXT)
    for i in range(len(skips)):
        skips[i] = skips[i] + weights[i] * a[i] + 0.7 * b[i]
    wanted = unet.decode(skips, h + weights[-1] * a[-1] + 0.7 * b[-1], e, CONTEXT)
    got = controlled_forward(
        unet, [left, right], X, T, [C, C.flip(-1)], CONTEXT, scales=[weights, 0.7]
    )
    assert_float32(got, wanted)
    swapped = controlled_forward(
        unet, [right, left], X, T, [C.flip(-1), C], CONTEXT, scales=[0.7, weights]
    )
    torch.testing.assert_close(swapped, got, rtol=1e-4, atol=1e-5)


def test_the_copy_sees_the_condition_behind_its_first_convolution():
    control = fill(small_control(small_unet()))
    skips, h, _ = control.encoder(X, T, CONTEXT)
    hinted, _, _ = control.encoder(X, T, CONTEXT, added=control.hint(C))
    assert_float32(hinted[0], skips[0] + control.hint(C))
    got = control(X, T, C, CONTEXT)
    first = control.zero_convs[0]
    wanted = torch.einsum("oi,bihw->bohw", first.weight[..., 0, 0], hinted[0])
    torch.testing.assert_close(got[0], wanted + first.bias[:, None, None], rtol=1e-4, atol=1e-5)
    assert len(got) == len(skips) + 1
    assert got[-1].shape == h.shape


def test_limits_of_the_scale():
    unet = small_unet()
    control = fill(small_control(unet))
    plain = unet(X, T, CONTEXT)
    assert torch.equal(controlled_forward(unet, [control], X, T, [C], CONTEXT, scales=[0.0]), plain)
    assert torch.equal(controlled_forward(unet, [], X, T, [], CONTEXT), plain)
    one = controlled_forward(unet, [control], X, T, [C], CONTEXT)
    assert not torch.allclose(one, plain)
    assert torch.equal(
        controlled_forward(unet, [control], X, T, [C], CONTEXT, scales=[[1.0] * 5]), one
    )


def test_a_zero_picture_is_not_the_absence_of_control():
    unet = small_unet()
    control = fill(small_control(unet))
    black = controlled_forward(unet, [control], X, T, [torch.zeros_like(C)], CONTEXT)
    assert not torch.allclose(black, unet(X, T, CONTEXT))


def test_without_a_prompt_control_in_both_branches_undoes_guidance():
    unet = small_unet()
    control, null = fill(small_control(unet)), torch.zeros_like(CONTEXT)
    c = controlled_forward(unet, [control], X, T, [C], null)
    assert torch.equal(classifier_free_guidance(c, c, scale=7.5), c)
    assert not torch.allclose(classifier_free_guidance(c, unet(X, T, null), scale=7.5), c)


def test_resolution_weights():
    heights = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
    weights = cfg_resolution_weights(heights)
    assert weights == [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [8.0] * 4
    assert all(w * h == 64 for w, h in zip(weights, heights, strict=True))
    assert cfg_resolution_weights([8, 4], size=8) == [1.0, 2.0]


def test_refusals():
    unet = small_unet()
    control = small_control(unet)
    with pytest.raises(ValueError, match=r"condition of \(8, 8\) for x of \(8, 8\): \(16, 16\), 2"):
        control(X, T, C[..., ::2, ::2], CONTEXT)
    with pytest.raises(ValueError, match="1 controls, 2 conditions and 1 scales"):
        controlled_forward(unet, [control], X, T, [C, C], CONTEXT)
    with pytest.raises(ValueError, match="4 weights for 5 residuals"):
        controlled_forward(unet, [control], X, T, [C], CONTEXT, scales=[[1.0] * 4])
    with pytest.raises(ValueError, match=r"heights \[128, 0\] with size 64"):
        cfg_resolution_weights([128, 64, 0])
