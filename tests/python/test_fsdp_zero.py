import pytest
import torch
import torch.distributed as dist
from tests.closeness import assert_exact
from torch import nn
from torch.utils.checkpoint import checkpoint

from zhizhi.deep_learning.adamw import adamw_step
from zhizhi.python.ddp import run
from zhizhi.python.fsdp_zero import (
    FlatShard,
    ZeroOne,
    ZeroThree,
    ZeroTwo,
    full_state,
    kept_bytes,
    load_full_state_,
    ring_all_gather,
    ring_reduce_scatter,
    zero_bytes,
)

STAGES = {1: ZeroOne, 2: ZeroTwo, 3: ZeroThree}
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
N_PARAMS = 3466  # of `model`; 2 divides each unit, 3 does not


def model(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
        return nn.Sequential(*layers).to(dtype)


def sharded(stage, dtype=torch.float64):
    net = model(dtype)
    return STAGES[stage](net, adamw_step, units=[net[0], net[2], net[4]], **SETTINGS)


def batches(n=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 24, 64, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(10, (n, 24), generator=generator), strict=True))


def backward(net, x, y, *, n_micro=1):
    """Leave this rank's gradient, in n_micro passes."""
    rank, N = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = zip(x[rank::N].chunk(n_micro), y[rank::N].chunk(n_micro), strict=True)
    for x_part, y_part in parts:
        (nn.functional.cross_entropy(net(x_part), y_part) / n_micro).backward()


def alone(data, *, max_norm=None):
    """Train with torch's AdamW in one process; return parameters and gradient norms."""
    net, norms = model(), []
    optimizer = torch.optim.AdamW(net.parameters(), **SETTINGS)
    for x, y in data:
        optimizer.zero_grad()
        backward(net, x, y)
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), max_norm or float("inf")).item())
        optimizer.step()
    return flat(dict(net.named_parameters())), norms


def flat(tensors):
    return torch.cat([tensors[name].detach().flatten() for name, _ in model().named_parameters()])


def together(stage, data, *, max_norm=float("inf"), n_micro=1):
    zero, norms = sharded(stage), []
    for x, y in data:
        backward(zero, x, y, n_micro=n_micro)
        norms.append(zero.step(max_norm=max_norm))
    return flat(full_state(zero)["theta"]), norms, zero.n_sent


def padded(N):
    return sum(-(-n // N) * N for n in (64 * 32 + 32, 32 * 32 + 32, 32 * 10 + 10))


# The formula


def test_the_bytes_are_those_of_the_papers_first_figure():
    kept = [zero_bytes(7.5e9, stage=stage, world_size=64) / 1e9 for stage in (0, 1, 2, 3)]
    assert [round(x, 1) for x in kept] == [120.0, 31.4, 16.6, 1.9]


def test_one_rank_keeps_everything_and_stage_three_shares_everything():
    assert [zero_bytes(10, stage=stage, world_size=1) for stage in (0, 1, 2, 3)] == [160.0] * 4
    assert zero_bytes(10, stage=0, world_size=1000) == 160.0
    assert_exact(zero_bytes(10, stage=3, world_size=1000), 0.16)


def test_a_stage_that_does_not_exist_and_no_rank_are_refused():
    with pytest.raises(ValueError, match=r"^stage is 4: one of 0, 1, 2 and 3\.$"):
        zero_bytes(1, stage=4, world_size=1)
    with pytest.raises(ValueError, match=r"^world_size is 0: world_size >= 1\.$"):
        zero_bytes(1, stage=1, world_size=0)


# The halves of the ring


@pytest.mark.parametrize(("N", "S"), [(1, 4), (2, 6), (3, 12), (4, 4)])
def test_the_halves_equal_torchs_collectives_and_each_sends_half(N, S):
    def compare():
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(S, generator=generator, dtype=torch.float64)
        before, mine, whole = x.clone(), x.new_empty(S // N), x.new_empty(S)
        reduced = ring_reduce_scatter(x)
        dist.reduce_scatter_single(mine, x)
        gathered = ring_all_gather(mine)
        dist.all_gather_single(whole, mine)
        assert torch.equal(x, before)
        assert torch.equal(gathered.result, whole)
        return reduced.result, mine, reduced.n_sent, gathered.n_sent

    for ours, theirs, *sent in run(compare, world_size=N):
        assert_exact(ours, theirs)
        assert sent == [S * (N - 1) // N] * 2


def test_a_length_that_the_ranks_do_not_divide_is_refused():
    def refuse():
        try:
            ring_reduce_scatter(torch.zeros(5))
        except ValueError as error:
            return str(error)

    message = "x has 5 numbers for 2 ranks: pad it to a multiple."
    assert run(refuse, world_size=2) == [message] * 2


# Training


@pytest.mark.parametrize("N", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_as_one_process_and_sends_what_was_derived(stage, N):
    data = batches()
    expected, norms = alone(data)
    for theta, ours, n_sent in run(together, stage, data, world_size=N):
        assert (theta - expected).abs().max() < 1e-12
        assert_exact(ours, norms)
        assert n_sent == len(data) * {1: 2, 2: 2, 3: 3}[stage] * padded(N) * (N - 1) // N
    assert padded(3) > padded(2) == N_PARAMS


@pytest.mark.parametrize("stage", STAGES)
def test_the_bytes_after_a_backward_pass_are_the_formulas(stage):
    x, y = batches(1)[0]

    def measure():
        zero = sharded(stage, torch.bfloat16)
        backward(zero, x.bfloat16(), y)
        after_backward = kept_bytes(zero)
        zero.step()
        return after_backward, kept_bytes(zero)

    for after_backward, after_step in run(measure, world_size=2):
        assert after_backward == zero_bytes(N_PARAMS, stage=stage, world_size=2)
        assert after_step == zero_bytes(N_PARAMS, stage=stage, world_size=2, grad=0)


def test_low_precision_parameters_are_the_rounded_master_copy():
    x, y = batches(1)[0]

    def train():
        zero = sharded(1, torch.bfloat16)
        backward(zero, x.bfloat16(), y)
        zero.step()
        state = full_state(zero)["theta"]
        return [(p.detach().float(), state[name]) for name, p in zero.module.named_parameters()]

    for parameters in run(train, world_size=2):
        for p, master in parameters:
            assert master.dtype == torch.float32
            assert torch.equal(p, master.bfloat16().float())
            assert not torch.equal(p, master)


def test_stage_three_holds_one_unit_at_a_time_and_nothing_between_steps():
    x, y = batches(1)[0]

    def watch():
        zero = sharded(3)
        held = [sum(s.buffer.untyped_storage().nbytes() for s in zero.shards)]
        with torch.no_grad():
            zero(x)
        held.append(sum(p.numel() for p in zero.parameters()))
        backward(zero, x, y)
        held.append(sum(s.buffer.untyped_storage().nbytes() for s in zero.shards))
        zero.step()
        held.append(sum(s.buffer.untyped_storage().nbytes() for s in zero.shards))
        return held, zero.n_whole_peak

    assert run(watch, world_size=2) == [([0, 0, 0, 0], 64 * 32 + 32)] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_two_forward_passes_share_one_backward_pass(stage):
    x, y = batches(1)[0]
    net = model()
    (nn.functional.cross_entropy(net(x), y) + net(x).square().mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()

    def norm():
        zero, rank = sharded(stage), dist.get_rank()
        x_mine, y_mine = x[rank::2], y[rank::2]
        (
            nn.functional.cross_entropy(zero(x_mine), y_mine) + zero(x_mine).square().mean()
        ).backward()
        return zero.step()

    assert_exact(run(norm, world_size=2), [expected] * 2)


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "early_stop": False},  # the unit's forward pass ends once more
    ],
)
def test_stage_three_may_compute_a_unit_of_several_layers_again(options):
    x, y = batches(1)[0]
    net = model()
    backward(net, x, y)
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()

    def norm():
        net = model()
        zero = ZeroThree(net, adamw_step, units=[net[:3], net[4]], **SETTINGS)

        class Checkpointed(nn.Module):
            def forward(self, x):
                unit = zero.units[0]
                x = x.clone().requires_grad_()
                return net[4](net[3](checkpoint(unit, x, **options)))

        backward(Checkpointed(), x, y)
        held = sum(s.buffer.untyped_storage().nbytes() for s in zero.shards)
        return zero.step(), held

    for ours, held in run(norm, world_size=2):
        assert_exact(ours, expected)
        assert held == 0


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_start_from_rank_zero_whatever_their_seeds(stage):
    def start():
        torch.manual_seed(dist.get_rank())
        net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        net[1].running_mean += dist.get_rank()
        zero = STAGES[stage](net, adamw_step, units=[net[0], net[1]])
        return full_state(zero)["theta"]["0.weight"], net[1].running_mean

    (p, mean), (q, other) = run(start, world_size=2)
    assert torch.equal(p, q)
    assert torch.equal(mean, other)


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_uses_the_norm_over_all_ranks(stage):
    data = batches(4)
    expected, norms = alone(data, max_norm=0.3)
    assert min(norms) > 0.3
    for theta, ours, _ in run(lambda: together(stage, data, max_norm=0.3), world_size=3):
        assert (theta - expected).abs().max() < 1e-12
        assert_exact(ours, norms)


@pytest.mark.parametrize(("stage", "cost"), [(1, 2), (2, 1 + 4), (3, 3 * 4)])
def test_accumulated_passes_equal_one_and_cost_what_each_sends(stage, cost):
    data = batches(3)
    expected, _ = alone(data)
    for theta, _, n_sent in run(lambda: together(stage, data, n_micro=4), world_size=2):
        assert (theta - expected).abs().max() < 1e-12
        assert n_sent == len(data) * cost * N_PARAMS // 2


@pytest.mark.parametrize(("save", "load"), [(1, 3), (3, 2), (2, 1)])
def test_a_gathered_state_goes_on_with_another_stage_on_other_ranks(save, load):
    data = batches()
    expected, _ = alone(data)

    def first():
        zero = sharded(save)
        for x, y in data[:3]:
            backward(zero, x, y)
            zero.step()
        return full_state(zero)

    states = run(first, world_size=3)
    assert states[0]["t"] == 3
    assert all(torch.equal(flat(s["m"]), flat(states[0]["m"])) for s in states)

    def second():
        zero = sharded(load)
        load_full_state_(zero, states[0])
        for x, y in data[3:]:
            backward(zero, x, y)
            zero.step()
        return flat(full_state(zero)["theta"])

    for theta in run(second, world_size=2):
        assert (theta - expected).abs().max() < 1e-12


# Refusals


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("stage", STAGES)
def test_an_unused_parameter_is_told(stage):
    def told():
        net = HalfUsed()
        zero = STAGES[stage](net, adamw_step, units=[net])
        for _ in range(2):
            zero(torch.ones(1, 2)).sum().backward()
        try:
            zero.step()
        except RuntimeError as error:
            return str(error)

    message = "2 parameters got no gradient: each must be used."
    assert run(told, world_size=2) == [message] * 2


def test_units_that_do_not_hold_each_parameter_once_are_refused():
    def told():
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        tied[1].weight = tied[0].weight
        messages = []
        for module, units in ((net, [net[0]]), (net, [net, net[1]]), (tied, [tied[0], tied[1]])):
            try:
                ZeroOne(module, adamw_step, units=units)
            except ValueError as error:
                messages.append(str(error))
        return messages

    assert run(told, world_size=1)[0] == [
        "units hold 2 parameters, 2 of them distinct, and the module has 4: each must be in one "
        "unit.",
        "units hold 6 parameters, 4 of them distinct, and the module has 4: each must be in one "
        "unit.",
        "units hold 2 parameters, 1 of them distinct, and the module has 1: each must be in one "
        "unit.",
    ]


def test_a_unit_of_two_dtypes_and_a_frozen_parameter_are_refused():
    def told():
        mixed = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]
        frozen = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)]
        messages = []
        for params in (mixed, frozen):
            try:
                FlatShard(params)
            except ValueError as error:
                messages.append(str(error))
        return messages

    assert run(told, world_size=1)[0] == [
        "a unit has 2 dtypes: its parameters must share one.",
        "1 of 2 parameters are frozen: 0 may be.",
    ]
