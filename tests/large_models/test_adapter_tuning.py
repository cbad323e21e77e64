import pytest
import torch
from tests.closeness import assert_exact
from torch import nn
from torch.nn import functional as F

from zhizhi.large_models.adapter_tuning import (
    AdaptedBlock,
    Adapter,
    ScaledLinear,
    adapter_parameters,
    inject_adapters,
    merge_linear_adapter,
)
from zhizhi.large_models.digits_transformer import DigitsTransformer
from zhizhi.large_models.transformer_decoder import Block, Decoder


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strong(**how):
    """Return an adapter that is far from the identity."""
    g = torch.Generator().manual_seed(1)
    return Adapter(width=8, bottleneck=3, std=0.5, generator=g, **how).double()


def test_an_adapter_is_its_formula():
    a, h = strong(), some(5, 8)
    nn.init.normal_(a.down.bias)
    nn.init.normal_(a.up.bias)
    for x, y in zip(h, a(h), strict=True):
        z = [
            F.gelu(sum(a.down.weight[j, i] * x[i] for i in range(8)) + a.down.bias[j])
            for j in range(3)
        ]
        slow = [
            x[i] + sum(a.up.weight[i, j] * z[j] for j in range(3)) + a.up.bias[i] for i in range(8)
        ]
        assert_exact(y, torch.stack(slow))


def test_small_weights_make_it_nearly_the_identity_and_zero_ones_exactly():
    h = some(50, 32)
    small = Adapter(width=32, bottleneck=8, generator=torch.Generator().manual_seed(0)).double()
    assert 0 < (small(h) - h).abs().max() < 1e-2
    assert small.down.weight.abs().max() <= 2e-2  # cut off at two deviations
    with torch.no_grad():
        small.up.weight.zero_()
    assert torch.equal(small(h), h)


def test_one_zero_matrix_still_learns_and_two_do_not():
    for zero_down, learns in ((False, True), (True, False)):
        a = strong()
        with torch.no_grad():
            a.up.weight.zero_()
            if zero_down:
                a.down.weight.zero_()
        a(some(5, 8)).square().sum().backward()
        assert bool(a.up.weight.grad.any()) == learns
        assert not a.down.weight.grad.any()


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_a_block_adds_the_adapters_before_the_residual(style):
    g = torch.Generator().manual_seed(0)
    block = Block(width=8, n_heads=2).double()
    adapted = AdaptedBlock(
        block, bottleneck=3, style=style, std=0.5, scale=1.7, generator=g
    ).double()
    x = some(2, 4, 8)
    first, second = adapted.attn_adapter, adapted.mlp_adapter
    read = block.attend(block.attn_norm(x))
    h = x + (first(read) if style == "houlsby" else read)
    normed = block.mlp_norm(h)
    written = block.think(normed)
    if style == "parallel":
        wanted = h + written + 1.7 * second.up(F.gelu(second.down(normed)))
    else:
        wanted = h + second(written)
    assert_exact(adapted(x), wanted)
    assert (first is None) == (style != "houlsby")


def test_only_adapters_and_norms_are_trained():
    model = DigitsTransformer()
    n = inject_adapters(model, model.blocks, bottleneck=8)
    assert n == adapter_parameters([32] * 4, bottleneck=8) + 4 * 64
    assert n == sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("adapter" in name or "norm" in name for name in trained)


def test_the_published_counts():
    assert adapter_parameters([32] * 4, bottleneck=8) == 2208
    assert adapter_parameters([768] * 24, bottleneck=64) == 24 * (2 * 64 * 768 + 768 + 64)


def test_a_cache_goes_through_and_changes_nothing():
    g = torch.Generator().manual_seed(0)
    model = Decoder(vocab_size=9, width=8, n_layers=2, n_heads=2, max_length=12, generator=g)
    inject_adapters(model, model.blocks, bottleneck=2, std=0.5, generator=g)
    model = model.double()
    ids = torch.arange(9).reshape(1, 9)
    cache = model.new_cache(batch=1)
    parts = [model(part, cache=cache) for part in ids.split([4, 1, 4], dim=1)]
    assert_exact(torch.cat(parts, dim=1), model(ids))


def test_two_tasks_do_not_disturb_each_other():
    x = torch.rand(6, 64, generator=torch.Generator().manual_seed(0))
    model = DigitsTransformer(generator=torch.Generator().manual_seed(0))
    inject_adapters(model, model.blocks, bottleneck=4)
    task_a = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    said = model(x)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model(x), said)
    model.load_state_dict(task_a, strict=False)
    assert torch.equal(model(x), said)


@pytest.mark.parametrize("on", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
def test_rescaling_begins_as_nothing_and_merges(on, bias):
    base = nn.Linear(5, 4, bias=bias).double()
    layer, x = ScaledLinear(base, on=on), some(3, 5)
    assert torch.equal(layer(x), base(x))
    assert layer.scale.shape == ((5,) if on == "input" else (4,))
    with torch.no_grad():
        layer.scale.copy_(some(len(layer.scale), seed=2))
    slow = (
        base.weight @ torch.diag(layer.scale)
        if on == "input"
        else torch.diag(layer.scale) @ base.weight
    )
    shift = 0 if not bias else base.bias * (1 if on == "input" else layer.scale)
    assert_exact(layer(x), x @ slow.T + shift)
    assert_exact(layer.merged()(x), layer(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["scale"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_adapter_merges_into_an_increment_of_its_rank(bias):
    base, a = nn.Linear(6, 8, bias=bias).double(), strong(linear=True)
    nn.init.normal_(a.up.bias)
    nn.init.normal_(a.down.bias)
    merged, x = merge_linear_adapter(base, a), some(9, 6)
    assert_exact(merged(x), a(base(x)))
    assert torch.linalg.matrix_rank(merged.weight - base.weight) == 3


def test_no_matrix_does_what_a_bent_adapter_does():
    base, a, x = nn.Linear(6, 8).double(), strong(), some(200, 6)
    wanted = a(base(x)).detach()
    ones = torch.cat([x, torch.ones(200, 1).double()], dim=1)
    best = ones @ torch.linalg.lstsq(ones, wanted).solution
    assert (best - wanted).norm() / (wanted - base(x)).norm() > 0.05
    with pytest.raises(ValueError, match="has a GELU"):
        merge_linear_adapter(base, a)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="bottleneck is 0"):
        Adapter(width=4, bottleneck=0)
    with pytest.raises(ValueError, match="expect pre-norm"):
        AdaptedBlock(Block(width=8, n_heads=2, pre_norm=False), bottleneck=2)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Entry 0 is a Linear"):
        inject_adapters(model, model.blocks, bottleneck=2)
    assert model.blocks[0].weight.requires_grad
