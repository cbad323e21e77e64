import itertools

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.large_models.deepseek_r1 import (
    accuracy_reward,
    chinese_share,
    format_reward,
    majority_vote,
    pass_at_k,
    token_weights,
)
from zhizhi.reinforcement_learning.ppo import group_advantages, grpo_loss

GOOD = "<think>\n3 + 4\n</think>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1.0),
        (f"  {GOOD}\n", 1.0),
        (GOOD + " so 7", 0.0),
        ("Sure. " + GOOD, 0.0),
        ("<answer>7</answer><think>x</think>", 0.0),
        ("<think>a</think><think>b</think><answer>7</answer>", 0.0),
        ("<think>a<answer>7</answer></think>", 0.0),
        ("<think></think><answer></answer>", 1.0),
        ("7", 0.0),
    ],
)
def test_the_format_is_a_thought_and_then_an_answer(text, reward):
    assert format_reward(text) == reward


@pytest.mark.parametrize(
    ("answer", "solution", "reward"),
    [("7", "7", 1.0), (" 7.00 ", "7", 1.0), ("7.1", "7", 0.0), ("B", "B", 1.0), ("b", "B", 0.0)],
)
def test_an_answer_is_right_as_a_text_or_as_a_number(answer, solution, reward):
    assert accuracy_reward(f"<think>x</think><answer>{answer}</answer>", solution) == reward


def test_many_answers_are_none():
    assert accuracy_reward("<answer>6</answer><answer>7</answer>", "7") == 0.0
    assert accuracy_reward("7", "7") == 0.0


def test_languages_are_counted_by_words():
    assert chinese_share("先算 first 再算") == 4 / 5
    assert chinese_share("let us see") == 0.0
    assert chinese_share("") == 0.0


def test_pass_at_k_is_the_share_of_all_choices():
    for n in range(1, 7):
        for c in range(n + 1):
            answers = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                choices = list(itertools.combinations(answers, k))
                assert pass_at_k(n, c, k=k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased_and_the_plain_power_is_not():
    p, n, k = 0.3, 6, 3
    truth = 1 - (1 - p) ** k
    binomial = [
        torch.distributions.Binomial(n, p).log_prob(torch.tensor(float(c))).exp()
        for c in range(n + 1)
    ]
    expected = sum(w * pass_at_k(n, c, k=k) for c, w in enumerate(binomial))
    naive = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(binomial))
    assert expected == pytest.approx(truth, abs=1e-6)
    assert abs(naive - truth) > 0.02


def test_the_commonest_answer_wins_and_the_first_of_equals():
    assert majority_vote(["b", "a", "a"]) == "a"
    assert majority_vote(["b", "a", "a", "b"]) == "b"


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def test_weights_are_those_of_the_formulas():
    grpo = token_weights(MASK, aggregation="grpo")
    assert_float32(grpo.sum(dim=1), torch.full((3,), 1 / 3))
    assert_float32(grpo[1, :2], torch.full((2,), 1 / 6))
    dapo = token_weights(MASK, aggregation="dapo")
    assert_float32(dapo[MASK], torch.full((7,), 1 / 7))
    constant = token_weights(MASK, aggregation="dr_grpo", max_length=10)
    assert_float32(constant[MASK], torch.full((7,), 1 / 30))
    for weights in (grpo, dapo, constant):
        assert not weights[~MASK].any()


def test_the_first_are_those_of_the_grpo_loss():
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(3, 4, generator=g).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 2.0])
    grpo_loss(logp, logp.detach(), logp.detach(), advantages, MASK, beta=0.0).backward()
    assert_float32(logp.grad, -token_weights(MASK, aggregation="grpo") * advantages[:, None])


def test_long_wrong_answers_are_punished_less_by_the_token():
    advantages = torch.tensor([-1.0, -1.0, 2.0])[:, None]
    push = token_weights(MASK, aggregation="grpo") * advantages
    assert push[0, 0].abs() < push[1, 0].abs()  # four tokens against two
    even = token_weights(MASK, aggregation="dapo") * advantages
    assert even[0, 0] == even[1, 0]


def test_a_baseline_of_the_group_shrinks_the_gradient_by_one_part():
    """E[(R_i - mean R) s_i] = (1 - 1/G) E[R_i s_i], enumerated (eq:r1-baseline)."""
    p, G = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 3
    reward = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    score = torch.eye(3, dtype=torch.float64) - p  # of softmax logits
    true = (p[:, None] * reward[:, None] * score).sum(dim=0)
    got = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=G):
        weight = p[list(draws)].prod()
        r = reward[list(draws)]
        got += weight * ((r - r.mean())[:, None] * score[list(draws)]).mean(dim=0)
    assert_exact(got, (1 - 1 / G) * true)


def test_dividing_by_the_deviation_lifts_rare_success():
    rare, even = torch.zeros(16), torch.zeros(16)
    rare[0], even[:8] = 1.0, 1.0
    assert group_advantages(rare).max() > 3 > 1.1 > group_advantages(even).max() > 0.9


def test_what_makes_no_sense_is_refused():
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="0 <= c <= n and 1 <= k <= n"):
            pass_at_k(n, c, k=k)
    with pytest.raises(ValueError, match="no answer"):
        majority_vote([])
    with pytest.raises(ValueError, match="aggregation is 'mean'"):
        token_weights(MASK, aggregation="mean")
    with pytest.raises(ValueError, match="shortest answer has 0"):
        token_weights(torch.zeros(1, 2, dtype=torch.bool), aggregation="grpo")
