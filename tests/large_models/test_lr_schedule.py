import itertools

import pytest
from tests.closeness import assert_exact

from zhizhi.large_models.lr_schedule import cosine_with_warmup, multi_step


def test_the_rate_rises_straight_and_falls_to_the_floor():
    rates = [cosine_with_warmup(s, n_steps=100, n_warmup=20, floor=0.1) for s in range(101)]
    assert_exact(rates[:21], [s / 20 for s in range(21)])
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert_exact(rates[60], 0.55)  # halfway between peak and floor
    assert_exact(rates[100], 0.1)


def test_the_fall_is_symmetric_about_its_middle():
    for s in range(41):
        pair = [cosine_with_warmup(x, n_steps=100, n_warmup=20) for x in (60 - s, 60 + s)]
        assert_exact(sum(pair), 1.1)


def test_after_the_run_the_floor_is_kept_and_no_warm_up_begins_at_the_peak():
    assert cosine_with_warmup(500, n_steps=100, n_warmup=20) == pytest.approx(0.1)
    assert cosine_with_warmup(0, n_steps=10, n_warmup=0) == 1.0
    assert cosine_with_warmup(10, n_steps=10, n_warmup=0, floor=0.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("step", "how", "message"),
    [
        (0, {"n_steps": 10, "n_warmup": 10}, "n_warmup is 10 of 10 steps"),
        (0, {"n_steps": 10, "n_warmup": -1}, "n_warmup is -1"),
        (-1, {"n_steps": 10, "n_warmup": 1}, "step is -1"),
        (0, {"n_steps": 10, "n_warmup": 1, "floor": 1.5}, "floor 1.5"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(step, how, message):
    with pytest.raises(ValueError, match=message):
        cosine_with_warmup(step, **how)


def test_steps_stay_and_fall_where_they_should():
    rates = [multi_step(s, n_steps=1000, n_warmup=100) for s in range(1000)]
    assert_exact(rates[:101], [s / 100 for s in range(101)])
    assert set(rates[100:800]) == {1.0}
    assert set(rates[800:900]) == {0.316}
    assert set(rates[900:]) == {0.1}
    assert pytest.approx(10**-0.5, abs=1e-3) == 0.316


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = ([multi_step(s, n_steps=n, n_warmup=10) for s in range(80)] for n in (100, 300))
    assert short == long


@pytest.mark.parametrize(
    ("step", "how", "message"),
    [
        (0, {"milestones": (0.9, 0.8)}, "one each, ascending"),
        (0, {"milestones": (0.5,)}, "one each, ascending"),
        (0, {"n_warmup": 80}, "n_warmup 80"),
        (-1, {}, "step is -1"),
    ],
)
def test_steps_that_make_no_sense_are_refused(step, how, message):
    with pytest.raises(ValueError, match=message):
        multi_step(step, **({"n_steps": 100, "n_warmup": 10} | how))
