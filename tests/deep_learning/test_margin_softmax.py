"""Margins: the angles by hand, the loss by loops, the geometry on the circle."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve
from tests.closeness import assert_exact, assert_float32

from zhizhi.deep_learning.margin_softmax import (
    a_softmax_loss,
    add_angle_margin,
    add_cosine_margin,
    angle,
    arcface_loss,
    cosface_loss,
    cosine_logits,
    l_softmax_loss,
    normalized_softmax_loss,
    pair_scores,
    psi,
    scale_lower_bound,
    tar_at_far,
    with_target,
)

N, C, D = 7, 5, 3


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features, class weights of unequal lengths, and targets, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(N, D, generator=g, dtype=torch.float64)
    w = torch.randn(C, D, generator=g, dtype=torch.float64)
    return x, w, torch.randint(0, C, (N,), generator=g)


def angle_of(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the angle between two vectors, from the lengths of their sum and difference."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2((a - b).norm().item(), (a + b).norm().item())


def loss_by_loops(x, w, target, score, own):
    """Return the losses when class j scores `score(i, j)` and the target `own(i)`."""
    losses = []
    for i, y in enumerate(target.tolist()):
        logits = [own(i) if j == y else score(i, j) for j in range(C)]
        losses.append(math.log(sum(math.exp(z) for z in logits)) - logits[y])
    return torch.tensor(losses, dtype=torch.float64)


def psi_by_pieces(theta: float, m: int) -> float:
    for k in range(m):
        if k * math.pi / m <= theta <= (k + 1) * math.pi / m:
            return (-1) ** k * math.cos(m * theta) - 2 * k
    raise AssertionError(theta)


def test_cosines_are_those_of_the_angles_between_features_and_weights() -> None:
    x, w, _ = draw()
    expected = [[math.cos(angle_of(a, b)) for b in w] for a in x]
    assert_exact(cosine_logits(x, w), expected)
    assert_exact(cosine_logits(x, w, scale=16.0), 16 * torch.tensor(expected, dtype=torch.float64))


def test_lengths_of_features_and_weights_do_not_matter_to_cosines() -> None:
    x, w, _ = draw()
    lengths = torch.tensor([0.1, 5.0, 2.0, 1.0, 7.0], dtype=torch.float64)[:, None]
    assert_exact(cosine_logits(3 * x, lengths * w), cosine_logits(x, w))


@pytest.mark.parametrize("cosine", [-1.0, 1.0, 1.0 + 1e-6])
def test_the_slope_of_an_angle_is_finite_at_the_ends(cosine: float) -> None:
    x = torch.tensor([cosine], requires_grad=True)
    angle(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_psi_is_the_function_of_its_pieces(m: int) -> None:
    theta = torch.linspace(0, math.pi, 101, dtype=torch.float64)
    assert_exact(psi(theta, m=m), [psi_by_pieces(t, m) for t in theta.tolist()])


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
def test_psi_is_continuous_and_falls_from_one_to_one_less_two_m(m: int) -> None:
    theta = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    values = psi(theta, m=m)
    assert (values.diff() <= 1e-12).all()
    assert values.diff().abs().max() < 1.01 * m * math.pi / 4000
    assert_exact(values[[0, -1]], [1, 1 - 2 * m])
    assert (psi(theta, m=m) <= theta.cos() + 1e-12).all()  # never above the plain cosine
    for k in range(1, m):  # both branches meet at the knots
        knot = torch.tensor([k * math.pi / m - 1e-9, k * math.pi / m + 1e-9], dtype=torch.float64)
        assert (psi(knot, m=m) + (2 * k - 1)).abs().max() < 1e-7


def test_psi_with_a_margin_of_one_is_the_cosine() -> None:
    theta = torch.linspace(0, math.pi, 50, dtype=torch.float64)
    assert_exact(psi(theta, m=1), theta.cos())


def test_the_slope_of_psi_is_that_of_its_piece() -> None:
    theta = torch.linspace(0.05, 3.1, 40, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(psi(theta, m=4).sum(), theta)
    assert_exact(grad, -4 * (4 * theta.detach()).sin().abs())


@pytest.mark.parametrize("m", [0.0, 0.2, 0.5, 1.0, math.pi / 2])
def test_an_angle_margin_falls_all_the_way_and_never_raises_the_target(m: float) -> None:
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    value = add_angle_margin(theta.cos(), m=m)
    assert (value.diff() <= 1e-9).all()
    assert (value <= theta.cos() + 1e-6).all()
    early = theta <= math.pi - m
    assert (value - (theta + m).cos())[early].abs().max() < 1e-3 * m + 1e-6


def test_beyond_pi_less_m_the_target_goes_on_with_the_cosine() -> None:
    cosine = torch.tensor([math.cos(3.0)], dtype=torch.float64)
    assert_exact(add_angle_margin(cosine, m=0.5), cosine - 0.5 * math.sin(0.5))
    assert math.cos(3.0 + 0.5) > math.cos(3.1)  # where cos(theta + m) rises again


def test_a_cosine_margin_is_subtracted() -> None:
    cosine = torch.tensor([0.5, -1.0], dtype=torch.float64)
    assert_exact(add_cosine_margin(cosine, m=0.35), [0.15, -1.35])


def test_every_loss_is_what_loops_over_angles_give() -> None:
    x, w, target = draw()
    theta = [[angle_of(a, b) for b in w] for a in x]
    long, heavy = x.norm(dim=1).tolist(), w.norm(dim=1).tolist()
    y = target.tolist()

    def check(actual, score, own):
        torch.testing.assert_close(
            actual, loss_by_loops(x, w, target, score, own), rtol=1e-9, atol=1e-9
        )

    check(
        normalized_softmax_loss(x, w, target, scale=4.0),
        lambda i, j: 4 * math.cos(theta[i][j]),
        lambda i: 4 * math.cos(theta[i][y[i]]),
    )
    check(
        cosface_loss(x, w, target, scale=4.0, m=0.35),
        lambda i, j: 4 * math.cos(theta[i][j]),
        lambda i: 4 * (math.cos(theta[i][y[i]]) - 0.35),
    )
    check(
        arcface_loss(x, w, target, scale=4.0, m=0.3),
        lambda i, j: 4 * math.cos(theta[i][j]),
        lambda i: (
            4 * math.cos(theta[i][y[i]] + 0.3)
            if theta[i][y[i]] <= math.pi - 0.3
            else 4 * (math.cos(theta[i][y[i]]) - 0.3 * math.sin(0.3))
        ),
    )
    check(
        a_softmax_loss(x, w, target, m=3, lam=2.0),
        lambda i, j: long[i] * math.cos(theta[i][j]),
        lambda i: long[i] * (2 * math.cos(theta[i][y[i]]) + psi_by_pieces(theta[i][y[i]], 3)) / 3,
    )
    check(
        l_softmax_loss(x, w, target, m=2),
        lambda i, j: long[i] * heavy[j] * math.cos(theta[i][j]),
        lambda i: long[i] * heavy[y[i]] * psi_by_pieces(theta[i][y[i]], 2),
    )


def test_without_a_margin_all_losses_are_the_plain_ones() -> None:
    x, w, target = draw()
    unit = F.normalize(w, dim=1)
    plain = F.cross_entropy(x @ w.T, target, reduction="none")
    modified = F.cross_entropy(x @ unit.T, target, reduction="none")
    cosine = F.cross_entropy(8 * F.normalize(x, dim=1) @ unit.T, target, reduction="none")
    assert_exact(l_softmax_loss(x, w, target, m=1), plain)
    assert_exact(a_softmax_loss(x, w, target, m=1), modified)
    assert_exact(normalized_softmax_loss(x, w, target, scale=8.0), cosine)
    assert_exact(cosface_loss(x, w, target, scale=8.0, m=0.0), cosine)
    assert_exact(arcface_loss(x, w, target, scale=8.0, m=0.0), cosine)


def test_a_large_lambda_turns_the_margin_off() -> None:
    x, w, target = draw()
    assert_float32(a_softmax_loss(x, w, target, m=4, lam=1e9), a_softmax_loss(x, w, target, m=1))


def test_a_margin_makes_every_loss_larger() -> None:
    x, w, target = draw()
    assert (a_softmax_loss(x, w, target, m=2) > a_softmax_loss(x, w, target, m=1)).all()
    assert (
        cosface_loss(x, w, target, scale=8.0, m=0.2)
        > normalized_softmax_loss(x, w, target, scale=8.0)
    ).all()
    assert (
        arcface_loss(x, w, target, scale=8.0, m=0.2)
        > normalized_softmax_loss(x, w, target, scale=8.0)
    ).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, w, y: normalized_softmax_loss(x, w, y, scale=4.0),
        lambda x, w, y: l_softmax_loss(x, w, y, m=3),
        lambda x, w, y: a_softmax_loss(x, w, y, m=4, lam=5.0),
        lambda x, w, y: cosface_loss(x, w, y, scale=4.0, m=0.35),
        lambda x, w, y: arcface_loss(x, w, y, scale=4.0, m=0.5),
    ],
)
def test_gradients_agree_with_finite_differences(loss) -> None:
    x, w, target = draw(1)
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, b, target), (x.requires_grad_(), w.requires_grad_())
    )


def test_only_the_target_gets_another_value() -> None:
    logits = torch.arange(6.0).reshape(2, 3)
    out = with_target(logits, torch.tensor([2, 0]), torch.tensor([-1.0, -2.0]))
    assert out.tolist() == [[0, 1, -1], [-2, 4, 5]]
    assert logits.tolist() == [[0, 1, 2], [3, 4, 5]]


def region(theta_12: float, m: float, first: bool) -> torch.Tensor:
    """Return the places of a circle that one of two classes owns with a margin, by trying them."""
    place = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)[:-1]

    def distance(a: float) -> torch.Tensor:
        gap = (place - a).abs() % (2 * math.pi)
        return torch.minimum(gap, 2 * math.pi - gap)

    to_first, to_second = distance(0.0), distance(theta_12)
    return place[m * to_first < to_second] if first else place[m * to_second < to_first]


def widest_and_nearest(theta_12: float, m: float) -> tuple[float, float]:
    """Return the widest angle within the first class, and the least between the two."""

    def gaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        gap = (a[:, None] - b[None, :]).abs()
        return torch.minimum(gap, 2 * math.pi - gap)

    first, second = region(theta_12, m, True)[::23], region(theta_12, m, False)[::23]
    return gaps(first, first).max().item(), gaps(first, second).min().item()


@pytest.mark.slow
def test_within_is_nearer_than_between_from_two_plus_root_three_on() -> None:
    angles = [0.05 * math.pi * k for k in range(1, 21)]
    enough = 2 + math.sqrt(3)
    for theta_12 in angles:
        within, between = widest_and_nearest(theta_12, enough + 0.1)
        assert within < between
    assert any(
        within > between
        for within, between in (widest_and_nearest(t, enough - 0.2) for t in angles)
    )


def test_the_scale_is_just_enough_on_a_regular_simplex() -> None:
    for n_classes, p in ((2, 0.9), (10, 0.99), (1000, 0.5)):
        s = scale_lower_bound(n_classes, p)
        others = -1 / (n_classes - 1)
        reached = 1 / (1 + (n_classes - 1) * math.exp(s * (others - 1)))
        assert reached == pytest.approx(p, abs=1e-12)
    assert scale_lower_bound(1000, 0.99) == pytest.approx(11.49, abs=0.005)
    assert scale_lower_bound(85_742, 0.99) == pytest.approx(15.95, abs=0.005)


def test_no_arrangement_of_centres_does_with_less() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        w = torch.randn(6, 4, generator=g, dtype=torch.float64)
        s = scale_lower_bound(6, 0.9)
        p = cosine_logits(w, w, scale=s * 0.999).softmax(dim=1).diagonal()
        assert p.min() < 0.9


def test_pairs_are_all_pairs_once() -> None:
    x, _, _ = draw()
    label = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    score, same = pair_scores(x, label)
    expected = [
        (F.cosine_similarity(x[i], x[j], dim=0).item(), bool(label[i] == label[j]))
        for i in range(N)
        for j in range(i + 1, N)
    ]
    assert_exact(score, [s for s, _ in expected])
    assert same.tolist() == [t for _, t in expected]


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.01, 0.1, 0.37, 1.0]))
def test_accept_rates_are_those_of_scikit_learn(seed: int, far: float) -> None:
    g = torch.Generator().manual_seed(seed)
    same = torch.rand(200, generator=g) < 0.3
    score = torch.randn(200, generator=g) + same
    fpr, tpr, _ = roc_curve(same.numpy(), score.numpy(), drop_intermediate=False)
    expected = max(t for f, t in zip(fpr, tpr, strict=True) if f <= far + 1e-12)
    assert tar_at_far(score, same, far=far) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psi(torch.zeros(1), m=0), r"^m is 0: m >= 1\.$"),
        (
            lambda: add_angle_margin(torch.zeros(1), m=28.6),
            r"^m is 28\.6: 0 <= m <= pi / 2, in radians\.$",
        ),
        (lambda: scale_lower_bound(1, 0.9), r"^n_classes is 1: n_classes >= 2\.$"),
        (lambda: scale_lower_bound(10, 0.1), r"^p is 0\.1: 1/10 < p < 1\.$"),
        (
            lambda: tar_at_far(torch.zeros(2), torch.tensor([True, False]), far=1.5),
            r"^far is 1\.5: 0 <= far <= 1\.$",
        ),
        (
            lambda: tar_at_far(torch.zeros(2), torch.tensor([True, True]), far=0.5),
            r"^2 of 2 pairs are true: there must be both\.$",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
