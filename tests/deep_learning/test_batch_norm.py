import copy
import functools
import itertools
import statistics

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.closeness import assert_exact
from torch import nn

from zhizhi.deep_learning.batch_norm import (
    BatchNorm,
    Moments,
    SyncBatchNorm,
    all_rank_moments,
    batch_moments,
    batch_norm,
    batch_norm_backward,
    fold_batch_norm,
    merge_moments,
    running_update,
)
from zhizhi.python.ddp import DataParallel, run, share_of_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(values):
    """Return the moments of a list; those of nothing are zeros."""
    x = torch.tensor(values, dtype=torch.float64)
    if not values:
        return Moments(0, *torch.zeros(2).double())
    return Moments(len(values), x.mean(), x.var(correction=0))


# Moments


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=3),
    st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_has_the_moments_of_the_whole(values, cuts, random):
    bounds = sorted({0, len(values), *(min(cut, len(values)) for cut in cuts)})
    parts = [of(values[a:b]) for a, b in itertools.pairwise(bounds)] + [of([])]
    random.shuffle(parts)
    n, mean, var = functools.reduce(merge_moments, parts)
    assert n == len(values)
    assert_exact(mean, statistics.fmean(values))
    assert_exact(var, statistics.pvariance(values))


def test_merging_one_value_at_a_time_is_welfords_update():
    values = normal(100).tolist()
    mean = squares = 0.0
    for k, v in enumerate(values, start=1):
        before, mean = mean, mean + (v - mean) / k
        squares += (v - before) * (v - mean)
    merged = functools.reduce(merge_moments, [of([v]) for v in values])
    assert_exact(merged.mean, mean)
    assert_exact(merged.var, squares / 100)


def test_a_large_mean_does_not_hurt_a_merge_as_it_does_the_difference_of_squares():
    x = (1e4 + normal(4096)).float()
    true = x.double().var(correction=0)
    parts = [Moments(64, p.mean(), p.var(correction=0)) for p in x.split(64)]
    merged = functools.reduce(merge_moments, parts).var
    naive = x.square().mean() - x.mean().square()
    assert abs(merged - true) < 1e-3 * true
    assert abs(naive - true) > 0.5 * true


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 4)])
def test_batch_moments_are_those_of_each_channels_list(shape):
    x = normal(*shape)
    count, mean, var = batch_moments(x)
    for c in range(3):
        values = x[:, c].flatten().tolist()
        assert count == len(values)
        assert_exact(mean[c], statistics.fmean(values))
        assert_exact(var[c], statistics.pvariance(values))


# Batch norm as a function


def test_in_training_each_channel_has_mean_zero_and_variance_one():
    x, ones, zeros = 3 + 2 * normal(8, 3, 5), torch.ones(3).double(), torch.zeros(3).double()
    y = batch_moments(batch_norm(x, ones, zeros, batch_moments(x), eps=0.0))
    assert_exact(y.mean, zeros)
    assert_exact(y.var, ones)


def test_with_given_moments_it_is_an_affine_map_of_each_channel():
    x, w, b = normal(4, 3, 2), normal(3, seed=1), normal(3, seed=2)
    given_moments = Moments(9, normal(3, seed=3), normal(3, seed=4).square())
    y = batch_norm(x, w, b, given_moments, eps=0.1)
    for c in range(3):
        std = (given_moments.var[c] + 0.1).sqrt()
        assert_exact(y[:, c], w[c] * (x[:, c] - given_moments.mean[c]) / std + b[c])


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (3, 3, 2, 2)])
def test_backward_equals_autograd_and_finite_differences(shape):
    x, w, b, dy = normal(*shape), normal(3, seed=1), normal(3, seed=2), normal(*shape, seed=3)

    def forward(x, w, b):
        return batch_norm(x, w, b, batch_moments(x), eps=1e-3)

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    expected = torch.autograd.grad(forward(*leaves), leaves, dy)
    ours = batch_norm_backward(dy, x, w, eps=1e-3)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_exact(mine, theirs)
    for i in range(x.numel()):
        step = torch.zeros(x.numel()).double()
        step[i] = 1e-5
        step = step.reshape(shape)
        slope = ((forward(x + step, w, b) - forward(x - step, w, b)) * dy).sum() / 2e-5
        assert ours.dx.flatten()[i].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-6)


def test_a_batch_of_two_keeps_only_which_is_larger():
    x, ones, zeros = normal(2, 50), torch.ones(50).double(), torch.zeros(50).double()
    y = batch_norm(x, ones, zeros, batch_moments(x), eps=0.0)
    assert_exact(y[0], (x[0] - x[1]).sign())
    dx = batch_norm_backward(normal(2, 50, seed=1), x, ones, eps=0.0).dx
    assert dx.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_moments_in_float32_and_an_output_of_its_own(dtype):
    x, one = normal(64, 3).to(dtype), torch.ones(3)
    moments = batch_moments(x)
    assert moments.mean.dtype == moments.var.dtype == torch.float32
    assert torch.equal(
        batch_norm(x, one, one, moments), batch_norm(x.float(), one, one, moments).to(dtype)
    )
    assert batch_norm_backward(x, x, one).dx.dtype == dtype


def test_weights_before_the_norm_have_a_gradient_across_them_that_falls_as_they_grow():
    h, W, dy = normal(9, 5), normal(3, 5, seed=1), normal(9, 3, seed=2)
    one, zero = torch.ones(3).double(), torch.zeros(3).double()

    def gradient(weight):
        weight = weight.clone().requires_grad_()
        z = h @ weight.mT
        y = batch_norm(z, one, zero, batch_moments(z), eps=0.0)
        return torch.autograd.grad((dy * y).sum(), weight)[0]

    assert_exact((W * gradient(W)).sum(dim=1), zero)
    assert_exact(gradient(4 * W), gradient(W) / 4)


# Running estimates


def test_without_news_the_start_decays_by_one_minus_momentum():
    mean, var = torch.zeros(1).double(), torch.ones(1).double()
    batch = Moments(5, torch.tensor([3.0]).double(), torch.tensor([4.0]).double())
    for _ in range(20):
        mean, var = running_update(mean, var, batch, momentum=0.1)
    assert_exact(mean, [3 * (1 - 0.9**20)])
    assert_exact(var, [5 + 0.9**20 * (1 - 5)])  # 4 * 5 / 4 is the unbiased variance


def test_the_running_variance_of_small_batches_is_unbiased():
    n, batches = 4, 4000
    x = normal(batches, n)
    mean, var = torch.zeros(2, 1).double()
    for k, rows in enumerate(x, start=1):
        mean, var = running_update(mean, var, batch_moments(rows[:, None]), momentum=1 / k)
    # The unbiased variance of n normal values has variance 2 / (n - 1).
    assert abs(var.item() - 1) < 4 * (2 / (n - 1) / batches) ** 0.5


def test_momentum_none_weighs_all_batches_alike():
    norm = BatchNorm(3, momentum=None).double()
    x = normal(7, 10, 3)
    for rows in x:
        norm(rows)
    assert_exact(norm.running_mean, x.mean(dim=(0, 1)))
    assert_exact(norm.running_var, x.var(dim=1).mean(dim=0))
    assert norm.num_batches_tracked.item() == 7


def test_evaluation_uses_the_estimates_leaves_them_and_treats_rows_alone():
    norm = BatchNorm(3).double()
    x = 2 + normal(10, 3)
    norm(x)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    whole = norm(x)
    assert_exact(torch.cat([norm(row[None]) for row in x]), whole)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    expected = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    assert_exact(whole.detach(), expected)


# All ranks


def parts_of(x, sizes):
    return x.split(sizes)[dist.get_rank()]


def test_all_rank_moments_are_those_of_the_whole_batch_and_alike_on_all_ranks():
    x = normal(9, 3, 2) + 5 * torch.arange(9)[:, None, None]
    results = run(lambda: all_rank_moments(batch_moments(parts_of(x, [5, 0, 4]))), world_size=3)
    whole = batch_moments(x)
    for count, mean, var in results:
        assert count == whole.count
        assert_exact(mean, whole.mean)
        assert_exact(var, whole.var)
        assert mean.equal(results[0].mean)
        assert var.equal(results[0].var)


def network(norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 2)).double()


def train(norm, x, y, sizes, n_steps=5):
    net = network(norm)
    wrapped, scale = net, 1.0
    if dist.is_initialized():
        x, y = parts_of(x, sizes), parts_of(y, sizes)
        wrapped, scale = DataParallel(net), share_of_rows(len(x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (scale * (wrapped(x) - y).square().mean()).backward()
        if dist.is_initialized():
            wrapped.finish()
        optimizer.step()
    return {k: v.detach() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("sizes", [[6, 6], [9, 3]])
def test_two_ranks_train_as_one_process_does_with_synchronised_moments_only(sizes):
    x, y = normal(12, 4), normal(12, 2, seed=1)
    single = train(BatchNorm, x, y, None)
    for result in run(lambda: train(SyncBatchNorm, x, y, sizes), world_size=2):
        for name, value in single.items():
            assert_exact(result[name], value)
    apart = run(lambda: train(BatchNorm, x, y, sizes), world_size=2)
    assert (apart[0]["3.weight"] - single["3.weight"]).abs().max() > 1e-3
    assert not torch.allclose(apart[0]["1.running_mean"], apart[1]["1.running_mean"])


# Folding


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Conv1d(5, 3, 2), nn.Conv2d(5, 3, 2)])
def test_a_folded_layer_does_what_layer_and_norm_did(layer):
    layer = layer.double()
    shape = (4, 5) + (6,) * (layer.weight.ndim - 2)
    norm = BatchNorm(3).double()
    with torch.no_grad():
        norm.weight.copy_(normal(3, seed=1))
        norm.bias.copy_(normal(3, seed=2))
    for seed in range(5):
        norm(layer(normal(*shape, seed=seed)))
    norm.eval()
    x = normal(*shape, seed=9)
    expected = norm(layer(x))
    kernel, bias = fold_batch_norm(layer.weight.detach(), layer.bias.detach(), norm)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        layer.bias.copy_(bias)
    assert_exact(layer(x), expected)


# Refusals


def test_a_single_value_in_a_channel_is_refused_in_training_and_fine_in_evaluation():
    norm = BatchNorm(3)
    message = r"^a channel has 1 value in the batch: training needs 2 at least\.$"
    with pytest.raises(ValueError, match=message):
        norm(torch.zeros(1, 3))
    assert norm.num_batches_tracked.item() == 0
    assert norm.eval()(torch.zeros(1, 3)).shape == (1, 3)
    assert norm.train()(torch.randn(1, 3, 2)).shape == (1, 3, 2)


def test_an_empty_batch_everywhere_is_refused_with_its_number():
    message = r"^a channel has 0 values in the batch: training needs 2 at least\.$"
    with pytest.raises(ValueError, match=message):
        running_update(torch.zeros(1), torch.ones(1), of([]), momentum=0.1)
