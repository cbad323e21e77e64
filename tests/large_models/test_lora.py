import pytest
import torch
from tests.closeness import assert_exact
from torch import nn

from zhizhi.large_models.llama import Llama, LlamaConfig
from zhizhi.large_models.lora import (
    LoRALinear,
    best_low_rank,
    inject_lora,
    load_lora,
    lora_state,
    merge_lora,
)
from zhizhi.large_models.nf4 import NF4Linear


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(d_in=10, d_out=6, *, bias=True):
    layer = nn.Linear(d_in, d_out, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(some(d_out, d_in, seed=3))
    return layer


def trained(**how):
    """Return a layer whose B is not zero any more."""
    layer = LoRALinear(linear(), **({"rank": 3, "alpha": 7.0} | how))
    with torch.no_grad():
        layer.B.copy_(some(6, layer.B.shape[1], seed=4))
    return layer


def tiny():
    g = torch.Generator().manual_seed(0)
    return Llama(LlamaConfig(13, 16, 24, 2, 4, 2), generator=g).double()


IDS = torch.tensor([[1, 5, 2, 9, 12, 0]])


def test_the_map_is_the_frozen_one_plus_the_scaled_product():
    layer, x = trained(), some(4, 2, 10, seed=5)
    slow = torch.zeros(4, 2, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(10):
            low = sum(layer.B[i, k] * layer.A[k, j] for k in range(3))
            slow[..., i] += (layer.base.weight[i, j] + 7.0 / 3 * low).detach() * x[..., j]
    assert_exact(layer(x), slow + layer.base.bias)


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert trained(rank=4, alpha=8.0).scale == 2.0
    assert trained(rank=4, alpha=8.0, stabilised=True).scale == 4.0


@pytest.mark.parametrize(("stabilised", "power"), [(True, 0.0), (False, -1.0)])
def test_what_one_step_changes_depends_on_the_rank_unless_the_scale_is_stabilised(
    stabilised, power
):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, generator=g)
    moved = {}
    for rank in (8, 128):
        base = nn.Linear(512, 512)
        layer = LoRALinear(base, rank=rank, alpha=4.0, stabilised=stabilised, generator=g)
        before = layer(x)
        before.backward(torch.ones_like(before))
        assert layer.B.grad is not None
        with torch.no_grad():
            layer.B -= 0.1 * layer.B.grad
        moved[rank] = (layer(x) - before).norm().item()
    assert moved[128] / moved[8] == pytest.approx(16**power, rel=0.5)


def test_at_first_nothing_changes_and_only_b_has_a_gradient():
    base, x = linear(), some(5, 10)
    before = base(x)
    layer = LoRALinear(base, rank=2, alpha=4.0)
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert not layer.A.grad.any()
    assert layer.B.grad.abs().sum() > 0
    assert layer.base.weight.grad is None


def test_gradients_are_the_formulas():
    layer, x = trained(), some(10, seed=5)
    g = some(6, seed=6)
    (layer(x) * g).sum().backward()
    assert_exact(layer.B.grad, layer.scale * torch.outer(g, layer.A @ x))
    assert_exact(layer.A.grad, layer.scale * torch.outer(layer.B.T @ g, x))


def test_two_zero_matrices_never_learn():
    layer = LoRALinear(linear(), rank=2, alpha=4.0)
    with torch.no_grad():
        layer.A.zero_()
    layer(some(5, 10)).square().sum().backward()
    assert not layer.A.grad.any()
    assert not layer.B.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_merging_gives_one_map_that_does_the_same(bias):
    layer = LoRALinear(linear(bias=bias), rank=3, alpha=5.0)
    with torch.no_grad():
        layer.B.copy_(some(6, 3, seed=4))
    x = some(4, 10, seed=5)
    merged = layer.merged()
    assert_exact(merged(x), layer(x))
    assert torch.linalg.matrix_rank(merged.weight - layer.base.weight) == 3
    assert (merged.bias is None) == (not bias)


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_a_rank_that_no_matrix_has_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank is {rank} for a 6 x 10 matrix"):
        LoRALinear(linear(), rank=rank, alpha=1.0)


# In a model


def test_only_the_increments_are_trained_and_the_count_is_r_times_both_sides():
    model = tiny()
    before = model(IDS)
    names = inject_lora(model, r"\.(q|v)$", rank=2, alpha=4.0)
    assert names == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert torch.equal(model(IDS), before)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == 2 * (2 * (16 + 16) + 2 * (16 + 8))
    assert all(n.endswith((".A", ".B")) for n, p in model.named_parameters() if p.requires_grad)


def train_a_little(model, seed):
    with torch.no_grad():
        for i, w in enumerate(lora_state(model).values()):
            w.add_(some(*w.shape, seed=seed + i), alpha=0.1)


def test_merged_the_model_is_an_ordinary_one_that_says_the_same():
    model = tiny()
    names = inject_lora(model, r"\.(q|k|v|o|gate|up|down)$", rank=2, alpha=4.0)
    train_a_little(model, 7)
    wanted = model(IDS)
    assert merge_lora(model) == names
    assert_exact(model(IDS), wanted)
    plain = tiny()
    plain.load_state_dict(model.state_dict())  # the same names and shapes as before
    assert_exact(plain(IDS), wanted)


def test_one_model_serves_two_tasks():
    model = tiny()
    inject_lora(model, r"\.(q|v)$", rank=2, alpha=4.0)
    untouched = {n: w.clone() for n, w in lora_state(model).items()}
    before = model(IDS)
    train_a_little(model, 7)
    task = {n: w.clone() for n, w in lora_state(model).items()}
    said = model(IDS)
    load_lora(model, untouched)
    assert torch.equal(model(IDS), before)
    load_lora(model, task)
    assert torch.equal(model(IDS), said)
    assert not torch.equal(said, before)


def test_what_does_not_fit_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="No linear map of the model matches 'attention'"):
        inject_lora(model, "attention", rank=1, alpha=1.0)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has no LoRALinear"):
        merge_lora(model)
    inject_lora(model, r"\.q$", rank=1, alpha=1.0)
    with pytest.raises(ValueError, match=r"The names differ: \['blocks.0.q.A'"):
        load_lora(model, {})


def test_increments_train_beside_a_quantised_map_that_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(NF4Linear(nn.Linear(64, 64)), nn.Tanh(), NF4Linear(nn.Linear(64, 8)))
    codes = model[0].codes.clone()
    inject_lora(model, ".", rank=4, alpha=8.0)
    x, target = torch.randn(32, 64), torch.randn(32, 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(model[0].base.codes, codes)
    with pytest.raises(ValueError, match="The base is in NF4"):
        merge_lora(model)
    assert isinstance(model[0], LoRALinear)  # and nothing was merged


# The nearest matrix of a rank


def test_what_is_lost_is_the_rest_of_the_spectrum():
    w = some(7, 5)
    s = torch.linalg.svdvals(w)
    for rank in range(6):
        near = best_low_rank(w, rank=rank)
        assert torch.linalg.matrix_rank(near) == rank
        assert_exact((w - near).square().sum(), s[rank:].square().sum())


def test_no_other_matrix_of_the_rank_is_nearer():
    w = some(7, 5)
    best = (w - best_low_rank(w, rank=2)).norm()
    for seed in range(50):
        u, v = some(7, 2, seed=seed), some(2, 5, seed=100 + seed)
        coefficients = torch.linalg.lstsq(u, w).solution  # the best for this column space
        assert (w - u @ coefficients).norm() >= best
        assert (w - u @ v).norm() >= best
