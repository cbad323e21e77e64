import pytest
import torch
from tests.closeness import assert_exact, assert_float32
from torch import nn

from zhizhi.large_models.deepseek_v3 import DeepSeekV3, v3_parameters
from zhizhi.large_models.kimi_vl import (
    MOONLIGHT,
    MoonViT,
    Projector,
    VisionBlock,
    VisionConfig,
    image_tokens,
    interpolate_positions,
    merge_image_tokens,
    patchify,
    pixel_shuffle,
    siglip_loss,
    vision_parameters,
)

TINY = VisionConfig(16, 2, 2, 24, patch=2, side=6, channels=3)
GRIDS = [(4, 4), (2, 6), (6, 2)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images():
    return [torch.randn(3, 2 * h, 2 * w, generator=seeded(h)) for h, w in GRIDS]


def test_patches_are_what_a_convolution_sees():
    conv = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    image = torch.randn(3, 8, 12, generator=seeded())
    rows, grid = patchify(image, patch=4)
    assert grid == (2, 3)
    ours = rows @ conv.weight.flatten(1).T + conv.bias
    assert_float32(ours, conv(image[None])[0].flatten(1).T)
    for patch in (3, 5, 8):  # divides the one side, none, the other
        with pytest.raises(ValueError, match=f"8 by 12: {patch} must divide"):
            patchify(image, patch=patch)


def test_packed_images_do_not_see_each_other():
    model = MoonViT(TINY, generator=seeded())
    cut = [patchify(image, patch=2) for image in images()]
    packed = model(torch.cat([rows for rows, _ in cut]), GRIDS)
    alone = torch.cat([model(rows, [grid]) for rows, grid in cut])
    assert_float32(packed, alone)
    other = [(rows.flip(0) if i == 0 else rows) for i, (rows, _) in enumerate(cut)]
    changed = model(torch.cat(other), GRIDS)
    assert torch.equal(changed[16:], packed[16:])
    assert (changed[:16] - packed[:16]).abs().max() > 1e-3


def test_a_block_is_the_plain_formula_without_rotation():
    block = VisionBlock(TINY)
    x, N = torch.randn(5, 16, generator=seeded()), 5
    q, k, v = block.qkv(block.norm1(x)).reshape(N, 3, 2, 8).permute(1, 2, 0, 3)
    mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(0, 1).reshape(N, 16)
    h = x + block.out(mixed)
    wanted = h + block.down(nn.functional.gelu(block.up(block.norm2(h)), approximate="tanh"))
    assert_float32(block(x, torch.zeros(5, 4), torch.tensor([0, 5])), wanted)


@pytest.mark.parametrize("grid", [(3, 1), (1, 3)])
def test_both_rows_and_columns_turn(grid):
    model = MoonViT(TINY, generator=seeded())
    torch.nn.init.zeros_(model.position)  # only the rotations tell places apart
    for block in model.blocks:
        torch.nn.init.normal_(block.qkv.weight, generator=seeded(1))
    rows, order = torch.randn(3, 12, generator=seeded(2)), [1, 0, 2]
    moved = model(rows[order], [grid]) - model(rows, [grid])[order]
    assert moved.abs().max() > 1e-3


def test_weights_begin_small():
    model = MoonViT(TINY, generator=seeded())
    drawn = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_table_of_the_same_size_is_taken_as_it_is_and_a_ramp_stays_one():
    table = torch.randn(6, 6, 3, generator=seeded(), dtype=torch.float64)
    assert_exact(interpolate_positions(table, [(6, 6)]), table.flatten(0, 1))
    ramp = torch.arange(6.0)[:, None, None].expand(6, 6, 1)
    rows = interpolate_positions(ramp, [(12, 6)]).reshape(12, 6)
    assert (rows.diff(dim=0) > 0).all()
    assert_float32(rows.mean(), torch.tensor(2.5))


def test_a_pixel_shuffle_only_moves_numbers():
    x = torch.randn(40, 3, generator=seeded())
    out = pixel_shuffle(x, GRIDS)
    assert out.shape == (10, 12)
    assert torch.equal(out.flatten().sort().values, x.flatten().sort().values)
    slow, start = [], 0
    for h, w in GRIDS:
        image = x[start : start + h * w].reshape(h, w, 3)
        start += h * w
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                square = [image[i, j], image[i, j + 1], image[i + 1, j], image[i + 1, j + 1]]
                slow.append(torch.cat(square))
    assert torch.equal(out, torch.stack(slow))
    with pytest.raises(ValueError, match="2 must divide"):
        pixel_shuffle(x[:3], [(1, 3)])
    with pytest.raises(ValueError, match="have 4 patches, but there are 3"):
        pixel_shuffle(x[:3], [(2, 2)])
    with pytest.raises(ValueError, match="have 4 patches, but there are 3"):
        MoonViT(TINY)(torch.zeros(3, 12), [(2, 2)])


@pytest.mark.parametrize(
    ("size", "tokens"), [(224, 64), (448, 256), (1792, 4096), (29, 4), (28, 1)]
)
def test_tokens_of_a_square_image(size, tokens):
    assert image_tokens(size, size) == tokens


def test_image_vectors_take_their_places_in_order():
    text, ids = torch.zeros(5, 2), torch.tensor([7, 9, 9, 3, 9])
    mixed = merge_image_tokens(text, ids, torch.arange(6.0).reshape(3, 2), token=9)
    assert mixed.tolist() == [[0, 0], [0, 1], [2, 3], [0, 0], [4, 5]]
    with pytest.raises(ValueError, match="3 places for 2 image vectors"):
        merge_image_tokens(text, ids, torch.zeros(2, 2), token=9)


def test_a_projector_reads_squares():
    projector = Projector(width=16, text_width=10)
    x = torch.randn(16, 16, generator=seeded())
    out = projector(x, [(4, 4)])
    x2 = x.clone()
    x2[0] += torch.randn(16, generator=seeded(1))  # the square of patches 0, 1, 4, 5
    changed = (projector(x2, [(4, 4)]) - out).abs().amax(dim=1) > 0
    assert changed.tolist() == [True, False, False, False]


def test_parameters_of_the_published_encoder():
    with torch.device("meta"):
        built = sum(p.numel() for p in MoonViT(VisionConfig()).parameters())
    assert built == vision_parameters(VisionConfig()) == 416_866_032
    tiny = sum(p.numel() for p in MoonViT(TINY).parameters())
    assert tiny == vision_parameters(TINY)


def test_parameters_of_moonlight():
    total, active, table = v3_parameters(MOONLIGHT)
    assert table == 163_840 * 2048
    assert MOONLIGHT.scale == 2.446  # counts do not see it
    assert round((total - 2 * table) / 1e9, 3) == 15.289
    assert round((active - 2 * table) / 1e9, 3) == 2.244
    with torch.device("meta"):
        built = sum(p.numel() for p in DeepSeekV3(MOONLIGHT).parameters())
    assert built == total


def test_the_sigmoid_loss_is_a_sum_over_all_pairs():
    image, text = torch.randn(2, 4, 6, generator=seeded(), dtype=torch.float64)
    t, b = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    total = 0.0
    for i in range(4):
        for j in range(4):
            cosine = image[i] @ text[j] / (image[i].norm() * text[j].norm())
            z = 1 if i == j else -1
            total += torch.log1p(torch.exp(-z * (t.exp() * cosine + b))).item()
    assert_exact(siglip_loss(image, text, log_scale=t, bias=b), total / 4)
