import itertools
import math

import pytest
import torch
from tests.closeness import EXACT, assert_exact, assert_float32

from zhizhi.large_models.seed_thinking_v1_5 import (
    batch_makespan,
    clip_higher_surrogate,
    informative_groups,
    length_adaptive_lambda,
    make_sudoku,
    pairwise_preference,
    soft_overlong_penalty,
    solve_24,
    verify_24,
    verify_sudoku,
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


@pytest.mark.parametrize("n_blank", [0, 1, 8, 16])
def test_a_sudoku_has_its_blanks_and_its_solution(n_blank):
    g = torch.Generator().manual_seed(n_blank)
    for _ in range(20):
        puzzle, solution = make_sudoku(n_blank=n_blank, generator=g)
        assert int((puzzle == 0).sum()) == n_blank
        assert torch.equal(solution[puzzle > 0], puzzle[puzzle > 0])
        cells = solution.tolist()
        groups = [*cells, *map(list, zip(*cells, strict=True))]
        for y, x in ((0, 0), (0, 2), (2, 0), (2, 2)):
            groups.append([cells[y + i][x + j] for i in (0, 1) for j in (0, 1)])
        assert all(sorted(group) == [1, 2, 3, 4] for group in groups)
        assert verify_sudoku(solution, puzzle)


def test_sudokus_differ():
    g = torch.Generator().manual_seed(0)
    drawn = {tuple(make_sudoku(n_blank=0, generator=g)[1].flatten().tolist()) for _ in range(200)}
    assert len(drawn) > 60


def test_each_rule_of_a_sudoku_is_checked_alone():
    free = torch.zeros(4, 4, dtype=torch.long)
    rows = torch.tensor([[1, 2, 3, 4]] * 4)  # rows right, columns and boxes wrong
    latin = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]])  # boxes wrong
    boxes = torch.tensor([[1, 2, 1, 2], [3, 4, 3, 4], [1, 2, 1, 2], [3, 4, 3, 4]])  # boxes right
    stripes = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2]] * 2)  # rows and boxes right, columns wrong
    good = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])
    for wrong in (rows, rows.T, latin, boxes, stripes, stripes.T, 2 * good, good - 1):
        assert not verify_sudoku(wrong.contiguous(), free)
    assert verify_sudoku(good, free)
    clue = free.clone()
    clue[0, 0] = 2
    assert not verify_sudoku(good, clue)
    with pytest.raises(ValueError, match="n_blank is 17"):
        make_sudoku(n_blank=17)


def test_a_liking_for_the_place_drops_out():
    g = torch.Generator().manual_seed(3)
    true, place = torch.randn(2, 50, generator=g, dtype=torch.float64)
    preference = pairwise_preference(true + place, -true + place)
    assert_exact(preference, torch.sigmoid(true))
    assert_exact(pairwise_preference(-true + place, true + place), 1 - preference)


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
        clip_higher_surrogate(logp, old, advantages, epsilon_low=0.2, epsilon_high=0.2),
        clipped_surrogate(logp, old, advantages, epsilon=0.2),
    )


@pytest.mark.parametrize(("ratio", "sign", "moves"), [
    (1.25, 1.0, True), (1.29, 1.0, False), (0.5, 1.0, True),
    (0.79, -1.0, False), (0.81, -1.0, True), (2.0, -1.0, True),
])  # fmt: skip
def test_where_the_gradient_stops(ratio, sign, moves):
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    clip_higher_surrogate(logp, torch.zeros(1).double(), torch.tensor([sign]).double()).backward()
    assert logp.grad is not None
    wanted = torch.tensor([ratio * sign if moves else 0.0], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, wanted, **EXACT)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.0, 0.2), (0.2, 0.0)])
def test_limits_out_of_range(low, high):
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="0 < epsilon_low < 1 and epsilon_high > 0"):
        clip_higher_surrogate(one, one, one, epsilon_low=low, epsilon_high=high)


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
    assert soft_overlong_penalty(lengths[:22], max_length=20, cache=1).tolist()[19:] == [0, -1, -1]
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
