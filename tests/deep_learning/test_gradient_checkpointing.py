import itertools
import math
import warnings

import pytest
import torch
import torch.utils.checkpoint as peer
from tests.closeness import assert_exact
from torch import nn

from zhizhi.deep_learning.gradient_checkpointing import (
    SavedTensorMeter,
    balanced_segments,
    checkpoint,
    checkpoint_sequential,
    revolve_forwards,
    revolve_schedule,
)

L, D, N = 36, 32, 16
UNIT = N * D * 4


@pytest.fixture
def chain():
    """36 blocks of which each saves one activation, and a count of the calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(L)]
    calls = []
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    return blocks, calls


def parameters(modules):
    return [p for module in modules for p in module.parameters()]


def inputs():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(modules):
    return torch.cat([p.grad.flatten() for p in parameters(modules)])


def plain(modules, x):
    for module in modules:
        x = module(x)
    return x


# One checkpoint


def test_gradients_are_bit_equal_to_those_without_and_to_torchs(chain):
    blocks = chain[0]
    found = []
    for run in (
        plain,
        lambda modules, x: checkpoint(nn.Sequential(*modules), x),
        lambda modules, x: peer.checkpoint(nn.Sequential(*modules), x, use_reentrant=False),
    ):
        for p in parameters(blocks):
            p.grad = None
        x = inputs()
        run(blocks, x).sum().backward()
        found.append(torch.cat([gradients(blocks), x.grad.flatten()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_inputs_of_which_one_needs_no_gradient():
    a = torch.tensor([2.0], requires_grad=True)
    b, c = torch.tensor([3.0]), torch.tensor([5.0], requires_grad=True)
    checkpoint(lambda a, b, c: a * b * c**2, a, b, c).backward()
    assert (a.grad.item(), b.grad, c.grad.item()) == (75.0, None, 60.0)


def test_gradcheck_in_float64():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: checkpoint(lambda y: y.sin() * y, x), (x,))


def test_dropout_draws_the_same_mask_again_and_leaves_the_random_state_alone():
    with torch.random.fork_rng(devices=[]):
        results = []
        for run in (nn.Dropout(0.5), lambda x: checkpoint(nn.Dropout(0.5), x)):
            torch.manual_seed(0)
            x = torch.ones(1000, requires_grad=True)
            out = run(x)
            torch.rand(7)
            out.sum().backward()
            assert torch.equal(out, x.grad)  # the mask of the output is the mask of the gradient
            results.append((x.grad, torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_random_state_torch_differentiates_another_mask():
    """What `preserve_rng_state=False` saves is paid with a wrong gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.ones(1000, requires_grad=True)
        out = peer.checkpoint(nn.Dropout(0.5), x, use_reentrant=True, preserve_rng_state=False)
        out.sum().backward()
    assert not torch.equal(out, x.grad)


def test_batch_norm_counts_a_batch_twice():
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3).requires_grad_()
    checkpoint(norm, x).sum().backward()
    assert norm.num_batches_tracked == 2


def test_inputs_without_gradients_are_refused_where_torch_returns_a_dead_end():
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    message = r"^none of 1 inputs requires a gradient: at least one must\.$"
    with pytest.raises(ValueError, match=message):
        checkpoint(layer, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not peer.checkpoint(layer, x, use_reentrant=True).requires_grad
    assert "None of the inputs have requires_grad=True" in str(caught[0].message)
    assert peer.checkpoint(layer, x, use_reentrant=False).requires_grad
    with torch.no_grad():
        assert torch.equal(checkpoint(layer, x), layer(x))


def test_torch_still_falls_back_to_reentrant_with_a_warning():
    with pytest.warns(UserWarning, match="the use_reentrant parameter should be passed explicitly"):
        peer.checkpoint(nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True))


# Segments


@pytest.mark.parametrize("s", [1, 2, 3, 4, 6, 9, 12, 18, 36])
def test_the_peak_is_s_plus_l_over_s_and_the_calls_are_as_derived(chain, s):
    blocks, calls = chain
    x = inputs()
    with SavedTensorMeter(exclude=parameters(blocks)) as meter:
        checkpoint_sequential(blocks, x, n_segments=s).sum().backward()
    assert meter.peak == (s + L // s) * UNIT
    assert meter.live == 0
    assert len(calls) == L + (s - 1) * L // s
    with_segments = gradients(blocks)
    for p in parameters(blocks):
        p.grad = None
    plain(blocks, inputs()).sum().backward()
    assert torch.equal(with_segments, gradients(blocks))


@pytest.mark.parametrize("s", [1, 4, 5, 7, 35])
def test_calls_and_peak_equal_those_of_torch_also_where_s_does_not_divide(chain, s):
    blocks, calls = chain
    seen = []
    for run in (
        lambda x: checkpoint_sequential(blocks, x, n_segments=s),
        lambda x: peer.checkpoint_sequential(blocks, s, x, use_reentrant=True),
    ):
        calls.clear()
        with SavedTensorMeter(exclude=parameters(blocks)) as meter:
            run(inputs()).sum().backward()
        seen.append((len(calls), meter.peak))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("s", [0, 37])
def test_a_number_of_segments_that_does_not_fit_is_refused(chain, s):
    message = rf"^n_segments is {s} for 36 modules: 1 <= n_segments <= 36\.$"
    with pytest.raises(ValueError, match=message):
        checkpoint_sequential(chain[0], inputs(), n_segments=s)


# The meter


def test_the_meter_counts_one_activation_a_block_and_the_input(chain):
    blocks = chain[0]
    with SavedTensorMeter(exclude=parameters(blocks)) as meter:
        out = plain(blocks, inputs())
        assert meter.live == (L + 1) * UNIT
    out.sum().backward()
    assert meter.live == 0
    assert meter.peak == max(meter.history) == (L + 1) * UNIT


def test_without_the_exclusion_the_weights_are_counted_too(chain):
    blocks = chain[0]
    with SavedTensorMeter() as meter:
        out = plain(blocks, inputs())
    weights = sum(p.nbytes for p in parameters(blocks) if p.ndim == 2)
    assert meter.live == (L + 1) * UNIT + weights
    del out
    assert meter.live == 0


def test_views_of_one_memory_count_once_and_whole():
    x = torch.ones(10, requires_grad=True)
    with SavedTensorMeter() as meter:
        y = x.exp()
        parts = [part**2 for part in y.split(5)]
    assert meter.live == 40
    del parts, y
    assert meter.live == 0


def test_gradients_of_gradients_pass_through_the_meter():
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with SavedTensorMeter():
        assert torch.autograd.gradgradcheck(lambda x: x.exp() * x.tanh(), (x.requires_grad_(),))


# Reversal with few slots


def simulate(actions, n_steps, n_slots):
    """Carry actions out on a chain whose state is a number; return the forwards and check rules."""
    stored, state, done, forwards = {0: 0}, 0, n_steps, 0
    for action, i in actions:
        if action == "advance":
            assert state == i
            state, forwards = i + 1, forwards + 1
        elif action == "reverse":
            assert (state, done) == (i, i + 1)
            done = i
        elif action == "store":
            assert state == i
            stored[i] = state
            assert len(stored) - 1 <= n_slots
        elif action == "load":
            state = stored[i]
        else:
            assert action == "free"
            del stored[i]
    assert done == 0
    return forwards


@pytest.mark.parametrize("n_slots", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 36])
def test_the_schedule_reverses_the_chain_within_its_slots_at_its_cost(n_steps, n_slots):
    forwards = simulate(revolve_schedule(n_steps, n_slots), n_steps, n_slots)
    assert forwards == revolve_forwards(n_steps, n_slots)


def binomial_cost(n_steps, n_slots):
    """Griewank's closed form, the kept first state counted as a slot: r is the most repeats."""
    c = n_slots + 1
    r = next(r for r in itertools.count() if math.comb(c + r, c) >= n_steps)
    return r * n_steps - math.comb(c + r, c + 1)


def test_the_cost_equals_the_binomial_closed_form():
    for n_steps, n_slots in itertools.product(range(1, 60), range(12)):
        assert revolve_forwards(n_steps, n_slots) == binomial_cost(n_steps, n_slots)


def cheapest(n_steps, n_slots):
    """Search every way to reverse, as a shortest path over (state, kept states, steps left)."""
    import heapq

    start = (0, frozenset({0}), n_steps)
    queue, best = [(0, 0, start)], {start: 0}
    for number in itertools.count(1):
        cost, _, (state, kept, left) = heapq.heappop(queue)
        if left == 0:
            return cost
        following = [((s, kept, left), 0) for s in kept]
        following += [((state, kept - {s}, left), 0) for s in kept]
        if len(kept) <= n_slots:
            following.append(((state, kept | {state}, left), 0))
        if state + 1 == left:
            following.append(((state, kept, left - 1), 0))
        else:
            following.append(((state + 1, kept, left), 1))
        for position, (node, price) in enumerate(following):
            if node[0] < left and cost + price < best.get(node, math.inf):
                best[node] = cost + price
                heapq.heappush(queue, (cost + price, number * 100 + position, node))
    raise AssertionError


@pytest.mark.parametrize("n_slots", [0, 1, 2, 3])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 7])
def test_no_other_schedule_is_cheaper(n_steps, n_slots):
    assert cheapest(n_steps, n_slots) == revolve_forwards(n_steps, n_slots)


@pytest.mark.parametrize(("n_steps", "n_slots"), [(0, 1), (3, -1)])
def test_a_chain_that_makes_no_sense_is_refused(n_steps, n_slots):
    message = rf"^{n_steps} steps, {n_slots} slots: n_steps >= 1 and n_slots >= 0\.$"
    for function in (revolve_forwards, revolve_schedule):
        with pytest.raises(ValueError, match=message):
            function(n_steps, n_slots)


# Layers of different size


@pytest.mark.parametrize("n_segments", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(5))
def test_the_largest_segment_is_the_least_of_all_cuts(n_segments, seed):
    sizes = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    found = balanced_segments(sizes, n_segments=n_segments)
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(7))
    assert len(found) == n_segments
    every = (
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, 7)))
        for cuts in itertools.combinations(range(1, 7), n_segments - 1)
    )
    assert_exact(max(sum(sizes[s]) for s in found), min(every))


@pytest.mark.parametrize("n_segments", [0, 3])
def test_more_segments_than_layers_are_refused(n_segments):
    message = rf"^n_segments is {n_segments} for 2 layers: 1 <= n_segments <= 2\.$"
    with pytest.raises(ValueError, match=message):
        balanced_segments([1.0, 2.0], n_segments=n_segments)
