"""The ensembles against scikit-learn's, to the last digit."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    GradientBoostingRegressor,
    StackingClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from zhizhi.deep_learning.ensemble_learning import (
    adaboost,
    bag,
    boosted_scores,
    boosted_values,
    gradient_boost,
    mean_proba,
    out_of_bag_proba,
    out_of_fold_proba,
)

pytestmark = pytest.mark.parity


def test_bagging() -> None:
    X, y = load_digits(return_X_y=True)
    theirs = BaggingClassifier(
        DecisionTreeClassifier(), n_estimators=40, oob_score=True, random_state=0
    ).fit(X, y)

    def make(b: int) -> DecisionTreeClassifier:
        return DecisionTreeClassifier(random_state=theirs.estimators_[b].random_state)

    ours = bag(make, X, y, samples=theirs.estimators_samples_)
    assert np.abs(mean_proba(ours.models, X) - theirs.predict_proba(X)).max() < 1e-12
    oob, expected = out_of_bag_proba(ours, X), theirs.oob_decision_function_
    assert np.abs(oob - expected).max() < 1e-12


@pytest.mark.parametrize("load", [load_breast_cancer, load_iris])
def test_adaboost(load) -> None:
    X, y = load(return_X_y=True)
    theirs = AdaBoostClassifier(
        DecisionTreeClassifier(max_depth=1), n_estimators=20, random_state=0
    ).fit(X, y)

    def make(m: int) -> DecisionTreeClassifier:
        return DecisionTreeClassifier(max_depth=1, random_state=theirs.estimators_[m].random_state)

    ours = adaboost(make, X, y, n_rounds=len(theirs.estimators_))
    assert np.abs(ours.votes - theirs.estimator_weights_[: len(ours.votes)]).max() < 1e-9
    assert np.abs(ours.errors - theirs.estimator_errors_[: len(ours.errors)]).max() < 1e-12
    predicted = ours.classes[boosted_scores(ours, X).argmax(axis=1)]
    assert (predicted == theirs.predict(X)).all()


def test_gradient_boosting() -> None:
    X, y = load_diabetes(return_X_y=True)
    theirs = GradientBoostingRegressor(
        n_estimators=60, learning_rate=0.1, max_depth=3, random_state=0
    ).fit(X, y)
    shared = np.random.RandomState(0)  # one generator through all trees, as there

    def make(_: int) -> DecisionTreeRegressor:
        return DecisionTreeRegressor(max_depth=3, random_state=shared)

    ours = gradient_boost(
        make, X, y, residual=lambda y, f: y - f, start=float(y.mean()),
        learning_rate=0.1, n_rounds=60,
    )  # fmt: skip
    assert np.abs(boosted_values(ours, X) - theirs.predict(X)).max() < 1e-9


def test_stacking() -> None:
    X, y = load_iris(return_X_y=True)
    bases = {"nb": GaussianNB(), "knn": KNeighborsClassifier(3)}
    folds = StratifiedKFold(5)
    columns = []
    for model in bases.values():
        found = out_of_fold_proba(
            lambda model=model: model.__class__(**model.get_params()), X, y,
            folds=folds.split(X, y),
        )  # fmt: skip
        expected = cross_val_predict(model, X, y, cv=folds, method="predict_proba")
        assert np.abs(found - expected).max() < 1e-15
        columns.append(found)
    final = LogisticRegression(max_iter=1000).fit(np.hstack(columns), y)
    theirs = StackingClassifier(
        list(bases.items()), LogisticRegression(max_iter=1000), cv=folds,
        stack_method="predict_proba",
    ).fit(X, y)  # fmt: skip
    assert np.abs(final.coef_ - theirs.final_estimator_.coef_).max() < 1e-9
