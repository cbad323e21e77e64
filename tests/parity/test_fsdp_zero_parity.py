import warnings

import pytest
import torch
import torch.distributed as dist
from tests.closeness import assert_exact
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from zhizhi.deep_learning.adamw import adamw_step
from zhizhi.python.ddp import run
from zhizhi.python.fsdp_zero import ZeroOne, ZeroThree, full_state

pytestmark = pytest.mark.parity

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def zero_redundancy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its package still compiles with torch.jit.script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, 5)).double()


def losses(net):
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        x = torch.randn(12, 16, generator=generator, dtype=torch.float64)
        yield net(x[dist.get_rank() :: dist.get_world_size()]).square().mean()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def ours(stage):
    net = model()
    zero = stage(net, adamw_step, units=[net[0], net[2]], **SETTINGS)
    norms = []
    for loss in losses(zero):
        loss.backward()
        norms.append(zero.step(max_norm=0.2))
    return flat(full_state(zero)["theta"].values()), norms


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize("reshard", [True, False])
def test_stage_three_equals_fully_shard_with_uneven_rows_and_clipping(N, reshard):
    def theirs():
        net = model()
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh(), reshard_after_forward=reshard)
        optimizer, norms = torch.optim.AdamW(net.parameters(), **SETTINGS), []
        for loss in losses(net):
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.2).full_tensor().item())
            optimizer.step()
        rows = [len(p.to_local()) for p in net.parameters()]
        return flat(p.full_tensor() for p in net.parameters()), norms, rows

    def mesh():
        return dist.device_mesh.init_device_mesh("cpu", (N,))

    results = run(lambda: (ours(ZeroThree), theirs()), world_size=N)
    for (theta, norms), (theirs_theta, their_norms, _) in results:
        assert (theta - theirs_theta).abs().max() < 1e-12
        assert_exact(norms, their_norms)
    rows = {2: [[6, 6, 3, 3], [5, 5, 2, 2]], 3: [[4, 4, 2, 2], [4, 4, 2, 2], [3, 3, 1, 1]]}
    assert [rows_here for _, (*_, rows_here) in results] == rows[N]


@pytest.mark.parametrize("N", [2, 3])
def test_stage_one_equals_ddp_with_the_zero_redundancy_optimizer(zero_redundancy, N):
    def theirs():
        net = model()
        ddp = DistributedDataParallel(net)
        optimizer = zero_redundancy(net.parameters(), torch.optim.AdamW, **SETTINGS)
        for loss in losses(ddp):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.2)
            optimizer.step()
        state = optimizer.optim.state.values()
        return flat(net.parameters()), sum(s["exp_avg"].numel() for s in state)

    results = run(lambda: (ours(ZeroOne), theirs()), world_size=N)
    for (theta, _), (theirs_theta, _) in results:
        assert (theta - theirs_theta).abs().max() < 1e-12
    # Theirs deals out whole parameters, so the shares are as uneven as the parameters are.
    shares = {2: [16 * 11, 11 * 5 + 11 + 5], 3: [16 * 11, 11 * 5, 11 + 5]}[N]
    assert [n for _, (_, n) in results] == shares


def test_fully_shard_broadcasts_nothing_and_an_earlier_optimizer_updates_nothing():
    def theirs():
        torch.manual_seed(dist.get_rank())
        net = nn.Linear(2, 4, bias=False)
        mine = net.weight.detach().clone()
        early = torch.optim.SGD(net.parameters(), lr=1.0)
        fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        before = net.weight.full_tensor().detach().clone()
        net(torch.ones(1, 2)).sum().backward()
        early.step()
        return mine, before, net.weight.full_tensor()

    (first, mixed, after), (second, *_) = run(theirs, world_size=2)
    assert torch.equal(mixed, torch.cat([first[:2], second[2:]]))
    assert not torch.equal(first, second)
    assert torch.equal(after, mixed)
