import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.large_models.kimi_vl import MoonViT, VisionConfig, pixel_shuffle, vision_parameters

pytestmark = pytest.mark.parity
SMALL = VisionConfig(32, 2, 2, 40, patch=2, side=6)


@pytest.fixture(scope="module")
def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = pytest.importorskip("transformers.models.kimi_k25.configuration_kimi_k25")
        model = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")

    def build(ours):
        return model.Kimi_K25VisionModel(
            config.Kimi_K25VisionConfig(
                patch_size=ours.patch,
                pos_emb_height=ours.side,
                pos_emb_width=ours.side,
                num_attention_heads=ours.n_heads,
                num_hidden_layers=ours.n_layers,
                hidden_size=ours.width,
                intermediate_size=ours.hidden,
            )
        )

    return build


def test_moonvit_is_that_of_transformers_on_still_images(peer):
    torch.manual_seed(0)
    theirs, ours = peer(SMALL).eval(), MoonViT(SMALL)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    d = SMALL.width // SMALL.n_heads
    # Their pair 2i turns by the column and 2i + 1 by the row; ours are all rows, then all columns.
    pairs = torch.cat([torch.arange(1, d // 2, 2), torch.arange(0, d // 2, 2)])
    order = torch.cat([pairs, pairs + d // 2])
    order = torch.cat([order + h * d for h in range(SMALL.n_heads)])
    with torch.no_grad():
        embed = theirs.patch_embed
        ours.patch.weight.copy_(embed.proj.weight.flatten(1))
        ours.patch.bias.copy_(embed.proj.bias)
        ours.position.copy_(embed.pos_emb.position_embeddings)
        for a, b in zip(ours.blocks, theirs.layers, strict=True):
            heads = [(b.attn.q_proj, order), (b.attn.k_proj, order), (b.attn.v_proj, slice(None))]
            a.qkv.weight.copy_(torch.cat([m.weight[o] for m, o in heads]))
            a.qkv.bias.copy_(torch.cat([m.bias[o] for m, o in heads]))
            for mine, other in (
                (a.out, b.attn.proj), (a.up, b.mlp.fc1), (a.down, b.mlp.fc2),
                (a.norm1, b.norm1), (a.norm2, b.norm2),
            ):  # fmt: skip
                mine.load_state_dict(other.state_dict())
        ours.norm.load_state_dict(theirs.final_layernorm.state_dict())
        grids = [(4, 6), (8, 2)]
        pixels = torch.randn(40, 3, 2, 2)
        out = theirs(pixels, torch.tensor([[1, h, w] for h, w in grids]))
        mine = ours(pixels.flatten(1), grids)
    assert_float32(mine, out.last_hidden_state)
    assert_float32(pixel_shuffle(mine, grids), out.pooler_output.flatten(1))


def test_the_published_size_is_that_of_transformers(peer):
    with torch.device("meta"):
        theirs = sum(p.numel() for p in peer(VisionConfig()).parameters())
    assert theirs == vision_parameters(VisionConfig())
