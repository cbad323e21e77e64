import os
import time

import pytest
import torch
import torch.distributed as dist
from tests.closeness import assert_exact
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from zhizhi.deep_learning.digits import digits_split
from zhizhi.python.ddp import (
    DataParallel,
    ring_all_reduce,
    run,
    shard_indices,
    share_of_rows,
    torchrun,
)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def batches():
    """1,797 digits in an order, 96 at a time; the last batch has 69."""
    digits = digits_split(n_test=0, generator=torch.Generator().manual_seed(0))
    return list(zip(digits.x_train.double().split(96), digits.y_train.split(96), strict=True))


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def train(wrap, data, *, weigh=False):
    """Train on this rank's part of each batch; return the parameters."""
    rank, N = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net = model()
    wrapped = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        size = -(-96 // N)
        x, y = x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]
        loss = nn.functional.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        (loss * (share_of_rows(len(x)) if weigh else 1.0)).backward()
        getattr(wrapped, "finish", lambda: None)()
        optimizer.step()
    return flat(net)


# Processes


def test_results_come_back_by_rank_as_copies():
    results = run(lambda: {"rank": dist.get_rank(), "x": torch.arange(3)}, world_size=3)
    assert [result["rank"] for result in results] == [0, 1, 2]
    results[0]["x"] += 1
    assert results[1]["x"].tolist() == [0, 1, 2]


def test_a_failing_rank_is_named_and_the_waiting_ones_are_ended_at_once():
    def fail():
        if dist.get_rank() == 1:
            raise LookupError("no such thing")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)^rank \d failed: Traceback.*"):
        run(fail, world_size=3, timeout=300.0)
    assert time.monotonic() - started < 150


def test_a_process_that_is_gone_is_told():
    with pytest.raises(RuntimeError, match=r"^rank 0 failed: it ended without a result\.$"):
        run(lambda: os._exit(3), world_size=1)


def test_a_process_that_never_ends_is_told():
    with pytest.raises(TimeoutError, match=r"^ranks \[0\] are still running after 0\.2 s\.$"):
        run(lambda: time.sleep(60), world_size=1, timeout=0.2)


def test_no_process_is_refused():
    with pytest.raises(ValueError, match=r"^world_size is 0: world_size >= 1\.$"):
        run(lambda: None, world_size=0)


# The ring


@pytest.mark.parametrize(("N", "S"), [(1, 7), (2, 24), (3, 24), (4, 5), (5, 3)])
def test_the_ring_equals_all_reduce_and_sends_what_was_derived(N, S):
    def compare():
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(1, S, generator=generator, dtype=torch.float64)
        ours, theirs = ring_all_reduce(x), x.clone()
        dist.all_reduce(theirs)
        return ours.total, theirs, ours.n_sent

    results = run(compare, world_size=N)
    for ours, theirs, _ in results:
        assert_exact(ours, theirs)
        assert torch.equal(ours, results[0][0])  # every rank got the very same sum
    assert sum(n_sent for *_, n_sent in results) == 2 * (N - 1) * S
    if S % N == 0:
        assert {n_sent for *_, n_sent in results} == {2 * (N - 1) * S // N}


# Training


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 2000, 25 << 20])
def test_replicas_are_equal_and_equal_one_process_and_torchs_ddp(N, bucket_bytes):
    even = batches()[:-1]
    alone = train(lambda net: net, even)

    def both():
        ours = train(lambda net: DataParallel(net, bucket_bytes=bucket_bytes), even)
        return ours, train(DistributedDataParallel, even)

    results = run(both, world_size=N)
    for ours, theirs in results:
        assert torch.equal(ours, results[0][0])
        assert (ours - alone).abs().max() < 1e-12
        assert (ours - theirs).abs().max() < 1e-12


def test_an_uneven_last_batch_breaks_the_equality_and_weights_restore_it():
    every = batches()
    assert len(every[-1][0]) == 69
    alone = train(lambda net: net, every)
    plain, repaired = run(
        lambda: [train(DataParallel, every, weigh=weigh) for weigh in (False, True)], world_size=3
    )[0]
    assert (plain - alone).abs().max() > 1e-3
    assert (repaired - alone).abs().max() < 1e-12


def test_replicas_start_from_rank_zero_whatever_their_seeds():
    def start():
        torch.manual_seed(dist.get_rank())
        net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        net[1].running_mean += dist.get_rank()
        DataParallel(net)
        return flat(net), net[1].running_mean

    (p, mean), (q, other) = run(start, world_size=2)
    assert torch.equal(p, q)
    assert torch.equal(mean, other)


def test_buckets_are_filled_from_the_last_layer():
    def buckets():
        net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
        order = {p: i for i, p in enumerate(net.parameters())}
        return [
            [order[p] for p in bucket] for bucket in DataParallel(net, bucket_bytes=128).buckets
        ]

    assert run(buckets, world_size=1) == [[[4, 3], [2, 1], [0]]]


def test_accumulation_without_sync_equals_one_backward_pass():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def accumulate():
        mine = x[dist.get_rank() :: 2]
        net = DataParallel(model())
        with net.no_sync():
            (net(mine[:2]).square().mean() / 2).backward()
            local = torch.cat([p.grad.flatten() for p in net.parameters()])
        (net(mine[2:]).square().mean() / 2).backward()
        net.finish()
        return local, torch.cat([p.grad.flatten() for p in net.parameters()])

    (local_0, total_0), (local_1, total_1) = run(accumulate, world_size=2)
    net = model()
    net(x).square().mean().backward()
    assert (local_0 - local_1).abs().max() > 1e-6
    assert torch.equal(total_0, total_1)
    assert_exact(total_0, torch.cat([p.grad.flatten() for p in net.parameters()]))


def test_an_unused_parameter_is_told_at_once_by_ours_and_an_iteration_later_by_torch():
    class HalfUsed(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.used(x)

    def messages():
        told = []
        ours, theirs = DataParallel(HalfUsed()), DistributedDataParallel(HalfUsed())
        ours(torch.ones(1, 2)).sum().backward()
        for step in (ours.finish, lambda: theirs(torch.ones(1, 2)).sum().backward()):
            for _ in range(2):
                try:
                    step()
                except RuntimeError as error:
                    told.append(str(error).partition(".")[0])
                    break
        return told

    for ours, theirs in run(messages, world_size=2):
        assert ours == "2 parameters got no gradient: each must be used"
        assert theirs.startswith("Expected to have finished reduction in the prior iteration")


# Data


@pytest.mark.parametrize(("n", "N"), [(7, 2), (8, 2), (10, 3), (1, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_are_those_of_torch_in_every_epoch(n, N, shuffle):
    def shards():
        theirs = DistributedSampler(range(n), shuffle=shuffle, seed=5)
        found = []
        for epoch in range(2):
            theirs.set_epoch(epoch)
            found.append((shard_indices(n, epoch=epoch, seed=5, shuffle=shuffle), list(theirs)))
        return found

    for rank in run(shards, world_size=N):
        for ours, theirs in rank:
            assert ours == theirs


def test_every_row_is_seen_and_the_first_ones_twice():
    shards = run(lambda: shard_indices(7, shuffle=False), world_size=2)
    assert sorted(shards[0] + shards[1]) == [0, 0, 1, 2, 3, 4, 5, 6]


def test_no_rows_are_refused():
    def refuse():
        try:
            shard_indices(0)
        except ValueError as error:
            return str(error)

    assert run(refuse, world_size=1) == ["n is 0: n >= 1."]


def test_shares_average_to_one():
    shares = run(lambda: share_of_rows([32, 32, 5][dist.get_rank()]), world_size=3)
    assert_exact(shares, [3 * 32 / 69, 3 * 32 / 69, 3 * 5 / 69])
    assert_exact(sum(shares) / 3, 1.0)


# torchrun


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_returns_what_they_print(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.ones(1) * (dist.get_rank() + 1)\n"
        "dist.all_reduce(x)\n"
        "if dist.get_rank() == 0:\n"
        "    print('sum', x.item())\n"
        "dist.destroy_process_group()\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"  # a thread of gloo may still hold x, and then aborts a normal exit
    )
    assert torchrun(script, n_processes=2) == "sum 3.0\n"


@pytest.mark.slow
def test_torchrun_tells_what_a_failing_script_wrote(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('a reason')\n")
    with pytest.raises(RuntimeError, match=r"(?s)^torchrun ended with 1:\n.*"):
        torchrun(script, n_processes=1)
