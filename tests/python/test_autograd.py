"""The engine against torch, against sums over paths, and against what it must refuse."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.closeness import assert_exact

from zhizhi.python.autograd import (
    Function,
    Tensor,
    adjoints,
    no_grad,
    record,
    toposort,
    unbroadcast,
)


def draw(*shape: int, seed: int = 0, low: float = 0.5) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(low, 2.0, shape))


# Each is a function text that torch and the engine both read; shapes broadcast in most of them.
EXPRESSIONS = {
    "add": (lambda a, b: a + b, (2, 3), (3,)),
    "add_constant": (lambda a: 2.0 + a + 1.0, (2, 3)),
    "sub": (lambda a, b: a - b, (2, 1), (1, 3)),
    "sub_from_constant": (lambda a: 1.0 - a, (3,)),
    "mul": (lambda a, b: a * b, (4, 2, 3), (2, 1)),
    "div": (lambda a, b: a / b, (2, 3), ()),
    "div_constant": (lambda a: 3.0 / a / 2.0, (2, 3)),
    "neg": (lambda a: -a, (3,)),
    "pow": (lambda a: a**3.0 + a**-0.5, (2, 3)),
    "matmul": (lambda a, b: a @ b, (2, 3), (3, 4)),
    "stacked_matmul": (lambda a, b: a @ b, (5, 1, 2, 3), (4, 3, 2)),
    "exp": (lambda a: a.exp(), (2, 3)),
    "log": (lambda a: a.log(), (2, 3)),
    "tanh": (lambda a: a.tanh(), (2, 3)),
    "relu": (lambda a: (a - 1.2).relu(), (2, 3)),
    "sum": (lambda a: a.sum() * a, (2, 3)),
    "sum_axis": (lambda a: a.sum(-1) * a.sum(0).sum(), (2, 3)),
    "sum_keepdims": (lambda a: a / a.sum(1, keepdims=True), (2, 3)),
    "mean": (lambda a: a.mean() * a, (2, 3)),
    "mean_axis": (lambda a: (a - a.mean(0, keepdims=True)) ** 2.0, (2, 3)),
    "reshape": (lambda a, b: a.reshape(3, 2) @ b, (2, 3), (2, 2)),
    "broadcast": (lambda a, b: a.broadcast_to(4, 2, 3) * b, (2, 1), (4, 1, 3)),
    "net": (
        lambda x, W, b, V: ((x @ W + b).tanh() @ V).exp().mean(0).log() + x.relu().sum(),
        (5, 3),
        (3, 4),
        (4,),
        (4, 2),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_value_and_vector_jacobian_products_equal_those_of_torch(name):
    fn, *shapes = EXPRESSIONS[name]
    arrays = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    out, expected = fn(*ours), fn(*theirs)
    assert_exact(out.data, expected.detach())
    v = draw(*out.shape, seed=9, low=-1.0)
    out.backward(v)
    expected.backward(torch.tensor(v))
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert a.grad.shape == a.shape
        assert_exact(a.grad, b.grad)


def test_the_expression_in_the_readme_of_micrograd_has_its_printed_value_and_gradients():
    a, b = Tensor(-4.0, requires_grad=True), Tensor(2.0, requires_grad=True)
    c = a + b
    d = a * b + b**3
    c = c + c + 1
    c = c + 1 + c + (-a)
    d = d + d * 2 + (b + a).relu()
    d = d + 3 * d + (b - a).relu()
    e = c - d
    f = e**2
    g = f / 2.0
    g = g + 10.0 / f
    g.backward()
    printed = [f"{float(x):.4f}" for x in (g.data, a.grad, b.grad)]
    assert printed == ["24.7041", "138.8338", "645.5773"]


def test_a_node_used_by_two_results_receives_the_sum_over_both_paths():
    x = Tensor(3.0, requires_grad=True)
    y = x * x
    (y * y + y).backward()
    assert_exact(x.grad, 4 * 3.0**3 + 2 * 3.0)


def test_each_node_is_visited_once_though_the_number_of_paths_doubles_with_each_step():
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(200):  # 2^200 paths
        y = y + y
    y.backward()
    assert_exact(x.grad, 2.0**200)


def test_toposort_lists_every_input_before_its_results():
    x, w = Tensor(draw(2, 3), requires_grad=True), Tensor(draw(3, 2), requires_grad=True)
    h = (x @ w).tanh()
    order = toposort((h * h + h).sum() / h.sum())
    place = {t: i for i, t in enumerate(order)}
    assert len(place) == len(order)
    for tensor in order:
        for parent in tensor.node.inputs if tensor.node else ():
            assert not parent.requires_grad or place[parent] < place[tensor]


def test_a_chain_longer_than_the_stack_of_python_is_differentiated():
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(5000):
        y = y * 1.0
    y.backward()
    assert x.grad == 1.0


def test_the_graph_follows_the_loop_that_ran():
    x = Tensor([0.5, 0.25], requires_grad=True)
    y, n = x * 2, 1
    while float((y.data**2).sum()) < 1e4:
        y, n = y * 2, n + 1
    y.backward(np.array([1.0, 10.0]))
    assert_exact(x.grad, np.array([2.0**n, 10 * 2.0**n]))


def test_a_second_backward_adds_and_leaves_share_no_memory():
    x, y = Tensor([1.0, 2.0], requires_grad=True), Tensor([1.0, 2.0], requires_grad=True)
    total = (x + y).sum()
    total.backward()
    x.grad *= 5
    assert_exact(y.grad, np.ones(2))
    total.backward()
    assert_exact(y.grad, 2 * np.ones(2))


def test_only_leaves_and_those_that_ask_keep_a_gradient():
    x, c = Tensor(2.0, requires_grad=True), Tensor(5.0)
    kept, dropped = x * c, x * 3.0
    kept.retains_grad = True
    (kept * dropped).backward()
    assert dropped.grad is None
    assert c.grad is None
    assert_exact(kept.grad, 6.0)


def test_adjoints_include_the_results_in_between():
    x = Tensor(2.0, requires_grad=True)
    y = x * x
    bars = adjoints(y.exp())
    assert_exact(bars[y], np.exp(4.0))
    assert_exact(bars[x], 4 * np.exp(4.0))


@given(st.data())
def test_unbroadcast_is_the_adjoint_of_broadcasting(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    full = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2))) + tuple(
        data.draw(st.integers(1, 3)) if s == 1 else s for s in shape
    )
    x, v = draw(*shape), draw(*full, seed=1)
    back = unbroadcast(v, shape)
    assert back.shape == shape
    assert_exact((np.broadcast_to(x, full) * v).sum(), (x * back).sum())


def test_softmax_ce_has_the_gradient_p_minus_y():
    logits, labels = draw(4, 3), np.array([0, 2, 1, 2])
    x = Tensor(logits, requires_grad=True)
    loss = x.softmax_ce(labels)
    loss.backward(np.asarray(2.0))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert_exact(loss.data, -np.log(p[np.arange(4), labels]).mean())
    assert_exact(x.grad, 2 * (p - np.eye(3)[labels]) / 4)


def test_softmax_ce_of_large_logits_is_finite_and_exact():
    x = Tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    loss = x.softmax_ce(np.array([0, 0]))
    loss.backward()
    assert_exact(loss.data, 500.0)
    assert_exact(x.grad, np.array([[0.0, 0.0], [-0.5, 0.5]]))


def test_relu_has_derivative_zero_at_zero():
    x = Tensor([-1.0, 0.0, 1.0], requires_grad=True)
    x.relu().sum().backward()
    assert_exact(x.grad, np.array([0.0, 0.0, 1.0]))


def test_no_grad_records_nothing_and_ends_even_by_an_error():
    x = Tensor(2.0, requires_grad=True)

    def fail_inside_no_grad() -> None:
        with no_grad():
            with no_grad():
                pass
            assert not (x * x).requires_grad
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside_no_grad()
    assert (x * x).requires_grad


def test_detach_cuts_the_history_and_shares_the_array():
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x.detach()
    y.data[0] = 5.0
    assert x.data[0] == 5.0
    assert not y.requires_grad
    (x * y).sum().backward()
    assert_exact(x.grad, np.array([5.0, 2.0]))


def test_the_dtype_of_the_tensor_is_kept_and_integers_become_float64():
    x = Tensor(np.ones((2, 2), np.float32), requires_grad=True)
    loss = ((2.0 * x + np.ones(2)) / 3 @ np.ones((2, 2)) - 1).tanh().mean()
    loss.backward()
    assert loss.data.dtype == np.float32
    assert x.grad is not None
    assert x.grad.dtype == np.float32
    assert Tensor([1, 2]).data.dtype == np.float64


def test_an_array_on_the_left_hands_the_operation_to_the_tensor():
    x, a = Tensor(draw(2, 2), requires_grad=True), draw(2, 2, seed=1)
    assert isinstance(a * x, Tensor)
    (a @ x).sum().backward()
    assert_exact(x.grad, a.T @ np.ones((2, 2)))


class Cube(Function):
    def forward(self, x, unused, *, scale):
        self.x, self.scale = x, scale
        return scale * x**3

    def backward(self, grad):
        return 3 * self.scale * self.x**2 * grad, None


def test_a_function_may_take_settings_and_return_no_gradient():
    x, unused = Tensor([1.0, 2.0], requires_grad=True), Tensor(1.0, requires_grad=True)
    y = Cube.apply(x, unused, scale=2.0)
    assert repr(y) == "Tensor([ 2., 16.], node=Cube)"
    y.sum().backward()
    assert_exact(x.grad, np.array([6.0, 24.0]))
    assert unused.grad is None


def test_a_function_without_rules_is_refused():
    with pytest.raises(NotImplementedError):
        Function.apply(Tensor(1.0))
    with pytest.raises(NotImplementedError):
        Function().backward(np.ones(1))


def test_record_keeps_the_node_only_if_an_input_requires_a_gradient():
    x, c = Tensor(1.0, requires_grad=True), Tensor(1.0)
    assert record("id", x.data, (x, c), lambda g: (g, g)).node.inputs == (x, c)
    assert record("id", c.data, (c,), lambda g: (g,)).node is None


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: Tensor([1.0, 2.0], requires_grad=True).backward(),
            "the root has shape (2,): give grad unless it has one element.",
        ),
        (
            lambda: (Tensor([1.0, 2.0], requires_grad=True) * 2).backward(np.ones(3)),
            "grad has shape (3,) and the root (2,): they must agree.",
        ),
        (
            lambda: Tensor(1.0).backward(),
            "the root has no history: an input must have requires_grad=True.",
        ),
        (
            lambda: unbroadcast(np.ones((2, 3)), (2,)),
            "grad has shape (2, 3): (2,) must broadcast to it.",
        ),
        (
            lambda: unbroadcast(np.ones(3), (1, 3)),
            "grad has shape (3,): (1, 3) must broadcast to it.",
        ),
        (
            lambda: Tensor(np.ones(3)) @ Tensor(np.ones((3, 2))),
            "shapes (3,) and (3, 2): matmul needs at least two axes each.",
        ),
        (
            lambda: Tensor(np.ones((3, 2))).softmax_ce(np.array([0, 1])),
            "2 labels for logits (3, 2): one label a row.",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(attempt, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attempt()
