import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.utils.flop_counter import FlopCounterMode

from zhizhi.large_models.deepseek_llm import (
    DATA_SCALE,
    MODEL_SCALE,
    PowerLaw,
    advised,
    fit_power_law,
    flops_per_token,
    isoflop_law,
    isoflop_minimum,
)
from zhizhi.large_models.llama import Llama, LlamaConfig, chinchilla_loss
from zhizhi.large_models.transformer_decoder import next_token_loss


def test_the_formula_counts_what_the_model_does():
    D, L, T, V = 96, 2, 64, 128
    model = Llama(LlamaConfig(V, D, 8 * D // 3, L, 4, 4))
    ids = torch.randint(V, (1, T))
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model(ids), ids).backward()
    assert (
        counter.get_total_flops() / T == flops_per_token(n_layers=L, width=D, length=T) + 6 * V * D
    )


def test_six_n_misses_what_attention_costs():
    """With T = D the weights alone are six sevenths (eq:deepseek-llm-flops)."""
    M = flops_per_token(n_layers=32, width=4096, length=4096)
    assert pytest.approx(6 / 7) == 72 * 32 * 4096**2 / M


@pytest.mark.parametrize(
    ("M", "batch", "rate"),
    [
        (flops_per_token(n_layers=30, width=4096, length=4096), 2304 * 4096, 4.2e-4),
        (6 * 65.74e9 + 12 * 95 * 8192 * 4096, 4608 * 4096, 3.2e-4),
    ],
)
def test_both_released_models_follow_the_laws(M, batch, rate):
    run = advised(M * 2e12)
    assert run.batch_tokens == pytest.approx(batch, rel=0.05)
    assert run.learning_rate == pytest.approx(rate, rel=0.02)


def test_model_and_data_multiply_to_the_budget():
    assert MODEL_SCALE.exponent + DATA_SCALE.exponent == pytest.approx(1.0)
    for C in (1e18, 1e21, 1e24):
        run = advised(C)
        assert run.flops_per_token * run.tokens == pytest.approx(C, rel=2e-4)


def test_two_trillion_for_seven_billion_is_more_than_the_law_advises():
    M = flops_per_token(n_layers=30, width=4096, length=4096)
    run = advised(M * 2e12)
    assert 2e12 / run.tokens == pytest.approx(4.3, abs=0.05)
    assert run.flops_per_token / M == pytest.approx(4.3, abs=0.05)


def test_a_line_in_logarithms_is_found_and_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 100, 20)
    y = 3 * x**-0.7 * np.exp(rng.normal(0, 0.1, 20))
    law = fit_power_law(x.tolist(), y.tolist())
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert law.exponent == pytest.approx(slope)
    assert law.coefficient == pytest.approx(math.exp(intercept))
    assert PowerLaw(3.0, -0.7)(10.0) == pytest.approx(3 * 10**-0.7)


def test_a_parabola_gives_its_vertex():
    for best in (2.0, 7.5):
        sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
        losses = [(math.log(s) - math.log(best)) ** 2 + 3 for s in sizes]
        assert isoflop_minimum(sizes, losses) == pytest.approx(best)


def test_profiles_of_a_known_law_give_its_exponent():
    law = isoflop_law(chinchilla_loss, [1e19, 1e20, 1e21, 1e22])
    assert law.exponent == pytest.approx(0.28 / 0.62, abs=0.005)
    for C in (1e19, 1e22):
        exact = minimize_scalar(
            lambda s, C=C: chinchilla_loss(math.exp(s), C / math.exp(s)),
            bounds=(10, 35),
            method="bounded",
        )
        assert law(C) == pytest.approx(math.exp(exact.x), rel=0.05)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="compute is 0"):
        advised(0.0)
    for x, y in (
        ([1.0], [1.0]),
        ([1.0, 1.0], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, -1.0]),
        ([1.0, 2.0], [1.0]),
    ):
        with pytest.raises(ValueError, match="two different x"):
            fit_power_law(x, y)
    for losses in ([1.0, 2.0, 3.0], [1.0, 2.0, 1.0]):
        with pytest.raises(ValueError, match="no minimum between"):
            isoflop_minimum([1.0, 2.0, 4.0], losses)
