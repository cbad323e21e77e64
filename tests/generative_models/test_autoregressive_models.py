"""Autoregressive models: loops, sums over all states, and what each output reads by autograd."""

import math
from itertools import product

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.generative_models.autoregressive_models import (
    MADE,
    MaskedConv2d,
    PixelCNN,
    ancestral_sample,
    bernoulli_log_likelihood,
    binary_states,
    bits_per_dim,
    complete,
    fvsbn_logits,
    made_masks,
    nade_logits,
    pixel_cnn_mask,
)

ORDERS = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 3, 5, 1, 4]]  # the last: not its inverse


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def sigma(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def pixel_cnn(width: int, *, n_layers: int = 2) -> PixelCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PixelCNN(width, n_channels=4, n_layers=n_layers).double()


def reads(model, n: int) -> torch.Tensor:
    """Return [i, j]: does logit i read bit j, at any of some random points?"""
    found = torch.zeros(n, n, dtype=torch.bool)
    for seed in range(10):
        x = torch.randn(n, generator=seeded(seed), dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
        found |= jacobian != 0
    return found


def test_all_states_are_there_once_in_counting_order() -> None:
    assert binary_states(5).tolist() == [[float(b) for b in s] for s in product((0, 1), repeat=5)]


def test_a_likelihood_is_a_product_of_coin_tosses() -> None:
    logits = draw(4, 3)
    x = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.float64)
    expected = []
    for a, row in zip(logits.tolist(), x.tolist(), strict=True):
        heads = [sigma(v) for v in a]
        tosses = [p if bit else 1 - p for p, bit in zip(heads, row, strict=True)]
        expected.append(math.log(math.prod(tosses)))
    assert_exact(bernoulli_log_likelihood(logits, x), expected)


def test_a_likelihood_stays_finite_where_a_probability_rounds_to_zero() -> None:
    x = torch.tensor([[1.0, 0.0]])
    assert_float32(bernoulli_log_likelihood(torch.tensor([[-200.0, 200.0]]), x), -400 * x[:, 0])


def test_fair_bits_cost_one_bit_each_and_bits_are_nats_over_log_two() -> None:
    x = binary_states(7)
    fair = bernoulli_log_likelihood(torch.zeros_like(x), x)
    assert_exact(bits_per_dim(fair, n_dims=7), torch.ones(128))
    nats = torch.tensor([-17.95], dtype=torch.float64)
    assert_exact(bits_per_dim(nats, n_dims=64), [17.95 / 64 / math.log(2)])


def models() -> dict:
    """Return one random model of each kind, of six bits (nine for images)."""
    weight, bias = draw(6, 6), draw(6, seed=1)
    W, V, b, c = draw(4, 6), draw(6, 4, seed=1), draw(6, seed=2), draw(4, seed=3)
    return {
        "FVSBN": (6, lambda x: fvsbn_logits(x, weight, bias)),
        "NADE": (6, lambda x: nade_logits(x, W, V, b, c)),
        **{
            f"MADE {order} {hidden}": (6, MADE(order, hidden, generator=seeded()).double())
            for order in ORDERS
            for hidden in ([], [16], [16, 12])
        },
        "PixelCNN": (9, pixel_cnn(3)),
    }


@pytest.mark.parametrize("name", models())
def test_the_probabilities_of_all_states_sum_to_one(name: str) -> None:
    n, model = models()[name]
    states = binary_states(n)
    p = bernoulli_log_likelihood(model(states), states).exp()
    assert_exact(p.sum(), 1.0)
    assert p.std() > 1e-4  # and is not uniform


def test_a_model_that_reads_its_own_bit_does_not_sum_to_one() -> None:
    states, weight = binary_states(6), draw(6, 6)
    p = bernoulli_log_likelihood(states @ weight.tril(0).T, states).exp()
    assert abs(p.sum() - 1) > 0.1


def test_an_fvsbn_is_a_logistic_regression_of_each_bit_on_those_before() -> None:
    x, weight, bias = draw(3, 5), draw(5, 5, seed=1), draw(5, seed=2)
    expected = [
        [bias[i] + sum(weight[i, j] * row[j] for j in range(i)) for i in range(5)] for row in x
    ]
    assert_exact(fvsbn_logits(x, weight, bias), expected)


def test_the_recursion_of_nade_is_the_sum_over_all_bits_before() -> None:
    x, W, V = draw(3, 5), draw(4, 5, seed=1), draw(5, 4, seed=2)
    b, c = draw(5, seed=3), draw(4, seed=4)
    expected = [
        [
            b[i]
            + sum(
                V[i, k] * sigma(float(c[k] + sum(W[k, j] * row[j] for j in range(i))))
                for k in range(4)
            )
            for i in range(5)
        ]
        for row in x
    ]
    assert_exact(nade_logits(x, W, V, b, c), expected)


def test_the_last_column_of_nade_is_never_used() -> None:
    x, W, V = draw(3, 5), draw(4, 5, seed=1), draw(5, 4, seed=2)
    b, c = draw(5, seed=3), draw(4, seed=4)
    other = W.clone()
    other[:, -1] += 1
    assert_exact(nade_logits(x, other, V, b, c), nade_logits(x, W, V, b, c))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("hidden", [[], [64], [64, 64]], ids=str)
def test_outputs_of_made_read_all_bits_before_in_its_order_and_no_others(order, hidden) -> None:
    made = MADE(order, hidden, generator=seeded()).double()
    place = [order.index(i) for i in range(6)]
    expected = [[place[j] < place[i] for j in range(6)] for i in range(6)]
    assert reads(made, 6).tolist() == expected


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_hidden_unit_reads_a_beginning_of_the_order(order) -> None:
    first, second, _ = made_masks(order, [30, 30], generator=seeded())
    beginnings = [[float(i in order[:k]) for i in range(6)] for k in range(1, 6)]
    assert all(row in beginnings for row in first.tolist())
    assert all(row in beginnings for row in (second @ first).clamp(max=1).tolist())
    assert {sum(row) for row in first.tolist()} == {1, 2, 3, 4, 5}  # all of them are drawn


def test_no_unit_of_a_deeper_layer_is_cut_off() -> None:
    for seed in range(50):
        masks = made_masks(range(6), [2, 3, 2], generator=seeded(seed))
        assert all((mask.sum(dim=1) > 0).all() for mask in masks[:-1])


def test_made_without_hidden_layers_is_an_fvsbn() -> None:
    made = MADE(range(6), [], generator=seeded()).double()
    x = draw(4, 6)
    assert_exact(made(x), fvsbn_logits(x, made.weights[0].detach(), made.biases[0].detach()))


def best_divergence(logits_fn, parameters, p, states) -> float:
    """Return the least KL(p || model) that L-BFGS finds."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def divergence():
        return (p * (p.log() - bernoulli_log_likelihood(logits_fn(states), states))).sum()

    def closure():
        optimizer.zero_grad()
        value = divergence()
        value.backward()
        return value

    optimizer.step(closure)
    return divergence().item()


def best_fvsbn(p, states) -> float:
    n = states.shape[1]
    weight = torch.zeros(n, n, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    return best_divergence(lambda x: fvsbn_logits(x, weight, bias), [weight, bias], p, states)


def test_the_best_fvsbn_misses_a_parity_by_log_two_and_made_does_not() -> None:
    states = binary_states(3)
    states = states[states.sum(dim=1) % 2 == 0]
    p = torch.full((4,), 0.25, dtype=torch.float64)
    assert best_fvsbn(p, states) == pytest.approx(math.log(2), abs=1e-9)
    made = MADE(range(3), [16], generator=seeded()).double()
    assert best_divergence(made, list(made.parameters()), p, states) < 1e-2


def test_an_fvsbn_has_an_exclusive_or_after_a_conjunction_and_not_before_it() -> None:
    a, b = binary_states(2).T
    p = torch.full((4,), 0.25, dtype=torch.float64)
    before = torch.stack([a, b, (a + b) % 2, a * b], dim=1)
    assert best_fvsbn(p, before) == pytest.approx(math.log(2), abs=1e-3)  # the AND: in the limit
    assert best_fvsbn(p, before[:, [0, 1, 3, 2]]) < 1e-3


def test_an_fvsbn_is_found_again_from_its_own_distribution() -> None:
    states = binary_states(4)
    weight, bias = draw(4, 4, seed=3), draw(4, seed=4)
    p = bernoulli_log_likelihood(fvsbn_logits(states, weight, bias), states).exp()
    assert best_fvsbn(p, states) == pytest.approx(0, abs=1e-7)  # L-BFGS stops short of zero


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_pixel_mask_keeps_what_comes_before_the_centre_in_reading(k: int) -> None:
    c = k // 2
    for kind in ("A", "B"):
        expected = [
            [float((y, x) < (c, c) or (kind == "B" and (y, x) == (c, c))) for x in range(k)]
            for y in range(k)
        ]
        assert pixel_cnn_mask(k, kind=kind).tolist() == expected


def test_a_masked_convolution_is_a_sum_over_kept_neighbours() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = MaskedConv2d(2, 3, kernel_size=3, kind="A").double()
    assert conv.bias is not None
    image = draw(1, 2, 4, 5)
    out = conv(image)
    before = [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
    for o, y, x in product(range(3), range(4), range(5)):
        total = conv.bias[o].item()
        for dy, dx in before:
            if 0 <= y + dy < 4 and 0 <= x + dx < 5:
                total += sum(
                    (conv.weight[o, i, dy + 1, dx + 1] * image[0, i, y + dy, x + dx]).item()
                    for i in range(2)
                )
        assert out[0, o, y, x].item() == pytest.approx(total, abs=1e-10)


def test_a_pixel_cnn_reads_no_pixel_from_its_own_on() -> None:
    found = reads(pixel_cnn(5), 25)
    assert found.triu().sum() == 0
    assert found.tril(-1).sum() > 100


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_the_blind_spot_is_a_quarter_of_what_could_be_seen_times_l_less_one_over_l_plus_one(
    n_layers: int,
) -> None:
    L, side = n_layers, 2 * n_layers + 3
    kinds = ["A"] + ["B"] * (L - 1)
    x = torch.zeros(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    h = x
    for kind in kinds:
        layer = MaskedConv2d(1, 1, kernel_size=3, kind=kind).double()
        torch.nn.init.ones_(layer.weight)
        h = layer(h)
    h[0, 0, L + 1, L + 1].backward()
    assert x.grad is not None
    seen = int(x.grad.count_nonzero())
    could = L * (2 * L + 1) + L
    assert (could - seen) / could == pytest.approx((L - 1) / (4 * (L + 1)))


def test_samples_come_as_often_as_their_probability_says() -> None:
    order = [2, 0, 3, 1]
    made = MADE(order, [12], generator=seeded())
    for weight in made.weights:
        weight.data *= 3
    states = binary_states(4)
    p = bernoulli_log_likelihood(made.double()(states), states).exp().detach()
    made.float()
    n = 20_000
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0])

    def frequency(order):
        x = ancestral_sample(made, n, 4, order=order, generator=seeded(1))
        return torch.bincount((x @ weights).long(), minlength=16) / n

    bound = 4 * (p * (1 - p) / n).sqrt()
    assert ((frequency(order) - p).abs() < bound).all()
    assert ((frequency([0, 1, 2, 3]) - p).abs() > bound).any()  # in the wrong order they do not


def test_completions_keep_what_is_known_and_follow_the_conditional() -> None:
    order, n = [1, 2, 0], 20_000
    made = MADE(order, [12], generator=seeded(2))
    for weight in made.weights:
        weight.data *= 3
    states = binary_states(3)
    joint = bernoulli_log_likelihood(made.double()(states), states).exp().detach()
    made.float()
    known = torch.tensor([0.0, 1.0, 0.0]).expand(n, -1)  # only bit 1 is known
    x = complete(made, known, n_known=1, order=order, generator=seeded(3))
    assert (x[:, 1] == 1).all()
    given = states[:, 1] == 1
    p = joint[given] / joint[given].sum()
    seen = torch.stack([(x == s).all(dim=1).float().mean() for s in states[given]])
    assert ((seen - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_unknown_bits_are_not_read_and_the_input_stays() -> None:
    made = MADE(range(6), [16], generator=seeded())
    x = torch.zeros(5, 6)
    other = torch.full((5, 6), 9.0)
    other[:, :3] = 0
    first = complete(made, x, n_known=3, generator=seeded(1))
    assert first.equal(complete(made, other, n_known=3, generator=seeded(1)))
    assert x.equal(torch.zeros(5, 6))
    assert not first.requires_grad


def test_sampling_costs_one_pass_a_bit_and_a_density_one() -> None:
    calls = []

    def counted(x):
        calls.append(len(x))
        return torch.zeros_like(x)

    ancestral_sample(counted, 3, 7)
    assert calls == [3] * 7
    complete(counted, torch.zeros(2, 7), n_known=7)
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_states(0), r"^n is 0: 1 <= n <= 20, for there are 2\^n states\.$"),
        (lambda: binary_states(21), r"^n is 21: 1 <= n <= 20"),
        (
            lambda: bernoulli_log_likelihood(torch.zeros(1, 2), torch.tensor([[1.0, 0.5]])),
            r"^x holds 0\.5: every entry is 0 or 1\.$",
        ),
        (lambda: bits_per_dim(torch.zeros(1), n_dims=0), r"^n_dims is 0: n_dims >= 1\.$"),
        (
            lambda: made_masks([0, 2], [4]),
            r"^order is \[0, 2\]: a permutation of 0\.\.n-1, n >= 2\.$",
        ),
        (lambda: made_masks([0], [4]), r"^order is \[0\]: a permutation of 0\.\.n-1, n >= 2\.$"),
        (
            lambda: pixel_cnn_mask(4, kind="A"),
            r"^kernel_size is 4: odd, for a kernel needs a centre\.$",
        ),
        (
            lambda: pixel_cnn_mask(-1, kind="A"),
            r"^kernel_size is -1: odd, for a kernel needs a centre\.$",
        ),
        (lambda: pixel_cnn_mask(3, kind="C"), r"^kind is 'C': 'A' or 'B'\.$"),
        (
            lambda: complete(torch.zeros_like, torch.zeros(1, 2), n_known=0, order=[0, 0]),
            r"^order is \[0, 0\]: a permutation of 0\.\.1\.$",
        ),
        (
            lambda: complete(torch.zeros_like, torch.zeros(1, 2), n_known=3),
            r"^n_known is 3 of 2 bits: 0 <= n_known <= 2\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
