import itertools
import math

import pytest
import torch
from tests.closeness import EXACT, assert_exact, assert_float32

from zhizhi.large_models.seed_thinking_v1_5 import (
    asymmetric_surrogate,
    batch_makespan,
    informative_groups,
    length_adaptive_lambda,
    soft_overlong_penalty,
    solve_24,
    verify_24,
)
from zhizhi.reinforcement_learning.ppo import clipped_surrogate, gae


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("8/(3-8/3)", True),
        (" (8) / (3 - 8 / 3) ", True),
        ("24", False),  # no number of the puzzle
        ("3*8", False),  # two numbers left
        ("3*8+3-3", False),  # a number twice
        ("3*8*(8-3-4)", False),
        ("3**3-3", False),
        ("__import__('os').getpid()", False),
        ("8/(3-3)", False),
        ("8 x 3", False),
        ("8.0/(3-8/3)", False),
        ("True+8+8+8", False),
        ("-8/(8/3-3)", False),
        ("(" * 5000 + "8", False),
        ("", False),
    ],
)
def test_an_expression_must_use_each_number_once(expression, right):
    assert verify_24(expression, [3, 3, 8, 8]) is right


def test_every_solution_is_verified():
    solvable = 0
    for numbers in itertools.combinations_with_replacement(range(1, 10), 4):
        if math.prod(numbers) % 7:  # those with a seven; all of them take long
            continue
        found = solve_24(numbers)
        if found is not None:
            solvable += 1
            assert verify_24(found, numbers)
            assert not verify_24(found + "+0", numbers)
    assert solvable > 100
    assert solve_24([1, 1, 1, 1]) is None
    assert solve_24([7, 7, 7, 7]) is None


def test_the_weights_of_an_answer_add_up_to_a_share_of_its_length():
    for length in (100, 1000, 10_000):
        lam = length_adaptive_lambda(torch.tensor(length)).double()
        total = (lam ** torch.arange(200_000)).sum().item()
        assert total == pytest.approx(0.05 * length, rel=1e-3)
        # What the last reward weighs at the first token hardly depends on the length.
        assert length == 100 or lam.item() ** length == pytest.approx(math.exp(-20), rel=0.25)


def test_lambda_of_short_answers_is_zero_and_not_negative():
    lam = length_adaptive_lambda(torch.arange(1, 41))
    assert (lam[:20] == 0).all()
    assert (lam[20:] > 0).all()
    with pytest.raises(ValueError, match="alpha > 0, length >= 1"):
        length_adaptive_lambda(torch.tensor([0]))
    with pytest.raises(ValueError, match="alpha > 0, length >= 1"):
        length_adaptive_lambda(torch.tensor([5]), alpha=0.0)


def test_a_critic_with_lambda_one_is_taught_the_return_whatever_it_believes():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=g, dtype=torch.float64)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    end, no = torch.arange(7).expand(3, 7) == 6, torch.zeros(3, 7, dtype=torch.bool)
    target = gae(rewards, values, after, end, no, discount=1.0, lam=1.0) + values
    assert_exact(target, rewards.flip(1).cumsum(1).flip(1))
    biased = gae(rewards, values, after, end, no, discount=1.0, lam=0.95) + values
    assert (biased - target).abs().max() > 1e-2


def test_equal_limits_are_the_clip_of_ppo():
    g = torch.Generator().manual_seed(1)
    logp, old, advantages = torch.randn(3, 100, generator=g)
    assert_float32(
        asymmetric_surrogate(logp, old, advantages, low=0.2, high=0.2),
        clipped_surrogate(logp, old, advantages, epsilon=0.2),
    )


@pytest.mark.parametrize(("ratio", "sign", "moves"), [
    (1.25, 1.0, True), (1.29, 1.0, False), (0.5, 1.0, True),
    (0.79, -1.0, False), (0.81, -1.0, True), (2.0, -1.0, True),
])  # fmt: skip
def test_where_the_gradient_stops(ratio, sign, moves):
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    asymmetric_surrogate(logp, torch.zeros(1).double(), torch.tensor([sign]).double()).backward()
    assert logp.grad is not None
    wanted = torch.tensor([ratio * sign if moves else 0.0], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, wanted, **EXACT)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.0, 0.2), (0.2, 0.0)])
def test_limits_out_of_range(low, high):
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="0 < low < 1 and high > 0"):
        asymmetric_surrogate(one, one, one, low=low, high=high)


def test_groups_without_gradient_are_as_many_as_the_formula_says():
    G = 4
    rows = torch.tensor(list(itertools.product([False, True], repeat=G)))
    for p in (0.1, 0.5, 0.9):
        weight = (torch.where(rows, p, 1 - p)).double().prod(dim=1)
        dead = weight[~informative_groups(rows)].sum()
        assert dead.item() == pytest.approx(p**G + (1 - p) ** G, abs=1e-6)


def test_the_penalty_is_a_ramp():
    lengths = torch.arange(0, 40)
    slow = [0.0 if n <= 16 else (16 - n) / 4 if n <= 20 else -1.0 for n in range(40)]
    assert soft_overlong_penalty(lengths, max_length=20, cache=4).tolist() == slow
    for cache in (0, 21):
        with pytest.raises(ValueError, match="0 < cache <= max_length"):
            soft_overlong_penalty(lengths, max_length=20, cache=cache)


def test_a_stream_is_never_slower_and_never_faster_than_the_work_allows():
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        times = torch.rand(24, generator=g).exp().tolist()
        locked = batch_makespan(times, workers=8, stream=False)
        stream = batch_makespan(times, workers=8, stream=True)
        assert max(max(times), sum(times) / 8) - 1e-9 <= stream <= locked + 1e-9
    assert batch_makespan([], workers=1, stream=True) == 0.0
    with pytest.raises(ValueError, match="workers is 0"):
        batch_makespan([1.0], workers=0, stream=True)
