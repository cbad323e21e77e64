"""Ensembles: identities to the last digit, the bound of AdaBoost, what leaks and what does not."""

import math
from itertools import product

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import KFold
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from zhizhi.deep_learning.ensemble_learning import (
    adaboost,
    ambiguity,
    bag,
    boosted_scores,
    boosted_values,
    bootstrap_samples,
    gradient_boost,
    majority_correct,
    mean_proba,
    out_of_bag_proba,
    out_of_fold_proba,
)


def stump(_: int) -> DecisionTreeClassifier:
    return DecisionTreeClassifier(max_depth=1, random_state=0)


def squared(y: np.ndarray, f: np.ndarray) -> np.ndarray:
    return y - f


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (3, 0.7), (4, 0.6), (9, 0.45)])
def test_a_majority_is_right_as_often_as_counting_says(n: int, p: float) -> None:
    expected = sum(
        p ** sum(votes) * (1 - p) ** (n - sum(votes))
        for votes in product((0, 1), repeat=n)
        if sum(votes) > n / 2
    )
    assert majority_correct(n, p) == pytest.approx(expected, abs=1e-12)


def test_a_majority_gains_above_one_half_and_loses_below_it() -> None:
    above = [majority_correct(n, 0.6) for n in (1, 3, 11, 101)]
    below = [majority_correct(n, 0.4) for n in (1, 3, 11, 101)]
    assert above == sorted(above)
    assert below == sorted(below, reverse=True)
    assert [round(x, 3) for x in above[1:]] == [0.648, 0.753, 0.979]
    assert round(below[1], 3) == 0.352
    assert majority_correct(11, 0.5) == pytest.approx(0.5)


def test_the_error_of_an_average_is_that_of_the_members_less_their_spread() -> None:
    rng = np.random.default_rng(0)
    predictions, y = rng.normal(size=(7, 40)), rng.normal(size=40)
    found = ambiguity(predictions, y)
    assert found.ensemble == pytest.approx(found.members - found.spread, abs=1e-12)
    loops = np.mean([[(predictions[b, i] - y[i]) ** 2 for i in range(40)] for b in range(7)])
    assert found.members == pytest.approx(loops, abs=1e-12)


def test_a_bootstrap_sample_leaves_out_about_one_in_e() -> None:
    samples = bootstrap_samples(1000, n_models=200, seed=0)
    assert all(len(rows) == 1000 and rows.min() >= 0 and rows.max() < 1000 for rows in samples)
    left_out = [1 - len(np.unique(rows)) / 1000 for rows in samples]
    exact = (1 - 1 / 1000) ** 1000
    standard_error = np.std(left_out) / math.sqrt(200)
    assert abs(np.mean(left_out) - exact) < 4 * standard_error
    assert abs(exact - math.exp(-1)) < 1e-3


def test_models_of_a_bag_differ_by_their_rows_alone() -> None:
    X, y = load_iris(return_X_y=True)
    samples = bootstrap_samples(len(X), n_models=3, seed=0)
    fitted = bag(lambda _: DecisionTreeClassifier(random_state=0), X, y, samples=samples)
    for model, rows in zip(fitted.models, samples, strict=True):
        alone = DecisionTreeClassifier(random_state=0).fit(X[rows], y[rows])
        assert (model.predict(X) == alone.predict(X)).all()
    expected = sum(model.predict_proba(X) for model in fitted.models) / 3
    assert np.allclose(mean_proba(fitted.models, X), expected, rtol=0, atol=1e-15)


def test_out_of_bag_probabilities_come_from_models_that_have_not_seen_the_row() -> None:
    X, y = load_iris(return_X_y=True)
    fitted = bag(stump, X, y, samples=bootstrap_samples(len(X), n_models=5, seed=1))
    found = out_of_bag_proba(fitted, X)
    for i in range(len(X)):
        free = [m for m, rows in zip(*fitted, strict=True) if i not in rows]
        if free:
            expected = np.mean([m.predict_proba(X[i : i + 1])[0] for m in free], axis=0)
            assert np.allclose(found[i], expected, rtol=0, atol=1e-15)
        else:
            assert np.isnan(found[i]).all()
    seen_by_all = np.isnan(found).all(axis=1).mean()
    assert abs(seen_by_all - (1 - math.exp(-1)) ** 5) < 0.1


def test_exponential_loss_of_adaboost_is_its_bound_and_above_its_error() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    fitted = adaboost(stump, X, y, n_rounds=20)
    bound = np.cumprod(2 * np.sqrt(fitted.errors * (1 - fitted.errors)))
    sign = 2 * y - 1
    for m in (1, 5, 20):
        scores = boosted_scores(fitted, X, n_rounds=m)
        f = (scores[:, 1] - scores[:, 0]) / 2
        loss = np.exp(-sign * f).mean()
        assert loss == pytest.approx(bound[m - 1], rel=1e-10)
        assert (scores.argmax(axis=1) != y).mean() <= loss


def test_each_model_of_adaboost_is_at_chance_on_the_next_weights() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    fitted = adaboost(stump, X, y, n_rounds=6)
    weight = np.full(len(y), 1 / len(y))
    for model, vote, error in zip(fitted.models, fitted.votes, fitted.errors, strict=True):
        wrong = model.predict(X) != y
        assert weight[wrong].sum() == pytest.approx(error, abs=1e-12)
        weight = weight * np.where(wrong, (1 - error) / error, 1.0)
        weight /= weight.sum()
        assert weight[wrong].sum() == pytest.approx(0.5, abs=1e-12)
        assert vote == pytest.approx(math.log((1 - error) / error), abs=1e-12)


def test_adaboost_stops_at_a_perfect_model_and_before_one_at_chance() -> None:
    X, y = load_iris(return_X_y=True)
    perfect = adaboost(lambda _: DecisionTreeClassifier(random_state=0), X, y, n_rounds=5)
    assert (len(perfect.models), perfect.votes.tolist(), perfect.errors.tolist()) == (
        1,
        [1.0],
        [0.0],
    )

    def good_then_useless(m: int):
        return stump(m) if m == 0 else DummyClassifier(strategy="constant", constant=0)

    assert len(adaboost(good_then_useless, X, y, n_rounds=5).models) == 1
    with pytest.raises(ValueError, match=r"^the first model errs with weight 0\.66\d*: it must be"):
        adaboost(lambda _: DummyClassifier(strategy="constant", constant=0), X, y, n_rounds=2)


def test_one_deep_tree_with_rate_one_fits_the_residual_at_once() -> None:
    X, y = load_diabetes(return_X_y=True)
    fitted = gradient_boost(
        lambda _: DecisionTreeRegressor(random_state=0), X, y,
        residual=squared, start=float(y.mean()), learning_rate=1.0, n_rounds=1,
    )  # fmt: skip
    assert np.abs(boosted_values(fitted, X) - y).max() < 1e-9


def test_gradient_boosting_lowers_each_loss_in_every_round() -> None:
    X, y = load_diabetes(return_X_y=True)
    y = y - y.mean()
    losses = {
        "squared": (squared, lambda f: ((y - f) ** 2).mean() / 2),
        "huber": (
            lambda y, f: np.clip(y - f, -50, 50),
            lambda f: np.where(
                np.abs(y - f) < 50, (y - f) ** 2 / 2, 50 * np.abs(y - f) - 1250
            ).mean(),
        ),
    }
    for residual, loss in losses.values():
        fitted = gradient_boost(
            lambda _: DecisionTreeRegressor(max_depth=2, random_state=0), X, y,
            residual=residual, start=0.0, learning_rate=0.3, n_rounds=15,
        )  # fmt: skip
        path = [loss(boosted_values(fitted, X, n_rounds=m)) for m in range(16)]
        assert all(np.diff(path) < 0)


def test_out_of_fold_predictions_never_see_their_row() -> None:
    X, y = load_iris(return_X_y=True)
    y = np.random.default_rng(0).permutation(y)  # nothing to learn
    folds = KFold(5, shuffle=True, random_state=0)
    honest = out_of_fold_proba(
        lambda: DecisionTreeClassifier(random_state=0), X, y, folds=folds.split(X)
    )
    leaky = DecisionTreeClassifier(random_state=0).fit(X, y).predict_proba(X)
    assert (leaky.argmax(axis=1) == y).mean() > 0.9
    assert (honest.argmax(axis=1) == y).mean() < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: majority_correct(0, 0.5), r"^n is 0: n >= 1\.$"),
        (lambda: majority_correct(3, 1.5), r"^p is 1\.5: 0 <= p <= 1\.$"),
        (
            lambda: gradient_boost(
                stump, np.zeros((2, 1)), np.zeros(2),
                residual=squared, start=0.0, learning_rate=0.0, n_rounds=1,
            ),
            r"^learning_rate is 0\.0: learning_rate > 0\.$",
        ),
        (
            lambda: out_of_fold_proba(
                lambda: DecisionTreeClassifier(), np.zeros((4, 1)), np.array([0, 1, 0, 1]),
                folds=[(np.array([0, 1]), np.array([2]))],
            ),
            r"^row 0 is predicted by 0 folds: it must be one\.$",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
