"""Very many classes: the same loss in pieces, on processes, and what a sample of them changes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.closeness import assert_exact
from torch.autograd.graph import saved_tensors_hooks

from zhizhi.deep_learning.large_scale_softmax import (
    chunked_cross_entropy,
    class_shard,
    partial_classes,
    partial_cross_entropy,
    sampled_cross_entropy,
    sharded_cross_entropy,
)
from zhizhi.python.ddp import run

N, C, D = 6, 23, 5


def draw(seed: int = 0, *, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(N, D, generator=g, dtype=torch.float64)
    w = torch.randn(C, D, generator=g, dtype=torch.float64)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, C, (N,), generator=g)


def with_gradients(loss, x, w):
    """Return the losses and the gradients of a sum that weighs each row differently."""
    weights = torch.arange(1.0, N + 1, dtype=torch.float64)
    return [loss.detach(), *torch.autograd.grad((weights * loss).sum(), (x, w))]


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_in_chunks_it_is_the_cross_entropy_of_torch(chunk: int, scale: float) -> None:
    x, w, y = draw(scale=scale)
    ours = with_gradients(chunked_cross_entropy(x, w, y, chunk=chunk), x, w)
    theirs = with_gradients(F.cross_entropy(x @ w.T, y, reduction="none"), x, w)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_chunks_keep_nothing_of_the_size_of_the_logits() -> None:
    x, w, y = (t.detach() for t in draw())
    x, w = x.repeat(100, 1).requires_grad_(), w.repeat(40, 1).requires_grad_()
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        chunked_cross_entropy(x, w, y.repeat(100), chunk=50)
    assert max(kept) == max(x.numel(), w.numel()) < len(x) * len(w) / 100


def in_a_process(world_size: int, seed: int):
    x, w, y = draw(seed)
    part = class_shard(C, rank=dist.get_rank(), world_size=world_size)
    shard = w[part].detach().clone().requires_grad_()
    return with_gradients(sharded_cross_entropy(x, shard, y, first=part.start), x, shard)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_on_processes_it_is_the_cross_entropy_of_one(world_size: int) -> None:
    x, w, y = draw(1)
    loss, dx, dw = with_gradients(F.cross_entropy(x @ w.T, y, reduction="none"), x, w)
    ranks = run(in_a_process, world_size, 1, world_size=world_size)
    for rank_loss, rank_dx, _ in ranks:
        assert (rank_loss - loss).abs().max() < 1e-12
        assert (rank_dx - dx).abs().max() < 1e-12
    assert (torch.cat([rank_dw for _, _, rank_dw in ranks]) - dw).abs().max() < 1e-12


def test_shards_cover_all_classes_once_and_differ_by_one_at_most() -> None:
    for n_classes in (5, 6, 7, 100):
        for world_size in (1, 2, 5):
            parts = [
                class_shard(n_classes, rank=r, world_size=world_size) for r in range(world_size)
            ]
            rows = [i for part in parts for i in range(part.start, part.stop)]
            assert rows == list(range(n_classes))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_all_classes_drawn_alike_with_their_probability_give_the_whole_sum() -> None:
    x, w, y = draw()
    uniform = torch.full((C,), 1 / C, dtype=torch.float64)
    once_each = torch.arange(C)  # a sample in which each class comes as often as it should
    found = sampled_cross_entropy(x, w, y, samples=once_each, probability=uniform)
    assert_exact(found.detach(), F.cross_entropy(x @ w.T, y, reduction="none").detach())


def test_the_sampled_sum_is_right_on_average_and_its_logarithm_too_small() -> None:
    x, w, y = (t.detach() for t in draw())
    q = torch.linspace(1, 3, C, dtype=torch.float64)
    q = q / q.sum()
    g = torch.Generator().manual_seed(0)
    own = (x * w[y]).sum(dim=1)
    losses = torch.stack([
        sampled_cross_entropy(
            x, w, y, samples=torch.multinomial(q, 8, replacement=True, generator=g), probability=q
        )
        for _ in range(4000)
    ])  # fmt: skip
    sums = torch.exp(losses + own)
    error = sums.std(dim=0) / math.sqrt(4000)
    whole = torch.exp(x @ w.T).sum(dim=1)
    assert ((sums.mean(dim=0) - whole).abs() < 4 * error).all()
    truth = F.cross_entropy(x @ w.T, y, reduction="none")
    assert (losses.mean(dim=0) < truth).all()
    assert (losses >= 0).all()


def test_without_the_correction_the_loss_is_another_one() -> None:
    x, w, y = (t.detach() for t in draw())
    uniform = torch.full((C,), 1 / C, dtype=torch.float64)
    samples = torch.arange(4)
    found = sampled_cross_entropy(x, w, y, samples=samples, probability=uniform, correct=False)
    expected = []
    for i, target in enumerate(y.tolist()):
        chosen = [target, *(j for j in range(4) if j != target)]
        expected.append(F.cross_entropy((x[i] @ w[chosen].T)[None], torch.tensor([0])).item())
    assert_exact(found, expected)


def test_a_share_of_the_classes_has_the_targets_and_no_class_twice() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([17, 3, 17, 90])
    for rate in (0.0, 0.02, 0.1, 0.5, 1.0):
        subset = partial_classes(y, n_classes=100, rate=rate, generator=g)
        assert len(subset.classes) == max(3, round(100 * rate))
        assert len(subset.classes.unique()) == len(subset.classes)
        assert subset.classes[subset.target].tolist() == y.tolist()


def test_with_all_classes_it_is_the_whole_loss_and_others_get_no_gradient() -> None:
    x, w, y = draw()
    whole = F.cross_entropy(x @ w.T, y, reduction="none")
    assert_exact(partial_cross_entropy(x, w, y, rate=1.0).detach(), whole.detach())
    g = torch.Generator().manual_seed(3)
    (dw,) = torch.autograd.grad(partial_cross_entropy(x, w, y, rate=0.5, generator=g).sum(), w)
    g = torch.Generator().manual_seed(3)
    chosen = partial_classes(y, n_classes=C, rate=0.5, generator=g).classes
    left_out = torch.ones(C, dtype=torch.bool)
    left_out[chosen] = False
    assert (dw[left_out] == 0).all()
    assert (dw[chosen] != 0).any(dim=1).all()


def test_the_loss_of_a_share_is_smaller_by_about_the_logarithm_of_the_share() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=g, dtype=torch.float64) / 8
    w = torch.randn(4000, 32, generator=g, dtype=torch.float64)
    y = torch.randint(0, 4000, (64,), generator=g)
    whole = F.cross_entropy(x @ w.T, y).item()
    for rate in (0.5, 0.1):
        part = torch.stack([
            partial_cross_entropy(x, w, y, rate=rate, generator=g).mean() for _ in range(20)
        ]).mean()  # fmt: skip
        assert abs(part.item() - (whole + math.log(rate))) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chunked_cross_entropy(*draw(), chunk=0), r"^chunk is 0: chunk >= 1\.$"),
        (
            lambda: class_shard(2, rank=0, world_size=3),
            r"^3 processes share 2 classes: at least one each\.$",
        ),
        (
            lambda: sharded_cross_entropy(*draw(), first=0),
            r"^there is no process group: call init_process_group first\.$",
        ),
        (
            lambda: partial_classes(torch.tensor([0]), n_classes=3, rate=1.5),
            r"^rate is 1\.5: 0 <= rate <= 1\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
