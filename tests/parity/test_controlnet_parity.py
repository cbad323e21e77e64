"""Our ControlNet with the weights of diffusers' gives diffusers' numbers."""

import warnings

import pytest
import torch
from tests.parity.test_unet_and_dit_parity import attentions, copy, copy_stage

from zhizhi.generative_models.controlnet import ControlNet, controlled_forward
from zhizhi.generative_models.unet import UNet

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def copy_encoder(encoder, theirs):
    copy(encoder.time[0], theirs.time_embedding.linear_1)
    copy(encoder.time[2], theirs.time_embedding.linear_2)
    copy(encoder.conv_in, theirs.conv_in)
    for stages, block in zip(encoder.stages, theirs.down_blocks, strict=True):
        for stage, resnet, attention in zip(stages, block.resnets, attentions(block), strict=True):
            copy_stage(stage, resnet, attention)
    copy(encoder.downs[0], theirs.down_blocks[0].downsamplers[0].conv)
    copy_stage(encoder.middle, theirs.mid_block.resnets[0], theirs.mid_block.attentions[0])
    middle = type("Holder", (), {"res": encoder.middle_res})
    copy_stage(middle, theirs.mid_block.resnets[1], None)


def copy_unet(ours, theirs):
    copy_encoder(ours.encoder, theirs)
    for stages, block in zip(ours.stages, theirs.up_blocks, strict=True):
        for stage, resnet, attention in zip(stages, block.resnets, attentions(block), strict=True):
            copy_stage(stage, resnet, attention)
    copy(ours.ups[0], theirs.up_blocks[0].upsamplers[0].conv)
    copy(ours.norm, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)


def copy_control(ours, theirs):
    copy_encoder(ours.encoder, theirs)
    copy(ours.hint, theirs.controlnet_cond_embedding)
    zeros = [*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]
    for mine, other in zip(ours.zero_convs, zeros, strict=True):
        copy(mine, other)


@pytest.fixture(scope="module")
def pair(diffusers):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2, layers_per_block=2,
    ).eval()  # fmt: skip
    ours = UNet(d_in=4, d_out=4, widths=(32, 64), attention=(True, False), d_context=12, n_heads=2)
    copy_unet(ours, theirs)
    return ours, theirs


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(2, 4, 8, 8, generator=g), torch.rand(2, 3, 64, 64, generator=g)
    return x, torch.tensor([3, 700]), c, torch.randn(2, 5, 12, generator=g)


def test_a_fresh_control_copies_the_way_down_and_changes_nothing(diffusers, pair):
    unet, theirs = pair
    other, ours = diffusers.ControlNetModel.from_unet(theirs).eval(), ControlNet(unet)
    assert sum(p.numel() for p in ours.parameters()) == other.num_parameters()
    assert len(ours.zero_convs) == len(other.controlnet_down_blocks) + 1
    for mine, copied in zip(ours.encoder.parameters(), unet.encoder.parameters(), strict=True):
        assert torch.equal(mine, copied)
    x, t, c, context = inputs()
    with torch.no_grad():
        down, middle = other(x, t, context, controlnet_cond=c, return_dict=False)
        mine = ours(x, t, c, context)
    for a, b in zip(mine, [*down, middle], strict=True):
        assert a.shape == b.shape
        assert not a.any()
        assert not b.any()


def trained(diffusers, pair, seed):
    """Their control as if it were trained, and ours with its weights."""
    unet, theirs = pair
    other, ours = diffusers.ControlNetModel.from_unet(theirs).eval(), ControlNet(unet)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    copy_control(ours, other)
    return ours, other


def test_residuals_and_the_controlled_prediction(diffusers, pair):
    unet, theirs = pair
    ours, other = trained(diffusers, pair, 1)
    x, t, c, context = inputs()
    with torch.no_grad():
        down, middle = other(
            x, t, context, controlnet_cond=c, conditioning_scale=0.7, return_dict=False
        )
        for a, b in zip(ours(x, t, c, context), [*down, middle], strict=True):
            torch.testing.assert_close(0.7 * a, b, rtol=1e-3, atol=1e-4)
        wanted = theirs(
            x, t, encoder_hidden_states=context,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        got = controlled_forward(unet, [ours], x, t, [c], context, scales=[0.7])
    assert not torch.allclose(got, unet(x, t, context), atol=1e-2)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_guess_mode_is_a_list_of_weights(diffusers, pair):
    ours, other = trained(diffusers, pair, 1)
    x, t, c, context = inputs()
    with torch.no_grad():
        down, middle = other(x, t, context, controlnet_cond=c, guess_mode=True, return_dict=False)
        weights = torch.logspace(-1, 0, len(down) + 1)
        for w, a, b in zip(weights, ours(x, t, c, context), [*down, middle], strict=True):
            torch.testing.assert_close(w * a, b, rtol=1e-3, atol=1e-4)


def test_several_controls_are_added(diffusers, pair):
    from diffusers import MultiControlNetModel

    unet, theirs = pair
    (left, other_left), (right, other_right) = (trained(diffusers, pair, s) for s in (1, 2))
    x, t, c, context = inputs()
    d = inputs(1)[2]
    both = MultiControlNetModel([other_left, other_right])
    with torch.no_grad():
        down, middle = both(x, t, context, [c, d], [0.5, 0.8], return_dict=False)
        wanted = theirs(
            x, t, encoder_hidden_states=context,
            down_block_additional_residuals=down, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
        got = controlled_forward(unet, [left, right], x, t, [c, d], context, scales=[0.5, 0.8])
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
