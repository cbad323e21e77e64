"""Mixture of experts: every sum by a slow loop, every load by counting, balance by assignment."""

import math
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from tests.closeness import assert_exact, assert_float32

from zhizhi.large_models.moe import (
    DeepSeekMoE,
    Experts,
    Routing,
    all_to_all_tokens,
    expert_counts,
    expert_parallel_mixture,
    in_best_groups,
    max_violation,
    mixture,
    moe_parameters,
    normalized,
    router_z_loss,
    sequence_balance_loss,
    sigmoid_top_k,
    softmax_top_k,
    swiglu,
    switch_balance_loss,
    updated_bias,
    within_capacity,
)
from zhizhi.python.ddp import run

N, E, K, D, FH = 12, 8, 3, 5, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def weights(n_experts: int = E, width: int = FH, seed: int = 1) -> Experts:
    return Experts(
        draw(n_experts, D, width, seed=seed),
        draw(n_experts, D, width, seed=seed + 1),
        draw(n_experts, width, D, seed=seed + 2),
    )


def one_expert(x: torch.Tensor, experts: Experts, i: int) -> torch.Tensor:
    """Answer one token, without a matrix product over tokens."""
    a = (x[:, None] * experts.w_gate[i]).sum(dim=0)
    b = (x[:, None] * experts.w_up[i]).sum(dim=0)
    hidden = a / (1 + (-a).exp()) * b
    return (hidden[:, None] * experts.w_down[i]).sum(dim=0)


def mixture_by_loops(x, routing, experts, kept=None):
    rows = []
    for n, token in enumerate(x):
        y = torch.zeros_like(token)
        for slot, i in enumerate(routing.experts[n].tolist()):
            if kept is None or kept[n, slot]:
                y = y + routing.gates[n, slot] * one_expert(token, experts, i)
        rows.append(y)
    return torch.stack(rows)


# Routers


def test_a_softmax_router_keeps_the_probabilities_of_the_k_best() -> None:
    z = draw(N, E)
    routing = softmax_top_k(z, k=K)
    for n in range(N):
        p = [math.exp(a) / sum(math.exp(b) for b in z[n].tolist()) for a in z[n].tolist()]
        best = sorted(range(E), key=lambda i: -p[i])[:K]
        assert routing.experts[n].tolist() == best
        assert_exact(routing.gates[n], [p[i] for i in best])


def test_normalized_gates_are_the_softmax_over_the_chosen_logits() -> None:
    z = draw(N, E)
    routing = softmax_top_k(z, k=K)
    expected = z.gather(1, routing.experts).softmax(dim=1)
    assert_exact(normalized(routing).gates, expected)
    assert (normalized(routing).experts == routing.experts).all()


def test_one_normalized_gate_is_one_and_teaches_the_router_nothing() -> None:
    x, w, experts = draw(N, D), draw(D, E, seed=9).requires_grad_(), weights()
    routing = softmax_top_k(x @ w, k=1)
    (grad,) = torch.autograd.grad(mixture(x, normalized(routing), experts).square().sum(), w)
    assert grad.abs().max() < 1e-10
    routing = softmax_top_k(x @ w, k=1)
    (grad,) = torch.autograd.grad(mixture(x, routing, experts).square().sum(), w)
    assert grad.abs().max() > 1e-3


def test_with_all_experts_chosen_the_mixture_is_dense() -> None:
    x, experts = draw(N, D), weights()
    z = draw(N, E, seed=5)
    every = torch.stack([swiglu(x, *each) for each in zip(*experts, strict=True)], dim=1)
    dense = (z.softmax(dim=1)[..., None] * every).sum(dim=1)
    assert_exact(mixture(x, softmax_top_k(z, k=E), experts), dense)


def test_a_sigmoid_router_chooses_with_the_bias_and_weighs_without_it() -> None:
    z, b = draw(N, E), draw(E, seed=3)
    routing = sigmoid_top_k(z, b, k=K, scale=2.5)
    for n in range(N):
        s = [1 / (1 + math.exp(-a)) for a in z[n].tolist()]
        best = sorted(range(E), key=lambda i: -(s[i] + b[i].item()))[:K]
        assert routing.experts[n].tolist() == best
        assert_exact(routing.gates[n], [2.5 * s[i] / sum(s[j] for j in best) for i in best])
    assert_exact(routing.gates.sum(dim=1), torch.full((N,), 2.5))


def test_the_bias_gets_no_gradient() -> None:
    z, b = draw(N, E).requires_grad_(), draw(E, seed=3).requires_grad_()
    (sigmoid_top_k(z, b, k=K).gates ** 2).sum().backward()
    assert b.grad is None
    assert z.grad.abs().max() > 0


def test_a_bias_that_is_the_same_for_all_changes_nothing() -> None:
    z, b = draw(N, E), draw(E, seed=3)
    for groups in ({}, {"n_groups": 4, "k_groups": 2}):
        before = sigmoid_top_k(z, b, k=K, **groups)
        after = sigmoid_top_k(z, b + 7.0, k=K, **groups)
        assert (before.experts == after.experts).all()
        assert_exact(before.gates, after.gates)


@given(st.integers(0, 1000), st.sampled_from([(2, 1), (4, 2), (4, 3), (2, 2)]))
def test_the_best_groups_are_those_whose_two_best_sum_to_most(seed, groups) -> None:
    J, M = groups
    scores = draw(3, E, seed=seed)
    allowed = in_best_groups(scores, n_groups=J, k_groups=M)
    for n in range(3):
        parts = scores[n].reshape(J, -1).tolist()
        value = [max(a + b for a, b in combinations(part, 2)) for part in parts]
        best = sorted(range(J), key=lambda j: -value[j])[:M]
        expected = [i // (E // J) in best for i in range(E)]
        assert allowed[n].tolist() == expected


def test_chosen_experts_stay_in_their_groups_even_where_all_scores_are_negative() -> None:
    z, b = draw(200, E), torch.full((E,), -2.0, dtype=torch.float64)
    routing = sigmoid_top_k(z, b, k=4, n_groups=4, k_groups=2)
    allowed = in_best_groups(z.sigmoid() + b, n_groups=4, k_groups=2)
    assert allowed.gather(1, routing.experts).all()
    # Filled with zero instead of minus infinity, those that are not allowed would win.
    wrong = (z.sigmoid() + b).masked_fill(~allowed, 0.0).topk(4, dim=1).indices
    assert not allowed.gather(1, wrong).any()


def test_all_groups_are_no_limit() -> None:
    z, b = draw(N, E), draw(E, seed=3)
    assert (
        sigmoid_top_k(z, b, k=K).experts == sigmoid_top_k(z, b, k=K, n_groups=4, k_groups=4).experts
    ).all()


def test_a_router_in_bfloat16_chooses_others() -> None:
    x, w = draw(2000, 64), draw(64, 64, seed=1) / 8
    fine = softmax_top_k(x.float() @ w.float(), k=6).experts.sort(dim=1).values
    coarse = softmax_top_k((x.bfloat16() @ w.bfloat16()).float(), k=6).experts.sort(dim=1).values
    changed = (fine != coarse).any(dim=1).double().mean().item()
    assert 0.01 < changed < 0.3


# Dispatch and capacity


@pytest.mark.parametrize("k", [1, 3, E])
def test_the_grouped_computation_is_the_loop_over_tokens_and_experts(k) -> None:
    x, experts = draw(N, D), weights()
    routing = softmax_top_k(draw(N, E, seed=5), k=k)
    assert_exact(mixture(x, routing, experts), mixture_by_loops(x, routing, experts))


def test_gradients_are_those_of_the_loop() -> None:
    x, z = draw(N, D).requires_grad_(), draw(N, E, seed=5).requires_grad_()
    experts = Experts(*(w.requires_grad_() for w in weights()))
    inputs = (x, z, *experts)
    routing = softmax_top_k(z, k=K)
    fast = torch.autograd.grad(mixture(x, routing, experts).sin().sum(), inputs, retain_graph=True)
    slow = torch.autograd.grad(mixture_by_loops(x, routing, experts).sin().sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        assert_exact(a, b)


def test_an_expert_without_tokens_and_a_batch_without_tokens_are_fine() -> None:
    experts = weights()
    routing = Routing(torch.full((N, 1), 2), torch.ones(N, 1, dtype=torch.float64))
    x = draw(N, D)
    assert_exact(mixture(x, routing, experts), mixture_by_loops(x, routing, experts))
    none = Routing(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.float64))
    assert mixture(x[:0], none, experts).shape == (0, D)


def test_a_choice_that_is_not_kept_adds_nothing() -> None:
    x, experts = draw(N, D), weights()
    routing = softmax_top_k(draw(N, E, seed=5), k=2)
    kept = within_capacity(routing.experts, n_experts=E, capacity=2)
    assert not kept.all()
    expected = mixture_by_loops(x, routing, experts, kept)
    assert_exact(mixture(x, routing, experts, kept=kept), expected)
    nothing = torch.zeros_like(kept)
    assert (mixture(x, routing, experts, kept=nothing) == 0).all()


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 3))
def test_places_go_to_first_choices_first_and_then_in_order(seed, capacity, k) -> None:
    g = torch.Generator().manual_seed(seed)
    experts = torch.stack([torch.randperm(4, generator=g)[:k] for _ in range(10)])
    kept = within_capacity(experts, n_experts=4, capacity=capacity)
    taken = [0] * 4
    for slot in range(k):
        for n in range(10):
            i = int(experts[n, slot])
            assert kept[n, slot] == (taken[i] < capacity)
            taken[i] += 1
    counts = expert_counts(experts, n_experts=4)
    assert kept.sum() == counts.clamp(max=capacity).sum()


def test_random_choices_are_dropped_as_often_as_the_binomial_says() -> None:
    n, e, capacity, tries = 256, 8, 36, 400
    g = torch.Generator().manual_seed(0)
    dropped = []
    for _ in range(tries):
        experts = torch.randint(0, e, (n, 1), generator=g)
        dropped.append(1 - within_capacity(experts, n_experts=e, capacity=capacity).double().mean())
    x = range(n + 1)
    kept = sum(min(c, capacity) * binom.pmf(c, n, 1 / e) for c in x) * e / n
    sample = torch.stack(dropped)
    assert abs(sample.mean() - (1 - kept)) < 4 * sample.std() / tries**0.5


# Balance


def test_the_switch_loss_is_what_loops_give() -> None:
    z = draw(N, E)
    experts = softmax_top_k(z, k=2).experts
    total = 0.0
    for i in range(E):
        f = sum(i in row for row in experts.tolist()) / (2 * N)
        total += f * sum(z[n].softmax(0)[i].item() for n in range(N)) / N
    assert_exact(switch_balance_loss(z, experts), E * total)


def test_the_switch_loss_is_one_where_either_share_is_even() -> None:
    even = torch.arange(N)[:, None] % 4
    assert_exact(switch_balance_loss(draw(N, 4), even), 1.0)
    assert_exact(switch_balance_loss(torch.zeros(N, 4).double(), torch.zeros(N, 1).long()), 1.0)


def test_the_switch_loss_can_fall_below_one() -> None:
    p = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]], dtype=torch.float64)
    z = p.log()
    loss = switch_balance_loss(z, softmax_top_k(z, k=1).experts)
    assert_exact(loss, 2 * (2 / 3 * 1.03 / 3 + 1 / 3 * 1.97 / 3))
    assert loss < 0.9


def test_the_switch_loss_is_e_where_all_go_to_one() -> None:
    z = torch.zeros(N, E, dtype=torch.float64)
    z[:, 2] = 50.0
    assert_exact(switch_balance_loss(z, softmax_top_k(z, k=1).experts), E)


def test_its_gradient_pushes_down_what_is_fuller_than_the_token_expects() -> None:
    z = draw(N, E).requires_grad_()
    experts = softmax_top_k(z, k=1).experts
    (grad,) = torch.autograd.grad(switch_balance_loss(z, experts), z)
    f = expert_counts(experts, n_experts=E).double() / N
    p = z.detach().softmax(dim=1)
    assert_exact(grad, E / N * p * (f - (p * f).sum(dim=1, keepdim=True)))


def test_the_z_loss_and_its_gradient_are_those_of_the_partition_function() -> None:
    z = draw(N, E).requires_grad_()
    loss = router_z_loss(z)
    lse = [math.log(sum(math.exp(a) for a in row)) for row in z.tolist()]
    assert_exact(loss, sum(a * a for a in lse) / N)
    (grad,) = torch.autograd.grad(loss, z)
    scale = 2 / N * torch.tensor(lse, dtype=torch.float64)[:, None]
    assert_exact(grad, scale * z.detach().softmax(dim=1))
    assert_exact(router_z_loss(torch.full((N, E), -math.log(E), dtype=torch.float64)), 0.0)


def test_the_sequence_loss_is_what_loops_give() -> None:
    B, T = 3, 6
    z = draw(B, T, E)
    experts = z.topk(2, dim=-1).indices
    for b in range(B):
        total = 0.0
        for i in range(E):
            f = E / (2 * T) * sum(i in row for row in experts[b].tolist())
            s = z[b].sigmoid()
            total += f * sum((s[t, i] / s[t].sum()).item() for t in range(T)) / T
        assert_exact(sequence_balance_loss(z, experts)[b], total)


def test_sequences_of_one_domain_each_are_even_as_a_batch_and_not_alone() -> None:
    experts = torch.arange(4)[:, None, None].expand(4, 6, 1)
    z = 40.0 * F.one_hot(experts[..., 0], 4).double() - 20
    assert_float32(sequence_balance_loss(z, experts), torch.full((4,), 4.0))
    assert_exact(switch_balance_loss(z.flatten(0, 1), experts.flatten(0, 1)), 1.0)


def test_the_bias_moves_by_one_rate_against_the_excess() -> None:
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    after = updated_bias(bias, torch.tensor([10, 6, 5, 3]), rate=0.01)
    assert_exact(after, [0.09, 0.2, 0.31, 0.41])
    assert_exact(bias, [0.1, 0.2, 0.3, 0.4])


def test_the_bias_evens_the_load_of_skewed_tokens() -> None:
    z = draw(4000, 16) + torch.linspace(-1.5, 1.5, 16)
    bias = torch.zeros(16)
    violations = []
    for _ in range(600):
        counts = expert_counts(sigmoid_top_k(z, bias, k=4).experts, n_experts=16)
        violations.append(max_violation(counts))
        bias = updated_bias(bias, counts, rate=0.001)
    assert violations[0] > 1.5
    assert violations[-1] < 0.05


def test_even_choices_by_the_bias_are_the_best_even_assignment() -> None:
    n, e = 64, 4
    s = (draw(n, e) + torch.tensor([1.0, 0.0, 0.0, -1.0])).sigmoid()
    row, column = linear_sum_assignment(s.repeat_interleave(n // e, dim=1).numpy(), maximize=True)
    best = s[row, column // (n // e)].sum()
    bias, chosen = torch.zeros(e, dtype=torch.float64), None
    for t in range(4000):
        experts = sigmoid_top_k(s.logit(), bias, k=1).experts
        counts = expert_counts(experts, n_experts=e)
        dual = (s + bias).max(dim=1).values.sum() - n / e * bias.sum()
        assert dual >= best - 1e-9  # weak duality, whatever the bias
        if (counts == n // e).all():
            chosen = experts
            break
        bias = updated_bias(bias, counts, rate=0.1 / (1 + t) ** 0.6)
    assert chosen is not None
    assert_exact(s.gather(1, chosen).sum(), best)


def test_a_count_is_a_count_and_a_violation_is_relative() -> None:
    experts = torch.tensor([[0, 1], [1, 4], [1, 0]])
    assert expert_counts(experts, n_experts=6).tolist() == [2, 3, 0, 0, 1, 0]
    assert max_violation(torch.tensor([2, 3, 0, 0, 1, 0])) == pytest.approx(2.0)
    assert max_violation(torch.tensor([5, 5, 5])) == 0.0


# The layer


def layer(**settings) -> DeepSeekMoE:
    g = torch.Generator().manual_seed(0)
    return DeepSeekMoE(D, FH, n_experts=E, k=K, generator=g, **settings).double()


def test_the_layer_is_the_sum_of_each_shared_and_each_routed_expert() -> None:
    moe, x = layer(n_shared=2, scale=2.5), draw(N, D)
    y, routing = moe(x)
    gate, up, down = moe.shared
    shared = Experts(
        torch.stack(gate.chunk(2, dim=1)),
        torch.stack(up.chunk(2, dim=1)),
        torch.stack(down.chunk(2, dim=0)),
    )
    routed = mixture_by_loops(x, routing, Experts(*moe.routed))
    both = torch.stack([one_expert(t, shared, 0) + one_expert(t, shared, 1) for t in x])
    assert_exact(y, both + routed)
    assert_exact(routing.gates.sum(dim=1), torch.full((N,), 2.5))


def test_every_weight_of_the_layer_is_counted_and_the_bias_is_no_weight() -> None:
    moe = layer(n_shared=2)
    total, active = moe_parameters(d_model=D, d_hidden=FH, n_experts=E, n_shared=2, k=K)
    assert sum(p.numel() for p in moe.parameters()) == total
    assert total - active == (E - K) * 3 * D * FH
    assert "bias" in moe.state_dict()
    assert "bias" not in dict(moe.named_parameters())


def test_the_layer_uses_its_bias_and_its_groups() -> None:
    moe, x = layer(n_groups=4, k_groups=2), draw(200, D)
    moe.bias[6:] = 5.0
    _, routing = moe(x)
    assert ((routing.experts >= 6).sum(dim=1) == 2).all()
    assert (routing.experts // 2).unique(dim=1).shape[1] <= K
    assert all(len(set(row)) <= 2 for row in (routing.experts // 2).tolist())


def test_all_the_pieces_of_a_split_expert_together_are_the_expert() -> None:
    m, whole, x = 2, weights(), draw(N, D)
    pieces = Experts(
        torch.cat([torch.stack(w.chunk(m, dim=1)) for w in whole.w_gate]),
        torch.cat([torch.stack(w.chunk(m, dim=1)) for w in whole.w_up]),
        torch.cat([torch.stack(w.chunk(m, dim=0)) for w in whole.w_down]),
    )
    routing = softmax_top_k(draw(N, E, seed=5), k=2)
    split = Routing(
        torch.cat([m * routing.experts + j for j in range(m)], dim=1), routing.gates.repeat(1, m)
    )
    assert_exact(mixture(x, split, pieces), mixture(x, routing, whole))
    assert math.comb(16, 2) == 120
    assert math.comb(64, 8) == 4_426_165_368


# Expert parallelism


def spread(R: int, n: int = 6) -> tuple[torch.Tensor, Routing]:
    x = draw(R, n, D)
    routing = softmax_top_k(draw(R * n, E, seed=5), k=K)
    return x, Routing(routing.experts.reshape(R, n, K), routing.gates.reshape(R, n, K))


@pytest.mark.parametrize("R", [1, 2, 4, 8])
def test_experts_spread_over_ranks_give_what_one_process_gives(R) -> None:
    (x, routing), experts = spread(R), weights()
    y, n_bytes = expert_parallel_mixture(x, routing, experts)
    flat = Routing(routing.experts.flatten(0, 1), routing.gates.flatten(0, 1))
    assert_exact(y.flatten(0, 1), mixture(x.flatten(0, 1), flat, experts))
    sent = all_to_all_tokens(routing.experts, n_experts=E, once_per_rank=False)
    assert n_bytes == 2 * (sent.sum() - sent.trace()) * D * 8
    assert (n_bytes == 0) == (R == 1)


@pytest.mark.parametrize("once", [False, True])
def test_vectors_are_counted_as_loops_count_them(once) -> None:
    _, routing = spread(4)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for r in range(4):
        for row in routing.experts[r].tolist():
            to = [i // (E // 4) for i in row]
            for q in set(to) if once else to:
                expected[r, q] += 1
    sent = all_to_all_tokens(routing.experts, n_experts=E, once_per_rank=once)
    assert (sent == expected).all()


def on_one_rank(x, routing, experts):
    """Send tokens to the ranks of their experts and take the answers back, over gloo."""
    r, R = dist.get_rank(), dist.get_world_size()
    per = E // R
    x, chosen, gates = x[r], routing.experts[r].flatten(), routing.gates[r].flatten()
    order = chosen.argsort(stable=True)
    send = torch.bincount(chosen // per, minlength=R)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    there, back = receive.tolist(), send.tolist()
    inbox = x.new_empty(sum(there), D)
    asked = chosen.new_empty(sum(there))
    dist.all_to_all_single(inbox, x[order // K].contiguous(), there, back)
    dist.all_to_all_single(asked, chosen[order], there, back)
    mine = Experts(*(w[r * per : (r + 1) * per] for w in experts))
    ones = torch.ones_like(inbox[:, :1])
    answers = mixture(inbox, Routing(asked[:, None] - r * per, ones), mine)
    home = x.new_empty(len(order), D)
    dist.all_to_all_single(home, answers, back, there)
    return torch.zeros_like(x).index_add(0, order // K, gates[order, None] * home)


def test_processes_that_exchange_tokens_over_gloo_give_the_same() -> None:
    (x, routing), experts = spread(2), weights()
    y, _ = expert_parallel_mixture(x, routing, experts)
    assert_exact(torch.stack(run(on_one_rank, x, routing, experts, world_size=2)), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: softmax_top_k(torch.zeros(1, 4), k=5),
            r"^k is 5 of 4 experts to choose from: 1 <= k <= 4\.$",
        ),
        (
            lambda: sigmoid_top_k(torch.zeros(1, 8), torch.zeros(8), k=5, n_groups=4, k_groups=2),
            r"^k is 5 of 4 experts to choose from: 1 <= k <= 4\.$",
        ),
        (
            lambda: in_best_groups(torch.zeros(1, 8), n_groups=3, k_groups=1),
            r"^8 experts in 3 groups: n_groups must divide E\.$",
        ),
        (
            lambda: in_best_groups(torch.zeros(1, 8), n_groups=4, k_groups=5),
            r"^k_groups is 5 of 4: 1 <= k_groups <= n_groups\.$",
        ),
        (
            lambda: in_best_groups(torch.zeros(1, 8), n_groups=8, k_groups=1),
            r"^best is 2 in groups of 1: 1 <= best <= E / n_groups\.$",
        ),
        (
            lambda: within_capacity(torch.zeros(1, 1).long(), n_experts=1, capacity=0),
            r"^capacity is 0: capacity >= 1\.$",
        ),
        (
            lambda: all_to_all_tokens(torch.zeros(3, 1, 1).long(), n_experts=8, once_per_rank=True),
            r"^8 experts on 3 ranks: the ranks must divide the experts\.$",
        ),
        (
            lambda: expert_parallel_mixture(
                torch.zeros(3, 1, D),
                Routing(torch.zeros(3, 1, 1).long(), torch.ones(3, 1, 1)),
                Experts(*(w.float() for w in weights())),
            ),
            r"^8 experts on 3 ranks: the ranks must divide the experts\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
