import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from tests.closeness import assert_exact
from torch import nn

from zhizhi.deep_learning.adamw import (
    SGD,
    Adam,
    AdamW,
    adam_l2_step,
    adam_step,
    adamw_step,
    decay_groups,
)

RULES = [adam_step, adam_l2_step, adamw_step]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def iterate(rule, theta, grad, *, n_steps, lr, **kwargs):
    """Run a step function; lr may be a schedule of t, grad is a function of theta."""
    m = v = torch.zeros_like(theta)
    for t in range(1, n_steps + 1):
        rate = lr(t) if callable(lr) else lr
        theta, m, v = rule(theta, grad(theta), m, v, t=t, lr=rate, **kwargs)
    return theta


@pytest.fixture
def least_squares():
    """A regression of 60 rows whose solution has entries of very different size."""
    A = normal(60, 5)
    b = A @ torch.tensor([2.0, -1.5, 1.0, 0.5, -0.2]).double() + 0.3 * normal(60, seed=1)
    return A, b, lambda theta: A.T @ (A @ theta - b) / 60


def fade(t):
    return 0.05 * (1 - (t - 1) / 3000)


# One step


@pytest.mark.parametrize("n_steps", [1, 10, 300])
def test_adam_step_equals_the_five_lines_in_python_floats(n_steps):
    theta, m, v, by_hand = 1.5, 0.0, 0.0, []
    for t in range(1, n_steps + 1):
        g = math.cos(t) + theta
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        theta -= 0.05 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-3)
        by_hand.append(theta)

    theta_t, m_t, v_t = torch.tensor([1.5]).double(), *torch.zeros(2, 1).double()
    for t in range(1, n_steps + 1):
        theta_t, m_t, v_t = adam_step(
            theta_t, math.cos(t) + theta_t, m_t, v_t, t=t, lr=0.05, betas=(0.9, 0.99), eps=1e-3
        )
        assert_exact(theta_t, [by_hand[t - 1]])


def test_the_first_step_is_lr_times_the_sign_of_the_gradient():
    g, zero = torch.tensor([1e-4, -3.0, 1e6]).double(), torch.zeros(3).double()
    step = adam_step(zero, g, zero, zero, t=1, lr=0.1, eps=0.0)
    assert_exact(step.theta, -0.1 * g.sign())


def test_under_a_constant_gradient_every_step_has_length_lr():
    g = torch.tensor([0.02, -7.0]).double()
    walked = iterate(adam_step, torch.zeros(2).double(), lambda _: g, n_steps=50, lr=0.1, eps=0.0)
    assert_exact(walked, -0.1 * 50 * g.sign())


def test_bias_correction_makes_the_moments_of_white_gradients_unbiased():
    n, t = 20_000, 7
    zero = torch.zeros(n).double()
    m = v = zero
    g = 0.5 + normal(t, n)
    for i in range(t):
        _, m, v = adam_step(zero, g[i], m, v, t=i + 1)
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    assert abs(m_hat.mean() - 0.5) < 4 * m_hat.std() / n**0.5
    assert abs(v_hat.mean() - 1.25) < 4 * v_hat.std() / n**0.5


def test_l2_is_adam_on_the_gradient_of_the_penalised_loss():
    theta = normal(4).requires_grad_()
    loss = (theta**3).sum() / 3 + 0.5 * 0.3 * theta.square().sum()
    (g,) = torch.autograd.grad(loss, theta)
    theta, m, v = theta.detach(), normal(4, seed=1), normal(4, seed=2).abs()
    penalised = adam_step(theta, g, m, v, t=3, lr=0.1)
    ours = adam_l2_step(theta, theta**2, m, v, t=3, lr=0.1, weight_decay=0.3)
    for a, b in zip(ours, penalised, strict=True):
        assert_exact(a, b)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), t=st.integers(1, 500), lr=st.floats(0, 0.5), lam=st.floats(0, 2.0)
)
def test_adamw_is_adam_minus_lr_lambda_theta_and_keeps_adams_moments(seed, t, lr, lam):
    theta, g, m, v = normal(4, 6, seed=seed)
    adam = adam_step(theta, g, m, v.abs(), t=t, lr=lr)
    adamw = adamw_step(theta, g, m, v.abs(), t=t, lr=lr, weight_decay=lam)
    assert_exact(adamw.theta - adam.theta, -lr * lam * theta)
    assert torch.equal(adamw.m, adam.m)
    assert torch.equal(adamw.v, adam.v)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_leaves_its_inputs_and_keeps_the_dtype(rule):
    before = [x.float().abs() for x in normal(4, 3)]
    given_ = [x.clone() for x in before]
    after = rule(*given_, t=2)
    assert all(torch.equal(a, b) for a, b in zip(given_, before, strict=True))
    assert {x.dtype for x in after} == {torch.float32}


@pytest.mark.parametrize("rule", [adam_l2_step, adamw_step])
def test_without_decay_both_rules_are_adam(rule):
    theta, g, m, v = normal(4, 3).abs()
    expected = adam_step(theta, g, m, v, t=4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(rule(theta, g, m, v, t=4, weight_decay=0.0), expected, strict=True)
    )


def test_paper_algorithm_2_is_ours_with_lambda_divided_by_alpha():
    alpha, lam_paper = 0.01, 0.002
    eta = [0.5 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    theta_paper = normal(3)
    m = v = torch.zeros(3).double()

    def grad(theta):
        return theta**3 - 1

    ours = iterate(
        adamw_step,
        theta_paper,
        grad,
        n_steps=40,
        lr=lambda t: eta[t - 1] * alpha,
        weight_decay=lam_paper / alpha,
    )
    for t in range(1, 41):
        g = grad(theta_paper)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        theta_paper = theta_paper - eta[t - 1] * (alpha * direction + lam_paper * theta_paper)
    assert_exact(ours, theta_paper)


# What the decay does


def test_with_no_gradient_adamw_shrinks_geometrically():
    for lam in (0.01, 0.1, 10.0):
        left = iterate(
            adamw_step,
            torch.ones(1).double(),
            torch.zeros_like,
            n_steps=100,
            lr=0.01,
            weight_decay=lam,
        )
        assert_exact(left, [(1 - 0.01 * lam) ** 100])


def test_with_no_gradient_l2_shrinks_the_same_whatever_lambda():
    left = [
        iterate(
            adam_l2_step,
            torch.ones(1).double(),
            torch.zeros_like,
            n_steps=100,
            lr=0.01,
            weight_decay=lam,
            eps=0.0,
        )
        for lam in (1e-3, 0.1, 10.0)
    ]
    assert_exact(torch.cat(left), left[0].expand(3))
    assert 0.2 < left[0].item() < 0.25


def test_l2_decay_under_noise_is_divided_by_the_noise_and_adamw_decay_is_not():
    sigma = torch.tensor([[10.0], [30.0], [100.0]]).double()
    generator = torch.Generator().manual_seed(0)

    def noise(theta):
        draw = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        return sigma * draw

    start = torch.ones(3, 1000).double()
    for rule, rate in ((adam_l2_step, 1 / sigma), (adamw_step, torch.ones_like(sigma))):
        left = iterate(rule, start, noise, n_steps=1000, lr=1e-3, weight_decay=1.0)
        expected = torch.exp(-rate[:, 0])
        # One step of size lr has variance lr^2 and neighbours correlate by beta_1: at most
        # lr sqrt(n (1 + beta_1) / (1 - beta_1)) after n steps; the start adds a few steps of lr.
        bound = 4 * 1e-3 * (1000 * 19) ** 0.5 / 1000**0.5 + 0.01
        assert (left.mean(dim=1) - expected).abs().max() < bound


@pytest.mark.parametrize("rule", [adam_step, adamw_step])
def test_scaling_the_loss_changes_nothing_when_eps_is_zero(rule, least_squares):
    grad = least_squares[2]
    ends = [
        iterate(
            rule,
            torch.ones(5).double(),
            lambda theta, c=c: c * grad(theta),
            n_steps=100,
            lr=0.01,
            eps=0.0,
        )
        for c in (1e-3, 1.0, 1e3)
    ]
    assert_exact(ends[0], ends[1])
    assert_exact(ends[2], ends[1])


def test_scaling_the_loss_by_c_divides_the_l2_decay_by_c(least_squares):
    grad = least_squares[2]
    scaled, weakened = (
        iterate(
            adam_l2_step,
            torch.ones(5).double(),
            lambda theta, c=c: c * grad(theta),
            n_steps=100,
            lr=0.01,
            eps=0.0,
            weight_decay=lam,
        )
        for c, lam in ((100.0, 0.1), (1.0, 0.001))
    )
    assert_exact(scaled, weakened)


# Where it converges


def test_adam_with_l2_converges_to_ridge_regression(least_squares):
    A, b, grad = least_squares
    end = iterate(
        adam_l2_step,
        torch.zeros(5).double(),
        grad,
        n_steps=3000,
        lr=fade,
        betas=(0.9, 0.9),
        weight_decay=0.3,
    )
    ridge = torch.linalg.solve(A.T @ A / 60 + 0.3 * torch.eye(5).double(), A.T @ b / 60)
    assert (end - ridge).abs().max() < 1e-4  # the last steps are lr / 3000 = 2e-5 long


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.0, 4.0])
def test_adamw_converges_to_least_squares_in_a_box_of_one_over_lambda(lam, least_squares):
    A, b, grad = least_squares
    end = iterate(
        adamw_step,
        torch.zeros(5).double(),
        grad,
        n_steps=3000,
        lr=fade,
        betas=(0.9, 0.9),
        weight_decay=lam,
    )
    box = lsq_linear(A.numpy(), b.numpy(), bounds=(-1 / lam, 1 / lam), tol=1e-12).x
    assert (end - torch.from_numpy(box)).abs().max() < 1e-3


def test_the_fixed_point_at_a_large_eps_balances_decay_and_normalised_gradient(least_squares):
    grad = least_squares[2]
    end = iterate(
        adamw_step,
        torch.zeros(5).double(),
        grad,
        n_steps=3000,
        lr=fade,
        betas=(0.9, 0.9),
        weight_decay=1.0,
        eps=0.1,
    )
    g = grad(end)
    assert_exact(1.0 * end, -g / (g.abs() + 0.1))


# Optimizers


def trained(make, *, n_steps, weight_decay):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    x, y = normal(20, 4, seed=9), normal(20, 2, seed=10)
    optimizer = make(model.parameters(), lr=0.02, weight_decay=weight_decay)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def decoupled_adam(params, **kwargs):
    return torch.optim.Adam(params, decoupled_weight_decay=True, **kwargs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD, torch.optim.SGD),
        (Adam, torch.optim.Adam),
        (AdamW, torch.optim.AdamW),
        (AdamW, decoupled_adam),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("n_steps", [1, 10, 300])
def test_optimizers_equal_those_of_torch(ours, theirs, weight_decay, n_steps):
    expected = trained(theirs, n_steps=n_steps, weight_decay=weight_decay)
    assert_exact(trained(ours, n_steps=n_steps, weight_decay=weight_decay), expected)


@pytest.mark.parametrize(("ours", "theirs"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_defaults_equal_those_of_torch(ours, theirs):
    w = nn.Parameter(torch.zeros(1))
    defaults = ours([w]).defaults
    assert {k: theirs([w]).defaults[k] for k in defaults} == defaults


def test_sgd_with_l2_is_sgd_after_multiplying_by_one_minus_lr_lambda():
    w = nn.Parameter(normal(3))
    before, w.grad = w.detach().clone(), normal(3, seed=1)
    SGD([w], lr=0.1, weight_decay=0.5).step()
    assert_exact(w.detach(), (1 - 0.1 * 0.5) * before - 0.1 * w.grad)


def test_each_group_uses_its_own_settings():
    decays, stays = nn.Parameter(torch.ones(1).double()), nn.Parameter(torch.ones(1).double())
    groups = [{"params": [decays]}, {"params": [stays], "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.1, weight_decay=0.5)
    decays.grad, stays.grad = torch.zeros(2, 1).double()
    optimizer.step()
    assert_exact(torch.cat([decays, stays]).detach(), [0.95, 1.0])


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_a_parameter_without_a_gradient_is_left_alone(make):
    w = nn.Parameter(torch.ones(1))
    make([w], lr=0.1, weight_decay=0.5).step()
    assert w.item() == 1


def test_a_resumed_optimizer_goes_on_where_it_stopped():
    w = nn.Parameter(normal(3))
    w.grad = normal(3, seed=1)
    optimizer = AdamW([w], lr=0.1)
    optimizer.step()
    copy = nn.Parameter(w.detach().clone())
    copy.grad = w.grad.clone()
    resumed = AdamW([copy], lr=0.3)
    resumed.load_state_dict(optimizer.state_dict())
    optimizer.step()
    resumed.step()
    assert torch.equal(w, copy)


def test_step_evaluates_the_closure_with_gradients_and_returns_it():
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = SGD([w], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert w.item() == 0.0


def test_only_matrices_decay_shared_ones_once_and_frozen_ones_not_at_all():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
            "conv": nn.Conv1d(4, 4, 3),
            "head": nn.Linear(4, 7, bias=False),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    model["head"].weight = model["embed"].weight
    decayed, kept = decay_groups(model, weight_decay=0.1)
    assert [p.shape for p in decayed["params"]] == [(7, 4), (4, 4, 3)]
    assert [p.shape for p in kept["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


# Refusals


def test_step_zero_is_refused():
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^t is 0: steps are counted from t = 1\.$"):
        adam_step(zero, zero, zero, zero, t=0)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_negative_setting_is_refused(make, name):
    with pytest.raises(ValueError, match=rf"^{name} is -0\.5: {name} >= 0\.$"):
        make([nn.Parameter(torch.zeros(1))], **{name: -0.5})


def test_a_negative_eps_and_a_bad_group_are_refused():
    w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"^eps is -1\.0: eps >= 0\.$"):
        Adam([w], eps=-1.0)
    with pytest.raises(ValueError, match=r"^weight_decay is -0\.1: weight_decay >= 0\.$"):
        AdamW([{"params": [w], "weight_decay": -0.1}])


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_a_beta_outside_zero_one_is_refused(betas):
    a, b = (str(x).replace(".", r"\.") for x in betas)
    message = rf"^betas are \({a}, {b}\): 0 <= beta < 1 for both\.$"
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(1))], betas=betas)
