"""Ensembles of models that fit and predict: bagging, boosting, gradient boosting, stacking."""

from collections.abc import Callable, Iterable, Sequence
from math import comb, log
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Model = Any
"""A scikit-learn estimator: `fit(X, y)`, `predict(X)`, for some `predict_proba` and weights."""


def majority_correct(n: int, p: float) -> float:
    r"""Return the probability that most of n independent voters are right.

    $$
    P_n = \sum_{k > n/2} \binom{n}{k} p^k (1 - p)^{n - k}
    $$

    Args:
        n: Number of voters; a tie counts as wrong.
        p: Probability that one of them is right.

    Raises:
        ValueError: If there is no voter or p is not a probability.

    Example:
        >>> round(majority_correct(3, 0.7), 3)
        0.784

    Reference:
        Condorcet (1785), Essai sur l'application de l'analyse.
    """
    if n < 1:
        raise ValueError(f"n is {n}: n >= 1.")
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}: 0 <= p <= 1.")
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))


class Ambiguity(NamedTuple):
    """Mean squared errors: of the average, the average of them, and how far the models differ."""

    ensemble: float
    members: float
    spread: float


def ambiguity(predictions: Float[np.ndarray, "B N"], y: Float[np.ndarray, " N"]) -> Ambiguity:
    r"""Split the squared error of an average of models.

    $$
    (\bar f - y)^2 = \frac1B \sum_b (f_b - y)^2 - \frac1B \sum_b (f_b - \bar f)^2
    $$

    Args:
        predictions: What B models say of N points.
        y: The truth.

    Returns:
        The three terms, averaged over the points; the first is the second less the third.

    Reference:
        Krogh & Vedelsby (1995), Neural Network Ensembles, Cross Validation, and Active Learning.
    """
    mean = predictions.mean(axis=0)
    return Ambiguity(
        float(((mean - y) ** 2).mean()),
        float(((predictions - y) ** 2).mean()),
        float(((predictions - mean) ** 2).mean()),
    )


def bootstrap_samples(n: int, *, n_models: int, seed: int) -> list[Int[np.ndarray, " N"]]:
    r"""Draw n of n rows with replacement, once for each model.

    Args:
        n: Number of rows.
        n_models: Number of samples.
        seed: Seed of the draws.

    Returns:
        Row numbers; each sample leaves out about 1/e of the rows.
    """
    rng = np.random.default_rng(seed)
    return [rng.integers(0, n, n) for _ in range(n_models)]


class Bag(NamedTuple):
    """Models and the rows that each of them has seen."""

    models: list[Model]
    samples: list[Int[np.ndarray, " N"]]


def bag(
    make_model: Callable[[int], Model],
    X: Float[np.ndarray, "N D"],
    y: Shaped[np.ndarray, " N"],
    *,
    samples: Sequence[Int[np.ndarray, " N"]],
) -> Bag:
    r"""Fit a model to each sample of the rows.

    Args:
        make_model: Returns the unfitted model of a number.
        X: Features.
        y: Labels or numbers to predict.
        samples: Row numbers, such as `bootstrap_samples` draws.

    Reference:
        Breiman (1996), Bagging Predictors.
    """
    models = [make_model(b).fit(X[rows], y[rows]) for b, rows in enumerate(samples)]
    return Bag(models, list(samples))


def mean_proba(models: Iterable[Model], X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N K"]:
    r"""Average the class probabilities of models.

    Args:
        models: Fitted models that know the same classes.
        X: Features.
    """
    return np.mean([model.predict_proba(X) for model in models], axis=0)


def out_of_bag_proba(fitted: Bag, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N K"]:
    r"""Average, for each training row, the probabilities of the models that have not seen it.

    Args:
        fitted: A bag.
        X: The features that it was fitted to.

    Returns:
        Probabilities; NaN for a row that every model has seen.
    """
    total = np.zeros((len(X), len(fitted.models[0].classes_)))
    count = np.zeros((len(X), 1))
    for model, rows in zip(fitted.models, fitted.samples, strict=True):
        unseen = np.ones(len(X), dtype=bool)
        unseen[rows] = False
        total[unseen] += model.predict_proba(X[unseen])
        count[unseen] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


class Boosted(NamedTuple):
    """What AdaBoost found: models with their votes and the weighted error of each, K classes."""

    models: list[Model]
    votes: Float[np.ndarray, " M"]
    errors: Float[np.ndarray, " M"]
    classes: Shaped[np.ndarray, " K"]


def adaboost(
    make_model: Callable[[int], Model],
    X: Float[np.ndarray, "N D"],
    y: Shaped[np.ndarray, " N"],
    *,
    n_rounds: int,
) -> Boosted:
    r"""Fit models one after another, each to the rows that those before it got wrong.

    $$
    \alpha_m = \log\frac{1 - \epsilon_m}{\epsilon_m} + \log(K - 1), \qquad
        D_{m+1}(i) \propto D_m(i)\, e^{\alpha_m [h_m(x_i) \ne y_i]}
    $$

    It stops early at a model without an error, which gets the vote 1, and before a model that is no
    better than chance.

    Args:
        make_model: Returns the unfitted model of a round; its `fit` takes `sample_weight`.
        X: Features.
        y: Labels of K classes.
        n_rounds: Rounds at most.

    Raises:
        ValueError: If the first model is no better than chance.

    Reference:
        Freund & Schapire (1997); Zhu et al. (2009), Multi-class AdaBoost, Algorithm 2 (SAMME).
    """
    classes = np.unique(y)
    chance = 1 - 1 / len(classes)
    weight = np.full(len(y), 1 / len(y))
    models: list[Model] = []
    votes: list[float] = []
    errors: list[float] = []
    for m in range(n_rounds):
        model = make_model(m).fit(X, y, sample_weight=weight)
        wrong = model.predict(X) != y
        error = float(weight[wrong].sum())
        if error >= chance:
            if not models:
                raise ValueError(
                    f"the first model errs with weight {error}: it must be < {chance}."
                )
            break
        models.append(model)
        errors.append(error)
        if error == 0:
            votes.append(1.0)
            break
        votes.append(log((1 - error) / error) + log(len(classes) - 1))  # (eq:ensemble-vote)
        weight = weight * np.exp(votes[-1] * wrong)  # (eq:ensemble-reweight)
        weight = weight / weight.sum()
    return Boosted(models, np.array(votes), np.array(errors), classes)


def boosted_scores(
    fitted: Boosted, X: Float[np.ndarray, "N D"], *, n_rounds: int | None = None
) -> Float[np.ndarray, "N K"]:
    r"""Add up the votes for each class.

    Args:
        fitted: What `adaboost` found.
        X: Features.
        n_rounds: How many of its models vote; None for all.

    Returns:
        The predicted class is the column of the largest.
    """
    scores = np.zeros((len(X), len(fitted.classes)))
    voters = zip(fitted.models, fitted.votes, strict=True)
    for model, vote in list(voters)[:n_rounds]:
        scores += vote * (model.predict(X)[:, None] == fitted.classes)
    return scores


class GradientBoosted(NamedTuple):
    """A constant, and the models that were added to it with a learning rate."""

    start: float
    models: list[Model]
    learning_rate: float


def gradient_boost(
    make_model: Callable[[int], Model],
    X: Float[np.ndarray, "N D"],
    y: Float[np.ndarray, " N"],
    *,
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray],
    start: float,
    learning_rate: float,
    n_rounds: int,
) -> GradientBoosted:
    r"""Descend in the space of functions: each model is fitted to the negative gradient.

    $$
    f_m = f_{m-1} + \nu h_m, \qquad h_m \approx -\frac{\partial L}{\partial f}\Big|_{f_{m-1}}
    $$

    Args:
        make_model: Returns the unfitted regressor of a round.
        X: Features.
        y: What is to be predicted.
        residual: Returns -dL/df of each row from y and f; y - f for half the squared error.
        start: The constant f_0.
        learning_rate: The step nu.
        n_rounds: Number of models.

    Raises:
        ValueError: If the learning rate is not positive.

    Reference:
        Friedman (2001), Greedy Function Approximation, Algorithm 1, without its line search.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}: learning_rate > 0.")
    f = np.full(len(y), start)
    models: list[Model] = []
    for m in range(n_rounds):
        models.append(make_model(m).fit(X, residual(y, f)))  # (eq:ensemble-gradient)
        f = f + learning_rate * models[-1].predict(X)
    return GradientBoosted(start, models, learning_rate)


def boosted_values(
    fitted: GradientBoosted, X: Float[np.ndarray, "N D"], *, n_rounds: int | None = None
) -> Float[np.ndarray, " N"]:
    r"""Return the sum of the models.

    Args:
        fitted: What `gradient_boost` found.
        X: Features.
        n_rounds: How many of its models count; None for all.
    """
    f = np.full(len(X), fitted.start)
    for model in fitted.models[:n_rounds]:
        f = f + fitted.learning_rate * model.predict(X)
    return f


def out_of_fold_proba(
    make_model: Callable[[], Model],
    X: Float[np.ndarray, "N D"],
    y: Shaped[np.ndarray, " N"],
    *,
    folds: Iterable[tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"]]],
) -> Float[np.ndarray, "N K"]:
    r"""Predict each row by a model that has not seen it: the features of a stack.

    Args:
        make_model: Returns an unfitted model.
        X: Features.
        y: Labels; every class is in every training part.
        folds: Pairs of rows to fit to and rows to predict, as a splitter of scikit-learn gives.

    Raises:
        ValueError: If some row is predicted by no fold, or by two.

    Reference:
        Wolpert (1992), Stacked Generalization.
    """
    proba = np.full((len(X), len(np.unique(y))), np.nan)
    times = np.zeros(len(X), dtype=int)
    for fit_rows, held_out in folds:
        proba[held_out] = make_model().fit(X[fit_rows], y[fit_rows]).predict_proba(X[held_out])
        times[held_out] += 1
    odd: Bool[np.ndarray, " N"] = times != 1
    if odd.any():
        row = int(odd.argmax())
        raise ValueError(f"row {row} is predicted by {times[row]} folds: it must be one.")
    return proba
