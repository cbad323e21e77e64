"""Mutual information by hand, by scikit-learn and by bounds; codes that keep what tiles share."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from tests.closeness import assert_exact

from zhizhi.deep_learning.deep_infomax import (
    DeepInfoMax,
    QuadraticCritic,
    dv_bound,
    gaussian_log_ratio,
    gaussian_mi,
    infonce_bound,
    jsd_objective,
    linear_probe,
    mosaics,
    mutual_information,
    nwj_bound,
)
from zhizhi.deep_learning.digits import digits_split


def gaussian_pairs(
    n: int, *, rho: float, d: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return x, rho * x + math.sqrt(1 - rho**2) * e


@given(st.integers(0, 10_000))
def test_discrete_information_is_that_of_scikit_learn(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 20, (3, 4)) + np.eye(3, 4, dtype=int)
    joint = torch.from_numpy(counts / counts.sum())
    expected = mutual_info_score(None, None, contingency=counts)
    assert mutual_information(joint).item() == pytest.approx(expected, abs=1e-12)


def test_information_is_zero_when_independent_and_the_entropy_when_equal() -> None:
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert abs(mutual_information(p[:, None] * p).item()) < 1e-12
    assert_exact(mutual_information(p.diag()), -(p * p.log()).sum())


def test_information_of_gaussians_is_that_of_their_determinants() -> None:
    rho, d = 0.8, 3
    covariance = torch.eye(2 * d, dtype=torch.float64)
    covariance[:d, d:] = covariance[d:, :d] = rho * torch.eye(d, dtype=torch.float64)
    assert gaussian_mi(rho, d=d) == pytest.approx(-0.5 * covariance.logdet().item(), abs=1e-12)


def test_the_log_ratio_of_gaussians_is_that_of_their_densities() -> None:
    rho, d = 0.6, 2
    x, y = gaussian_pairs(4, rho=rho, d=d)
    covariance = torch.eye(2 * d, dtype=torch.float64)
    covariance[:d, d:] = covariance[d:, :d] = rho * torch.eye(d, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    joint = normal(torch.zeros(2 * d).double(), covariance)
    single = normal(torch.zeros(d).double(), torch.eye(d).double())
    expected = [
        [joint.log_prob(torch.cat([a, b])) - single.log_prob(a) - single.log_prob(b) for b in y]
        for a in x
    ]
    assert_exact(gaussian_log_ratio(x, y, rho=rho), torch.tensor(expected))


def by_loops(scores: torch.Tensor) -> dict[str, float]:
    """Return all four objectives by sums over pairs."""
    N = len(scores)
    t = scores.tolist()
    true = [t[i][i] for i in range(N)]
    others = [t[i][j] for i in range(N) for j in range(N) if i != j]

    def softplus(z: float) -> float:
        return math.log1p(math.exp(z))

    return {
        "dv": sum(true) / N - math.log(sum(map(math.exp, others)) / len(others)),
        "nwj": sum(true) / N - sum(math.exp(z - 1) for z in others) / len(others),
        "nce": sum(math.log(math.exp(t[i][i]) / (sum(map(math.exp, t[i])) / N)) for i in range(N))
        / N,
        "jsd": sum(-softplus(-z) for z in true) / N - sum(map(softplus, others)) / len(others),
    }


OBJECTIVES = {"dv": dv_bound, "nwj": nwj_bound, "nce": infonce_bound, "jsd": jsd_objective}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_is_what_loops_over_pairs_give(name: str) -> None:
    scores = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = OBJECTIVES[name](scores)
    assert_exact(found, [by_loops(s)[name] for s in scores])


def test_large_scores_do_not_overflow() -> None:
    scores = 1e4 * torch.eye(8)
    assert dv_bound(scores).item() == pytest.approx(1e4)
    assert infonce_bound(scores).item() == pytest.approx(math.log(8))
    assert jsd_objective(scores).isfinite()


def test_the_exact_critic_gives_the_information() -> None:
    rho, d = 0.8, 2
    true = gaussian_mi(rho, d=d)
    for bound, shift in ((dv_bound, 0.0), (nwj_bound, 1.0), (infonce_bound, 0.0)):
        found = torch.tensor([
            bound(gaussian_log_ratio(*gaussian_pairs(256, rho=rho, d=d, seed=s), rho=rho) + shift)
            for s in range(40)
        ])  # fmt: skip
        error = found.std() / math.sqrt(40)
        slack = 0.05 if bound is infonce_bound else 0.0  # it is a bound: below, and at most log N
        assert found.mean() < true + 4 * error
        assert found.mean() > true - 4 * error - slack


def test_infonce_cannot_say_more_than_log_n() -> None:
    scores = gaussian_log_ratio(*gaussian_pairs(64, rho=0.95, d=10), rho=0.95)
    assert gaussian_mi(0.95, d=10) > 2 * math.log(64)
    assert infonce_bound(scores) <= math.log(64)


def test_infonce_does_not_see_a_function_of_the_row_and_the_other_bounds_do() -> None:
    scores = gaussian_log_ratio(*gaussian_pairs(32, rho=0.5, d=2), rho=0.5)
    moved = scores + torch.randn(32, 1, generator=torch.Generator().manual_seed(1)).double() * 3
    assert_exact(infonce_bound(moved), infonce_bound(scores))
    assert dv_bound(moved) < dv_bound(scores) - 1


def test_jsd_at_its_best_is_twice_the_divergence_less_log_four() -> None:
    p = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    q = torch.full((2, 2), 0.25, dtype=torch.float64)
    ratio = (p / q).log()
    best = (p * -torch.nn.functional.softplus(-ratio)).sum()
    best = best - (q * torch.nn.functional.softplus(ratio)).sum()
    middle = (p + q) / 2
    divergence = 0.5 * ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum())
    assert_exact(best, 2 * divergence - math.log(4))


def test_a_quadratic_critic_scores_every_pair_and_can_be_the_log_ratio() -> None:
    rho, d = 0.7, 3
    critic = QuadraticCritic(d).double()
    x, y = gaussian_pairs(5, rho=rho, d=d)
    with torch.no_grad():
        scale = 1 / (2 * (1 - rho**2))
        eye = torch.eye(d, dtype=torch.float64)
        critic.a.copy_(-(rho**2) * scale * eye)
        critic.b.copy_(-(rho**2) * scale * eye)
        critic.w.copy_(2 * rho * scale * eye)
        critic.c.fill_(gaussian_mi(rho, d=d))
        assert_exact(critic(x, y), gaussian_log_ratio(x, y, rho=rho))


def test_tiles_of_a_mosaic_are_different_images_of_its_class() -> None:
    digits = digits_split()
    g = torch.Generator().manual_seed(0)
    found = mosaics(digits.x_train, digits.y_train, n=200, generator=g)
    assert found.tiles.shape == (200, 4, 64)
    for tiles, label in zip(found.tiles, found.label, strict=True):
        members = digits.x_train[digits.y_train == label]
        rows = [(members == tile).all(dim=1).nonzero()[0].item() for tile in tiles]
        assert len(set(rows)) == 4
    assert found.label.unique().tolist() == list(range(10))


def test_scores_are_those_of_one_code_and_one_tile_at_a_time() -> None:
    torch.manual_seed(0)
    net = DeepInfoMax(3, n_features=5)
    tiles = torch.randn(4, 4, 64)
    codes = net.encode(tiles)
    features = net.features(tiles)
    assert codes.shape == (4, 3)
    local, whole = net.local_scores(tiles), net.global_scores(tiles)
    for b in range(4):
        for c in range(4):
            asked = net.ask(codes[b])
            picture = net.answer_picture(features[c].flatten())
            torch.testing.assert_close(whole[b, c], asked @ picture)
            for m in range(4):
                torch.testing.assert_close(local[m, b, c], asked @ net.answer_tile(features[c, m]))


def test_the_probe_is_logistic_regression_on_standardised_features() -> None:
    digits = digits_split()
    mean, std = digits.x_train.mean(dim=0), digits.x_train.std(dim=0).clamp_min(1e-6)
    model = LogisticRegression(max_iter=2000).fit((digits.x_train - mean) / std, digits.y_train)
    expected = model.score((digits.x_test - mean) / std, digits.y_test)
    assert linear_probe(*digits[:2], *digits[2:]) == pytest.approx(expected)
    assert expected > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mutual_information(torch.full((2, 2), 0.5)),
            r"^joint sums to 2\.0: probabilities sum to 1\.$",
        ),
        (lambda: gaussian_mi(1.0, d=2), r"^rho is 1\.0: -1 < rho < 1\.$"),
        (
            lambda: dv_bound(torch.zeros(3, 4)),
            r"^scores are 3 by 4: a square of at least 2, true pairs on its diagonal\.$",
        ),
        (
            lambda: mosaics(torch.zeros(5, 64), torch.tensor([0, 0, 0, 0, 1]), n=1),
            r"^class 1 has 1 images: four make a mosaic\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
