"""Our networks with the weights of diffusers' give diffusers' numbers."""

import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.dit import DiT, sincos_2d
from zhizhi.generative_models.unet import UNet, timestep_embedding

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def copy(ours, theirs):
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.copy_(b.reshape(a.shape))


def copy_stage(ours, resnet, attention):
    pairs = ("norm_1", "norm1"), ("conv_1", "conv1"), ("time", "time_emb_proj"), ("norm_2", "norm2")
    for mine, other in (*pairs, ("conv_2", "conv2")):
        copy(getattr(ours.res, mine), getattr(resnet, other))
    if resnet.conv_shortcut is not None:
        copy(ours.res.skip, resnet.conv_shortcut)
    if attention is None:
        return
    block = attention.transformer_blocks[0]
    for mine, other in (
        (ours.attention.norm, attention.norm), (ours.attention.proj_in, attention.proj_in),
        (ours.attention.norm_1, block.norm1), (ours.attention.norm_2, block.norm2),
        (ours.attention.norm_3, block.norm3), (ours.attention.proj_out, attention.proj_out),
        (ours.attention.feed_forward.up, block.ff.net[0].proj),
        (ours.attention.feed_forward.down, block.ff.net[2]),
    ):  # fmt: skip
        copy(mine, other)
    for mine, other in (("self_attention", block.attn1), ("cross_attention", block.attn2)):
        attend = getattr(ours.attention, mine)
        copy(attend.q, other.to_q)
        copy(attend.k, other.to_k)
        copy(attend.v, other.to_v)
        copy(attend.out, other.to_out[0])


def attentions(block):
    return getattr(block, "attentions", None) or [None] * len(block.resnets)


def test_unet_of_stable_diffusion(diffusers):
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2, layers_per_block=2,
    ).eval()  # fmt: skip
    ours = UNet(d_in=4, d_out=4, widths=(32, 64), attention=(True, False), d_context=12, n_heads=2)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    encoder = ours.encoder
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
    for stages, block in zip(ours.stages, theirs.up_blocks, strict=True):
        for stage, resnet, attention in zip(stages, block.resnets, attentions(block), strict=True):
            copy_stage(stage, resnet, attention)
    copy(ours.ups[0], theirs.up_blocks[0].upsamplers[0].conv)
    copy(ours.norm, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    with torch.no_grad():
        wanted = theirs(x, t, encoder_hidden_states=context).sample
        torch.testing.assert_close(ours(x, t, context), wanted, rtol=1e-4, atol=1e-5)


def test_timestep_embedding(diffusers):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 500, 999])
    wanted = get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim=320), wanted, rtol=1e-4, atol=1e-4)


def test_sincos_2d(diffusers):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = get_2d_sincos_pos_embed(16, (3, 3), base_size=3, output_type="pt")
    place = torch.arange(3.0)
    assert_float32(sincos_2d(place, place, dim=16), torch.as_tensor(wanted))


def test_dit(diffusers):
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, patch_size=2, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    ours = DiT(d_in=4, d_out=8, side=8, patch=2, d_model=16, n_blocks=2, n_heads=2)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        conv = theirs.pos_embed.proj
        ours.embed.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
        ours.embed.bias.copy_(conv.bias)
        assert_float32(ours.position, theirs.pos_embed.pos_embed[0])
        # Every block of theirs has an embedding of time and class; one will do for all.
        first = theirs.transformer_blocks[0].norm1.emb
        for block in theirs.transformer_blocks:
            block.norm1.emb.load_state_dict(first.state_dict())
            # DiT's own code, like ours, has i / 128 in the exponent; diffusers here i / 127.
            assert block.norm1.emb.time_proj.downscale_freq_shift == 1
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        copy(ours.time[0], first.timestep_embedder.linear_1)
        copy(ours.time[2], first.timestep_embedder.linear_2)
        copy(ours.label, first.class_embedder.embedding_table)
        for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
            copy(mine.condition, block.norm1.linear)
            heads = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
            mine.qkv.weight.copy_(torch.cat([m.weight for m in heads]))
            mine.qkv.bias.copy_(torch.cat([m.bias for m in heads]))
            copy(mine.out, block.attn1.to_out[0])
            copy(mine.mlp[0], block.ff.net[0].proj)
            copy(mine.mlp[2], block.ff.net[2])
        copy(ours.condition, theirs.proj_out_1)
        copy(ours.head, theirs.proj_out_2)
        x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 10])
        wanted = theirs(x, timestep=t, class_labels=label).sample
        torch.testing.assert_close(ours(x, t, label), wanted, rtol=1e-3, atol=1e-4)
