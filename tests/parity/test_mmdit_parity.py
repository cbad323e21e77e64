import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.dit import sincos_2d
from zhizhi.generative_models.mmdit import MMDiT, MMDiTBlock, grid_places

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return module


def swapped(parameter):
    """Exchange scale and shift: diffusers' continuous adaLN puts the scale first."""
    return torch.cat(parameter.chunk(2)[::-1])


def copy_linear(ours, *theirs):
    ours.weight.copy_(torch.cat([layer.weight for layer in theirs]))
    ours.bias.copy_(torch.cat([layer.bias for layer in theirs]))


def copy_projections(ours, theirs, *, added):
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    copy_linear(ours.qkv, *(getattr(theirs, name) for name in names))
    if ours.gain_q is not None:
        ours.gain_q.copy_((theirs.norm_added_q if added else theirs.norm_q).weight)
        ours.gain_k.copy_((theirs.norm_added_k if added else theirs.norm_k).weight)
    if ours.out is not None:
        copy_linear(ours.out, theirs.to_add_out if added else theirs.to_out[0])


@torch.no_grad()
def copy_block(ours, theirs):
    copy_linear(ours.image.condition, theirs.norm1.linear)
    copy_projections(ours.image.joint, theirs.attn, added=False)
    copy_projections(ours.text.joint, theirs.attn, added=True)
    if ours.image.alone is not None:
        copy_projections(ours.image.alone, theirs.attn2, added=False)
    copy_linear(ours.image.mlp[0], theirs.ff.net[0].proj)
    copy_linear(ours.image.mlp[2], theirs.ff.net[2])
    copy_linear(ours.text.condition, theirs.norm1_context.linear)
    if ours.last:
        for parameter in ours.text.condition.parameters():
            parameter.copy_(swapped(parameter))
    else:
        copy_linear(ours.text.mlp[0], theirs.ff_context.net[0].proj)
        copy_linear(ours.text.mlp[2], theirs.ff_context.net[2])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dual", [False, True])
def test_a_block_is_that_of_diffusers(diffusers, last, qk_norm, dual):
    theirs = diffusers.models.attention.JointTransformerBlock(
        dim=24, num_attention_heads=3, attention_head_dim=8, context_pre_only=last,
        qk_norm="rms_norm" if qk_norm else None, use_dual_attention=dual,
    )  # fmt: skip
    ours = MMDiTBlock(24, n_heads=3, qk_norm=qk_norm, last=last, dual=dual)
    copy_block(ours, fill(theirs))
    x, c, e = normal(2, 6, 24, seed=1), normal(2, 4, 24, seed=2), normal(2, 24, seed=3)
    with torch.no_grad():
        wanted_c, wanted_x = theirs(x, c, e)
        y, d = ours(x, c, e)
    torch.testing.assert_close(y, wanted_x, rtol=1e-5, atol=1e-5)
    if not last:
        torch.testing.assert_close(d, wanted_c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd3", "sd3.5-large", "sd3.5-medium"])
def test_the_whole_net_is_that_of_diffusers(diffusers, kind):
    qk_norm, n_dual = kind != "sd3", 2 if kind == "sd3.5-medium" else 0
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
        caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=12,
        dual_attention_layers=tuple(range(n_dual)), qk_norm="rms_norm" if qk_norm else None,
    )  # fmt: skip
    fill(theirs)
    ours = MMDiT(
        d_in=3, d_text=10, d_pooled=6, d_model=16, n_blocks=3, n_heads=2, n_max=12, n_base=4,
        qk_norm=qk_norm, n_dual=n_dual,
    )  # fmt: skip
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        kernel = theirs.pos_embed.proj.weight  # D C p q
        ours.embed.weight.copy_(kernel.permute(0, 2, 3, 1).reshape(16, -1))
        ours.embed.bias.copy_(theirs.pos_embed.proj.bias)
        embedders = theirs.time_text_embed
        copy_linear(ours.time[0], embedders.timestep_embedder.linear_1)
        copy_linear(ours.time[2], embedders.timestep_embedder.linear_2)
        copy_linear(ours.pooled[0], embedders.text_embedder.linear_1)
        copy_linear(ours.pooled[2], embedders.text_embedder.linear_2)
        copy_linear(ours.words, theirs.context_embedder)
        for block, their_block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
            copy_block(block, their_block)
        copy_linear(ours.condition, theirs.norm_out.linear)
        for parameter in ours.condition.parameters():
            parameter.copy_(swapped(parameter))
        copy_linear(ours.head, theirs.proj_out)
        for shape in ((8, 8), (4, 16), (20, 6)):
            z, t = normal(2, 3, *shape, seed=1), torch.tensor([0.125, 0.75])
            text, pooled = normal(2, 5, 10, seed=2), normal(2, 6, seed=3)
            wanted = theirs(z, text, pooled, timestep=1000 * t).sample
            torch.testing.assert_close(ours(z, t, text, pooled), wanted, rtol=1e-4, atol=1e-4)


def test_places_are_the_cropped_table_of_diffusers(diffusers):
    theirs = diffusers.models.embeddings.PatchEmbed(
        height=16, width=16, patch_size=2, in_channels=1, embed_dim=24, pos_embed_max_size=12
    )
    for height, width in ((8, 8), (3, 12), (5, 2)):
        rows, columns = (grid_places(n, n_max=12, n_base=8) for n in (height, width))
        ours = sincos_2d(rows, columns, dim=24)
        assert_float32(ours, theirs.cropped_pos_embed(2 * height, 2 * width)[0])
